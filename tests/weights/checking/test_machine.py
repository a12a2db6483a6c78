"""What is said about the machine is what holds for this process."""

from importlib import metadata
from pathlib import Path

import psutil
import pytest

from minigpt4.weights.checking import machine


def test_memory_is_the_systems_where_no_container_limits_it(tmp_path: Path) -> None:
    free, total = machine.memory(tmp_path)
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total


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
    assert machine.memory(tmp_path) == (50_000_000, 100_000_000)


@pytest.mark.parametrize("text", ["max\n", str(2**63 - 4096), "nonsense"])
def test_container_without_a_limit_does_not(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(text)
    (tmp_path / "memory.current").write_text("70000000\n")
    assert machine.memory(tmp_path)[1] == psutil.virtual_memory().total


def test_cpu_is_the_first_device() -> None:
    first = machine.devices()[0]
    assert first.name == "cpu"
    assert first.description
    assert 0 < first.free <= first.total
    assert machine.cores() >= 1


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
    found = {library.name: library for library in machine.libraries()}
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
    assert machine.libraries() == []


def test_cache_folder_is_tried_and_left_empty(tmp_path: Path) -> None:
    found = machine.cache_folder(tmp_path / "new")
    assert (found.problem, list((tmp_path / "new").iterdir())) == ("", [])
    assert found.free > 0


def test_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = machine.cache_folder(tmp_path / "file")
    assert "file" in found.problem
