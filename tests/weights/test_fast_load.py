"""The fast way into a full folder gives what the library's way gives, bit by bit, or leaves the folder to it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.weights import folder as folder_module
from minigpt4.weights import nano
from minigpt4.weights.folder import FAST_KINDS, built_folder, load, load_fast
from tests import tiny_chat
from tests.model import tiny

DTYPES = [torch.float32, torch.bfloat16]


def assert_same_model(ours: MiniGPT4ForConditionalGeneration, theirs: MiniGPT4ForConditionalGeneration) -> None:
    """Everything two loaded models can differ in, exactly."""
    for kind in ("state_dict", "named_parameters", "named_buffers"):
        tensors: Any = [dict(getattr(model, kind)()) for model in (ours, theirs)]
        assert tensors[0].keys() == tensors[1].keys(), kind
        for name, tensor in tensors[1].items():
            mine = tensors[0][name]
            assert (mine.dtype, mine.device, mine.requires_grad, mine.stride()) == (
                tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride()), name  # fmt: skip
            assert torch.equal(mine, tensor), name
    for ours_in, theirs_in in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(ours_in) is type(theirs_in)
        assert ours_in.training == theirs_in.training
        assert ours_in._non_persistent_buffers_set == theirs_in._non_persistent_buffers_set
        attention = [getattr(getattr(m, "config", None), "_attn_implementation", None) for m in (ours_in, theirs_in)]
        assert attention[0] == attention[1]
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert str(ours.config.name_or_path) == str(theirs.config.name_or_path)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert ours.dtype == theirs.dtype


def logits(model: MiniGPT4ForConditionalGeneration, size: int = tiny.IMAGE_SIZE) -> Tensor:
    inputs = tiny.batch([tiny.row(num_pictures=1, words=3), tiny.row(num_pictures=1, words=5, seed=1)])
    pixels = tiny.pictures(2, size=size).to(model.dtype)
    with torch.no_grad():
        result: Tensor = model(**inputs, pixel_values=pixels).logits
    return result


def folder_of(tmp_path: Path, **kinds: Any) -> Path:
    model = tiny.model(trainable_parts=["query_tokens", "language_projection"], **kinds)
    model.generation_config.repetition_penalty = 1.5
    model.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


KNOWN = [pair for pair in tiny.PAIRS if pair[0] in FAST_KINDS["vision_config"]]


def test_every_known_kind_is_compared() -> None:
    compared = {tiny.TEXT[text]["model_type"] for _, text in KNOWN}

    assert {vision for vision, _ in KNOWN} == FAST_KINDS["vision_config"]
    assert compared == FAST_KINDS["text_config"]
    assert {tiny.QFORMER["model_type"]} == FAST_KINDS["qformer_config"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vision", "text"), KNOWN)
def test_both_ways_give_the_same_model(vision: str, text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, vision=vision, text=text)

    ours = load_fast(folder, dtype)

    theirs = MiniGPT4ForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    assert ours is not None
    assert_same_model(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.generation_config.repetition_penalty == 1.5


def test_both_ways_give_the_same_model_without_a_qformer(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    tiny.model(qformer=False).save_pretrained(folder)

    ours = load_fast(folder, torch.float32)

    assert ours is not None
    assert_same_model(ours, MiniGPT4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))


def test_a_tied_head_stays_the_embedding_table(tmp_path: Path) -> None:
    model = load_fast(folder_of(tmp_path, text="llama, tied"), torch.float32)

    assert model is not None
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_parts_kept_in_fewer_bits_are_widened(tmp_path: Path) -> None:
    model = tiny.model(text="llama, tied")
    model.model.language_model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "full")

    ours = load_fast(tmp_path / "full", torch.float32)

    assert ours is not None
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    theirs = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "full", dtype=torch.float32)
    assert_same_model(ours, theirs)


def test_loaded_model_is_saved_as_it_came(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, text="llama, tied")
    model = load_fast(folder, torch.float32)
    assert model is not None

    model.save_pretrained(tmp_path / "again")

    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


WEIGHT = "model.language_projection.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(WEIGHT), f"tensor {WEIGHT} is missing or of another shape"),
        (lambda tensors: tensors.update({WEIGHT: torch.zeros(3, 3)}), f"tensor {WEIGHT} is missing or of another"),
        (lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}), f"tensor {WEIGHT} is missing"),
    ],
    ids=["missing", "another shape", "turned"],
)
def test_tensors_that_do_not_fit_are_left_to_the_library_and_refused(
    change: Callable[[dict[str, Tensor]], object], complaint: str, tmp_path: Path
) -> None:
    folder = tiny_chat.saved(tmp_path / "full")
    changed(folder, change)

    assert load_fast(folder, torch.float32) is None
    with pytest.raises(WeightsError, match=complaint):
        load(folder, device="cpu")


def test_a_tensor_too_many_is_left_to_the_library(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    changed(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))

    assert load_fast(folder, torch.float32) is None


def rewritten(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | entries), encoding="utf-8")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "generation_config.json").unlink(),
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: rewritten(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ],
    ids=["no generation_config.json", "in pieces", "with an adapter", "quantized"],
)
def test_unusual_folders_are_left_to_the_library(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    spoil(folder)

    assert load_fast(folder, torch.float32) is None


def test_large_models_are_left_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(folder_module, "FAST_BYTES", size - 1)
    assert load_fast(folder, torch.float32) is None

    monkeypatch.setattr(folder_module, "FAST_BYTES", size)
    assert load_fast(folder, torch.float32) is not None


def test_kinds_that_were_not_compared_are_left_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    monkeypatch.setitem(FAST_KINDS, "text_config", {"gpt2"})

    assert load_fast(folder, torch.float32) is None


def test_loading_takes_the_short_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_chat.saved(tmp_path / "full")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded by the library")

    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "from_pretrained", fail)

    load(folder, device="cpu")


@pytest.mark.network
def test_both_ways_give_the_same_nano() -> None:
    folder = built_folder(nano.ALIGNMENT_DIR, None)

    ours = load_fast(folder, torch.float32)

    theirs = MiniGPT4ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert ours is not None
    assert_same_model(ours, theirs)
