"""Curves show every step, validation and stage; trackers get every figure, and go on where a run stopped."""

import builtins
import json
import math
import re
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from matplotlib.figure import Figure
from PIL import Image

from minigpt4.data.batches import SourceBatches
from minigpt4.data.examples import Layout
from minigpt4.data.order import Order
from minigpt4.data.sources import open_source
from minigpt4.errors import ConfigError, DataError, StorageError, UsageError
from minigpt4.training import reports
from minigpt4.training.reports import (
    Trackers,
    check_trackers,
    describe_texts,
    draw_metrics,
    plot_metrics,
    read_metrics,
    smoothed,
)
from tests import tiny_chat
from tests.data.sources.source_files import write


def step(number: int, stage: str = "first", **changes: Any) -> dict[str, Any]:
    figures = {
        "stage": stage,
        "step": number,
        "steps": 40,
        "loss": 5 / number,
        "accuracy": 0.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens": 200,
        "images": 8,
        "seconds": 2.0,
        "skipped": False,
        "memory_bytes": 2 * 10**9,
    }
    return figures | changes


def validation(number: int, loss: float, stage: str = "first") -> dict[str, Any]:
    return {"stage": stage, "step": number, "validation_loss": loss}


def written(folder: Path, lines: Iterable[dict[str, Any]], rest: str = "") -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    return folder


def drawn(folder: Path) -> Figure:
    return draw_metrics(read_metrics(folder), "run")


def points(figure: Figure, gid: str) -> list[tuple[float, float]]:
    """All drawn points of a curve, those that are no number left out."""
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_gid() == gid]
    found = [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]
    return [point for point in found if math.isfinite(point[1])]


def test_every_step_of_both_stages_is_drawn_one_stage_after_the_other(tmp_path: Path) -> None:
    lines = [step(n) for n in range(1, 41)] + [step(n, "second", steps=10, loss=1.0) for n in range(1, 11)]

    figure = drawn(written(tmp_path, lines))

    assert points(figure, "loss") == [(n, 5 / n) for n in range(1, 41)] + [(40 + n, 1.0) for n in range(1, 11)]
    assert [x for x, _ in points(figure, "loss smoothed")] == list(range(1, 51))
    everywhere = {"images / s": 4.0, "target tokens / s": 100.0, "gradient norm": 1.0, "learning rate": 1e-4}
    for label, value in everywhere.items():
        assert points(figure, label) == [(n, value) for n in range(1, 51)]
    assert points(figure, "memory (GB)")[0] == (1, 2.0)
    borders = [line for axes in figure.axes for line in axes.get_lines() if line.get_gid() == "stage"]
    assert [line.get_xdata()[0] for line in borders] == [40.5] * len(figure.axes)
    assert "first (40 steps), second (10 steps)" in figure.get_suptitle().replace("\n", " ")


def test_validations_are_drawn_where_they_were_made(tmp_path: Path) -> None:
    lines = [step(1), step(2), validation(2, 3.5), *(step(n, "second") for n in (1, 2)), validation(1, 2.5, "second")]

    figure = drawn(written(tmp_path, lines))

    assert points(figure, "loss validation") == [(2, 3.5), (3, 2.5)]


def test_picture_is_1200_pixels_wide_and_light(tmp_path: Path) -> None:
    target = plot_metrics(written(tmp_path, [step(n) for n in range(1, 30)]))

    with Image.open(target) as picture:
        picture.load()
        assert (target, picture.format, picture.width) == (tmp_path / "metrics.png", "PNG", 1200)
        assert picture.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_a_persons_own_style_changes_nothing(tmp_path: Path) -> None:
    import matplotlib

    plain = plot_metrics(written(tmp_path, [step(n) for n in range(1, 5)]), tmp_path / "plain.png")
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 20}):
        dark = plot_metrics(tmp_path, tmp_path / "dark.png")

    assert dark.read_bytes() == plain.read_bytes()


def test_a_run_in_progress_is_drawn_and_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    figure = drawn(written(tmp_path, [step(1, "$a_b$ \u4e16")], rest='{"stage": "first", "st'))

    assert points(figure, "loss smoothed") == [(1, 5.0)]
    title = figure.get_suptitle().replace("\n", " ")
    assert title == "run: 1 step, 2 s of updates, in progress, $a_b$ \u4e16 (1 of 40 steps)"


