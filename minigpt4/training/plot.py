"""The curves of a training run, as one picture: loss, accuracy, learning rate, throughput, gradient norm and memory.

Works on a run in progress, and without torch. Knows neither the model nor the recipe.
"""

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt4.errors import ConfigError, UsageError
from minigpt4.training.metrics import StageMetrics, Values, read_metrics, smoothed
from minigpt4.weights.files.atomic import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PLOT_FILE = "metrics.png"

_BLUE, _ORANGE, _RED = "#0072B2", "#D55E00", "#B3001B"  # told apart by colour-blind people too
_STYLE = {
    "figure.dpi": 150,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "savefig.dpi": "figure",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#808080",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a stage or a folder may have a dollar sign in its name
    "xtick.color": "#505050",
    "ytick.color": "#505050",
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}


def plot_metrics(run_folder: Path, target: Path | None = None) -> Path:
    """Draw a run's curves into one PNG, 1200 pixels wide.

    Args:
        run_folder: The output folder of a run, finished or not.
        target: The file to write or replace; `PLOT_FILE` in the folder where not given.

    Returns:
        The file.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: The run has no figures yet, or its file holds something else.
        StorageError: A file cannot be read or written.
        UsageError: The target's name does not end in `.png`.
    """
    target = target or run_folder / PLOT_FILE
    if target.suffix.lower() != ".png":
        raise UsageError(f"the picture's name is {str(target)!r}, expected one that ends in .png", "name it so")
    with _matplotlib():
        figure = draw_metrics(read_metrics(run_folder), run_folder.resolve().name)
        with write_file(target) as file:
            figure.savefig(file, format="png")
    return target


@contextmanager
def _matplotlib() -> Iterator[None]:
    """Draw in our own style, whatever the person's settings are."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise ConfigError("plotting needs matplotlib", hint='pip install "minigpt4[train]"') from error
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name the font has no letters for is boxes
        yield


@dataclass(frozen=True)
class _Curve:
    """A figure in its panel.

    Args:
        label: What it is.
        key: One of `metrics.FIGURES`.
        per: What it is divided by.
        unit: It is shown in multiples of this; 0 for a power of ten that suits it.
        smooth: Draw a running mean too.
        from_zero: The scale begins at 0.
    """

    label: str
    key: str
    per: str = ""
    unit: float = 1.0
    smooth: bool = True
    from_zero: bool = False

    def values(self, stage: StageMetrics) -> tuple[Values, Values]:
        """Return a stage's values step by step, and smoothed."""
        values = stage.figures[self.key]
        if not self.per:
            return values, smoothed(values)
        amount = stage.figures[self.per]
        amount = np.where(np.isfinite(values) & (amount > 0), amount, np.nan)
        return values / amount, smoothed(np.where(np.isnan(amount), np.nan, values)) / smoothed(amount)

    def known(self, stages: Sequence[StageMetrics]) -> bool:
        """Whether any step has it."""
        return any(np.isfinite(self.values(stage)[0]).any() for stage in stages)


_LOSS = _Curve("loss", "loss")
_PANELS = (
    _Curve("accuracy", "accuracy"),
    _Curve("learning rate", "learning_rate", unit=0, smooth=False),
    _Curve("images / s", "images", per="seconds", from_zero=True),
    _Curve("target tokens / s", "tokens", per="seconds", from_zero=True),
    _Curve("gradient norm", "grad_norm"),
    _Curve("memory (GB)", "memory_bytes", unit=1e9, smooth=False, from_zero=True),
)


