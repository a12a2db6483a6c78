"""A download that broke off, taken up where it stopped.

pip begins each download anew and removes what it has when it fails. `Partial` gives the file that pip is writing a
second name beside its place, which outlives pip, this process and a power cut, and writes down the address pip had it
from. Later the rest is asked of that address by HTTP (a range); from a server that gives no ranges, or asks for what
only pip knows (certificates, passwords), nothing is taken, and pip begins anew.

Knows nothing of what the file is; whoever takes it up compares its digest.
"""

import http.client
import logging
import os
import re
import shutil
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minigpt4.errors import DownloadError
from minigpt4.weights.files.disk import storing

CHUNK_BYTES = 1024**2
TIMEOUT_SECONDS = 30.0
MAX_BREAKS = 10
"""So often a connection that brought something may break off before the person is told."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partial:
    """What came of a file.

    Args:
        folder: Where it is kept; made when there is something to keep.
        size: Length of the whole file in bytes.
    """

    folder: Path
    size: int

    @property
    def file(self) -> Path:
        """What came so far; from the file's beginning, without gaps."""
        return self.folder / "content"

    @property
    def address(self) -> Path:
        """A text file with the address."""
        return self.folder / "address"

    def keep(self, growing: Path, log: Path) -> None:
        """Give a file that is being written a second name, unless as much of it is here already.

        Args:
            growing: The file; on the same disk.
            log: A text file that names, among other things, the address the file comes from.
        """
        try:
            if growing.stat().st_size <= self._here():
                return
            found = re.search(rf"https?://[^\s#]*/{re.escape(growing.name)}(?![^\s#])", _text(log))
            if found is None:
                return
            self.folder.mkdir(exist_ok=True)
            self.file.unlink(missing_ok=True)
            self.address.write_text(found[0], encoding="utf-8")
            os.link(growing, self.file)
        except OSError as error:  # moved in this moment, or a file system without second names: then pip begins anew
            logger.debug("what comes of %s is not kept: %s", growing.name, error)

    def complete(self, report: Callable[[int], None]) -> Path | None:
        """Fetch what is missing.

        Args:
            report: Called with the bytes that are here, after each piece.

        Returns:
            The file, of its full size; None where there is nothing to go on from, or its address gives no ranges.

        Raises:
            DownloadError: The connection broke off again and again; what came is kept.
            StorageError: The file cannot be written.
        """
        for _ in range(MAX_BREAKS):
            before = self._here()
            if before == self.size:
                return self.file
            if not 0 < before < self.size:
                return None
            try:
                self._append(before, report)
            except (OSError, http.client.HTTPException, ValueError) as error:
                logger.debug("%s cannot be completed from byte %d: %s", self.file, before, error)
            if self._here() == before:
                return None
        raise DownloadError(
            f"the connection broke off {MAX_BREAKS} times, {self._here()} of {self.size} bytes are here",
            "run it again: it goes on from there",
        )

    def remove(self) -> None:
        """Forget what came."""
        with storing(self.folder, doing="remove"):
            if self.folder.exists():
                shutil.rmtree(self.folder)

    def _here(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def _append(self, start: int, report: Callable[[int], None]) -> None:
        """Ask for the bytes from `start` on, and write those that come.

        By position, not at the end: a pip whose minigpt4 was killed may still be writing there, the same bytes.
        """
        headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
        request = urllib.request.Request(_text(self.address), headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response, self.file.open("r+b") as file:
            expected = f"bytes {start}-{self.size - 1}/{self.size}"
            if response.status != http.HTTPStatus.PARTIAL_CONTENT or response.headers["Content-Range"] != expected:
                return
            file.seek(start)
            while piece := response.read1(min(CHUNK_BYTES, self.size - start)):
                with storing(self.file):
                    file.write(piece)
                    file.flush()
                start += len(piece)
                report(start)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
