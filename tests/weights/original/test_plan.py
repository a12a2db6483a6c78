"""Full-size files by names and shapes only: nothing is left over, and the published numbers of parameters come out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.weights.original.names import (
    STATE_DICT_NAMES,
    VISION_NAMES,
    Kind,
    recognise,
    to_original,
    to_ours,
    why_ignored,
)
from minigpt4.weights.original.plan import Plan, Source, expected_shapes, plan_import
from minigpt4.weights.original.sizes import read_overrides
from tests.weights.original import original_files as files
from tests.weights.original.original_files import PUBLISHED, PUBLISHED_13B, SMALL, Listed, Shapes, Sizes

# As published; the fused bias here has a zero third that the original does not store.
VISION_224 = 985_894_528
VISION_448 = 986_975_872
KEY_BIASES = 39 * 1408
VISION_NORM = 2_816
QFORMER = 105_137_664 + 24_576
LLAMA_7B = 6_738_415_616
LLAMA_13B = 13_015_864_320
SMALL_HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]


def sources(sizes: Sizes, *, with_qformer: bool = True, **changed: Shapes) -> list[Source]:
    """The files of a model in the order in which the original loads them; `changed` replaces one's content."""
    contents = {
        "vision": (Kind.VISION, files.vision(sizes)),
        "qformer": (Kind.QFORMER, files.qformer(sizes)),
        "language": (Kind.LANGUAGE_MODEL, files.llama(sizes)),
        "checkpoint": (Kind.CHECKPOINT, files.checkpoint(sizes, with_qformer)),
    }
    if not with_qformer:
        del contents["qformer"]
    return [
        Source(kind, Path(f"{name}.pth"), Listed(changed.get(name, shapes)))
        for name, (kind, shapes) in contents.items()
    ]


def plan(sizes: Sizes, *overrides: str, with_qformer: bool = True, **changed: Shapes) -> Plan:
    chosen = [*(SMALL_HEADS if sizes is SMALL and with_qformer else SMALL_HEADS[: sizes is SMALL]), *overrides]
    return plan_import(
        sources(sizes, with_qformer=with_qformer, **changed), files.text_config(sizes), read_overrides(chosen)
    )


@pytest.mark.parametrize(
    ("sizes", "with_qformer", "parameters"),
    [
        pytest.param(PUBLISHED, True, QFORMER + 3_149_824 + LLAMA_7B, id="7B"),
        pytest.param(PUBLISHED_13B, True, QFORMER + 3_937_280 + LLAMA_13B, id="13B"),
        pytest.param(PUBLISHED, False, 23_072_768 + LLAMA_7B, id="Llama-2"),
    ],
)  # fmt: skip
def test_published_files_make_the_published_number_of_parameters_and_leave_nothing_over(
    sizes: Sizes, with_qformer: bool, parameters: int
) -> None:
    made = plan(sizes, with_qformer=with_qformer)
    assert made.num_parameters == VISION_224 + KEY_BIASES + VISION_NORM + parameters
    every = [(source.path, name) for source in sources(sizes, with_qformer=with_qformer)
             for name in source.tensors.names()]  # fmt: skip
    ignored = [(path, name) for path, name, _ in made.ignored]
    used = [(part.source.path, part.name) for parts in made.parts.values() for part in parts]
    assert sorted(ignored + used) == sorted(every)
    # Block 39 and what is behind it, two lists of frequencies, BLIP-2's projection and two lists of positions.
    assert len(ignored) == 17 + 2 * sizes.text_layers + 4 * with_qformer
    assert not [note for note in made.notes if "heads" in note]
    vision, language = made.config.vision_config, made.config.text_config
    assert (vision.num_hidden_layers, vision.num_attention_heads, vision.image_size) == (39, 16, 224)
    assert (vision.layer_norm_eps, made.config.post_layernorm_eps, language.rms_norm_eps) == (1e-6, 1e-5, 1e-6)
    assert made.config.num_image_tokens == (32 if with_qformer else 64)
    if with_qformer:
        queries = made.config.qformer_config
        assert (queries.num_attention_heads, queries.cross_attention_frequency) == (12, 2)
        assert (queries.layer_norm_eps, queries.use_qformer_text_input) == (1e-12, False)


