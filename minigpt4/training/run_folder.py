"""A run's folder: one run at a time, one recipe, and its files of lines.

`recipe.json` is the recipe the run began with, `sources.json` the records its data had; `metrics.jsonl` has a line for
every update and validation, `bad_samples.jsonl` one for every example that could not be used.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minigpt4.errors import ConfigError, MiniGPT4Error, StorageError
from minigpt4.training.recipe import Recipe
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import fsync, fsync_folder, make_folder, storing

METRICS_FILE = "metrics.jsonl"
BAD_SAMPLES_FILE = "bad_samples.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_NAME = re.compile(r"stage(\d+)-step(\d+)")
RECIPE_FILE = "recipe.json"
SOURCES_FILE = "sources.json"
LOCK_FILE = ".run.lock"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb_id.txt"
WANDB_FOLDER = "wandb"
COMPOSED_FOLDER = "model"
"""The full model that a recipe of parts begins with."""

CHANGEABLE = (
    "output", "workers", "checkpoint_steps", "keep_checkpoints", "report_to", "validation", "max_bad_fraction",
    "max_skipped_steps", "gradient_checkpointing", "stages.*.threads",
)  # fmt: skip
"""Keys that may differ when a run is resumed: they change nothing that is learnt."""

_OF_A_START = (RECIPE_FILE, SOURCES_FILE, LOCK_FILE, TENSORBOARD_FOLDER, WANDB_ID_FILE, WANDB_FOLDER)
"""Files and folders that a start writes before its first update, and takes back if it is refused."""

_OF_THE_CHECKPOINT = ("trainable", "lora")
"""Keys that decide which tensors a checkpoint holds: `--force` cannot change them."""


def metrics_path(output: Path) -> Path:
    """Return the file of a run's figures, one JSON object a line."""
    return output / METRICS_FILE


