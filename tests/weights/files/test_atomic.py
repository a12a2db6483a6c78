"""Whatever happens during a write, the destination holds what it held before or the new content, whole.

Dying is tried at every call to the operating system, and at random moments; errors are tried at every call too.
"""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import clean_stale, file_sha256, recover, verify_folder, write_file, write_folder
from tests.weights.files.faults import Fault

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.weights.files.test_atomic"


def run(function: str, *arguments: object) -> Any:  # noqa: ANN401
    """Run one of this module's functions in a fresh interpreter, where forking and dying are safe."""
    code = f"import sys; from {MODULE} import {function}; {function}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout or "null")


def write_version(target: Path, version: int) -> None:
    with write_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text(json.dumps({"version": version}))
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocabulary.txt").write_text(f"{version}\n" * 100)
        (folder / "model.bin").write_bytes(version.to_bytes(4, "big") * 50_000)


def read_version(target: Path) -> int:
    """The version of a folder, after a check that all of its files are of that version."""
    manifest = verify_folder(target)
    assert list(manifest.files) == ["config.json", "model.bin", "tokenizer/vocabulary.txt"]
    version = json.loads((target / "config.json").read_text())["version"]
    assert (target / "model.bin").read_bytes() == version.to_bytes(4, "big") * 50_000
    assert (target / "tokenizer" / "vocabulary.txt").read_text() == f"{version}\n" * 100
    return int(version)


def write_number(target: Path, version: int) -> None:
    with write_file(target, "w") as file:
        file.write(f"{version}\n" * 1000)


def read_number(target: Path) -> int:
    lines = target.read_text().splitlines()
    assert lines == [lines[0]] * 1000
    return int(lines[0])


WRITERS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "folder": (write_version, read_version),
    "file": (write_number, read_number),
}


# Writing


def test_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    target = tmp_path / "models" / "mine"
    with write_folder(target) as folder:
        assert folder.stat().st_dev == tmp_path.stat().st_dev
        (folder / "b.txt").write_text("hello")
        (folder / "a").mkdir()
        (folder / "a" / "c.txt").write_bytes(b"")
        assert not target.exists()

    assert json.loads((target / "manifest.json").read_text()) == {
        "format_version": 1,
        "files": {
            "a/c.txt": {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "size": 0},
            "b.txt": {"sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", "size": 5},
        },
    }
    assert list(verify_folder(target).files) == ["a/c.txt", "b.txt"]
    assert os.listdir(tmp_path / "models") == ["mine"]


def test_every_file_is_flushed_before_the_manifest_and_the_manifest_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync, real_rename, events = os.fsync, os.rename, []

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("RENAME")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    write_version(tmp_path / "model", 1)

    files = ["config.json", "model.bin", "vocabulary.txt", "tokenizer"]
    assert events == [*files, "manifest.json", "model", "RENAME", tmp_path.name]


@pytest.mark.parametrize("kind", WRITERS)
def test_exception_leaves_the_target_untouched_and_nothing_else(tmp_path: Path, kind: str) -> None:
    write, read = WRITERS[kind]
    write(tmp_path / "x", 1)
    writer = write_folder(tmp_path / "x", overwrite=True) if kind == "folder" else write_file(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), writer as new:
        if isinstance(new, Path):
            (new / "config.json").write_text("half")
        else:
            new.write(b"half")
        raise KeyboardInterrupt
    assert read(tmp_path / "x") == 1
    assert os.listdir(tmp_path) == ["x"]


def test_file_is_replaced_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "state.json"
    with write_file(target, "w") as file:
        file.write("one\n")
    with write_file(target) as file:
        file.write("zwei \u00e4\n".encode())
        assert target.read_bytes() == b"one\n"
    assert target.read_text(encoding="utf-8") == "zwei \u00e4\n"
    assert os.listdir(target.parent) == ["state.json"]


def test_folder_and_file_are_written_where_a_link_points(tmp_path: Path) -> None:
    for name in ("big", "home"):
        (tmp_path / name).mkdir()
    for kind, (write, read) in WRITERS.items():
        (tmp_path / "home" / kind).symlink_to(tmp_path / "big" / kind)
        write(tmp_path / "home" / kind, 7)
        assert (tmp_path / "home" / kind).is_symlink()
        assert read(tmp_path / "big" / kind) == 7


def test_existing_folder_is_refused_before_the_work_begins(tmp_path: Path) -> None:
    write_version(tmp_path / "model", 1)
    with pytest.raises(StorageError, match="model` exists already"), write_folder(tmp_path / "model"):
        pytest.fail("the block must not run")
    assert read_version(tmp_path / "model") == 1


