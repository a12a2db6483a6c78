"""A run's reports: its curves as one picture, its figures in TensorBoard and Weights & Biases, its texts in a sentence.

Works on a run in progress. Reading and drawing `metrics.jsonl` loads no torch.
"""

import json
import math
import secrets
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from minigpt4.errors import ConfigError, DataError, PromptError, UsageError
from minigpt4.text import counted
from minigpt4.training.run_folder import METRICS_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import storing

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from minigpt4.data.batches import SourceBatches

Values = NDArray[np.float64]

PLOT_FILE = "metrics.png"
FIGURES = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens", "images", "seconds", "memory_bytes")
"""Figures of an update's line in `metrics.jsonl`."""
EXAMPLES_LOOKED_AT = 200
"""Examples of a stage, from its first, whose texts are measured."""
SHARE_WORTH_A_WARNING = 0.01

_LIBRARIES = {"tensorboard": 'pip install "minigpt4[train]"', "wandb": "pip install wandb"}
"""The module of each tracker, which has its name, and how to install it."""
_BLUE, _ORANGE, _RED = "#0072B2", "#D55E00", "#B3001B"  # colour-blind people can tell them apart
_PANELS = {
    "accuracy": ("accuracy", None, 1.0),
    "learning rate": ("learning_rate", None, 1.0),
    "images / s": ("images", "seconds", 1.0),
    "target tokens / s": ("tokens", "seconds", 1.0),
    "gradient norm": ("grad_norm", None, 1.0),
    "memory (GB)": ("memory_bytes", None, 1e9),
}
"""The small panels: label to figure, the figure that divides it, and its unit."""


@dataclass(frozen=True)
class StageMetrics:
    """The lines of a stage in `metrics.jsonl`; a figure that a line lacks is NaN.

    Args:
        name: The stage's.
        start: Updates made in the stages before.
        steps: Updates planned.
        figures: `step`, counted from 1, and each of `FIGURES`, to the values `(n,)`.
        skipped: Whether the update was left out, `(n,)`.
        validation: `step` and `loss` of the validations, `(2, validations)`.
    """

    name: str
    start: int
    steps: int
    figures: dict[str, Values]
    skipped: NDArray[np.bool_]
    validation: Values

    @property
    def last(self) -> int:
        """The last update made."""
        return int(max(self.figures["step"].max(initial=0), self.validation[0].max(initial=0)))


def read_metrics(run_folder: Path) -> list[StageMetrics]:
    """Read a run's figures, stage by stage in the order of training.

    A last line without its end is left out, since a run in progress may be writing it. Of two lines of one step the
    later counts.

    Raises:
        DataError: There is no such file, it holds no step, or a line is no step of a run.
        StorageError: The file cannot be read.
    """
    path = run_folder / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{str(run_folder)!r} holds no {METRICS_FILE}", "name the output folder of a training run")
    with storing(path, doing="read"):
        lines = path.read_bytes().splitlines(keepends=True)
    steps: dict[str, dict[int, dict[str, Any]]] = {}
    validations: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            stage, step, _ = str(entry["stage"]), int(entry["step"]), int(entry.get("steps") or 0)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise DataError(f"line {number} of {path} is no step of a run", "remove the line") from error
        of_stage = steps.setdefault(stage, {}), validations.setdefault(stage, {})
        of_stage["validation_loss" in entry][step] = entry
    if not any(steps.values()):
        raise DataError(f"{path} holds no step yet", "wait for the first one")
    stages: list[StageMetrics] = []
    for name, entries in steps.items():
        start = stages[-1].start + stages[-1].last if stages else 0
        stages.append(_stage(name, start, list(entries.values()), list(validations[name].values())))
    return stages


def _stage(name: str, start: int, entries: list[dict[str, Any]], validations: list[dict[str, Any]]) -> StageMetrics:
    figures = {key: _values(entries, key) for key in ("step", *FIGURES)}
    return StageMetrics(
        name=name,
        start=start,
        steps=int(entries[-1].get("steps") or figures["step"].max()) if entries else 0,
        figures=figures,
        skipped=np.array([bool(entry.get("skipped")) for entry in entries], dtype=bool),
        validation=np.stack([_values(validations, "step"), _values(validations, "validation_loss")]),
    )


