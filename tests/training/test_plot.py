"""The picture of a run shows every step, validation and stage that its file holds, whatever state the run is in."""

import builtins
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from minigpt4.errors import ConfigError, DataError, UsageError
from minigpt4.training.metrics import read_metrics, smoothed
from minigpt4.training.plot import draw_metrics, plot_metrics


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


def panel(figure: Figure, label: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_ylabel() == label)


def points(figure: Figure, gid: str) -> list[tuple[float, float]]:
    """All drawn points of a curve, those that are no number left out."""
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_gid() == gid]
    found = [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]
    return [point for point in found if math.isfinite(point[1])]


def stage_names(figure: Figure) -> list[Text]:
    return [text for text in figure.axes[0].texts if text.get_gid() == "stage name"]


def test_every_step_of_both_stages_is_drawn_one_stage_after_the_other(tmp_path: Path) -> None:
    lines = [step(n) for n in range(1, 41)] + [step(n, "second", steps=10, loss=1.0) for n in range(1, 11)]

    figure = drawn(written(tmp_path, lines))

    assert points(figure, "loss") == [(n, 5 / n) for n in range(1, 41)] + [(40 + n, 1.0) for n in range(1, 11)]
    assert [x for x, _ in points(figure, "loss smoothed")] == list(range(1, 51))
    assert points(figure, "images") == [(n, 4.0) for n in range(1, 51)]
    assert points(figure, "tokens") == [(n, 100.0) for n in range(1, 51)]
    assert points(figure, "grad_norm") == [(n, 1.0) for n in range(1, 51)]
    assert points(figure, "learning_rate") == [(n, 1e-4) for n in range(1, 51)]
    assert panel(figure, "learning rate (1e-4)")
    assert panel(figure, "memory (GB)")
    borders = [line for axes in figure.axes for line in axes.get_lines() if line.get_gid() == "stage"]
    assert [line.get_xdata()[0] for line in borders] == [40.5] * len(figure.axes)
    assert [text.get_text() for text in stage_names(figure)] == ["first (40 steps)", "second (10 steps)"]


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


def test_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    figure = drawn(written(tmp_path, [step(1), step(2)], rest='{"stage": "first", "st'))

    assert [x for x, _ in points(figure, "loss")] == [1, 2]
    assert "in progress" in figure.get_suptitle()
    assert stage_names(figure)[0].get_text() == "first (2 of 40 steps)"


def test_one_step_can_be_seen(tmp_path: Path) -> None:
    figure = drawn(written(tmp_path, [step(1)]))

    assert points(figure, "loss smoothed") == [(1, 5.0)]
    line = next(line for line in figure.axes[0].get_lines() if line.get_gid() == "loss smoothed")
    assert line.get_marker() == "o"
    assert figure.get_suptitle() == "run: 1 step, 2 s of updates, in progress"


def test_skipped_steps_and_losses_that_are_no_number_are_marked(tmp_path: Path) -> None:
    lines = [step(n) for n in range(1, 11)]
    lines[3] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    lines[5] |= {"skipped": True}
    lines[7] |= {"loss": None}

    figure = drawn(written(tmp_path, lines))

    assert [x for x, _ in points(figure, "skipped")] == [4, 6, 8]
    assert [x for x, _ in points(figure, "loss")] == [1, 2, 3, 5, 6, 7, 9, 10]
    assert len(points(figure, "loss smoothed")) == 10  # its neighbours know
    plot_metrics(tmp_path)


def test_a_run_that_never_had_a_loss_is_still_drawn(tmp_path: Path) -> None:
    lines = [step(n, loss=math.nan, grad_norm=math.nan, accuracy=math.nan, skipped=True) for n in (1, 2, 3)]

    figure = drawn(written(tmp_path, lines))

    assert len(points(figure, "skipped")) == 3
    plot_metrics(tmp_path)


def test_lines_that_lack_figures_show_what_they_have(tmp_path: Path) -> None:
    keys = ("stage", "step", "steps", "loss", "accuracy", "learning_rate", "seconds")
    figure = drawn(written(tmp_path, [{key: step(n)[key] for key in keys} for n in range(1, 9)]))

    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss", "accuracy", "learning rate (1e-4)"]


def test_one_wild_loss_does_not_flatten_the_curve(tmp_path: Path) -> None:
    lines = [step(n, loss=2.0) for n in range(1, 401)]
    lines[200]["loss"] = 1e6

    figure = drawn(written(tmp_path, lines))

    assert figure.axes[0].get_ylim()[1] < 10
    assert [x for x, _ in points(figure, "loss beyond")] == [201]


@pytest.mark.parametrize(
    "stages",
    [
        [("words", 40), ("chat", 40)],
        [("words", 2000), ("captions", 100), ("conversations", 150), ("names", 90)],
        [("a name so long that it leaves no room beside it, for it goes on and on and on", 30), ("chat", 30)],
        [("words", 500), ("one", 1), ("two", 1), ("three", 1)],
    ],
    ids=["two", "short last ones", "long name", "very short last ones"],
)
def test_stage_names_lie_inside_and_apart(stages: list[tuple[str, int]], tmp_path: Path) -> None:
    lines = [step(n, name, steps=steps) for name, steps in stages for n in range(1, steps + 1)]

    figure = drawn(written(tmp_path, lines))

    figure.draw_without_rendering()
    frame = figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in stage_names(figure)]
    assert len(boxes) == len(stages)
    assert frame.x0 - 1 <= boxes[0].x0 and boxes[-1].x1 <= frame.x1 + 1
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    told = " ".join([figure.get_suptitle(), *(text.get_text() for text in stage_names(figure))])
    assert all(name in told.replace("\n", " ") for name, _ in stages)


def test_no_labels_of_the_picture_overlap(tmp_path: Path) -> None:
    lines = [step(n, "words", steps=300, loss=9.0 - n / 40, grad_norm=n, tokens=10**5 * n) for n in range(1, 301)]
    lines += [step(n, "chat", steps=20, loss=1e-3 * n) for n in range(1, 15)]

    figure = drawn(written(tmp_path, lines))

    figure.draw_without_rendering()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert len(boxes) > 60
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for _, box in boxes)
    clashes = [
        (a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[i + 1 :] if one.padded(-1).overlaps(other)
    ]
    assert clashes == []


def test_names_are_written_as_they_stand(tmp_path: Path) -> None:
    figure = drawn(written(tmp_path, [step(1, "$a_b$ \u4e16")]))

    assert stage_names(figure)[0].get_text().startswith("$a_b$")
    plot_metrics(tmp_path)


def test_later_line_of_a_step_holds(tmp_path: Path) -> None:
    assert points(drawn(written(tmp_path, [step(1, loss=9.0), step(2), step(1, loss=1.0)])), "loss")[0] == (1, 1.0)


def test_smoothing_keeps_the_level_and_both_ends() -> None:
    line = np.linspace(0, 1, 200)

    assert smoothed(np.full(50, 3.0)) == pytest.approx(3.0)
    assert smoothed(line)[20:180] == pytest.approx(line[20:180])
    assert abs(smoothed(line) - line).max() < 0.01
    assert smoothed(np.array([2.0])) == pytest.approx([2.0])
    assert np.isnan(smoothed(np.array([np.nan]))).all()
    assert len(smoothed(np.array([]))) == 0


def test_smoothing_leaves_out_what_is_no_number() -> None:
    noisy = np.where(np.arange(100) % 3 == 0, np.nan, 1.0)

    assert smoothed(noisy) == pytest.approx(1.0)


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