def draw_metrics(stages: Sequence[StageMetrics], title: str) -> "Figure":
    """Draw the curves: the loss over the whole width, below it two panels a row of what else the lines say."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [curve for curve in _PANELS if curve.known(stages)]
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(8, 3.6 + 1.75 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[1.8] + [1.0] * rows)
    loss = figure.add_subplot(grid[0, :])
    _draw_panel(loss, _LOSS, stages)
    _mark_left_out(loss, stages)
    for number, curve in enumerate(panels):
        alone = number == len(panels) - 1 and number % 2 == 0
        place = grid[1 + number // 2, :] if alone else grid[1 + number // 2, number % 2]
        _draw_panel(figure.add_subplot(place, sharex=loss), curve, stages)
    for axes in figure.axes[-2 + len(panels) % 2 :] if panels else [loss]:
        axes.set_xlabel("step")
    heading = figure.suptitle(f"{title}: {_summary(stages)}", x=0.01, ha="left", fontsize=9.5, linespacing=1.6)
    kinds: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        kinds |= dict(zip(labels, handles, strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=len(kinds))
    _name_stages(figure, loss, stages, heading)
    return figure


def _draw_panel(axes: "Axes", curve: _Curve, stages: Sequence[StageMetrics]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for stage in stages:
        step, (values, mean) = stage.start + stage.step, curve.values(stage)
        marker = "o" if np.isfinite(values).sum() == 1 else ""  # a line needs two
        look: dict[str, Any] = {"color": _BLUE, "marker": marker, "markersize": 4}
        if curve.smooth:
            axes.plot(step, values, alpha=0.28, linewidth=0.7, label="each step", gid=curve.key, **look)
            axes.plot(step, mean, linewidth=1.6, label="running mean", gid=f"{curve.key} smoothed", **look)
        else:
            axes.plot(step, values, linewidth=1.6, gid=curve.key, **look)
    _draw_validation(axes, curve, stages)
    _limit(axes, curve, stages)
    unit, label = curve.unit, curve.label
    if not unit:
        exponent = math.floor(math.log10(max(float(np.nanmax(s.figures[curve.key], initial=0)) for s in stages) or 1))
        unit, label = 10.0**exponent, f"{label} (1e{exponent})"
    axes.set_ylabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:,.6g}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    for number, stage in enumerate(stages):
        if number:
            axes.axvline(stage.start + 0.5, color="#606060", linewidth=0.8, linestyle=(0, (4, 3)), gid="stage")
        if number % 2:
            axes.axvspan(stage.start + 0.5, stage.start + stage.last + 0.5, color="#eef1f5", linewidth=0, zorder=0)
    end = stages[-1].start + stages[-1].last
    axes.set_xlim(0.5 - 0.015 * end, end + 0.5 + 0.015 * end)


def _draw_validation(axes: "Axes", curve: _Curve, stages: Sequence[StageMetrics]) -> None:
    if curve.key not in stages[0].validation:
        return
    for stage in stages:
        step, values = stage.start + stage.validation["step"], stage.validation[curve.key]
        if np.isfinite(values).any():
            look: dict[str, Any] = {"color": _ORANGE, "markersize": 4.5, "markeredgecolor": "white", "linewidth": 1.0}
            axes.plot(step, values, marker="o", label="validation", gid=f"{curve.key} validation", zorder=3, **look)


def _limit(axes: "Axes", curve: _Curve, stages: Sequence[StageMetrics]) -> None:
    """Keep single outliers, three times higher than all but one of 200 values, from flattening the curve; mark them."""
    steps = np.concatenate([stage.start + stage.step for stage in stages])
    values = np.concatenate([curve.values(stage)[0] for stage in stages])
    good = values[np.isfinite(values)]
    if curve.from_zero:
        axes.set_ylim(0, 1.08 * float(good.max()) if len(good) and good.max() > 0 else 1)
    if not len(good) or good.max() <= 3 * (most := float(np.quantile(good, 0.995))) or most <= 0:
        return
    axes.set_ylim(top=1.3 * most)
    beyond = steps[np.isfinite(values) & (values > 1.3 * most)]
    axes.plot(
        beyond,
        np.full(len(beyond), 0.985),
        color=_BLUE,
        marker="^",
        markersize=4,
        linestyle="",
        transform=axes.get_xaxis_transform(),
        label="beyond the scale",
        gid=f"{curve.key} beyond",
    )


def _mark_left_out(axes: "Axes", stages: Sequence[StageMetrics]) -> None:
    """Mark the steps without an update or without a loss, at the foot of the panel."""
    left_out = [stage.start + stage.step[stage.skipped | ~np.isfinite(stage.figures["loss"])] for stage in stages]
    steps = np.concatenate(left_out)
    if len(steps):
        look: dict[str, Any] = {"color": _RED, "marker": "x", "markersize": 5, "linestyle": "", "clip_on": False}
        foot = axes.get_xaxis_transform()
        axes.plot(
            steps, np.full(len(steps), 0.02), transform=foot, label="skipped or not a number", gid="skipped", **look
        )


def _summary(stages: Sequence[StageMetrics]) -> str:
    last = stages[-1]
    seconds = float(sum(np.nansum(stage.figures["seconds"]) for stage in stages))
    done = last.start + last.last
    parts = [f"{done:,} step{'s' if done != 1 else ''}"]
    if seconds:
        hours, minutes = divmod(round(seconds / 60), 60)
        took = f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
        parts.append(f"{took} of updates")  # validations and checkpoints took more
    if last.last < last.steps:
        parts.append("in progress")
    return ", ".join(parts)


def _name_stages(figure: "Figure", axes: "Axes", stages: Sequence[StageMetrics], heading: "Text") -> None:
    """Write each stage's name above its part of the panel; else numbers, which the heading tells."""
    names = [f"{stage.name} ({_progress(stage)})" for stage in stages]
    look: dict[str, Any] = {"ha": "center", "va": "bottom", "gid": "stage name", "textcoords": "offset points"}
    places = [(stage.start + 0.5 + stage.last / 2, 1.0) for stage in stages]
    edge = axes.get_xaxis_transform()
    texts = [axes.annotate(name, place, (0, 3), edge, **look) for name, place in zip(names, places, strict=True)]
    figure.draw_without_rendering()
    if _apart(axes, texts):
        return
    for number, text in enumerate(texts, 1):
        text.set_text(str(number))
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(names, 1))
    heading.set_text("\n".join([heading.get_text(), *textwrap.wrap(listed, 100)]))
    figure.draw_without_rendering()
    _apart(axes, texts)


def _apart(axes: "Axes", texts: Sequence["Text"]) -> bool:
    """Move texts into the panel's width and apart from each other; tell whether none had to leave its place far."""
    frame, gap = axes.get_window_extent(), 8.0
    widths = [text.get_window_extent().width for text in texts]
    wanted = [float(axes.transData.transform((text.xy[0], 0))[0]) for text in texts]  # type: ignore[attr-defined]
    middles = list(wanted)
    right = frame.x1
    for number in range(len(texts) - 1, -1, -1):
        middles[number] = min(middles[number], right - widths[number] / 2)
        right = middles[number] - widths[number] / 2 - gap
    left = frame.x0
    for number, width in enumerate(widths):
        middles[number] = max(middles[number], left + width / 2)
        left = middles[number] + width / 2 + gap
    for text, middle, place in zip(texts, middles, wanted, strict=True):
        text.xyann = ((middle - place) * 72 / axes.figure.dpi, 3)  # type: ignore[attr-defined]
    shifts = [abs(middle - place) for middle, place in zip(middles, wanted, strict=True)]
    return left <= frame.x1 + gap + 1 and all(s <= w / 2 for s, w in zip(shifts, widths, strict=True))


def _progress(stage: StageMetrics) -> str:
    done = f"{stage.last:,} of " if stage.last < stage.steps else ""
    return f"{done}{max(stage.steps, stage.last):,} step{'s' if stage.steps != 1 else ''}"
