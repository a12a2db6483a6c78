"""A few child processes that decode pictures: each bounded in memory and time, and replaced when one dies of it."""

import asyncio
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import ImageLimits
from minigpt4.serving.http.openai_errors import ApiError

MEMORY = 1024 * 2**20
"""Address space of a child: 40 million pixels with transparency need 500 MB of it, the interpreter 250 MB."""

_HINT = "open it in a picture viewer and save it as JPEG or PNG"
_PACKAGE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Target:
    """The size that the model reads: width, height and Pillow's number of the way to get there."""

    width: int
    height: int
    resample: int


@dataclass(frozen=True)
class Decoded:
    """A picture as the model reads it.

    Args:
        image: RGB, of the target's size.
        key: Its content's name.
        pixels: How many it had before.
    """

    image: Image.Image
    key: str
    pixels: int


@dataclass(eq=False)
class _Child:
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    decoded: int = 0


class PicturePool:
    """Decodes pictures in child processes.

    Args:
        limits: Of one picture.
        children: How many processes.
        seconds: For one picture.
        wait: Seconds that a picture may wait for a free child.
        memory: Most address space of a child, in bytes.
        renew: Pictures after which a child is replaced.
    """

    def __init__(
        self,
        limits: ImageLimits,
        *,
        children: int = 2,
        seconds: float = 10.0,
        wait: float = 30.0,
        memory: int = MEMORY,
        renew: int = 1000,
    ) -> None:
        self.limits = limits
        self.seconds = seconds
        self.wait = wait
        self.memory = memory
        self.renew = renew
        self.deaths = 0
        self._closed = False
        self._all: set[_Child] = set()
        self._free: asyncio.LifoQueue[_Child | None] = asyncio.LifoQueue()
        for _ in range(children):
            self._free.put_nowait(None)  # a place whose child is started when it is needed

    async def start(self) -> None:
        """Start the children before the first picture needs them."""
        places = [self._free.get_nowait() for _ in range(self._free.qsize())]
        for place in places:
            self._free.put_nowait(place or await self._begin())

    async def decode(self, source: str | bytes, target: Target | None, max_pixels: int) -> Decoded:
        """Decode one picture.

        Args:
            source: A data URL or the bytes of a file.
            target: The size that is wanted; None for its own.
            max_pixels: Most pixels it may have, besides the limits of every picture.

        Raises:
            ImageError: It is no acceptable picture, or decoding it took too much time or memory.
            ApiError: 503, no child was free in time, or the pool is closed.
        """
        try:
            async with asyncio.timeout(self.wait):
                child = await self._free.get()
        except TimeoutError as error:
            raise ApiError(503, "too many pictures are waiting to be decoded", headers={"Retry-After": "5"}) from error
        kept: _Child | None = None
        try:
            self._check_open()
            child = child or await self._begin()
            async with asyncio.timeout(self.seconds):
                decoded = await self._ask(child, source, target, max_pixels)
            kept = child
            return decoded
        except ImageError:
            kept = child
            raise
        except TimeoutError as error:
            raise ImageError(f"the picture took longer than {self.seconds:g} s to decode", _HINT) from error
        except (OSError, EOFError, ValueError) as error:
            self._check_open()
            raise ImageError("the picture cannot be decoded", _HINT) from error
        finally:
            if child is not None and (kept is None or child.decoded >= self.renew):
                self.deaths += kept is None
                self._end(child)
                kept = None
            self._free.put_nowait(kept)

    def close(self) -> None:
        """End the children, and start no more."""
        self._closed = True
        for child in list(self._all):
            self._end(child)

    @property
    def processes(self) -> list[int]:
        """The numbers of the children's processes."""
        return [child.process.pid for child in self._all]

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "the server is closing")

    async def _ask(self, child: _Child, source: str | bytes, target: Target | None, max_pixels: int) -> Decoded:
        data = source.encode() if isinstance(source, str) else source
        size = dataclasses.astuple(target) if target else None
        request = {"bytes": len(data), "url": isinstance(source, str), "max_pixels": max_pixels, "size": size}
        child.writer.write(json.dumps(request).encode() + b"\n")
        child.writer.write(data)
        await child.writer.drain()
        answer = json.loads(await child.reader.readline())
        child.decoded += 1
        if "error" in answer:
            raise ImageError(answer["error"], answer["hint"])
        raw = await child.reader.readexactly(answer["bytes"])
        image = Image.frombytes("RGB", (answer["width"], answer["height"]), raw)
        return Decoded(image, answer["key"], answer["pixels"])

    async def _begin(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            limits = json.dumps(dataclasses.asdict(self.limits))
            process = subprocess.Popen(
                [sys.executable, "-m", "minigpt4.serving.pictures.child", str(self.memory), limits],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(os.environ),
                start_new_session=True,  # Ctrl-C in the terminal is the server's business
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        child = _Child(process, reader, writer)
        self._all.add(child)
        return child

    def _end(self, child: _Child) -> None:
        self._all.discard(child)
        child.writer.transport.abort()
        child.process.kill()
        child.process.wait()


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    """Return what a child may know: where libraries are, and no key."""
    kept = {name: ours[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG") if name in ours}
    paths = [str(_PACKAGE), *filter(None, ours.get("PYTHONPATH", "").split(os.pathsep))]
    # A thread of a numerical library reserves address space that the pictures need.
    return kept | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
