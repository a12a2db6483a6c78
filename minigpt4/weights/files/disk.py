"""What safe writing asks of the operating system: flushing, locks, temporary folders, and errors that name the place.

A scratch folder belongs to a living process as long as the lock on its `owner` file is held. The system lets go of
locks when a process ends, however it ends, so what dead processes left can be told from what is in use, also between
containers that share a disk.

This module knows nothing of manifests, models or destinations: `atomic` builds on it.
"""

import errno
import logging
import os
import re
import secrets
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

_OWNER = "owner"
_SCRATCH_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OF_WRITING = {*_NO_ROOM, errno.EROFS, errno.EIO}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}

logger = logging.getLogger(__name__)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the one lock that belongs to `path`, among all processes and threads of this machine.

    Waits, with one logged line, while another holds it. The lock is the file `.NAME.lock` beside `path`; it is gone
    when nobody holds it, except after a crash, where it is harmless. Not re-entrant.
    On a system or file system without file locks a warning is logged and nothing is held.

    Args:
        path: What the lock stands for; need not exist, its parent must.

    Raises:
        StorageError: The lock file cannot be made.
    """
    if sys.platform == "win32":
        logger.warning("no file locks on this system: do not let two programs work on %s at once", path)
        yield
        return
    lock_path = path.with_name(f".{path.name}.lock")
    with storing(lock_path):
        descriptor = _acquire(lock_path, path)
    try:
        yield
    finally:
        try:
            # Removed while held: whoever waits on this file then sees that it is gone, and makes a new one.
            lock_path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the lock file %s stays: %s", lock_path, error)
        finally:
            _release(descriptor, lock_path)


@contextmanager
def scratch_folder(parent: Path, name: str = "minigpt4") -> Iterator[Path]:
    """Make a temporary folder in `parent` that is gone after the block.

    If the process dies inside the block, `remove_dead_scratch` removes the folder.

    Args:
        parent: An existing folder.
        name: Part of the temporary name; tells a person who lists `parent` what the folder is for.

    Yields:
        The folder. The name `owner` in it is taken.

    Raises:
        StorageError: `parent` cannot be written.
    """
    with storing(parent):
        scratch, owner = _new_scratch(parent, name)
    try:
        yield scratch
    finally:
        _remove_scratch(scratch)
        if owner is not None:
            os.close(owner)


def remove_dead_scratch(parent: Path) -> list[Path]:
    """Remove the scratch folders that dead processes left in `parent`.

    Those of living processes stay, as do those of other users and those on a file system without locks.

    Returns:
        The folders removed.

    Raises:
        StorageError: `parent` cannot be read.
    """
    with storing(parent, doing="read"):
        candidates = [entry for entry in parent.iterdir() if _SCRATCH_NAME.fullmatch(entry.name)]
    return [entry for entry in sorted(candidates) if _remove_if_dead(entry)]


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing.

    Raises:
        StorageError: The folder cannot be made.
    """
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


def _new_scratch(parent: Path, name: str) -> tuple[Path, int | None]:
    """Make a scratch folder and hold the lock on its owner file (a descriptor; None where there are no locks)."""
    while True:
        scratch = parent / f".{name}.{secrets.token_hex(4)}.tmp"
        scratch.mkdir()
        if sys.platform == "win32":
            return scratch, None
        try:
            owner = os.open(scratch / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:
            continue  # a cleaner took the newborn folder for a dead one
        except OSError:
            scratch.rmdir()
            raise
        if _flock(owner, wait=False) is not False and os.fstat(owner).st_nlink > 0:
            return scratch, owner
        os.close(owner)  # a cleaner came between the two calls, and removes the folder


def _remove_if_dead(scratch: Path) -> bool:
    if sys.platform == "win32":
        return False
    try:
        owner = os.open(scratch / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _remove_newborn(scratch)
    except OSError as error:
        logger.debug("%s is left alone: %s", scratch, error)  # another user's, or no scratch folder at all
        return False
    try:
        return _flock(owner, wait=False) is True and _remove_scratch(scratch)
    finally:
        os.close(owner)


def _remove_newborn(scratch: Path) -> bool:
    """Remove an empty scratch folder: its process died before it made the owner file, or is about to make it."""
    try:
        scratch.rmdir()
    except OSError as error:
        logger.debug("%s is left alone: %s", scratch, error)
        return False
    return True


def _remove_scratch(scratch: Path) -> bool:
    """Remove a scratch folder, its owner file last, so that an interrupted removal can be taken up again."""
    try:
        for entry in scratch.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _OWNER:
                entry.unlink()
        (scratch / _OWNER).unlink(missing_ok=True)
        scratch.rmdir()
    except OSError as error:
        logger.warning("the temporary folder %s stays for now: %s", scratch, error)
        return False
    return True


def _flock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock an open file: True when held, False when another holds it, None where there are no locks."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


def _acquire(lock_path: Path, path: Path) -> int:
    """Open and lock the lock file of `path`, waiting for it if need be; returns its descriptor."""
    noted = False
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = _flock(descriptor, wait=False)
            if held is None:
                logger.warning("no file locks here: do not let two programs work on %s at once", path)
                return descriptor
            if held is False:
                if not noted:
                    logger.warning("waiting for another program that works on %s", path)
                noted = True
                _flock(descriptor, wait=True)
            if _is_file_at(lock_path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it: take the new one


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(descriptor: int, lock_path: Path) -> None:
    """Unlock and close: a forked child may have the descriptor too, and closing alone would leave it the lock.

    What the lock was held for is done, or has its own error: that the system would not unlock is only noted.
    """
    try:
        if sys.platform != "win32":
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            logger.warning("the lock %s was not let go: %s", lock_path, error)
    finally:
        os.close(descriptor)