def test_empty_folder_counts_as_absent(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with write_folder(tmp_path / "model") as folder:
        (folder / "a").touch()
    assert list(verify_folder(tmp_path / "model").files) == ["a"]


def test_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("irreplaceable")
    (tmp_path / "file").write_text("x")
    for name, reason in (("photos", "has no `manifest.json`"), ("file", "is a file")):
        with pytest.raises(StorageError, match=reason), write_folder(tmp_path / name, overwrite=True):
            pytest.fail("the block must not run")
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "irreplaceable"


def test_link_in_a_written_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="`passwords` is not a plain file"), write_folder(tmp_path / "x") as folder:
        (folder / "passwords").symlink_to("/etc/passwd")
    assert os.listdir(tmp_path) == []


def test_file_over_a_folder_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*x`: Is a directory"), write_file(tmp_path / "x") as file:
        file.write(b"1")
    assert os.listdir(tmp_path) == ["x"]


# Dying


def die_at_every_call(kind: str, folder: str) -> None:
    """Replace version 1 by version 2, dying at the k-th call for every k; then replace by 3. Prints what was found."""
    write, read = WRITERS[kind]
    target = Path(folder, "x")
    found = {"1": 0, "2": 0}
    finished, number = False, 0
    while not finished:
        number += 1
        write(target, 1)
        child = os.fork()
        if child == 0:
            with Fault(number, lambda place: os._exit(9)):
                write(target, 2)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.wait()[1]) == 0
        recover(target)
        found[str(read(target))] += 1
        write(target, 3)
        assert read(target) == 3
        assert os.listdir(folder) == ["x"], number
    print(json.dumps({**found, "calls": number - 1}))


@pytest.mark.parametrize("kind", WRITERS)
def test_death_at_every_call_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    found = run("die_at_every_call", kind, tmp_path / "place")
    assert found["calls"] > 10
    assert found["1"] + found["2"] == found["calls"] + 1
    assert found["1"] > 5  # died before the rename
    assert found["2"] > 1  # died after it, while cleaning up, and the last run that did not die


def kill_at_random(folder: str, kills: str) -> None:
    """Kill a process that replaces a folder over and over; prints how often, and the versions that were found."""
    target = Path(folder, "model")
    versions = []
    moments = random.Random(0)
    start = time.monotonic()
    write_version(target, 0)
    longest = 3 * (time.monotonic() - start)  # so that a few writes end before a kill, however slow the disk is
    shutil.rmtree(target)
    for number in range(int(kills)):
        child = os.fork()
        if child == 0:
            for version in range(number * 1000, (number + 1) * 1000):
                write_version(target, version)
            os._exit(1)
        time.sleep(moments.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.wait()[1])
        recover(target)
        if target.exists():
            versions.append(read_version(target))
    write_version(target, 10**6)
    assert read_version(target) == 10**6
    assert os.listdir(folder) == ["model"]
    print(json.dumps(versions))


def test_kill_at_random_moments_leaves_a_whole_version(tmp_path: Path) -> None:
    versions = run("kill_at_random", tmp_path, 60)
    assert versions == sorted(versions)
    assert len(set(versions)) > 2  # writes were finished between kills


def test_reader_recovers_a_replacement_that_died_between_the_renames(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_version(tmp_path / "model", 1)
    os.rename(tmp_path / "model", tmp_path / ".model.previous")

    assert read_version(tmp_path / "model") == 1
    assert "an interrupted replacement" in caplog.text
    assert os.listdir(tmp_path) == ["model"]


def test_next_writer_removes_what_a_finished_replacement_left(tmp_path: Path) -> None:
    write_version(tmp_path / "model", 1)
    write_version(tmp_path / "newer", 2)
    os.rename(tmp_path / "model", tmp_path / ".model.previous")
    os.rename(tmp_path / "newer", tmp_path / "model")

    write_number(tmp_path / "something else", 1)
    assert sorted(os.listdir(tmp_path)) == ["model", "something else"]
    assert read_version(tmp_path / "model") == 2


def test_writer_recovers_what_another_left_while_it_was_at_work(tmp_path: Path) -> None:
    write_version(tmp_path / "model", 1)
    with write_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").touch()
        os.rename(tmp_path / "model", tmp_path / ".model.previous")  # another writer dies between its renames
    assert list(verify_folder(tmp_path / "model").files) == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_folder_of_the_user_named_like_a_replaced_one_is_left_alone(tmp_path: Path) -> None:
    for name in ("photos", ".photos.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat.jpg").write_text("irreplaceable")
    clean_stale(tmp_path)
    assert (tmp_path / ".photos.previous" / "cat.jpg").read_text() == "irreplaceable"


# Errors of the disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("kind", WRITERS)
def test_error_at_every_call_is_a_storage_error_and_leaves_the_old_or_the_new(
    tmp_path: Path, kind: str, number: int
) -> None:
    write, read = WRITERS[kind]
    target = tmp_path / "x"

    def fail(place: object) -> None:
        raise OSError(number, os.strerror(number), place)

    k, injected, refused = 0, True, 0
    while injected:
        k += 1
        write(target, 1)
        with Fault(k, fail) as fault:
            try:
                write(target, 2)
            except StorageError as error:
                assert os.strerror(number) in error.message
                assert str(tmp_path) in error.message
                assert error.hint
                refused += 1
        injected = fault.count >= k
        assert target.exists()  # without the help of a reader that recovers
        assert read(target) in (1, 2)
        write(target, 3)  # removes what could not be removed under the error
        assert os.listdir(tmp_path) == ["x"], (k, fault.names)
    assert refused > 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB, for those who may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a small disk: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_names_the_place_and_keeps_the_old_version(small_disk: Path) -> None:
    write_version(small_disk / "model", 1)
    write_number(small_disk / "state", 1)
    megabyte = np.random.default_rng(0).integers(0, 255, 2**20, np.uint8)

    with (
        pytest.raises(StorageError, match="model`: No space left on device") as caught,
        write_folder(small_disk / "model", overwrite=True) as folder,
    ):
        (folder / "model.bin").write_bytes(megabyte.tobytes())
    assert isinstance(caught.value.__cause__, OSError)
    assert "free some space" in caught.value.hint
    with (
        pytest.raises(StorageError, match="model`: No space left on device"),
        write_folder(small_disk / "model", overwrite=True) as folder,
    ):
        save_file({"weight": megabyte}, folder / "model.safetensors")
    with pytest.raises(StorageError, match="state`: No space left on device"), write_file(small_disk / "state") as file:
        file.write(megabyte.tobytes())

    assert read_version(small_disk / "model") == 1
    assert read_number(small_disk / "state") == 1
    assert sorted(os.listdir(small_disk)) == ["model", "state"]