def test_skipped_steps_and_losses_that_are_no_number_are_marked(tmp_path: Path) -> None:
    lines = [step(n) for n in range(1, 11)]
    lines[3] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    lines[5] |= {"skipped": True}
    lines[7] |= {"loss": None}

    figure = drawn(written(tmp_path, lines))

    assert [x for x, _ in points(figure, "skipped")] == [4, 6, 8]
    assert [x for x, _ in points(figure, "loss")] == [1, 2, 3, 5, 6, 7, 9, 10]
    assert len(points(figure, "loss smoothed")) == 10  # from its neighbours


@pytest.mark.parametrize("loss", [math.nan, 2.0])
def test_figures_that_are_not_there_have_no_panel(loss: float, tmp_path: Path) -> None:
    keys = ("stage", "step", "steps", "loss", "accuracy", "learning_rate", "seconds")
    lines = [{key: step(n, loss=loss)[key] for key in keys} for n in range(1, 9)]

    figure = drawn(written(tmp_path, lines))

    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy", "learning rate"]
    plot_metrics(tmp_path)


def test_one_wild_loss_does_not_flatten_the_curve(tmp_path: Path) -> None:
    lines = [step(n, loss=2.0) for n in range(1, 401)]
    lines[200]["loss"] = 1e6

    assert drawn(written(tmp_path, lines)).axes[0].get_ylim()[1] < 10


def test_later_line_of_a_step_holds(tmp_path: Path) -> None:
    assert points(drawn(written(tmp_path, [step(1, loss=9.0), step(2), step(1, loss=1.0)])), "loss")[0] == (1, 1.0)


def test_smoothing_keeps_the_level_and_leaves_out_what_is_no_number() -> None:
    line = np.linspace(0, 1, 200)

    assert smoothed(np.where(np.arange(100) % 3 == 0, np.nan, 1.0)) == pytest.approx(1.0)
    assert smoothed(line)[20:180] == pytest.approx(line[20:180])
    assert abs(smoothed(line) - line).max() < 0.05
    assert smoothed(np.array([2.0])) == pytest.approx([2.0])
    assert np.isnan(smoothed(np.array([np.nan]))).all()
    assert len(smoothed(np.array([]))) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["holds no metrics.jsonl"]),
        ("", ["holds no step yet"]),
        ('{"stage": "fir', ["holds no step yet"]),
        ('{"stage": "a", "step": 1, "loss": 2}\nrubbish\n{"stage": "a", "step": 2, "loss": 2}\n', ["line 2"]),
        ('{"stage": "a"}\n', ["line 1"]),
        ("[1]\n", ["line 1"]),
        ('{"stage": "a", "step": 1e400}\n', ["line 1"]),
        ('{"stage": "a", "step": 1, "steps": "many"}\n', ["line 1"]),
    ],
)
def test_folder_that_holds_no_run_is_refused(content: str | None, words: list[str], tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)

    with pytest.raises(DataError) as told:
        plot_metrics(tmp_path)

    assert all(word in told.value.message for word in words)
    assert told.value.hint
    assert not (tmp_path / "metrics.png").exists()


def test_only_a_png_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        plot_metrics(written(tmp_path, [step(1)]), tmp_path / "curves.jpg")