def test_second_versions_configuration_has_the_published_number_of_parameters() -> None:
    config = MiniGPT4Config(
        vision_config={"image_size": 448},
        qformer_config=None,
        text_config={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    )
    counted = files.count(expected_shapes(config))
    assert counted == VISION_448 + KEY_BIASES + VISION_NORM + 23_072_768 + LLAMA_7B
    lora = {name: shape for name, shape in files.second_version(PUBLISHED).items() if ".lora_" in name}
    assert files.count(lora) == 33_554_432


def test_every_tensor_of_a_second_versions_checkpoint_has_a_name_here() -> None:
    for name in files.second_version(PUBLISHED):
        assert why_ignored(Kind.MINIGPT_V2, name) or to_ours(Kind.MINIGPT_V2, name), name


def test_names_lead_to_the_original_and_back() -> None:
    placed = 0
    for kind, pairs, shapes in (
        (Kind.VISION, VISION_NAMES, files.vision(SMALL)),
        (Kind.QFORMER, STATE_DICT_NAMES, files.qformer(SMALL)),
        (Kind.CHECKPOINT, STATE_DICT_NAMES, files.vision(SMALL, "visual_encoder.", head=False)),
        (Kind.CHECKPOINT, STATE_DICT_NAMES, files.checkpoint(SMALL)),
    ):
        for name in shapes:
            target = to_ours(kind, name)
            if target is None:
                assert why_ignored(kind, name), name
                continue
            placed += 1
            assert (name, target.third) in to_original(pairs, target.name), name
    assert placed > 200


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (files.vision(SMALL), Kind.VISION),
        (files.qformer(SMALL, text_side=True), Kind.QFORMER),
        (files.llama(SMALL), Kind.LANGUAGE_MODEL),
        (files.checkpoint(SMALL), Kind.CHECKPOINT),
        (files.vision(SMALL, "visual_encoder.") | files.qformer(SMALL) | files.checkpoint(SMALL), Kind.CHECKPOINT),
        (files.second_version(SMALL), Kind.MINIGPT_V2),
        ({"layers.0.attention.wq.weight": (4, 4), "tok_embeddings.weight": (8, 4)}, Kind.META),
        ({"weight": (4, 4)}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_file_is_recognised_by_its_names(shapes: Shapes, kind: Kind | None) -> None:
    assert recognise(set(shapes)) is kind


def test_forerunner_that_reads_text_loses_its_text_side_only() -> None:
    made = plan(SMALL, qformer=files.qformer(SMALL, text_side=True))
    assert made.shapes == plan(SMALL).shapes
    reasons = {name: reason for _, name, reason in made.ignored}
    assert "words" in reasons["Qformer.bert.encoder.layer.0.intermediate.dense.weight"]
    assert "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight" not in reasons


def test_sizes_come_from_the_shapes() -> None:
    made = plan(SMALL)
    vision, queries, text = made.config.vision_config, made.config.qformer_config, made.config.text_config
    assert (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers) == (24, 40, 3)
    assert (vision.patch_size, vision.image_size, made.config.num_query_tokens) == (4, 12, 3)
    assert (queries.hidden_size, queries.intermediate_size, queries.num_hidden_layers) == (16, 20, 4)
    assert (queries.encoder_hidden_size, text.hidden_size, text.vocab_size) == (24, 12, 380)


@pytest.mark.parametrize(("crossing", "frequency"), [((0, 2), 2), ((0, 3), 3), ((0, 1, 2, 3), 1), ((0,), 4)])
def test_cross_attention_is_where_the_file_has_it(crossing: tuple[int, ...], frequency: int) -> None:
    whole = files.qformer(SMALL)
    cross = {name.replace("layer.0.", ""): s for name, s in whole.items() if "layer.0.crossattention" in name}
    shapes = {name: shape for name, shape in whole.items() if "crossattention" not in name}
    for layer in crossing:
        shapes |= {name.replace("encoder.", f"encoder.layer.{layer}."): shape for name, shape in cross.items()}
    assert plan(SMALL, qformer=shapes).config.qformer_config.cross_attention_frequency == frequency


def test_vocabulary_of_an_early_vicuna_is_taken_from_its_tensors_and_said() -> None:
    made = plan(SMALL, language=files.llama(replace(SMALL, vocabulary=381)))
    assert made.config.text_config.vocab_size == 381
    assert any("380 words" in note and "381 rows" in note for note in made.notes)


def test_settings_that_shapes_cannot_tell_are_the_published_ones_unless_set() -> None:
    overrides = [
        "vision_config.layer_norm_eps=1e-5", "qformer_config.layer_norm_eps=1e-6", "post_layernorm_eps=1e-6",
        "vision_config.image_size=20",
    ]  # fmt: skip
    made = plan(SMALL, *overrides)
    assert made.config.vision_config.layer_norm_eps == 1e-5
    assert made.config.qformer_config.layer_norm_eps == 1e-6
    assert made.config.post_layernorm_eps == 1e-6
    assert made.shapes["model.vision_model.embeddings.position_embedding"] == (1, 26, 24)
    assert any("from 3x3 to 5x5" in note for note in made.notes)


def test_heads_of_the_published_size_are_taken_for_another_width_and_said() -> None:
    wide = replace(SMALL, vision_width=176, qformer_width=192)
    made = plan_import(sources(wide), files.text_config(wide), {})
    assert (made.config.vision_config.num_attention_heads, made.config.qformer_config.num_attention_heads) == (2, 3)
    said = "\n".join(note for note in made.notes if "heads" in note)
    assert "vision_config: the width is 176, not the published 1408; 2 heads of 88 numbers" in said
    assert "qformer_config: the width is 192, not the published 768; 3 heads of 64 numbers" in said
    given = read_overrides(["qformer_config.num_attention_heads=4", "vision_config.num_attention_heads=4"])
    made = plan_import(sources(wide), files.text_config(wide), given)
    assert (made.config.vision_config.num_attention_heads, made.config.qformer_config.num_attention_heads) == (4, 4)
    assert not [note for note in made.notes if "heads" in note]


@pytest.mark.parametrize(
    ("vision", "qformer", "said", "section", "part"),
    [
        (32, 16, [], "vision_config", "vision encoder has cannot be told: it is 32 wide, which the published 88"),
        (32, 16, SMALL_HEADS[1:], "vision_config", "vision encoder has cannot be told"),
        (32, 24, SMALL_HEADS[:1], "qformer_config", "Q-Former has cannot be told: it is 24 wide"),
        (1408, 24, [], "qformer_config", "Q-Former has cannot be told"),
    ],
)  # fmt: skip
def test_heads_that_no_rule_tells_are_refused_and_never_guessed(
    vision: int, qformer: int, said: list[str], section: str, part: str
) -> None:
    """32 wide with the published 16 heads has the right shapes and the wrong numbers."""
    sizes = replace(SMALL, vision_width=vision, qformer_width=qformer)
    with pytest.raises(ConfigError, match=f"how many heads the {part}") as told:
        plan_import(sources(sizes), files.text_config(sizes), read_overrides(said))
    assert f"--set {section}.num_attention_heads=N" in told.value.hint


def test_language_model_whose_configuration_does_not_say_its_heads_is_refused_or_has_the_published_size() -> None:
    small = {key: value for key, value in files.text_config(SMALL).items() if key != "num_attention_heads"}
    with pytest.raises(ConfigError, match="heads the language model has cannot be told: it is 12 wide") as told:
        plan_import(sources(SMALL), small, read_overrides(SMALL_HEADS))
    assert "--set text_config.num_attention_heads=N" in told.value.hint
    made = plan_import(sources(SMALL), small, read_overrides([*SMALL_HEADS, "text_config.num_attention_heads=3"]))
    assert made.config.text_config.num_attention_heads == 3
    large = {key: value for key, value in files.text_config(PUBLISHED_13B).items() if key != "num_attention_heads"}
    made = plan_import(sources(PUBLISHED_13B), large, {})
    assert made.config.text_config.num_attention_heads == 40  # the library's own default is 32
    assert any("config.json does not say its heads; 40 heads" in note for note in made.notes)


def test_parts_that_do_not_fit_are_told_before_heads_that_are_not_known() -> None:
    with pytest.raises(WeightsError, match="the projection in checkpoint"):
        plan_import(sources(SMALL, checkpoint=files.checkpoint(replace(SMALL, text_width=20))),
                    files.text_config(SMALL), {})  # fmt: skip


def test_checkpoint_that_holds_more_than_the_projection_replaces_what_the_other_files_hold() -> None:
    trained = files.checkpoint(SMALL) | {"query_tokens": (1, 3, 16), "ln_vision.weight": (24,)}
    made = plan(SMALL, checkpoint=trained)
    assert made.parts["model.query_tokens"][0].source.kind is Kind.CHECKPOINT
    assert made.parts["model.vision_model.post_layernorm.weight"][0].source.kind is Kind.CHECKPOINT
    assert made.parts["model.vision_model.post_layernorm.bias"][0].source.kind is Kind.QFORMER


def test_model_without_a_qformer_has_the_originals_new_norm() -> None:
    made = plan(SMALL, with_qformer=False)
    assert made.config.qformer_config is None
    assert made.config.num_image_tokens == 2
    assert "model.vision_model.post_layernorm.weight" not in made.parts
    assert any("norm after the vision encoder" in note for note in made.notes)


def test_qformer_that_is_given_to_a_model_without_one_is_left_out_and_said() -> None:
    made = plan(SMALL, checkpoint=files.checkpoint(SMALL, with_qformer=False))
    assert made.config.qformer_config is None
    assert "model.vision_model.post_layernorm.weight" not in made.parts
    assert any("left out" in note for note in made.notes)
    assert any(name == "query_tokens" for _, name, _ in made.ignored)


Change = Callable[[dict[str, Shapes]], Any]


@pytest.mark.parametrize(
    ("which", "change", "message", "hint"),
    [
        pytest.param(
            "vision", lambda shapes: shapes.pop("blocks.1.norm2.bias"), "vision.pth has no tensor blocks.1.norm2.bias",
            "incomplete", id="a tensor missing",
        ),
        pytest.param(
            "vision", lambda shapes: shapes.pop("blocks.2.attn.v_bias"),
            "vision.pth has no tensor blocks.2.attn.v_bias", "incomplete", id="half of a bias missing",
        ),
        pytest.param(
            "qformer", lambda shapes: shapes.pop("Qformer.bert.encoder.layer.1.output_query.dense.weight"),
            "qformer.pth has no tensor Qformer.bert.encoder.layer.1.output_query.dense.weight", "incomplete",
            id="a Q-Former's tensor missing",
        ),
        pytest.param(
            "language", lambda shapes: shapes.pop("lm_head.weight"), "language.pth has no tensor lm_head.weight",
            "incomplete", id="the head missing",
        ),
        pytest.param(
            "checkpoint", lambda shapes: shapes.pop("llama_proj.bias"), "checkpoint.pth has no tensor llama_proj.bias",
            "incomplete", id="the projection's bias missing",
        ),
        pytest.param(
            "vision", lambda shapes: shapes.update({"blocks.0.gamma_1": (24,)}),
            "tensor blocks.0.gamma_1 in vision.pth has no place in a vision encoder", "another model's",
            id="a tensor too many",
        ),
        pytest.param(
            "checkpoint", lambda shapes: shapes.update({"adapter.weight": (2, 2)}),
            "tensor adapter.weight in checkpoint.pth has no place in a MiniGPT-4 checkpoint", "another model's",
            id="a trained tensor too many",
        ),
        pytest.param(
            "language", lambda shapes: shapes.update({"model.layers.0.self_attn.q_norm.weight": (6,)}),
            "tensor model.layers.0.self_attn.q_norm.weight in language.pth has no place in a language model",
            "another model's", id="another kind of language model",
        ),
        pytest.param(
            "vision", lambda shapes: shapes.update({"blocks.1.mlp.fc2.weight": (40, 24)}),
            "tensor blocks.1.mlp.fc2.weight in vision.pth is (40, 24), expected (24, 40)", "damaged",
            id="a shape that does not fit",
        ),
        pytest.param(
            "language", lambda shapes: [shapes.pop(name) for name in list(shapes) if "layers.1." in name],
            "config.json says 2 layers, its files hold 1", "a file is missing", id="a shard missing",
        ),
        pytest.param(
            "vision", lambda shapes: shapes.update({"pos_embed": (1, 9, 24)}), "the table of positions has 8 places",
            "", id="no square of patches",
        ),
    ],
)  # fmt: skip
def test_file_that_does_not_hold_what_it_should_is_refused_by_name(
    which: str, change: Callable[[Shapes], Any], message: str, hint: str
) -> None:
    shapes = {"vision": files.vision, "qformer": files.qformer, "language": files.llama,
              "checkpoint": files.checkpoint}[which](SMALL)  # fmt: skip
    change(shapes)
    with pytest.raises(WeightsError) as error:
        plan(SMALL, **{which: shapes})
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("sizes", "checkpoint", "message", "hint"),
    [
        pytest.param(
            PUBLISHED, files.checkpoint(PUBLISHED_13B),
            "makes 5120 numbers a token for Vicuna 13B, the language model in language.pth reads 4096",
            "(Vicuna 7B) is prerained_minigpt4_7b.pth", id="13B on 7B",
        ),
        pytest.param(
            PUBLISHED_13B, files.checkpoint(PUBLISHED),
            "makes 4096 numbers a token for Vicuna 7B, the language model in language.pth reads 5120",
            "(Vicuna 13B) is pretrained_minigpt4.pth", id="7B on 13B",
        ),
        pytest.param(
            PUBLISHED_13B, files.checkpoint(PUBLISHED, with_qformer=False),
            "makes 4096 numbers a token for Llama-2-chat 7B", "trained with this language model", id="Llama-2 on 13B",
        ),
        pytest.param(
            PUBLISHED, {"llama_proj.weight": (4096, 1024), "llama_proj.bias": (4096,)},
            "reads 1024 numbers a token; the Q-Former gives 768, and without it the vision encoder gives 5632",
            "(Vicuna 7B) is prerained_minigpt4_7b.pth", id="another Q-Former",
        ),
    ],
)  # fmt: skip
def test_projection_of_another_model_is_refused_with_both_sizes_and_what_would_fit(
    sizes: Sizes, checkpoint: Shapes, message: str, hint: str
) -> None:
    with pytest.raises(WeightsError) as error:
        plan(sizes, checkpoint=checkpoint)
    assert message in error.value.message
    assert hint in error.value.hint


def test_qformer_of_another_vision_encoder_is_refused_with_both_sizes() -> None:
    with pytest.raises(WeightsError, match=r"Q-Former in qformer.pth reads 40 numbers a token, .* gives 24"):
        plan(SMALL, qformer=files.qformer(replace(SMALL, vision_width=40)))


def test_projection_that_needs_a_qformer_asks_for_one() -> None:
    without = [source for source in sources(SMALL) if source.kind is not Kind.QFORMER]
    with pytest.raises(WeightsError) as error:
        plan_import(without, files.text_config(SMALL), {})
    assert "--qformer" in error.value.hint


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("vision_config.num_attention_head=2", "vision_config.num_attention_head: there is no", "num_attention_heads?"),
        ("vision.num_attention_heads=2", "--set vision: there is no", "vision_config?"),
        ("image_token=2", "--set image_token: there is no", "image_token_id?"),
        ("vision_config.num_attention_heads", "has no value", "for example"),
        ("vision_config.num_attention_heads=two", "these settings make no model", "--set"),
        ("vision_config.num_attention_heads=[", "not YAML", "quotes"),
        ("vision_config.num_attention_heads=7", "these settings make no model", "--set"),
        ("qformer_config.num_attention_heads=0", "these settings make no model", "--set"),
    ],
)  # fmt: skip
def test_setting_that_does_not_exist_or_fit_is_refused(override: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(SMALL, override)
    assert message in error.value.message
    assert hint in error.value.hint


def test_setting_for_a_part_that_is_not_there_is_said() -> None:
    made = plan(SMALL, "qformer_config.num_attention_heads=2", with_qformer=False)
    assert any("qformer_config is not used" in note for note in made.notes)
