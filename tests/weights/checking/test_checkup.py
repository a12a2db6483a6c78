"""Whether a model will run here is told before it is loaded, with what to change if not."""

import json
from pathlib import Path

import pytest

from minigpt4.errors import ConfigError, StorageError, WeightsError
from minigpt4.weights.checking import checkup
from minigpt4.weights.checking.checkup import check_up
from minigpt4.weights.checking.machine import Cache, Device, Library
from minigpt4.weights.checking.sanity import Sanity
from tests import tiny_chat

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny full folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny_chat.model().save_pretrained(folder)
    tiny_chat.tokenizer().save_pretrained(folder)
    return str(folder)


def with_free(monkeypatch: pytest.MonkeyPatch, gigabytes: float) -> None:
    """Let the machine have a CPU with so much memory free."""
    free = int(gigabytes * GIGABYTE)
    monkeypatch.setattr(checkup, "devices", lambda: [Device("cpu", "a CPU", free, 64 * GIGABYTE)])


def test_model_that_fits_has_no_problem(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 8)
    found = check_up(folder, check_weights=False)
    assert found.problems == []
    assert found.placement is not None
    assert (found.placement.device, found.placement.dtype) == ("cpu", "float32")
    assert found.placement.context == tiny_chat.CONTEXT
    assert found.need is not None
    assert found.need.total < 2 * GIGABYTE
    assert json.loads(json.dumps(found.as_dict()))["need"]["total"] == found.need.total


def test_model_that_does_not_fit_is_told_with_the_nearest_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1.4)
    found = check_up("nano", num_beams=4, check_weights=False)
    [problem] = found.problems
    assert isinstance(problem, ConfigError)
    assert "nano needs 2.1 GB of memory on cpu, 1.4 GB are free" in problem.message
    assert "--num-beams 1" in problem.hint
    assert found.nearest is not None


def test_model_that_fits_nowhere_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0.1)
    [problem] = check_up("nano", check_weights=False).problems
    assert "nothing that can be chosen" in problem.hint


def test_longer_context_than_the_model_reads_is_refused(folder: str) -> None:
    [problem] = check_up(folder, context=tiny_chat.CONTEXT + 1, check_weights=False).problems
    assert str(tiny_chat.CONTEXT) in problem.message
    assert problem.hint == f"use --context {tiny_chat.CONTEXT}"


def test_device_and_model_that_do_not_exist_are_problems_not_tracebacks() -> None:
    [problem] = check_up("nano", device="cuda:7", check_weights=False).problems
    assert "cuda:7 is not available" in problem.message
    [problem] = check_up("nonesuch").problems
    assert isinstance(problem, WeightsError)


def test_small_models_weights_are_looked_at_unasked(folder: str) -> None:
    found = check_up(folder)
    assert found.sanity is not None
    [problem] = found.problems
    assert "does not know English" in problem.message  # it is random
    assert folder in problem.message


def test_large_models_weights_are_looked_at_when_asked(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "SMALL_MODEL_BYTES", 1000)
    found = check_up(folder)
    assert found.sanity is None
    assert "--check-weights" in found.notes[-1]
    monkeypatch.setattr(checkup, "check_language_model", lambda folder: Sanity(loss=1.0, chance=6.0))
    assert check_up(folder, check_weights=True).sanity == Sanity(loss=1.0, chance=6.0)


def test_nano_that_is_not_here_yet_needs_room_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkup, "cache_folder", lambda folder: Cache(folder, 100_000_000))
    found = check_up("nano")
    [problem] = found.problems
    assert isinstance(problem, StorageError)
    assert "0.1 GB are free" in problem.message
    assert "not been fetched" in found.notes[-1]


def test_library_of_a_wrong_version_is_the_first_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "libraries", lambda: [Library("torch", "2.9.1", ">=2.10", False)])
    problem = check_up("nonesuch").problems[0]
    assert problem.message.startswith("torch is version 2.9.1, minigpt4")


def test_cache_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "file"))
    problem = check_up("nano", check_weights=False).problems[0]
    assert isinstance(problem, StorageError)
    assert "MINIGPT4_HOME" in problem.hint