@contextmanager
def only_run(output: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; what a refused start wrote is removed, if no run began there.

    Raises:
        ConfigError: Another process trains in it, or it is a file.
        StorageError: It cannot be made.
    """
    if output.is_file():
        raise ConfigError(f"the output {output} is a file, expected a folder", hint="set another output")
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    before = {path.name for path in output.iterdir()} if output.is_dir() else set()
    make_folder(output)
    with _held(output):
        try:
            yield
        except MiniGPT4Error:
            _take_back(output, before, made)
            raise


def _take_back(output: Path, before: Collection[str], made: Sequence[Path]) -> None:
    """Remove what a refused start has written, and the folders it made, innermost first; nothing if a run has begun."""
    new = {path.name for path in output.iterdir()} - set(before)
    if RECIPE_FILE in before or not new <= set(_OF_A_START):
        return
    with suppress(OSError):  # the refusal is what matters
        for name in new:
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:
            folder.rmdir()


@contextmanager
def _held(output: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    # A lock of the process and not of the open file (filelock's), which forked workers would hold after a kill.
    with storing(output / LOCK_FILE):
        file = (output / LOCK_FILE).open("w")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process trains in {output}", hint="wait for it, or set another output"
            ) from error
        yield


def check_recipe(recipe: Recipe, processes: int, *, force: bool) -> None:
    """Compare a recipe with the one its run began with, or record it for a new run.

    Args:
        recipe: The recipe now.
        processes: Their number now.
        force: Continue although they differ, and record the new recipe; not if all updates were made, or if other
            tensors would be trained.

    Raises:
        ConfigError: They differ in what is learnt; names the keys.
        StorageError: It cannot be written.
    """
    path = recipe.output / RECIPE_FILE
    now = {**_flat(recipe.model_dump(mode="json")), "processes": processes}
    # Before its first update nothing of a run depends on its recipe but a composed model.
    begun = path.exists() and any((recipe.output / name).exists() for name in (METRICS_FILE, COMPOSED_FOLDER))
    ended = has_ended(recipe.output, len(recipe.stages))
    if begun:
        before = _read_object(path)
        if before is None:
            raise ConfigError(
                f"{path} is damaged, so that nobody can tell with which recipe the run began",
                hint="delete that file if the recipe is the same, and the run goes on; else set another output",
            )
        differing = sorted(
            key for key in now.keys() | before.keys() if now.get(key) != before.get(key) and not _may_change(key)
        )
        final = ended or any(key.split(".")[0] in _OF_THE_CHECKPOINT for key in differing)
        if differing and (final or not force):
            listed = ", ".join(f"{key} ({before.get(key)!r}, now {now.get(key)!r})" for key in differing[:5])
            hint = "set another output, undo the change, or go on with it by --force"
            if ended:
                hint = "that run has ended and learns no more: set another output, or undo the change"
            elif final:
                hint = "its checkpoints hold other numbers: set another output, or undo it"
            raise ConfigError(f"the run in {recipe.output} began with another recipe: {listed}", hint=hint)
    with resumable(), write_file(path, "w") as file:
        json.dump(now, file, indent=1)


def _may_change(key: str) -> bool:
    parts = key.split(".")
    starred = ".".join("*" if part.isdecimal() else part for part in parts)
    return starred in CHANGEABLE or parts[0] in CHANGEABLE


def _flat(value: Any, key: str = "") -> dict[str, Any]:  # noqa: ANN401  (JSON)
    """Return a tree of dicts and lists as one dict of dotted keys."""
    if not isinstance(value, dict | list) or not value:
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, inner in items for k, v in _flat(inner, f"{key}.{name}" if key else str(name)).items()}


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where the file holds something else."""
    content: Any = None
    with storing(path, doing="read"), suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else None


def check_sources(
    output: Path, now: Mapping[str, Mapping[str, Any]], *, num_stages: int, force: bool, say: Callable[[str], None]
) -> None:
    """Compare the records of the sources with those when the run began, or record them for a new run.

    The order of the examples is a function of how many there are: with another number, a run that goes on would read
    some twice and leave out others.

    Args:
        output: The run's folder.
        now: `path`, number of `records` and `identity` of each source, by its key in the recipe.
        num_stages: Of the run.
        force: Continue with another number of records, and record it.
        say: Called with a sentence if there are as many records but other ones, which somebody may have mended.

    Raises:
        ConfigError: There are more or fewer.
        StorageError: The file cannot be read or written.
    """
    path = output / SOURCES_FILE
    goes_on = path.exists() and (output / METRICS_FILE).exists() and not has_ended(output, num_stages)
    before = (_read_object(path) or {}) if goes_on else {}
    for place, source in now.items():
        old = before.get(place)
        if not isinstance(old, dict) or old.get("path") != source["path"]:
            continue  # a new run, or another source, which `check_recipe` allowed
        if old.get("records") != source["records"] and not force:
            raise ConfigError(
                f"{source['path']} had {old.get('records')} records when the run in {output} began, and now has "
                f"{source['records']}: examples would come twice, or not at all",
                hint="bring back what was there, set another output, or go on in another order by --force",
            )
        if old.get("identity") != source["identity"]:
            say(f"{source['path']} has other records than when the run began")
    with resumable(), write_file(path, "w") as file:
        json.dump(now, file, indent=1)


def has_ended(output: Path, num_stages: int) -> bool:
    """Return whether a run has made all its updates, by its newest checkpoint's name."""
    newest = next(newest_first(output), None)
    return newest is not None and place_of(newest)[0] >= num_stages


def newest_first(output: Path) -> Iterator[Path]:
    """Iterate over the checkpoints of a run, the last one first."""
    found = (output / CHECKPOINT_FOLDER).glob("stage*-step*")
    named = [path for path in found if CHECKPOINT_NAME.fullmatch(path.name)]
    return iter(sorted(named, key=place_of, reverse=True))


def place_of(checkpoint: Path) -> list[int]:
    """Return the stage and the step of a checkpoint."""
    return [int(number) for number in CHECKPOINT_NAME.findall(checkpoint.name)[0]]


@contextmanager
def resumable() -> Iterator[None]:
    """Give failing writes exit status 3, that of a run that the same command continues.

    Raises:
        StorageError: What the block raised.
    """
    try:
        yield
    except StorageError as error:
        error.exit_status = 3  # of this error alone
        raise


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append a line of JSON to a file; NaN and infinity, which JSON does not have, become null.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _in_json(value) for key, value in content.items()}, allow_nan=False) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", hint="make room, then run it again") from error


def _in_json(value: Any) -> Any:  # noqa: ANN401  (JSON)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush_lines(output: Path) -> None:
    """Flush the lines to the disk: a checkpoint must not outlive those of the updates before it.

    Raises:
        StorageError: It cannot be done.
    """
    with storing(output):
        for path in (output / METRICS_FILE, output / BAD_SAMPLES_FILE):
            if path.exists():
                fsync(path)
        fsync_folder(output)


def forget_lines_after(recipe: Recipe, stage: int, step: int) -> None:
    """Remove the lines of updates that will be made again, and what a crash left of a line."""
    numbers = {stage.name: number for number, stage in enumerate(recipe.stages)}
    for name in (METRICS_FILE, BAD_SAMPLES_FILE):
        path = recipe.output / name
        if not path.exists():
            continue
        kept = []
        with storing(path, doing="read"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            if not line.endswith("\n"):
                break
            try:
                content = json.loads(line)
            except ValueError:
                break  # the power failed: what the last checkpoint counts on was on the disk before it
            if (numbers.get(content["stage"], -1), content["step"]) <= (stage, step):
                kept.append(line)
        with write_file(path, "w") as file:
            file.writelines(kept)
