"""Language models of many kinds give the numbers of the library's own class, with text alone and with a picture.

The same weights go into both. Tolerance of float32 logits: 1e-5, of standard deviation 1.5 for most kinds. Choices of
words are compared exactly.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from tests.model import tiny

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": [tiny.PAD_ID, 2, 3]}

_SHARED = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": tiny.WIDE,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": tiny.PAD_ID,
}
_GROUPED = {**_SHARED, "num_key_value_heads": 1}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16}
_WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    # A head with a bias.
    "phi": _GROUPED,
    "gptj": {**_SHARED, "rotary_dim": 8},
    "codegen": {**_SHARED, "hidden_size": 64, "num_attention_heads": 4, "rotary_dim": 8},
    # Logits that are scaled or capped.
    "cohere": _GROUPED,
    "cohere2": {**_GROUPED, **_WINDOW},
    "granite": {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "gemma": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GEMMA, **_WINDOW, "final_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, **_WINDOW, "final_logit_softcapping": 2.0},
    # A window, experts, states in place of a cache.
    "mistral": {**_GROUPED, "sliding_window": 6},
    "mixtral": {**_GROUPED, **_EXPERTS},
    "qwen3_moe": {**_GROUPED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_GROUPED, **_EXPERTS, **_WINDOW, "head_dim": 16},
    "jamba": {**_GROUPED, "num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 4},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    # Learned positions, and distances in place of positions.
    "gpt2": {**_SHARED, "n_inner": 32},
    "opt": {**_SHARED, "ffn_dim": 32},
    "bloom": _SHARED,
    "mpt": {**_SHARED, "max_seq_len": 128},
    "falcon": {**_SHARED, "ffn_hidden_size": 32},
    # Others in wide use.
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "phi3": _GROUPED,
    "olmo2": _GROUPED,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "smollm3": _GROUPED,
    "gpt_neox": _SHARED,
}


def both(kind: str, **changes: Any) -> tuple[PreTrainedModel, MiniGPT4ForConditionalGeneration]:
    """Return the library's own model and ours, with the same weights."""
    text_config = CONFIG_MAPPING[kind](**{**KINDS.get(kind, _GROUPED), **changes})
    torch.manual_seed(0)
    ours = tiny.randomized(MiniGPT4ForConditionalGeneration(_config(copy.deepcopy(text_config)))).eval()
    library = AutoModelForCausalLM.from_config(text_config).eval()
    decoder, head = ours.model.language_model, ours.lm_head
    children = dict(library.named_children())
    [name] = [name for name, child in children.items() if type(child) is type(decoder)]
    children[name].load_state_dict(decoder.state_dict())
    library.get_output_embeddings().load_state_dict(head.state_dict())
    for model in (library, ours):
        model.set_attn_implementation("eager")
    return library, ours


def _config(text_config: PreTrainedConfig) -> MiniGPT4Config:
    return MiniGPT4Config(
        vision_config={"model_type": "blip_2_vision_model", **tiny.VISION["blip_2_vision_model"]},
        qformer_config=dict(tiny.QFORMER),
        text_config=text_config,
        num_query_tokens=tiny.NUM_IMAGE_TOKENS,
        image_token_id=tiny.IMAGE_TOKEN_ID,
        initializer_range=tiny.WIDE,
    )


@pytest.fixture(scope="module", params=KINDS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, MiniGPT4ForConditionalGeneration]:
    return both(request.param)


Models = tuple[PreTrainedModel, MiniGPT4ForConditionalGeneration]