def test_missing_matplotlib_is_told_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)

    with pytest.raises(ConfigError, match="matplotlib") as told:
        plot_metrics(written(tmp_path, [step(1)]))

    assert told.value.hint == 'pip install "minigpt4[train]"'


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_every_step(tmp_path: Path) -> None:
    tracker = Trackers(["tensorboard"], tmp_path, {"model": "nano", "stages": [{"steps": 3}]})
    for step in range(3):
        tracker.log({"loss": 2.0 - step, "images": 8}, step)
    tracker.finish()

    assert logged(tmp_path, "loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert logged(tmp_path, "images") == [(0, 8.0), (1, 8.0), (2, 8.0)]


def test_resumed_run_goes_on_in_the_same_log_and_repeats_no_step(tmp_path: Path) -> None:
    for start, loss in ((0, 1.0), (3, 2.0)):  # steps 3 and 4 came after the last checkpoint and are made again
        tracker = Trackers(["tensorboard"], tmp_path, {}, first_step=start)
        for step in range(start, start + 5):
            tracker.log({"loss": loss}, step)
        tracker.finish()

    assert logged(tmp_path, "loss") == [*((n, 1.0) for n in range(3)), *((n, 2.0) for n in range(3, 8))]


def test_figures_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    tracker = Trackers(["tensorboard"], tmp_path, {})
    for step, loss in enumerate([1.0, math.nan, None, math.inf, 5.0]):
        tracker.log({"loss": loss}, step)
    tracker.finish()

    assert logged(tmp_path, "loss") == [(0, 1.0), (4, 5.0)]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")

    with pytest.raises(StorageError, match="tensorboard"):
        Trackers(["tensorboard"], tmp_path, {})


@pytest.mark.parametrize(
    ("name", "cure"), [("tensorboard", 'pip install "minigpt4[train]"'), ("wandb", "pip install wandb")]
)
@pytest.mark.parametrize("there", ["nothing", "a folder of that name"])
def test_missing_library_is_told_with_its_cure(
    name: str, cure: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if there == "nothing" else ModuleSpec(name, None, is_package=True)
    monkeypatch.setattr(reports, "find_spec", lambda _: spec)

    for complaint in (lambda: check_trackers([name]), lambda: Trackers([name], tmp_path, {})):
        with pytest.raises(ConfigError, match=f"{name}, which is not installed") as told:
            complaint()
        assert told.value.hint == cure


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(ConfigError, match="'notebook'") as told:
        check_trackers(["tensorboard", "notebook"])

    assert "tensorboard or wandb" in told.value.hint


def test_weights_and_biases_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # it reads the environment once

    for start in (0, 2):
        tracker = Trackers(["wandb"], tmp_path, {"model": "nano"}, first_step=start)
        tracker.log({"loss": 0.625 + start, "empty": math.nan}, start)
        tracker.finish()

    wandb.teardown()  # a process of its own writes, which may be behind, and is waited for here

    started = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(started) == 2
    assert all(f"-{name}" in folder for folder in started)
    written = b"".join(path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert b"0.625" in written
    assert b"2.625" in written
    assert b"empty" not in written


def test_weights_and_biases_that_cannot_be_opened_is_told_and_closes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise wandb.Error("No API key\nconfigured.")

    closed = []
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.finish", lambda self: closed.append(self))

    with pytest.raises(ConfigError, match=r"cannot be opened: No API key configured$") as told:
        Trackers(["tensorboard", "wandb"], tmp_path, {})

    assert "WANDB_MODE=offline" in told.value.hint
    assert len(closed) == 1


TURNS = [{"from": who, "value": "a dog"} for who in ("human", "gpt")]


def described(folder: Path, talks: list[int], **layout: Any) -> str:
    """What is said of conversations of so many turns."""
    source = open_source(write(folder / "talk.json", [{"conversations": TURNS * number} for number in talks]))
    order = Order((len(talks),), (1.0,), 0, 0)
    layout_ = Layout(tiny_chat.processor(), **layout)
    return describe_texts(SourceBatches([source], order, layout_, ["Describe."], len(talks), batch_size=1), "own")


def test_the_lengths_of_answers_are_described(tmp_path: Path) -> None:
    assert re.fullmatch(
        r"stage own: answers of (\d+) tokens \(3 examples looked at\)", described(tmp_path, [1, 1, 1], max_turns=1)
    )
    assert re.fullmatch(
        r"stage own: answers of \d+ to \d+ tokens, half of them at most \d+, 95 % at most \d+ \(2 examples looked at\)",
        described(tmp_path, [1, 2], max_turns=2),
    )
    assert "WARNING: 100% lose their end, max_text_tokens is 3" in described(tmp_path, [1], max_text_tokens=3)


@pytest.mark.parametrize(("kind", "words"), [("template", "50% {} 2 questions"), ("original", "75% {} 1 question")])
def test_turns_that_are_left_out_are_no_lost_ends(kind: str, words: str, tmp_path: Path) -> None:
    sentence = described(tmp_path, [1, 2, 3, 3], kind=kind, max_turns=2)

    assert sentence.endswith("looked at); WARNING: " + words.format("lose what follows their first"))
