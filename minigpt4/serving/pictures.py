"""Pictures of requests: fetched, and decoded in child processes that are bounded in memory and time.

The children answer in JSON and raw pixels, which nothing unpickles: a decoder that a picture has taken over can do no
more to the server than send a wrong picture.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import ImageLimits
from minigpt4.serving.errors import ApiError
from minigpt4.serving.remote_pictures import fetch_picture
from minigpt4.serving.schema import ImagePart, Message
from minigpt4.serving.settings import Settings

MEMORY = 1024 * 2**20
"""Address space of a child: 40 million pixels with transparency need 500 MB of it, the interpreter 250 MB."""

_HINT = "open it in a picture viewer and save it as JPEG or PNG"
_PACKAGE = Path(__file__).resolve().parents[2]


Size = tuple[int, int, int]
"""Width, height and Pillow's resampling filter that pictures are brought to."""


@dataclass(frozen=True)
class Decoded:
    """A picture as the model reads it."""

    image: Image.Image  # RGB, of the wanted size
    key: str  # its content hash
    pixels: int  # how many it had before


class PicturePool:
    """Child processes that decode pictures; one that dies of a picture is replaced.

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
        self._decoded: dict[Process, int] = {}  # every child, and how many pictures it has decoded
        self._free: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()  # None: started when it is needed
        for _ in range(children):
            self._free.put_nowait(None)

    @property
    def processes(self) -> list[int]:
        """The numbers of the children's processes."""
        return [child.pid for child in self._decoded]

    async def start(self) -> None:
        """Start the children before the first picture needs them."""
        free = [self._free.get_nowait() for _ in range(self._free.qsize())]
        for child in free:
            self._free.put_nowait(child or await self._begin())

    async def close(self) -> None:
        """End the children, and start no more."""
        self._closed = True
        for child in list(self._decoded):
            await self._end(child)

    async def decode(self, source: str | bytes, size: Size | None, max_pixels: int) -> Decoded:
        """Decode one picture.

        Args:
            source: A data URL or the bytes of a file.
            size: The size that is wanted; None for its own.
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
        lives = False
        try:
            self._check_open()
            child = child or await self._begin()
            async with asyncio.timeout(self.seconds):
                decoded = await self._ask(child, source, size, max_pixels)
            lives = True
            return decoded
        except ImageError:
            lives = True
            raise
        except TimeoutError as error:
            raise ImageError(f"the picture took longer than {self.seconds:g} s to decode", _HINT) from error
        except (OSError, EOFError, ValueError) as error:
            self._check_open()
            raise ImageError("the picture cannot be decoded", _HINT) from error
        finally:
            if child is not None and (not lives or self._decoded.get(child, 0) >= self.renew):
                self.deaths += not lives
                await self._end(child)
                child = None
            self._free.put_nowait(child)

    def _check_open(self) -> None:
        if self._closed:
            raise ApiError(503, "the server is closing")

    async def _ask(self, child: Process, source: str | bytes, size: Size | None, max_pixels: int) -> Decoded:
        assert child.stdin is not None and child.stdout is not None
        self._decoded[child] += 1
        data = source.encode() if isinstance(source, str) else source
        request = {"bytes": len(data), "url": isinstance(source, str), "max_pixels": max_pixels, "size": size}
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.write(data)
        await child.stdin.drain()
        answer = json.loads(await child.stdout.readline())
        if "error" in answer:
            raise ImageError(answer["error"], answer["hint"])
        raw = await child.stdout.readexactly(answer["bytes"])
        image = Image.frombytes("RGB", (answer["width"], answer["height"]), raw)
        return Decoded(image, answer["key"], answer["pixels"])

    async def _begin(self) -> Process:
        """Start a child, which knows where libraries are, and no key."""
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "LANG")
                if name in os.environ}  # fmt: skip
        paths = [str(_PACKAGE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # A thread of a numerical library reserves address space that the pictures need.
        kept |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "minigpt4.serving.picture_child",
            str(self.memory), json.dumps(dataclasses.asdict(self.limits)),
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=kept,
            start_new_session=True,  # Ctrl-C in the terminal is the server's business
        )  # fmt: skip
        self._decoded[child] = 0
        return child

    async def _end(self, child: Process) -> None:
        self._decoded.pop(child, None)
        with contextlib.suppress(ProcessLookupError):  # it has ended
            child.kill()
        await child.wait()


async def open_messages(
    messages: Sequence[Message], settings: Settings, pool: PicturePool, size: Size | None
) -> list[dict[str, Any]]:
    """Return the messages of a request as the engine's, with every picture decoded.

    Raises:
        ApiError: 400, naming the part whose picture is refused; 503, no decoder was free.
    """
    left = settings.limits.max_total_pixels
    opened: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            opened.append({"role": role, "content": message.content})
            continue
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            if not isinstance(part, ImagePart):
                parts.append({"type": "text", "text": part.text})
                continue
            try:
                decoded = await pool.decode(await _source(part.image_url.url, settings), size, left)
            except ImageError as error:
                param = f"messages[{number}].content[{place}].image_url.url"
                raise ApiError(400, error.message, error.hint, param=param, code="invalid_image") from error
            left -= decoded.pixels
            parts.append({"type": "image", "image": decoded.image, "key": decoded.key})
        opened.append({"role": role, "content": parts})
    return opened


async def _source(url: str, settings: Settings) -> str | bytes:
    if url[:5].lower() == "data:":
        return url
    return await fetch_picture(url, settings.image_hosts, settings.limits.image.max_bytes)
