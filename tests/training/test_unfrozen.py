"""A vision encoder that learns as a whole: what moves, what is kept of it, and what cannot go with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention

import minigpt4
from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training.loop import Progress
from minigpt4.training.model_setup import Prepared, prepare_model
from minigpt4.training.processes import processes
from minigpt4.training.recipe import Recipe, make_recipe
from minigpt4.training.run import Reports, run
from minigpt4.weights.alignment import NANO, Origin, save_alignment
from tests import tiny_chat
from tests.model import tiny
from tests.training.toy import PowerFailureError

PICTURES = 6


def saved(model: MiniGPT4ForConditionalGeneration, folder: Path) -> Path:
    processor = tiny_chat.processor()
    processor.num_image_tokens = model.config.num_image_tokens
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model whose key biases are zero, as EVA-ViT's are."""
    model = tiny_chat.model()
    with torch.no_grad():
        for layer in model.model.vision_model.encoder.layers:
            key_bias(layer.self_attn.qkv.bias).zero_()
    return saved(model, tmp_path / "model")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file_name,caption"]
    for number in range(PICTURES):
        tiny_chat.picture(number).save(folder / f"{number}.png")
        lines.append(f"{number}.png,it is {number}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def recipe(model: Path, pictures: Path, output: Path, **changes: Any) -> Recipe:
    stage = {"name": "only", "steps": 4, "batch_size": 3, "learning_rate": 0.01, "warmup_steps": 1, "weight_decay": 0.1}
    content = {
        "model": str(model),
        "output": str(output),
        "trainable": ["vision_model"],
        "precision": "fp32",
        "data": {"sources": [{"path": str(pictures)}]},
        "stages": [stage],
        "workers": 0,
        "checkpoint_steps": 1,
        **changes,
    }
    return make_recipe(content, Path("made up"))


def key_bias(fused: Tensor) -> Tensor:
    return fused.chunk(3)[1]


def vision_tensors(folder: Path) -> dict[str, Tensor]:
    """What a full folder has of the vision encoder, by the names of an alignment."""
    whole = load_file(folder / "model.safetensors")
    return {
        name.removeprefix("model."): t for name, t in whole.items() if name.startswith("model.vision_model.")
    }  # fmt: skip


def prepared(model: MiniGPT4ForConditionalGeneration, folder: Path, **changes: Any) -> Prepared:
    return prepare_model(recipe(saved(model, folder / "model"), folder, folder / "run", **changes), processes())


def test_all_of_the_vision_encoder_learns_and_answers_over_its_model(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = run(recipe(model_folder, pictures, tmp_path / "run"), Reports(say=said.append))

    assert said[0].endswith("numbers learn, in vision_model")
    before, stored = vision_tensors(model_folder), load_file(folder / "alignment.safetensors")
    assert stored.keys() == before.keys()
    assert "vision_model.post_layernorm.weight" in stored
    assert not [name for name in stored if torch.equal(stored[name], before[name])]
    model, processor = minigpt4.load(folder, device="cpu")
    parameters = dict(model.model.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items())
    frozen = minigpt4.load(model_folder, device="cpu")
    seen = processor.image_processor([tiny_chat.picture()], return_tensors="pt").pixel_values
    with torch.no_grad():
        assert (model.get_image_features(seen)[1] - frozen[0].get_image_features(seen)[1]).abs().max() > 1e-3
    chat = minigpt4.ChatSession(model, processor)
    chat.add_image(pictures / "0.png")
    assert isinstance(chat.ask("What is it?", max_new_tokens=5), str)


def test_key_biases_stay_zero_while_the_rest_of_the_fused_bias_learns(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    stored = load_file(run(recipe(model_folder, pictures, tmp_path / "run")) / "alignment.safetensors")

    fused = [tensor for name, tensor in stored.items() if name.endswith("qkv.bias")]
    assert len(fused) == 2
    for bias, before in zip(
        fused, [t for n, t in vision_tensors(model_folder).items() if "qkv.bias" in n], strict=True
    ):
        assert not key_bias(bias).any()
        assert (bias != before).sum() == 2 * len(bias) // 3


def test_key_bias_that_is_not_zero_is_kept_and_counts_as_before(tmp_path: Path) -> None:
    model = tiny_chat.model()
    made = prepared(model, tmp_path)
    seen = tiny.pictures(2)
    with torch.no_grad():
        assert torch.equal(
            made.model.model.vision_model(seen).last_hidden_state, model.model.vision_model(seen).last_hidden_state
        )
    assert key_bias(made.model.model.vision_model.encoder.layers[0].self_attn.qkv.bias).any()


def test_a_run_that_was_torn_down_ends_with_the_same_vision_encoder(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    whole = run(recipe(model_folder, pictures, tmp_path / "whole"))

    def fail(progress: Progress) -> None:
        if progress.step == 3:
            raise PowerFailureError

    torn = recipe(model_folder, pictures, tmp_path / "torn")
    with pytest.raises(PowerFailureError):
        run(torn, Reports(update=fail))
    steps: list[int] = []
    resumed = run(torn, Reports(update=lambda progress: steps.append(progress.step)))

    assert steps == [3, 4]
    one, two = (load_file(folder / "alignment.safetensors") for folder in (whole, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_second_stage_keeps_the_vision_encoder_of_the_first(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    first = run(recipe(model_folder, pictures, tmp_path / "one"))
    second = run(recipe(first, pictures, tmp_path / "two", trainable=["language_projection"]))

    one, two = (load_file(folder / "alignment.safetensors") for folder in (first, second))
    assert two.keys() == one.keys() | {"language_projection.weight", "language_projection.bias"}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("trainable", ["vision_model", "vision_layernorms"])
def test_features_of_an_encoder_that_learns_are_not_kept(
    trainable: str, model_folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    data = {"sources": [{"path": str(pictures)}], "crop": False}
    wanted = recipe(model_folder, pictures, tmp_path / "run", trainable=[trainable], features="cache", data=data)
    with pytest.raises(ConfigError, match="keeps what the vision encoder sees, and the vision encoder learns") as error:
        run(wanted)
    assert trainable in error.value.hint


def test_gradient_checkpointing_reads_the_encoder_twice_and_changes_nothing(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    with readings_of_a_layer() as plain_readings:
        plain = run(recipe(model_folder, pictures, tmp_path / "plain"))
    with readings_of_a_layer() as frugal_readings:
        frugal = run(recipe(model_folder, pictures, tmp_path / "frugal", gradient_checkpointing=True))

    assert 2 * len(plain_readings) == len(frugal_readings) > 0
    one, two = (load_file(folder / "alignment.safetensors") for folder in (plain, frugal))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


@contextmanager
def readings_of_a_layer() -> Iterator[list[int]]:
    """Count how often the attention of any vision layer is computed."""
    readings: list[int] = []
    forward = Blip2Attention.forward

    def counting(
        self: Blip2Attention, hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor] | None]:
        if not hidden_states.is_meta:  # which has no numbers to compute
            readings.append(1)
        return forward(self, hidden_states, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Blip2Attention, "forward", counting)
        yield readings


def test_half_precision_trains_the_encoder_in_float32_and_validates(
    model_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    validation = {"sources": [{"path": str(pictures)}], "every_steps": 2, "batches": 1, "pictures": 1}
    wanted = recipe(model_folder, pictures, tmp_path / "run", precision="bf16", validation=validation)
    stored = load_file(run(wanted) / "alignment.safetensors")

    # Numbers of bfloat16 have nothing in the last 16 of 32 bits.
    assert all((tensor.view(torch.int32) & 0xFFFF).any() for tensor in stored.values())


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model", "dinov2", "efficientnet_lite"])
def test_what_no_word_depends_on_stays_frozen(vision: str, tmp_path: Path) -> None:
    """Else several processes would wait for a gradient that never comes."""
    model = tiny_chat.model(vision=vision)
    made = prepared(model, tmp_path)
    seen = made.model.model.get_image_features(tiny.pictures(2)).pooler_output
    learning = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert len(learning) > 10

    gradients = torch.autograd.grad(seen.sum(), list(learning.values()), allow_unused=True)

    assert [name for name, g in zip(learning, gradients, strict=True) if g is None] == []
    left = {name for name, _ in made.model.model.vision_model.named_parameters()} - {
        name.removeprefix("model.vision_model.") for name in learning
    }
    frozen = {"dinov2": {"embeddings.mask_token"}, "efficientnet_lite": set()}.get(vision)
    if frozen is None:
        assert left and all(
            name.startswith(("post_layernorm.", "vision_model.post_layernorm.", "head.")) for name in left
        )
    else:
        assert left == frozen


def test_encoder_with_batch_norms_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_chat.model()

    def with_batch_norm(*_: Any, **__: Any) -> tuple[Any, Any]:
        model.model.vision_model.extra = nn.BatchNorm1d(4)
        return model, tiny_chat.processor()

    monkeypatch.setattr("minigpt4.training.model_setup.load", with_batch_norm)
    with pytest.raises(ConfigError, match="its extra is a batch norm, whose statistics no alignment holds"):
        prepare_model(recipe(model_folder, tmp_path, tmp_path / "run"), processes())


def test_alignment_of_nano_keeps_its_vision_encoder_in_full(tmp_path: Path) -> None:
    """Its joining parts have 16 bits, which would lose what a vision encoder learns."""
    model = tiny_chat.model(vision="efficientnet_lite")
    model.config.trainable_parts = ["vision_model", "language_projection"]
    save_alignment(tmp_path / "alignment", model.freeze(), tiny_chat.processor(), origin=Origin(NANO))

    stored = load_file(tmp_path / "alignment/alignment.safetensors")

    assert {name.partition(".")[0]: tensor.dtype for name, tensor in stored.items()} == {
        "vision_model": torch.float32,
        "language_projection": torch.bfloat16,
    }