def _values(entries: list[dict[str, Any]], key: str) -> Values:
    values = [entry.get(key) for entry in entries]
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def smoothed(values: Values) -> Values:
    """Average each value with its neighbours, a twenty-fifth of all, more where there are few; NaN is left out."""
    if not len(values):
        return values
    half = max(len(values) // 50, min(len(values) // 10, 10))
    good, window = np.isfinite(values), np.ones(2 * half + 1)
    sums = np.convolve(np.where(good, values, 0.0), window, "same")
    counts = np.round(np.convolve(good.astype(float), window, "same"))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def plot_metrics(run_folder: Path, target: Path | None = None) -> Path:
    """Draw a run's curves into one PNG, 1200 pixels wide.

    Args:
        run_folder: The output folder of a run, finished or not.
        target: The file to write or replace; `PLOT_FILE` in the folder by default.

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
    try:
        from matplotlib import style
    except ImportError as error:
        raise ConfigError("plotting needs matplotlib", hint='pip install "minigpt4[train]"') from error
    # Whatever the person's own settings are; and a stage's name may have a dollar sign, or letters the font lacks.
    ours = {"text.parse_math": False, "font.size": 9, "axes.grid": True, "grid.alpha": 0.4}
    with style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = draw_metrics(read_metrics(run_folder), run_folder.resolve().name)
        with write_file(target) as file:
            figure.savefig(file, format="png")
    return target


def draw_metrics(stages: Sequence[StageMetrics], title: str) -> "Figure":
    """Draw the loss over the whole width, and below it two panels a row of the other figures that are known."""
    from matplotlib.figure import Figure

    panels = {}
    for label, (key, per, unit) in _PANELS.items():
        values = [_ratio(stage, key, per, unit) for stage in stages]
        if any(np.isfinite(of_stage).any() for of_stage in values):
            panels[label] = values
    rows = (len(panels) + 1) // 2
    figure = Figure(figsize=(8, 3.6 + 1.75 * rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[1.8] + [1.0] * rows)
    loss = figure.add_subplot(grid[0, :])
    _draw_curve(loss, "loss", stages, [stage.figures["loss"] for stage in stages])
    for stage in stages:
        left_out = stage.skipped | ~np.isfinite(stage.figures["loss"])
        step, label = stage.start + stage.figures["step"][left_out], "skipped or not a number"
        if len(step):
            foot = loss.get_xaxis_transform()
            loss.plot(step, 0.02 + 0 * step, "x", color=_RED, transform=foot, label=label, gid="skipped")
        step, values = stage.start + stage.validation[0], stage.validation[1]
        if len(step):
            loss.plot(step, values, "o-", markersize=4, color=_ORANGE, label="validation", gid="loss validation")
    for number, (label, values) in enumerate(panels.items()):
        _draw_curve(figure.add_subplot(grid[1 + number // 2, number % 2], sharex=loss), label, stages, values)
    figure.axes[-1].set_xlabel("step")
    handles = {label: handle for handle, label in zip(*loss.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle("\n".join(textwrap.wrap(f"{title}: {_summary(stages)}", 110)), x=0.01, ha="left", fontsize=9)
    return figure


def _ratio(stage: StageMetrics, key: str, per: str | None, unit: float) -> Values:
    values = stage.figures[key] / unit
    if per is None:
        return values
    amount = stage.figures[per]
    return values / np.where(amount > 0, amount, np.nan)


def _draw_curve(axes: "Axes", label: str, stages: Sequence[StageMetrics], values: Sequence[Values]) -> None:
    """Draw a figure's values and running mean over all stages, with a dashed line between two."""
    for stage, of_stage in zip(stages, values, strict=True):
        step = stage.start + stage.figures["step"]
        marker = "o" if np.isfinite(of_stage).sum() == 1 else ""  # a line needs two
        axes.plot(step, of_stage, marker=marker, color=_BLUE, alpha=0.3, lw=0.7, label="each step", gid=label)
        axes.plot(step, smoothed(of_stage), color=_BLUE, label="running mean", gid=f"{label} smoothed")
        if stage.start:
            axes.axvline(stage.start + 0.5, color="grey", linewidth=0.8, linestyle="--", gid="stage")
    axes.set_ylabel(label)
    axes.ticklabel_format(axis="y", scilimits=(-3, 6))
    good = np.concatenate(values)
    good = good[np.isfinite(good)]
    if len(good) and good.max() > 3 * (most := float(np.quantile(good, 0.995))) > 0:
        axes.set_ylim(top=1.3 * most)  # a single wild value would flatten the curve


def _summary(stages: Sequence[StageMetrics]) -> str:
    seconds = float(sum(np.nansum(stage.figures["seconds"]) for stage in stages))
    hours, minutes = divmod(round(seconds / 60), 60)
    took = f"{hours:,} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
    parts = [counted(stages[-1].start + stages[-1].last, "step")]
    parts += [f"{took} of updates"] if seconds else []  # validations and checkpoints took more
    parts += ["in progress"] if stages[-1].last < stages[-1].steps else []
    for stage in stages:
        done = f"{stage.last:,} of " if stage.last < stage.steps else ""
        parts.append(f"{stage.name} ({done}{counted(max(stage.steps, stage.last), 'step')})")
    return ", ".join(parts)


class Trackers:
    """The trackers that a recipe names, accelerate's, in the main process of a run."""

    def __init__(self, names: Sequence[str], run_folder: Path, config: Mapping[str, Any], first_step: int = 0) -> None:
        """Open them; a resumed run continues its own log.

        Args:
            names: `tensorboard` writes event files into the run's folder; `wandb` sends to the server it is logged in
                to, or, with `WANDB_MODE=offline`, writes into the run's folder.
            run_folder: The run's.
            config: The recipe as JSON.
            first_step: The next step to be logged. TensorBoard hides later figures, which an interrupted run left
                behind; Weights & Biases keeps the earlier figures.

        Raises:
            ConfigError: A name is unknown, a library is missing, or Weights & Biases is not logged in or not reached.
            StorageError: The run's folder cannot be written.
        """
        check_trackers(names)
        self._folder = run_folder
        self._open: list[GeneralTracker] = []
        openers = {"tensorboard": _tensorboard, "wandb": _weights_and_biases}
        try:
            for name in names:
                self._open.append(openers[name](run_folder, config, first_step))
        except BaseException:
            self.finish()
            raise

    def log(self, figures: Mapping[str, float | int | None], step: int) -> None:
        """Add figures, without None and what is not finite, at a step counted over all stages."""
        finite = {name: float(v) for name, v in figures.items() if v is not None and math.isfinite(v)}
        with storing(self._folder):
            for tracker in self._open:
                tracker.log(finite, step)

    def finish(self) -> None:
        """Write what is held back, and close."""
        with storing(self._folder):
            for tracker in self._open:
                tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that cannot work here, before anything is loaded.

    Raises:
        ConfigError: A name is unknown, or its library is not installed.
    """
    for name in names:
        if name not in _LIBRARIES:
            raise ConfigError(f"there is no tracker {name!r}", hint=f"expected {' or '.join(_LIBRARIES)}")
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name, such as wandb writes, is no library
            raise ConfigError(
                f"the tracker {name} needs the library {name}, which is not installed", hint=_LIBRARIES[name]
            )


def _tensorboard(run_folder: Path, config: Mapping[str, Any], first_step: int) -> "GeneralTracker":
    from accelerate.tracking import TensorBoardTracker

    with storing(run_folder / TENSORBOARD_FOLDER):
        resumed = (run_folder / TENSORBOARD_FOLDER).is_dir()
        tracker = TensorBoardTracker(TENSORBOARD_FOLDER, run_folder, purge_step=first_step if resumed else None)
        tracker.start()
        if not resumed:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            tracker.log({"recipe": textwrap.indent(text, "    ")}, 0)  # shown as Markdown
    return tracker


def _weights_and_biases(run_folder: Path, config: Mapping[str, Any], first_step: int) -> "GeneralTracker":
    import wandb  # type: ignore[import-not-found,unused-ignore]  # optional
    from accelerate.tracking import WandBTracker

    tracker = WandBTracker(
        "minigpt4",
        name=run_folder.resolve().name,
        id=_run_id(run_folder),
        resume="allow",
        dir=str(run_folder),
        config=dict(config),
        settings=wandb.Settings(silent=True),
    )
    try:
        tracker.start()
    except wandb.Error as error:
        raise ConfigError(
            f"Weights & Biases cannot be opened: {' '.join(str(error).split()).rstrip('.')}",
            hint="log in by `wandb login`, or set WANDB_MODE=offline and send it later by `wandb sync`",
        ) from error
    return tracker


def _run_id(run_folder: Path) -> str:
    """Return the id that a run got at its first start."""
    path = run_folder / WANDB_ID_FILE
    with storing(path, doing="read"):
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
    chosen = secrets.token_hex(8)
    with write_file(path, "w") as file:
        file.write(chosen + "\n")
    return chosen


def describe_texts(batches: "SourceBatches", stage: str) -> str:
    """Say how long the texts of a stage's first examples are and how many are cut, without opening a picture."""
    from minigpt4.data.packing import answer_lengths

    lengths: list[int] = []  # tokens learnt in each text
    cut = fewer = 0  # texts that lose the end of an answer, and texts that lose turns
    for place in range(min(EXAMPLES_LOOKED_AT, len(batches) * batches.batch_size)):
        try:
            example = batches.text(place)
        except (DataError, PromptError):
            continue  # counted when it is read for training
        answers = answer_lengths(example)
        lengths += answers
        cut += min(example.cut - example.turns_left_out, len(answers))
        fewer += min(example.turns_left_out, len(answers))
    if not lengths:
        return f"stage {stage}: none of its first examples can be used"
    shortest, longest = min(lengths), max(lengths)
    line = f"stage {stage}: answers of {counted(longest, 'token')}"
    if shortest < longest:
        middle, high = (quantiles(lengths, n=20, method="inclusive")[at] for at in (9, 18))
        line = f"stage {stage}: answers of {shortest} to {counted(longest, 'token')}, "
        line += f"half of them at most {middle:.0f}, 95 % at most {high:.0f}"
    line += f" ({counted(len(lengths), 'example')} looked at)"
    layout = batches.layout
    turns = 1 if layout.kind == "original" else layout.max_turns
    for count, loss in (
        (cut, f"their end, max_text_tokens is {layout.max_text_tokens}"),
        (fewer, f"what follows their first {counted(turns, 'question')}"),
    ):
        if (share := count / len(lengths)) > SHARE_WORTH_A_WARNING:
            line += f"; WARNING: {share:.0%} lose {loss}"
    return line
