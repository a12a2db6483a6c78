"""A model folder comes back exactly, and is refused with a reason where it is damaged or does not fit."""

import importlib.util
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt4 import ChatSession, load
from minigpt4.errors import ConfigError, WeightsError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.weights import folder as folder_module
from minigpt4.weights import nano
from minigpt4.weights.alignment import TENSORS_FILE, Origin, apply_alignment, save_alignment
from minigpt4.weights.files.atomic import write_folder
from minigpt4.weights.folder import load_processor, placement, quantization
from tests import tiny_chat

ROOT = Path(__file__).resolve().parents[2]


def with_frozen_parts_of(model: MiniGPT4ForConditionalGeneration, seed: int) -> MiniGPT4ForConditionalGeneration:
    """A model of the same frozen parts whose joining parts are others."""
    other = tiny_chat.model(seed)
    joining = {name: p for name, p in other.state_dict().items() if other.get_parameter(name).requires_grad}
    other.load_state_dict({**model.state_dict(), **joining})
    return other


@pytest.fixture
def alignment(tmp_path: Path) -> Path:
    save_alignment(tmp_path / "alignment", tiny_chat.model(), tiny_chat.processor(), files={"README.md": "a card"})
    return tmp_path / "alignment"


def rewritten(alignment: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Write the alignment anew, whole and sound, with other tensors."""
    tensors = load_file(alignment / TENSORS_FILE)
    texts = {path.name: path.read_text(encoding="utf-8") for path in alignment.glob("*.json")}
    del texts["manifest.json"]
    change(tensors)
    with write_folder(alignment, overwrite=True) as folder:
        save_file(tensors, folder / TENSORS_FILE)
        for name, content in texts.items():
            (folder / name).write_text(content, encoding="utf-8")


def test_alignment_comes_back_exactly(alignment: Path) -> None:
    trained = tiny_chat.model()
    fresh = with_frozen_parts_of(trained, seed=1)

    apply_alignment(alignment, fresh, tiny_chat.processor())

    for (name, theirs), ours in zip(trained.named_parameters(), fresh.parameters(), strict=True):
        expected = theirs.to(torch.bfloat16).float() if theirs.requires_grad else theirs
        assert torch.equal(ours, expected), name
    assert (alignment / "README.md").read_text(encoding="utf-8") == "a card"


def test_alignment_holds_only_what_was_trained(alignment: Path) -> None:
    stored = load_file(alignment / TENSORS_FILE)

    assert {name.partition(".")[0] for name in stored} == {"query_tokens", "qformer", "language_projection"}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_number_type_of_the_language_model_makes_no_difference(alignment: Path) -> None:
    model = with_frozen_parts_of(tiny_chat.model(), seed=1)
    model.model.language_model.to(torch.bfloat16)

    apply_alignment(alignment, model, tiny_chat.processor())


def test_another_language_model_of_the_same_size_is_refused(alignment: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"the alignment alignment was trained with .* likeness of .* expected 0\.98"
    ):
        apply_alignment(alignment, tiny_chat.model(seed=1), tiny_chat.processor())


@pytest.mark.parametrize("key", ["vocabulary", "tokens"])
def test_another_kind_of_language_model_is_refused_with_both_fingerprints(key: str, alignment: Path) -> None:
    description = json.loads((alignment / "alignment.json").read_text(encoding="utf-8"))
    here = description["language_model"][key]
    description["language_model"][key] = "other"
    with write_folder(alignment, overwrite=True) as folder:
        (folder / "alignment.json").write_text(json.dumps(description), encoding="utf-8")

    with pytest.raises(WeightsError, match=f"whose {key} is other, this one's is {here}") as told:
        apply_alignment(alignment, tiny_chat.model(), tiny_chat.processor())
    assert told.value.hint


BIAS = "language_projection.bias"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(BIAS), "differ in tensor language_projection.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "differ in tensor extra"),
        (lambda tensors: tensors.update({BIAS: torch.zeros(1)}), r"projection\.bias .* is \(1,\), expected \(64,\)"),
        (lambda tensors: tensors[BIAS].data[-1:].fill_(math.nan), "infinite or none"),
        (lambda tensors: tensors[BIAS].data[-1:].fill_(-math.inf), "infinite or none"),
    ],
    ids=["missing", "too many", "another shape", "no number", "infinite"],
)
def test_tensor_that_does_not_fit_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], complaint: str, alignment: Path
) -> None:
    rewritten(alignment, change)

    with pytest.raises(WeightsError, match=complaint):
        apply_alignment(alignment, tiny_chat.model(), tiny_chat.processor())


@pytest.mark.parametrize("file", ["alignment.safetensors", "alignment.json"])
def test_flipped_bit_is_refused(file: str, alignment: Path) -> None:
    content = bytearray((alignment / file).read_bytes())
    content[-3] ^= 4
    (alignment / file).write_bytes(content)

    with pytest.raises(WeightsError, match=file):
        apply_alignment(alignment, tiny_chat.model(), tiny_chat.processor())


def test_alignment_of_a_later_version_is_refused(alignment: Path) -> None:
    with write_folder(alignment, overwrite=True) as folder:
        (folder / "alignment.json").write_text('{"format": "minigpt4-alignment", "format_version": 2}')

    with pytest.raises(WeightsError, match="version 2, expected minigpt4-alignment version 1") as told:
        apply_alignment(alignment, tiny_chat.model(), tiny_chat.processor())
    assert "update minigpt4" in told.value.hint


@pytest.mark.parametrize("file", ["manifest.json", TENSORS_FILE])
def test_alignment_without_one_of_its_files_is_refused_before_it_is_joined(file: str, alignment: Path) -> None:
    (alignment / file).unlink()

    with pytest.raises(WeightsError, match=file):
        load(alignment)


def test_full_folder_is_loaded_and_answers_the_same(tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "full")

    model, processor = load(folder, device="cpu")

    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    said = []
    for chat in (ChatSession(model, processor), ChatSession(tiny_chat.model(), tiny_chat.processor())):
        chat.add_image(tiny_chat.picture())
        said.append(chat.ask("what is this?", max_new_tokens=8))
    assert said[0] == said[1]
    assert load(str(folder), device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_folder_without_one_of_its_files_is_refused(file: str, tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "full")
    (folder / file).unlink()

    with pytest.raises(WeightsError, match="full"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": "minigpt4", "vision_config": 3}'])
def test_folder_with_a_broken_config_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "full")
    (folder / "config.json").write_bytes(content)

    with pytest.raises(WeightsError, match=r"is not a complete model folder: .+"):
        load(folder)


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is not a model folder: it has neither config\.json nor alignment\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nono", "../none", ""])
def test_unknown_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(WeightsError, match=r"there is no model|is not a model folder"):
        load(name)


def test_alignment_of_a_training_that_was_stopped_is_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)

    with pytest.raises(WeightsError, match=r"the training in .*run has not ended") as told:
        load(tmp_path / "run/alignment")

    assert "`minigpt4 train` with the same recipe goes on" in told.value.hint


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"")

    with pytest.raises(WeightsError, match=r"model\.pth is a file, expected a model folder") as told:
        load(tmp_path / "model.pth")
    assert "`minigpt4 weights inspect`" in told.value.hint
    assert "`minigpt4 weights import`" in told.value.hint


def test_file_of_a_model_folder_leads_to_the_folder(tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "full")

    with pytest.raises(WeightsError, match="is a file, expected a model folder") as told:
        load(folder / "model.safetensors")
    assert told.value.hint == f"name its folder, {folder}"


@pytest.mark.parametrize(
    ("kind", "message", "cure"),
    [
        ("llama", r"vicuna is a language model \(llama\), which is one part of a MiniGPT-4", "--language-model"),
        ("qwen2", r"vicuna is a language model \(qwen2\)", "model.language_model"),
        ("blip-2", "vicuna is a model of the type blip-2, expected minigpt4", "weights import"),
    ],
)
def test_other_kind_of_model_is_refused_before_torch_makes_anything(
    kind: str, message: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library would make MiniGPT-4's default of 8 billion parameters of any configuration."""
    folder = tiny_chat.saved(tmp_path / "vicuna")
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "hidden_size": 4096}), encoding="utf-8")
    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "__init__", None)

    with pytest.raises(WeightsError, match=message) as told:
        load(folder)
    assert cure in told.value.hint


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "meta:x", "xpu"])
def test_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device {device} is not available here"):
        placement(device, "auto")