def test_read_only_disk_names_the_place(small_disk: Path) -> None:
    write_version(small_disk / "model", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write, name in ((write_version, "model"), (write_number, "state")):
        with pytest.raises(StorageError, match="Read-only file system"):
            write(small_disk / name, 2)
    assert read_version(small_disk / "model") == 1


def write_beyond_the_limit(folder: str) -> None:
    """Write more than a process may (the system's limit on the size of a file)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        write_version(Path(folder, "model"), 2)
    except StorageError as error:
        print(json.dumps([error.message, error.hint]))


def test_limit_on_file_size_is_a_storage_error(tmp_path: Path) -> None:
    write_version(tmp_path / "model", 1)
    message, hint = run("write_beyond_the_limit", tmp_path)
    assert message == f"cannot write `{tmp_path / 'model'}`: File too large"
    assert hint == "free some space there, or choose another place"
    assert read_version(tmp_path / "model") == 1
    assert os.listdir(tmp_path) == ["model"]


@pytest.fixture
def locked_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody may write to; root, who may, acts as another user meanwhile."""
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield place
    os.seteuid(user)


def test_place_without_permission_is_named(locked_folder: Path) -> None:
    for target, write in ((locked_folder / "state", write_number), (locked_folder / "new" / "model", write_version)):
        with pytest.raises(StorageError, match=f"{locked_folder}.*: Permission denied"):
            write(target, 1)


# Two at once


def test_of_eight_writers_that_may_not_replace_exactly_one_wins(tmp_path: Path) -> None:
    outcomes: list[int] = []

    def write(number: int) -> None:
        try:
            with write_folder(tmp_path / "model") as folder:
                (folder / "writer").write_text(str(number))
            outcomes.append(number)
        except StorageError as error:
            assert "exists already" in error.message
            outcomes.append(-1)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(outcomes) == 8
    assert outcomes.count(-1) == 7
    verify_folder(tmp_path / "model")
    assert int((tmp_path / "model" / "writer").read_text()) == max(outcomes)
    assert os.listdir(tmp_path) == ["model"]


def replace_in_three_processes(folder: str) -> None:
    """Three processes replace one folder and one file 30 times each; a fourth cleans up all the while."""
    cleaner = os.fork()
    if cleaner == 0:
        while True:
            clean_stale(Path(folder))
    for process in range(3):
        if os.fork() == 0:
            for number in range(30):
                write_version(Path(folder, "model"), 100 * process + number)
                write_number(Path(folder, "state"), 100 * process + number)
            os._exit(0)
    statuses = [os.wait()[1] for _ in range(3)]
    os.kill(cleaner, signal.SIGKILL)
    os.wait()
    print(json.dumps(statuses))


def test_writers_that_replace_each_others_folder_all_succeed(tmp_path: Path) -> None:
    assert run("replace_in_three_processes", tmp_path) == [0, 0, 0]
    clean_stale(tmp_path)
    assert read_version(tmp_path / "model") % 100 == 29
    assert read_number(tmp_path / "state") % 100 == 29
    assert sorted(name for name in os.listdir(tmp_path) if not name.endswith(".lock")) == ["model", "state"]


# Verifying


def test_missing_extra_and_changed_files_are_named_with_both_values(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_version(model, 1)
    config = model / "config.json"
    content = config.read_bytes()
    digest = file_sha256(config)

    config.write_bytes(content + b" ")
    with pytest.raises(WeightsError, match=r"config.json` is 15 bytes, the folder's manifest says 14"):
        verify_folder(model, deep=False)

    config.write_bytes(content.replace(b"1", b"2"))
    found = file_sha256(config)
    with pytest.raises(WeightsError, match=rf"config.json` has sha256 {found[:16]}\..* says {digest[:16]}\.") as caught:
        verify_folder(model)
    assert "damaged or was changed" in caught.value.hint
    verify_folder(model, deep=False)  # the quick form does not read

    config.unlink()
    with pytest.raises(WeightsError, match=r"config.json` is missing"):
        verify_folder(model, deep=False)

    config.write_bytes(content)
    (model / "tokenizer" / "extra.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"tokenizer/extra.bin` is not listed"):
        verify_folder(model, deep=False)


def test_hidden_files_of_browsers_and_hubs_do_not_count_as_extra(tmp_path: Path) -> None:
    write_version(tmp_path / "model", 1)
    (tmp_path / "model" / ".gitattributes").touch()
    (tmp_path / "model" / "tokenizer" / ".DS_Store").touch()
    assert read_version(tmp_path / "model") == 1


def test_any_single_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """500 mutants; none may pass for the original. Deterministic: seed 0."""
    model = tmp_path / "model"
    write_version(model, 1)
    original = {path: path.read_bytes() for path in sorted(model.rglob("*")) if path.is_file()}
    before = verify_folder(model)
    choose = random.Random(0)
    for _ in range(500):
        path = choose.choice(list(original))
        mutant = bytearray(original[path])
        mutant[choose.randrange(len(mutant))] ^= 1 << choose.randrange(8)
        path.write_bytes(mutant)
        if path.name == "manifest.json":  # a flip in white space may leave the same manifest
            with contextlib.suppress(WeightsError):
                assert verify_folder(model) == before
        else:
            with pytest.raises(WeightsError, match=path.name):
                verify_folder(model)
        path.write_bytes(original[path])
    assert verify_folder(model) == before


ENTRY = {"sha256": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is not a manifest"),
        ("[]", "is not a manifest"),
        ("[" * 100_000, "is not a manifest"),
        ('{"format_version": 1}', "is not a manifest"),
        ('{"format_version": 1, "files": []}', "is not a manifest"),
        ('{"format_version": 1, "files": {"a": 1}}', "is not a manifest"),
        ('{"format_version": 1, "files": {"a": {"size": 1}}}', "is not a manifest"),
        ('{"format_version": 2, "files": {}}', "has format version 2, 1 was expected"),
        (json.dumps({"format_version": 1, "files": {"../outside": ENTRY}}), "bad entry for '../outside'"),
        (json.dumps({"format_version": 1, "files": {"/etc/passwd": ENTRY}}), "bad entry for '/etc/passwd'"),
        (json.dumps({"format_version": 1, "files": {"a": {**ENTRY, "size": "1"}}}), "bad entry for 'a'"),
        (json.dumps({"format_version": 1, "files": {"a": {**ENTRY, "sha256": "0"}}}), "bad entry for 'a'"),
    ],
)
def test_manifest_that_is_none_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(WeightsError, match=reason):
        verify_folder(tmp_path)


def test_folder_without_manifest_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no `manifest.json`"):
        verify_folder(tmp_path)
    with pytest.raises(WeightsError, match="nowhere` is not a folder"):
        verify_folder(tmp_path / "nowhere")
