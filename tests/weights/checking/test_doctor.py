"""The doctor says before a model is loaded whether it will run here, and what to change if not."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from minigpt4.errors import ConfigError, StorageError, WeightsError
from minigpt4.weights.checking import doctor
from minigpt4.weights.checking.doctor import Cache, Device, Library, check_up
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
    monkeypatch.setattr(doctor, "devices", lambda: [Device("cpu", "a CPU", free, 64 * GIGABYTE)])


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


def test_model_that_does_not_fit_is_a_problem_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 1.4)
    [problem] = check_up("nano", num_beams=4, check_weights=False).problems
    assert isinstance(problem, ConfigError)
    assert "nano needs 2.1 GB of memory on cpu, 1.4 GB are free" in problem.message
    assert "--num-beams" in problem.hint


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
    monkeypatch.setattr(doctor, "SMALL_MODEL_BYTES", 1000)
    found = check_up(folder)
    assert found.sanity is None
    assert "--check-weights" in found.notes[-1]
    monkeypatch.setattr(doctor, "check_language_model", lambda folder: Sanity(loss=1.0, chance=6.0))
    assert check_up(folder, check_weights=True).sanity == Sanity(loss=1.0, chance=6.0)


def test_nano_that_is_not_here_yet_needs_room_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "cache_folder", lambda folder: Cache(folder, 100_000_000))
    found = check_up("nano")
    [problem] = found.problems
    assert isinstance(problem, StorageError)
    assert "0.1 GB are free" in problem.message
    assert "not been fetched" in found.notes[-1]


def test_library_of_a_wrong_version_is_the_first_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "libraries", lambda: [Library("torch", "2.9.1", ">=2.10", False)])
    problem = check_up("nonesuch").problems[0]
    assert problem.message.startswith("torch is version 2.9.1, minigpt4")


def test_cache_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "file"))
    problem = check_up("nano", check_weights=False).problems[0]
    assert isinstance(problem, StorageError)
    assert "MINIGPT4_HOME" in problem.hint


@pytest.mark.parametrize(
    ("limit", "used", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["second version", "first version"],
)
def test_container_with_less_memory_counts(limit: str, used: str, cached: str, tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("100000000\n")
    (tmp_path / used).write_text("70000000\n")
    (tmp_path / used).with_name("memory.stat").write_text(f"anon 1\n{cached} 20000000\n")
    assert doctor.memory(tmp_path) == (50_000_000, 100_000_000)


def test_cpu_is_the_first_device() -> None:
    first = doctor.devices()[0]
    assert first.name == "cpu"
    assert first.description
    assert 0 < first.free <= first.total
    assert doctor.cores() >= 1


def test_library_outside_its_range_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.9.1", "transformers": "5.20.0", "peft": "0.19"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    promised = [
        "torch>=2.10",
        "transformers<6,>=5.19",
        "rich>=14",
        'peft>=0.18; extra == "train"',
        'matplotlib>=3; extra == "train"',
        'ruff>=1; extra == "test"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: promised)
    monkeypatch.setattr(metadata, "version", version)
    found = {library.name: library for library in doctor.libraries()}
    assert {name: library.fits for name, library in found.items()} == {
        "torch": False,
        "transformers": True,
        "rich": False,
        "peft": True,
    }
    assert found["rich"].version is None


def test_source_that_is_not_installed_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert doctor.libraries() == []


def test_cache_folder_is_tried_and_left_empty(tmp_path: Path) -> None:
    found = doctor.cache_folder(tmp_path / "new")
    assert (found.problem, list((tmp_path / "new").iterdir())) == ("", [])
    assert found.free > 0