@pytest.mark.parametrize(("dtype", "quantize"), [("int3", "none"), ("auto", "int5")])
def test_number_type_that_does_not_exist_is_refused(dtype: str, quantize: str) -> None:
    with pytest.raises(ConfigError, match=r"(int3|int5) is not known"):
        quantization(quantize, placement("cpu", dtype)[0])


def test_cpu_runs_in_float32_unless_told() -> None:
    assert placement("cpu", "auto") == (torch.device("cpu"), torch.float32)
    assert placement("cpu", "bfloat16")[1] == torch.bfloat16


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("default")  # bitsandbytes' own, about processors and number types
@pytest.mark.parametrize(("quantize", "kind"), [("int8", "Linear8bitLt"), ("nf4", "Linear4bit")])
def test_quantization_takes_the_language_model_and_nothing_else(
    quantize: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_chat.saved(tmp_path / "full")

    model, processor = load(folder, device="cpu", quantize=quantize)

    whole = load(folder, device="cpu")[0]
    linear = {name for name, module in whole.named_modules() if type(module) is torch.nn.Linear}
    language = {name for name in linear if name.startswith("model.language_model.")}
    assert language
    assert {name: type(model.get_submodule(name)).__name__ for name in linear} == {
        name: kind if name in language else "Linear" for name in linear
    }
    for name in linear - language:
        assert torch.equal(model.get_submodule(name).weight, whole.get_submodule(name).weight), name
    bits = {parameter.dtype for name in language for parameter in model.get_submodule(name).parameters()}
    assert bits == {torch.int8 if quantize == "int8" else torch.uint8}
    chat = ChatSession(model, processor)
    chat.add_image(tiny_chat.picture())
    assert chat.ask("what is this?", max_new_tokens=4)
    assert chat.answer.completion_tokens == 4 or chat.answer.finish_reason == "stop"
    assert not [message for message in caplog.messages if "MatMul8bitLt" in message]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_answer_in_8_bits_on_a_cpu_stands_alone_in_the_terminal(tmp_path: Path) -> None:
    """The library reports a cast for every layer and every token."""
    folder = tiny_chat.saved(tmp_path / "full")
    tiny_chat.picture().save(tmp_path / "cat.png")
    command = [sys.executable, "-m", "minigpt4", "ask", str(tmp_path / "cat.png"), "what is this?", "-m", str(folder)]
    chosen = ["--quantize", "int8", "--device", "cpu", "--max-new-tokens", "4"]

    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr in ("", "the answer reached 4 tokens and was cut; --max-new-tokens raises it\n")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_other_words_of_bitsandbytes_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    quantization("int8", torch.device("cpu"))
    logger = logging.getLogger("bitsandbytes.autograd._functions")

    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
    logger.warning("the device is lost")

    assert caplog.messages == ["the device is lost"]


@pytest.mark.parametrize(
    "order", ["import minigpt4, transformers", "import transformers, minigpt4", "from minigpt4 import MiniGPT4Config"]
)
def test_the_librarys_auto_classes_know_the_folder(order: str, tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "full")
    program = f"""
{order}
import minigpt4
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r})
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r})
print(type(processor).__name__, type(model).__name__)
print(minigpt4.MiniGPT4Processor is type(processor))
"""

    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert result.stdout.split() == ["MiniGPT4Processor", "MiniGPT4ForConditionalGeneration", "True"], result.stderr


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing build a model."""
    monkeypatch.setattr(
        MiniGPT4ForConditionalGeneration, "__init__", lambda *_: pytest.fail("a model was built for its processor")
    )


def test_processor_comes_without_the_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, processor = tiny_chat.model(), tiny_chat.processor("vicuna-v0")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    save_alignment(tmp_path / "alignment", model, processor, origin=Origin(str(tmp_path / "model")))
    save_alignment(tmp_path / "over", model, processor, origin=Origin("../alignment"))
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    request.getfixturevalue("without_models")

    for name in ("model", "alignment", "over"):
        found = load_processor(tmp_path / name)
        assert found.to_dict() == processor.to_dict()
        assert found.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_processor_of_any_alignment_of_nano_is_that_of_nano(
    alignment: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_models: None
) -> None:
    tiny_chat.processor().save_pretrained(tmp_path / "built")
    asked: list[Path] = []

    def built(alignment: Path, *_: object) -> Path:
        asked.append(alignment)
        return tmp_path / "built"

    monkeypatch.setattr(folder_module, "built_folder", built)

    for name in ("nano", alignment):
        assert load_processor(name).to_dict() == tiny_chat.processor().to_dict()
    assert asked == 2 * [nano.ALIGNMENT_DIR]


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_folder_without_a_file_of_its_processor_is_refused(name: str, tmp_path: Path) -> None:
    tiny_chat.saved(tmp_path / "model")
    (tmp_path / "model" / name).unlink()

    with pytest.raises(WeightsError, match="is not a complete model folder"):
        load_processor(tmp_path / "model")
    with pytest.raises(WeightsError, match="there is no model"):
        load_processor(tmp_path / "gone")
