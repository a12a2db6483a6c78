"""Where a run's figures go besides `metrics.jsonl`: TensorBoard and Weights & Biases, both optional.

Each is opened in one process of a run. Knows neither the model nor the loop.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import yaml

from minigpt4.errors import ConfigError
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import storing

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id.txt"
WANDB_FOLDER = "wandb"
"""The name that its library gives to what it writes itself."""

_LIBRARIES = {"tensorboard": 'pip install "minigpt4[train]"', "wandb": "pip install wandb"}
"""The module each needs, which has the tracker's name, and how to get it."""


class Tracker(Protocol):
    """A place for figures."""

    def log(self, values: Mapping[str, float | int | None], step: int) -> None:
        """Add figures; what is None or not a finite number is left out, as no scale has a place for it.

        Args:
            values: Figures by name.
            step: Counted over all stages, so that it only rises.
        """

    def finish(self) -> None:
        """Write what is held back, and end."""


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


def open_trackers(
    names: Sequence[str], run_folder: Path, config: Mapping[str, Any], *, first_step: int = 0
) -> list[Tracker]:
    """Open trackers for a run, or go on with what an earlier start of it logged.

    Args:
        names: `tensorboard` writes event files into the run's folder; `wandb` sends to the server it is logged in to,
            or, with `WANDB_MODE=offline`, writes into the run's folder.
        run_folder: The run's.
        config: The recipe, as JSON would hold it.
        first_step: The next step to be logged; figures of it and later ones, which an interrupted run left behind, are
            hidden by TensorBoard. Weights & Biases keeps the earlier figures.

    Returns:
        The trackers, in the order of their names.

    Raises:
        ConfigError: A name is unknown, a library is not installed, or Weights & Biases is not logged in or not reached.
        StorageError: The run's folder cannot be written.
    """
    check_trackers(names)
    openers: dict[str, type[_TensorBoard] | type[_WeightsAndBiases]]
    openers = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}
    trackers: list[Tracker] = []
    try:
        for name in names:
            trackers.append(openers[name](run_folder, config, first_step))
    except BaseException:
        for tracker in trackers:
            tracker.finish()
        raise
    return trackers


def _finite(values: Mapping[str, float | int | None]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


class _TensorBoard:
    """Event files in the run's folder; `tensorboard --logdir` shows them."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_folder / TENSORBOARD_FOLDER
        self._folder = folder
        with storing(folder):
            resumed = folder.is_dir()
            self._writer = SummaryWriter(str(folder), purge_step=first_step if resumed else None)
        if not resumed:
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            self._writer.add_text("recipe", "    " + text.replace("\n", "\n    "), 0)  # shown as Markdown: as it stands

    def log(self, values: Mapping[str, float | int | None], step: int) -> None:
        """See `Tracker`."""
        with storing(self._folder):
            for name, value in _finite(values).items():
                self._writer.add_scalar(name, value, global_step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        with storing(self._folder):
            self._writer.close()


class _WeightsAndBiases:
    """A run of the project `minigpt4`, with the folder's name; its id lies in the folder, for a resumed run."""

    def __init__(self, run_folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        wandb: Any = import_module("wandb")  # optional, and the type checker cannot tell what is not installed

        try:
            self._run = wandb.init(
                project="minigpt4",
                name=run_folder.resolve().name,
                id=_run_id(run_folder),
                resume="allow",
                dir=str(run_folder),
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"Weights & Biases cannot be opened: {reason}",
                hint="log in by `wandb login`, or set WANDB_MODE=offline and send it later by `wandb sync`",
            ) from error

    def log(self, values: Mapping[str, float | int | None], step: int) -> None:
        """See `Tracker`."""
        self._run.log(_finite(values), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _run_id(run_folder: Path) -> str:
    """Return the id that a run has had since its first start."""
    path = run_folder / WANDB_ID_FILE
    with storing(path, doing="read"):
        if path.exists():
            return path.read_text(encoding="utf-8").strip()
    chosen = secrets.token_hex(8)
    with write_file(path, "w") as file:
        file.write(chosen + "\n")
    return chosen
