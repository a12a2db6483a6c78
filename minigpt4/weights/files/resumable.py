"""Writing a folder of large files so that an interrupted run goes on where it stopped.

The files are built in `.NAME.partial` beside the folder to be. Each one is brought to the disk, and noted with its
digest in a journal, before the next is begun; the same work begun again keeps what the journal lists, after reading it
once more. At the end the folder takes its place by one rename, as in `atomic`. Until then the target is absent.

This module knows nothing of tensors or models.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from minigpt4.errors import StorageError, WeightsError
from minigpt4.weights.files.atomic import FileEntry, clean_stale, file_sha256, move_folder, refuse_existing
from minigpt4.weights.files.disk import fsync, fsync_folder, lock, make_folder, storing

JOURNAL_NAME = "journal.json"
_CONTENT_DIR = "content"
_UNFINISHED = ".unfinished"

logger = logging.getLogger(__name__)


class PartialFolder:
    """A folder in the making.

    Args:
        folder: Where its files are built.
        journal: Where finished ones are noted.
        work: What identifies the work; files of other work are of no use.
    """

    def __init__(self, folder: Path, journal: Path, work: str) -> None:
        self._folder = folder
        self._journal = journal
        self._work = work
        self._done: dict[str, FileEntry] = {}

    @property
    def done(self) -> Mapping[str, FileEntry]:
        """The files that are finished, with what the manifest will say of them."""
        return self._done

    def write(self, name: str, make: Callable[[Path], FileEntry]) -> bool:
        """Make a file, unless it is there from an earlier run.

        Args:
            name: Its path in the folder, with `/`.
            make: Writes it to the path it is given and says what it wrote.

        Returns:
            Whether it was made now.
        """
        if name in self._done:
            return False
        unfinished = self._folder / f"{name}{_UNFINISHED}"
        make_folder(unfinished.parent)
        entry = make(unfinished)
        with storing(self._folder / name):
            fsync(unfinished)
            os.replace(unfinished, self._folder / name)
            fsync_folder(unfinished.parent)
            self._note(name, entry)
        return True

    def take_up(self) -> None:
        """Keep what an earlier run of the same work finished and what still has its digest; remove all else."""
        listed = self._listed()
        for name in _files_in(self._folder):
            entry, path = listed.get(name), self._folder / name
            if entry is not None and path.stat().st_size == entry.size and file_sha256(path) == entry.sha256:
                self._done[name] = entry
            else:
                logger.info("%s of an interrupted run is made anew", name)
                path.unlink()
        for folder in sorted(self._folder.rglob("*/"), reverse=True):  # the innermost first
            if not any(folder.iterdir()):
                folder.rmdir()

    def _listed(self) -> dict[str, FileEntry]:
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            if journal["work"] != self._work:
                return {}
            return {name: FileEntry(entry["sha256"], entry["size"]) for name, entry in journal["files"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            logger.warning("the journal of an interrupted run cannot be read, its files are made anew: %s", error)
            return {}

    def _note(self, name: str, entry: FileEntry) -> None:
        self._done[name] = entry
        content = {"work": self._work, "files": {name: asdict(entry) for name, entry in self._done.items()}}
        new = self._journal.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
        fsync(new)
        os.replace(new, self._journal)
        fsync_folder(self._journal.parent)


def partial_path(target: Path) -> Path:
    """Say where a folder is built."""
    target = Path(os.path.realpath(target))
    return target.with_name(f".{target.name}.partial")


@contextmanager
def resume_folder(target: Path, work: str, *, overwrite: bool = False) -> Iterator[PartialFolder]:
    """Build a folder, or go on with it.

    Args:
        target: The folder to appear when the block ends without an exception; its parents are made.
        work: A text that is the same for the same work: inputs, options, layout.
        overwrite: Replace a folder that has a manifest; otherwise the target must not exist or be empty.

    Yields:
        The folder in the making. When the block ends by an exception, or the process dies, its finished files stay
        in `.NAME.partial` for the next run of the same work.

    Raises:
        StorageError: `target` exists and may not be replaced, or its place cannot be written or is full.
    """
    target = Path(os.path.realpath(target))
    place = partial_path(target)
    make_folder(target.parent)
    clean_stale(target.parent)
    with lock(place):
        with storing(target):
            refuse_existing(target, overwrite=overwrite)
            partial = _prepared(place, work)
        try:
            with storing(target, only_within=place):
                yield partial
        except StorageError as error:
            if not partial.done:
                raise
            kept = f"the {len(partial.done)} files written so far are kept, run the same command again to go on"
            raise StorageError(error.message, f"{error.hint}; {kept}" if error.hint else kept) from error
        with storing(target):
            _check_complete(place / _CONTENT_DIR, partial)
            move_folder(place / _CONTENT_DIR, target, partial.done, overwrite=overwrite)
            shutil.rmtree(place)
            fsync_folder(target.parent)


def _prepared(place: Path, work: str) -> PartialFolder:
    (place / _CONTENT_DIR).mkdir(parents=True, exist_ok=True)
    partial = PartialFolder(place / _CONTENT_DIR, place / JOURNAL_NAME, work)
    partial.take_up()
    return partial


def _check_complete(folder: Path, partial: PartialFolder) -> None:
    stray = sorted(set(_files_in(folder)) - partial.done.keys())
    if stray:
        raise WeightsError(f"`{folder / stray[0]}` was put there by another program", "remove it and run again")


def _files_in(folder: Path) -> list[str]:
    """List everything that is no folder, at any depth, by its path with `/`."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in paths)
