"""What safe writing asks of the operating system: locks, temporary folders, flushing, and errors that name the place.

The scratch folder `.NAME.minigpt4-tmp` belongs to the holder of its lock. The system releases locks when a process
ends, however it ends: a scratch folder whose lock is free was left by a dead process.
"""

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from minigpt4.errors import StorageError
from minigpt4.text import size_text

if sys.platform != "win32":
    import fcntl

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_WRITING = {*_NO_ROOM, errno.EROFS, errno.EIO}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(parent: Path, name: str = "minigpt4") -> Iterator[Path]:
    """Make a temporary folder in the existing folder `parent` that is gone after the block, and hold its lock.

    Waits while another process has a scratch folder of this name there. What a process that died inside the block
    leaves is removed by the next one, or by `clean_stale`.

    Raises:
        StorageError: `parent` cannot be written.
    """
    with lock(scratch_path(parent, name)):
        with storing(parent):
            scratch = new_scratch(parent, name)
        try:
            yield scratch
        finally:
            remove_scratch(scratch)


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the one lock that belongs to `path`, among all processes and threads of this machine.

    The lock is the file `.NAME.lock` beside `path`; it is gone when nobody holds it, except after a crash, where it is
    harmless. Not re-entrant. On a system or file system without file locks a warning is logged and nothing is held.
    (`filelock` would leave its file beside everything that is written.)

    Args:
        path: What the lock stands for; need not exist, its parent must.
        wait: Wait while another holds it, with one logged line.

    Yields:
        Whether it is held.

    Raises:
        StorageError: The lock file cannot be made.
    """
    lock_path = path.with_name(f".{path.name.removeprefix('.')}.lock")
    with storing(lock_path):
        descriptor = _locked(lock_path, path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if sys.platform != "win32" and descriptor is not None:
            try:
                # Removed while held: whoever waits on this file then sees that it is gone, and makes a new one.
                lock_path.unlink(missing_ok=True)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have the descriptor, too
            except OSError as error:
                logger.warning("the lock file %s stays: %s", lock_path, error)
            finally:
                os.close(descriptor)


def _locked(lock_path: Path, path: Path, *, wait: bool) -> int | None:
    """Open and lock a lock file; return its descriptor, or None where nothing is held."""
    if sys.platform == "win32":
        logger.warning("no file locks on this system: do not let two programs work on %s at once", path)
        return None
    patience, noted = fcntl.LOCK_NB, False
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | patience)
            if os.path.samestat(lock_path.stat(), os.fstat(descriptor)):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder has removed it
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                return None
            if not noted:
                logger.warning("waiting for another program that works on %s", path)
            patience, noted = 0, True
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            lock_path.unlink(missing_ok=True)
            logger.warning("no file locks here: do not let two programs work on %s at once", path)
            return None
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing; raise StorageError if that cannot be."""
    with storing(path):
        path.mkdir(parents=True, exist_ok=True)


def require_free_space(place: Path, size: int) -> None:
    """Refuse to begin what will not fit.

    Args:
        place: A file or folder to be; the file system is that of its nearest existing parent.
        size: Bytes needed.

    Raises:
        StorageError: Fewer than `size` bytes are free.
    """
    with storing(place, doing="read"):
        existing = next(path for path in (place, *place.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < size:
        message = f"`{place}` needs {size_text(size)}, {size_text(free)} are free there"
        raise StorageError(message, "free some space there, or choose another place")


def fsync(path: Path) -> None:
    """Bring a file's content to the disk."""
    # Windows can flush only what is open for writing; elsewhere a read-only file must do.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Bring a folder's list of names to the disk."""
    if sys.platform == "win32":
        return  # folders cannot be opened there; the system orders its own renames
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and do it unasked
            raise
    finally:
        os.close(descriptor)


@contextmanager
def storing(place: Path, *, only_within: Path | None = None, doing: str = "write") -> Iterator[None]:
    """Turn what the system says about `place` into a StorageError that names it.

    Args:
        place: The file or folder to name.
        only_within: Set where the block runs a caller's code, which may fail for reasons of its own: only errors of
            writing, and errors about paths in this folder, are turned.
        doing: `write` or `read`.

    Raises:
        StorageError: In place of an OSError, which is its cause.
    """
    try:
        yield
    except OSError as error:
        inside = str(error.filename).startswith(f"{only_within}{os.sep}")
        if only_within is not None and error.errno not in _OF_WRITING and not inside:
            raise
        raise _storage_error(place, doing, error.errno, error.strerror or str(error)) from error
    except SafetensorError as error:
        # The library is written in Rust and reports the system's errors as text: "... (os error 28)".
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise _storage_error(place, doing, int(code[1]), os.strerror(int(code[1]))) from error


def _storage_error(place: Path, doing: str, number: int | None, reason: str) -> StorageError:
    if number in _NO_ROOM:
        hint = "free some space there, or choose another place"
    else:
        hint = "check the permissions and the state of that place, or choose another"
    return StorageError(f"cannot {doing} `{place}`: {reason}", hint)


def scratch_path(parent: Path, name: str) -> Path:
    """Say where the scratch folder of `name` lies."""
    return parent / f".{name}.minigpt4-tmp"


def new_scratch(parent: Path, name: str) -> Path:
    """Make a scratch folder in place of a dead writer's; the caller holds the lock."""
    scratch = scratch_path(parent, name)
    if os.path.lexists(scratch):
        shutil.rmtree(scratch)
    scratch.mkdir()
    return scratch


def remove_scratch(scratch: Path) -> None:
    """Remove a scratch folder; the caller holds the lock."""
    try:
        shutil.rmtree(scratch)
    except OSError as error:
        logger.warning("the temporary folder %s stays for now: %s", scratch, error)
