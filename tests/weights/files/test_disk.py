"""Locks exclude and do not leak; scratch folders go when their process does, and never before."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minigpt4.errors import StorageError
from minigpt4.weights.files.atomic import clean_stale
from minigpt4.weights.files.disk import lock, require_free_space, scratch_folder, storing

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.weights.files.test_disk"


def start(function: str, *arguments: Path | int) -> subprocess.Popen[str]:
    """Start one of this module's functions in a fresh interpreter, where forking and dying are safe."""
    code = f"import sys; from {MODULE} import {function}; {function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(function: str, *arguments: Path | int) -> str:
    process = start(function, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def count_up_in_four_processes(folder: str) -> None:
    """Each of four processes adds one to a number in a file, 100 times, by reading and writing it."""
    number = Path(folder, "number")
    number.write_text("0")
    for _ in range(4):
        if os.fork() == 0:
            for _ in range(100):
                with lock(number):
                    number.write_text(str(int(number.read_text()) + 1))
            os._exit(0)
    assert [os.wait()[1] for _ in range(4)] == [0] * 4


def test_lock_excludes_other_processes_and_leaves_no_file(tmp_path: Path) -> None:
    run("count_up_in_four_processes", tmp_path)

    assert (tmp_path / "number").read_text() == "400"
    assert os.listdir(tmp_path) == ["number"]


def fork_while_locked(folder: str) -> None:
    """A child forked while the lock is held lives on; the lock must be free all the same."""
    path = Path(folder, "x")
    with lock(path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        waiting = os.open(path.with_name(".x.lock"), os.O_RDWR)  # as one that waits has it open
    try:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)


def test_lock_does_not_live_on_in_a_forked_child(tmp_path: Path) -> None:
    run("fork_while_locked", tmp_path)


def test_second_thread_waits_with_one_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = []

    def wait_for_it() -> None:
        with lock(tmp_path / "model"):
            events.append("second")

    with lock(tmp_path / "model"):
        second = threading.Thread(target=wait_for_it)
        second.start()
        while not caplog.records:
            time.sleep(0.01)
        events.append("first")
    second.join(10)

    assert events == ["first", "second"]
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for another program that works on {tmp_path / 'model'}"
    ]


def test_lock_is_released_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "model"):
        raise KeyError
    with lock(tmp_path / "model"):
        assert os.listdir(tmp_path) == [".model.lock"]
    assert os.listdir(tmp_path) == []


def test_lock_left_by_a_crash_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".model.lock").touch()
    with lock(tmp_path / "model"):
        pass
    assert os.listdir(tmp_path) == []


def test_file_system_without_locks_is_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock(tmp_path / "model"):
        assert "no file locks here" in caplog.text
    with scratch_folder(tmp_path) as scratch:
        clean_stale(tmp_path)  # who lives cannot be told, so nothing is removed
        assert scratch.is_dir()
    assert os.listdir(tmp_path) == []


def test_lock_in_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*nowhere"), lock(tmp_path / "nowhere" / "model"):
        pass


def hold_scratch(folder: str) -> None:
    with scratch_folder(Path(folder), "model") as scratch:
        (scratch / "half").mkdir()
        (scratch / "half" / "weights").write_bytes(b"x" * 1000)
        print(scratch, flush=True)
        time.sleep(60)


def test_scratch_of_a_living_process_stays_and_of_a_killed_one_goes(tmp_path: Path) -> None:
    process = start("hold_scratch", tmp_path)
    assert process.stdout is not None
    scratch = Path(process.stdout.readline().strip())

    clean_stale(tmp_path)
    assert (scratch / "half" / "weights").stat().st_size == 1000

    process.kill()
    process.communicate()
    clean_stale(tmp_path)
    assert os.listdir(tmp_path) == []


def test_scratch_is_gone_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(tmp_path, "model") as scratch:
        (scratch / "file").touch()
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_folder_of_the_user_with_a_like_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "notes.txt").write_text("mine")

    with scratch_folder(tmp_path, "model"):
        clean_stale(tmp_path)

    assert (tmp_path / ".model.tmp" / "notes.txt").read_text() == "mine"


def test_scratch_that_cannot_be_removed_now_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with scratch_folder(tmp_path) as scratch:
        (scratch / "folder").mkdir()
        monkeypatch.setattr(shutil, "rmtree", busy)
    assert "stays for now" in caplog.text

    monkeypatch.undo()
    clean_stale(tmp_path)
    assert os.listdir(tmp_path) == []


def test_too_little_space_names_both_numbers(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(StorageError, match=r"needs 1,000,000,000,000\.0 MB, .* MB are free there"):
        require_free_space(tmp_path / "model", 10**18)


def test_error_of_foreign_code_passes_unless_it_is_about_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storing(tmp_path / "model", only_within=tmp_path / "new"):
        (tmp_path / "source").read_bytes()
    with (
        pytest.raises(StorageError, match=r"cannot write .*model.: No such file") as caught,
        storing(tmp_path / "model", only_within=tmp_path / "new"),
    ):
        (tmp_path / "new" / "x").read_bytes()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(StorageError, match="No space left"), storing(tmp_path, only_within=tmp_path / "new"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
