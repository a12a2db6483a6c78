"""Errors and death at every call of a merge to the operating system: the target is absent or whole, and one goes on."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.errors import MiniGPT4Error
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.llama.delta import apply_delta
from tests.weights.files.faults import Fault
from tests.weights.llama.delta_files import tiny_delta, tiny_llama, write_folder

ROOT = Path(__file__).resolve().parents[3]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
SOME, MANY = 12, 120
"""Calls that are tried in the fast and in the slow test, of some 500; errors are tried at all of them."""


def sides(folder: Path) -> None:
    """Write a base in archives and a delta in safetensors."""
    write_folder(folder / "base", tiny_llama(1), shards=2)
    write_folder(folder / "delta", tiny_delta(2), layout="safetensors")


def merge(folder: Path, file_format: str = "safetensors") -> None:
    apply_delta(folder / "base", folder / "delta", folder / "out", file_format=file_format, shard_bytes=4000)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def whole(folder: Path, file_format: str) -> tuple[dict[str, bytes], int]:
    """Merge without a fault; return what comes out, and the number of calls."""
    with Fault(0, lambda place: None, transfers=True) as fault:
        merge(folder, file_format)
    made = content(folder / "out")
    shutil.rmtree(folder / "out")
    return made, fault.count


def check_then_go_on(folder: Path, file_format: str, expected: dict[str, bytes], number: int) -> None:
    """The target is absent or whole; the same command again makes it, and leaves nothing else."""
    out = folder / "out"
    if out.exists():
        verify_folder(out)
        assert content(out) == expected, number
        shutil.rmtree(out)
    merge(folder, file_format)
    assert content(out) == expected, number
    assert sorted(path.name for path in folder.iterdir()) == ["base", "delta", "out"], number
    shutil.rmtree(out)


def fail_at(folder: Path, file_format: str, number: int, error: int, expected: dict[str, bytes]) -> bool:
    """Let one call fail; return whether the merge said so."""

    def fail(place: object) -> None:
        raise OSError(error, os.strerror(error), place)

    refused = False
    with Fault(number, fail, transfers=True):
        try:
            merge(folder, file_format)
        except MiniGPT4Error as caught:
            refused = True
            assert str(folder) in caught.message
            assert os.strerror(error) in caught.message
            assert "\n" not in caught.message
            assert caught.hint
    check_then_go_on(folder, file_format, expected, number)
    return refused


def chosen(count: int, some: int | None) -> list[int]:
    """All calls, or some of them: one of each stretch, so that every part of the work has one."""
    if some is None:
        return list(range(1, count + 1))
    chance = random.Random(count)
    return [1 + int((place + chance.random()) * count / some) for place in range(some)]


@pytest.mark.parametrize("some", [SOME, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_error_at_a_call_is_one_sentence_and_the_next_run_completes(
    file_format: str, some: int | None, tmp_path: Path
) -> None:
    sides(tmp_path)
    expected, count = whole(tmp_path, file_format)
    assert count > 150
    refused = 0
    for place, number in enumerate(chosen(count, some)):
        errors = ERRORS[:2] if some is None else ERRORS[place % 3 : place % 3 + 1]
        refused += sum(fail_at(tmp_path, file_format, number, error, expected) for error in errors)
    assert refused > (SOME if some is None else SOME // 2)


def die_at_calls(place: str, file_format: str, some: str) -> None:
    """Kill a merge at one call after the other; prints the number of calls that were tried."""
    folder = Path(place)
    sides(folder)
    expected, count = whole(folder, file_format)
    numbers = chosen(count, int(some))
    for number in numbers:
        child = os.fork()
        if child == 0:
            with Fault(number, lambda place: os.kill(os.getpid(), signal.SIGKILL), transfers=True):
                merge(folder, file_format)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, number
        check_then_go_on(folder, file_format, expected, number)
    print(json.dumps(len(numbers)))


@pytest.mark.parametrize("some", [SOME, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_death_at_a_call_leaves_no_target_or_a_whole_one_and_the_next_run_completes(
    file_format: str, some: int, tmp_path: Path
) -> None:
    code = f"import sys; from {__name__} import die_at_calls; die_at_calls(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path / "place"), file_format, str(some)]
    (tmp_path / "place").mkdir()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == some
