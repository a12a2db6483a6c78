"""A cached prefix gives the loss and gradient of reading all of each text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor

from minigpt4.data.examples import IGNORED, TextExample, padded
from minigpt4.data.packing import pack, packed_positions
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.training import prefix_cache
from minigpt4.training.objectives import Outcome, TrainingStep
from minigpt4.training.prefix_cache import PrefixCache, common_prefix
from minigpt4.training.run import Reports, run
from tests.model import tiny
from tests.training.test_objectives import losses, model_of
from tests.training.whole_run import model_folder, pictures, recipe

PREFIX = [1, 40, 41, 42, 43, 44]
PICTURE = [tiny.IMAGE_TOKEN_ID] * tiny.NUM_IMAGE_TOKENS

__all__ = ["model_folder", "pictures"]  # fixtures


def example(question: list[int], answer: list[int], before: list[int] = PREFIX) -> TextExample:
    asked = [*before, *PICTURE, *question]
    return TextExample(asked + answer, [IGNORED] * len(asked) + answer, 0)


ROWS = [example([10, 11], [20, 21, 22]), example([12], [23])]


def pictures_of(rows: list[TextExample]) -> dict[str, Tensor]:
    size = tiny.IMAGE_SIZE
    return {"pixel_values": torch.randn(len(rows), 3, size, size, generator=torch.Generator().manual_seed(1))}


def learnt(step: TrainingStep, batch: dict[str, Any]) -> tuple[Outcome, Tensor]:
    step.zero_grad()
    outcome = step(batch)
    outcome.loss.backward()
    return outcome, torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None])


def places_read(model: MiniGPT4ForConditionalGeneration) -> list[tuple[int, ...]]:
    """Keep the rows and places of whatever the language model reads from now on."""
    seen: list[tuple[int, ...]] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, arguments, named: seen.append(tuple(named["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("rows", ["apart", "packed"])
@pytest.mark.parametrize(
    ("text", "attention"), [("llama", "sdpa"), ("qwen2", "eager"), ("gpt2", "sdpa"), ("gpt_neox", "eager")]
)
def test_loss_and_gradient_are_those_of_reading_all_of_it(
    text: str, attention: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(text, attention)
    texts = ROWS if rows == "apart" else [pack(ROWS, tiny.IMAGE_TOKEN_ID), example([13, 14], [24, 25])]
    batch = padded(texts, 0) | packed_positions(texts) | pictures_of(texts)
    step = TrainingStep(model)
    seen = places_read(model)
    for _ in range(2):  # the second time it is there
        outcome, gradient = learnt(step, batch)

    monkeypatch.setattr(PrefixCache, "get", lambda *_: None)
    expected, whole = learnt(step, batch)

    length = batch["input_ids"].shape[1] - 1
    assert seen[-2:] == [(2, length - len(PREFIX)), (2, length)], "the last place is said and not read"
    assert seen.count((1, len(PREFIX))) == 2, "tried once, and read once"
    # Sums in another order: a few units in the last of float32's seven digits.
    assert outcome.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (gradient - whole).norm() < 1e-5 * whole.norm()
    assert outcome.hits == expected.hits


def test_another_prefix_is_another_one() -> None:
    model = model_of("llama", "sdpa")
    step = TrainingStep(model)
    others = [example([10], [20], before=[1, 50, 51, 52, 53]) for _ in range(2)]
    for rows in (ROWS, others, ROWS):
        step(padded(rows, 0) | pictures_of(rows))
        fresh = TrainingStep(model)(padded(rows, 0) | pictures_of(rows))
        assert step(padded(rows, 0) | pictures_of(rows)).loss.item() == fresh.loss.item()


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        (ROWS, 6),
        ([ROWS[0], example([10], [20], before=[1, 40, 41, 99])], 3),
        ([TextExample([1, 2, 3, 4, 5], [IGNORED, IGNORED, IGNORED, 4, 5], 0)], 2),  # place 2 predicts the 4
        ([TextExample([1, 2], [IGNORED, IGNORED], 0)], 0),
        ([example([10], [20], before=[])], 0),
    ],
)
def test_a_prefix_ends_before_a_picture_a_difference_or_what_predicts_an_answer(
    rows: list[TextExample], length: int
) -> None:
    assert common_prefix(padded(rows, 0), tiny.IMAGE_TOKEN_ID) == rows[0].input_ids[:length]


def given(model: MiniGPT4ForConditionalGeneration) -> object:
    return PrefixCache().get(model, padded(ROWS, 0))


def test_a_language_model_that_learns_reads_all_of_it() -> None:
    model = model_of("llama", "sdpa")
    assert given(model) is not None
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model.model.language_model)
    assert given(model) is None


def test_a_language_model_that_keeps_something_else_reads_all_of_it() -> None:
    assert given(model_of("llama", "sdpa", model_type="mistral", sliding_window=8)) is None


def test_a_language_model_that_goes_on_otherwise_reads_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", "sdpa")
    read = prefix_cache.prefill

    def shifted(model: MiniGPT4ForConditionalGeneration, ids: list[int]) -> prefix_cache.CachedPrefix:
        found = read(model, ids)
        return prefix_cache.CachedPrefix(found.length, tuple((k.roll(1, 2), v) for k, v in found.layers))

    monkeypatch.setattr(prefix_cache, "prefill", shifted)
    assert given(model) is None


def test_text_alone_is_read_as_a_whole() -> None:
    rows = [TextExample([1, 40, 41, 42, 43, 20], [IGNORED] * 5 + [20], 0)]
    assert PrefixCache().get(model_of("llama", "sdpa"), padded(rows, 0)) is None


def test_only_some_prefixes_are_kept() -> None:
    kept, model = PrefixCache(), model_of("llama", "sdpa")
    for number in range(3 * prefix_cache.MAX_PREFIXES):
        found = kept.get(model, padded([example([10], [20], before=[1, 40, 4 + number, 5])], 0))
        assert found is not None and found.length == 4
        assert len(kept._prefixes) <= prefix_cache.MAX_PREFIXES


def test_a_short_prefix_is_read_each_time() -> None:
    rows = [example([10], [20], before=[1])]
    assert PrefixCache().get(model_of("llama", "sdpa"), padded(rows, 0)) is None


def test_a_run_learns_the_same_and_an_interrupted_one_to_the_bit(
    model_folder: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[object] = []
    of = PrefixCache.get
    monkeypatch.setattr(PrefixCache, "get", lambda *given: used.append(of(*given)) or used[-1])
    run(recipe(model_folder, pictures, tmp_path / "whole"))
    assert len(used) == 4 and None not in used

    def fail(progress: Any) -> None:  # noqa: ANN401
        if progress.step == 3:
            raise RuntimeError("the power fails")

    with pytest.raises(RuntimeError, match="the power fails"):
        run(recipe(model_folder, pictures, tmp_path / "cut"), Reports(update=fail))
    run(recipe(model_folder, pictures, tmp_path / "cut"))
    monkeypatch.setattr(PrefixCache, "get", lambda *_: None)
    run(recipe(model_folder, pictures, tmp_path / "each time"))

    whole, cut = (load_file(tmp_path / name / "alignment/alignment.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "each time"), rel=1e-4)
