"""A run's figures as arrays: what `metrics.jsonl` says of each stage.

Needs no torch, and works on a run in progress. Draws nothing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt4.errors import DataError
from minigpt4.training.run_folder import METRICS_FILE
from minigpt4.weights.files.disk import storing

Values = NDArray[np.float64]

FIGURES = ("loss", "accuracy", "learning_rate", "grad_norm", "tokens", "images", "seconds", "memory_bytes")
"""What a step's line may say, besides its stage and number."""


@dataclass(frozen=True)
class StageMetrics:
    """What a stage's lines say; a figure that a line lacks is NaN.

    Args:
        name: The stage's.
        start: Steps taken in the stages before.
        steps: Steps planned.
        step: Steps that have a line, counted from 1, `(n,)`.
        figures: One of `FIGURES` to its values, `(n,)`.
        skipped: Whether the step's update was left out, `(n,)`.
        validation: `step` and `loss` to their values, `(validations,)`.
    """

    name: str
    start: int
    steps: int
    step: Values
    figures: dict[str, Values]
    skipped: NDArray[np.bool_]
    validation: dict[str, Values]

    @property
    def last(self) -> int:
        """The last step taken."""
        return int(max(self.step.max(initial=0), self.validation["step"].max(initial=0)))


def read_metrics(run_folder: Path) -> list[StageMetrics]:
    """Read a run's figures, stage by stage in the order in which they were trained.

    A last line that is cut off is left out, as a run in progress may be writing it. Of two lines of one step the later
    holds.

    Raises:
        DataError: There is no such file, it holds no step, or a line is none of ours.
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
        steps.setdefault(stage, {})
        (validations if "validation_loss" in entry else steps).setdefault(stage, {})[step] = entry
    if not any(steps.values()):
        raise DataError(f"{path} holds no step yet", "wait for the first one")
    stages: list[StageMetrics] = []
    for name, entries in steps.items():
        start = stages[-1].start + stages[-1].last if stages else 0
        stages.append(_stage(name, start, list(entries.values()), list(validations.get(name, {}).values())))
    return stages


def _stage(name: str, start: int, entries: list[dict[str, Any]], validations: list[dict[str, Any]]) -> StageMetrics:
    step = _values(entries, "step")
    return StageMetrics(
        name=name,
        start=start,
        steps=int(entries[-1].get("steps") or step.max()) if entries else 0,
        step=step,
        figures={key: _values(entries, key) for key in FIGURES},
        skipped=np.array([bool(entry.get("skipped")) for entry in entries], dtype=bool),
        validation={
            "step": _values(validations, "step"),
            "loss": _values(validations, "validation_loss"),
        },
    )


def _values(entries: list[dict[str, Any]], key: str) -> Values:
    values = [entry.get(key) for entry in entries]
    return np.array([value if isinstance(value, int | float) else np.nan for value in values], dtype=np.float64)


def smoothed(values: Values) -> Values:
    """Average each value with its neighbours; values that are no number are left out.

    The window is a twenty-fifth of the values, wider where they are few, and shrinks to a quarter towards both ends, so
    that a curve begins and ends close to where its values do.
    """
    count = len(values)
    half = max(count // 50, min(count // 10, 10))
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(count)
    reach = np.clip(np.minimum(place, count - 1 - place), half // 4, half)
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, count)
    inside, total = counts[end] - counts[first], sums[end] - sums[first]
    return np.divide(total, inside, out=np.full(count, np.nan), where=inside > 0)
