"""Trackers get every figure, go on where an interrupted run stopped, and say beforehand what they lack."""

import math
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import wandb

from minigpt4.errors import ConfigError, StorageError
from minigpt4.training import trackers
from minigpt4.training.trackers import check_trackers, open_trackers


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_every_step(tmp_path: Path) -> None:
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {"model": "nano", "stages": [{"steps": 3}]})
    for step in range(3):
        tracker.log({"loss": 2.0 - step, "images": 8}, step)
    tracker.finish()

    assert logged(tmp_path, "loss") == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert logged(tmp_path, "images") == [(0, 8.0), (1, 8.0), (2, 8.0)]


def test_resumed_run_goes_on_in_the_same_log_and_repeats_no_step(tmp_path: Path) -> None:
    for start, loss in ((0, 1.0), (3, 2.0)):  # steps 3 and 4 came after the last checkpoint and are made again
        (tracker,) = open_trackers(["tensorboard"], tmp_path, {}, first_step=start)
        for step in range(start, start + 5):
            tracker.log({"loss": loss}, step)
        tracker.finish()

    assert logged(tmp_path, "loss") == [*((n, 1.0) for n in range(3)), *((n, 2.0) for n in range(3, 8))]


def test_figures_that_are_no_number_are_left_out(tmp_path: Path) -> None:
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    for step, loss in enumerate([1.0, math.nan, None, math.inf, 5.0]):
        tracker.log({"loss": loss}, step)
    tracker.finish()

    assert logged(tmp_path, "loss") == [(0, 1.0), (4, 5.0)]


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file")

    with pytest.raises(StorageError, match="tensorboard"):
        open_trackers(["tensorboard"], tmp_path, {})


def test_no_trackers_need_nothing(tmp_path: Path) -> None:
    assert open_trackers([], tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "cure"), [("tensorboard", 'pip install "minigpt4[train]"'), ("wandb", "pip install wandb")]
)
@pytest.mark.parametrize("there", ["nothing", "a folder of that name"])
def test_missing_library_is_told_with_its_cure(
    name: str, cure: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if there == "nothing" else ModuleSpec(name, None, is_package=True)
    monkeypatch.setattr(trackers, "find_spec", lambda _: spec)

    for complaint in (lambda: check_trackers([name]), lambda: open_trackers([name], tmp_path, {})):
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
        (tracker,) = open_trackers(["wandb"], tmp_path, {"model": "nano"}, first_step=start)
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
    class Refusal(Exception):  # noqa: N818  (stands for the library's own class)
        pass

    class Library:
        Error = Refusal

        @staticmethod
        def Settings(**options: object) -> None:  # noqa: N802
            """Stand for the library's own class."""

        @staticmethod
        def init(**options: object) -> None:
            raise Refusal("No API key\nconfigured.")

    closed = []
    monkeypatch.setattr(trackers, "find_spec", lambda name: ModuleSpec(name, None, origin="here"))
    monkeypatch.setattr(trackers, "import_module", lambda name: Library)
    monkeypatch.setattr(trackers._TensorBoard, "finish", lambda self: closed.append(self))

    with pytest.raises(ConfigError, match=r"cannot be opened: No API key configured$") as told:
        open_trackers(["tensorboard", "wandb"], tmp_path, {})

    assert "WANDB_MODE=offline" in told.value.hint
    assert len(closed) == 1