def test_logits_and_loss_of_text_are_those_of_the_librarys_class(models: Models) -> None:
    _, ours = models
    ids = torch.tensor([tiny.row(0, 14)])
    with torch.no_grad():
        expected, actual = (model(input_ids=ids, labels=ids) for model in models)
        last = ours(input_ids=ids, logits_to_keep=1).logits
    assert expected.logits.std() > 0.05
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(actual.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(last, expected.logits[:, -1:], **TOLERANCE)


def test_left_padded_rows_are_answered_as_by_the_librarys_class_and_as_alone(models: Models) -> None:
    _, ours = models
    rows = [tiny.row(0, 3), tiny.row(0, 10, seed=1)]
    inputs = tiny.batch(rows)
    expected, actual = (model.generate(**inputs, **GREEDY) for model in models)
    assert actual.tolist() == expected.tolist()
    for ids, answer in zip(rows, actual[:, inputs["input_ids"].shape[1] :], strict=True):
        assert answer.tolist() == ours.generate(input_ids=torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist()


def test_picture_is_read_as_embeddings_given_to_the_librarys_class(models: Models) -> None:
    library, ours = models
    ids, pixels = torch.tensor([tiny.row(1, 3)]), tiny.pictures(1)
    with torch.no_grad():
        embeds = ours.get_input_embeddings()(ids).clone()
        embeds[ids == tiny.IMAGE_TOKEN_ID] = ours.get_image_features(pixels).pooler_output.flatten(0, 1)
        actual = ours(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(actual, library(inputs_embeds=embeds).logits, **TOLERANCE)


def test_answer_about_a_picture_needs_no_cache(models: Models) -> None:
    _, ours = models
    inputs = {"input_ids": torch.tensor([tiny.row(1, 3)]), "pixel_values": tiny.pictures(1)}
    cached = ours.generate(**inputs, **GREEDY)
    assert cached.tolist() == ours.generate(**inputs, **GREEDY, use_cache=False).tolist()


@pytest.mark.parametrize("kind", ["phi", "granite", "gemma2", "gpt2"])
def test_states_alone_become_the_logits_of_forward(kind: str) -> None:
    _, ours = both(kind)
    ids = torch.tensor([tiny.row(0, 6)])
    with torch.no_grad():
        states = ours.model(input_ids=ids).last_hidden_state
        expected = ours(input_ids=ids).logits
        torch.testing.assert_close(ours.compute_logits(states), expected, **TOLERANCE)
        torch.testing.assert_close(ours.compute_logits(states[0, 2:4]), expected[0, 2:4], **TOLERANCE)
        assert ours.compute_logits(states[0, :0]).shape == (0, tiny.VOCABULARY)


def test_unevenly_used_experts_count_in_the_loss_where_asked_for() -> None:
    library, ours = both("mixtral", router_aux_loss_coef=0.5)
    ids = torch.tensor([tiny.row(0, 14)])
    with torch.no_grad():
        expected, actual = (model(input_ids=ids, labels=ids, output_router_logits=True) for model in (library, ours))
        plain = ours(input_ids=ids, labels=ids)
    torch.testing.assert_close(actual.loss, expected.loss, **TOLERANCE)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, **TOLERANCE)
    assert actual.loss - plain.loss > 0.5
    assert len(actual.router_logits) == 2


def test_phi3_reads_all_again_with_its_pictures_where_its_positions_change_their_scale() -> None:
    ids, pixels = tiny.row(1, 3), tiny.pictures(1)
    scales = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    limit = len(ids) + 4
    _, ours = both("phi3", rope_parameters=scales, original_max_position_embeddings=limit)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
    answer = ours.generate(**inputs, **GREEDY)
    assert answer.tolist() == ours.generate(**inputs, **GREEDY, use_cache=False).tolist()
    text = torch.tensor([tiny.row(0, limit - 6)])
    assert ours.generate(text, **GREEDY).tolist() == ours.generate(text, **GREEDY, use_cache=False).tolist()
    features = {"image": ours.get_image_features(pixels)}
    assert ours.generate(torch.tensor([ids]), mm_encoder_outputs=features, **GREEDY).tolist() == answer.tolist()
    cache = ours.generate(**inputs, **{**GREEDY, "max_new_tokens": 3}, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="all pictures are needed again"):
        ours.generate(answer[:, : len(ids) + 3], past_key_values=cache, **GREEDY)


def test_head_with_a_bias_is_saved_loaded_and_frozen_whole(tmp_path: Path) -> None:
    _, ours = both("phi")
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ids = torch.tensor([tiny.row(0, 6)])
    for model in (loaded, copy.deepcopy(ours)):
        assert torch.equal(model.lm_head.bias, ours.lm_head.bias)
        assert not any(parameter.requires_grad for parameter in model.lm_head.parameters())
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, ours(input_ids=ids).logits, **TOLERANCE)


def test_word_embeddings_narrower_than_the_layers_fix_the_width_of_a_pictures() -> None:
    library, ours = both("opt", word_embed_proj_dim=16)
    ids, pixels = torch.tensor([tiny.row(1, 3)]), tiny.pictures(1)
    with torch.no_grad():
        image_embeds = ours.get_image_features(pixels).pooler_output
        assert image_embeds.shape == (1, tiny.NUM_IMAGE_TOKENS, 16)
        embeds = ours.get_input_embeddings()(ids).clone()
        embeds[ids == tiny.IMAGE_TOKEN_ID] = image_embeds[0]
        actual = ours(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(actual, library(inputs_embeds=embeds).logits, **TOLERANCE)


def test_head_put_in_place_of_the_first_is_the_one_that_speaks() -> None:
    _, ours = both("granite")

    class Silent(nn.Linear):
        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states) * 0

    ours.lm_head = Silent(32, tiny.VOCABULARY, bias=False)
    with torch.no_grad():
        assert ours(input_ids=torch.tensor([tiny.row(0, 3)])).logits.abs().max() == 0


def test_what_a_step_can_do_is_the_language_models_business() -> None:
    assert both("jamba")[1]._is_stateful
    assert not both("llama")[1]._is_stateful
    assert both("llama")[1]._can_compile_fullgraph


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("bart", {"d_model": 16}, "one decoder and one linear head"),
        ("bert", {"is_decoder": True}, "one decoder and one linear head"),
        ("modernbert-decoder", {}, "more layers between its decoder and its logits"),
        ("mamba", {}, "inputs_embeds and keep past_key_values"),
        ("minimax", {"num_local_experts": 2}, "cache of its own"),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8}, "reads the ids of words"),
        ("gemma3", None, "towers of its own"),
        ("t5", {}, "none of the causal language models"),
    ],
)
def test_kind_that_would_not_be_right_is_refused_by_its_name(
    kind: str, changes: dict[str, Any] | None, why: str
) -> None:
    config = (
        CONFIG_MAPPING[kind]() if changes is None else CONFIG_MAPPING[kind](**{**_SMALL.get(kind, _SHARED), **changes})
    )
    with pytest.raises(ConfigError, match=rf"'{kind}', which .*{why}") as raised:
        MiniGPT4ForConditionalGeneration(_config(config))
    assert "LLaMA" in raised.value.hint


_SMALL: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": tiny.VOCABULARY, "state_size": 4},
    "t5": {"d_model": 16, "num_layers": 1, "vocab_size": tiny.VOCABULARY},
    "bart": {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 32},
    "gemma3n_text": {
        **_GROUPED,
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 96,
    },
}
