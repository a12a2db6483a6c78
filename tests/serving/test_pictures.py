"""Strangers' pictures are decoded in a child that may die of them; the server does not, and does not grow."""

import asyncio
import os
import random
import signal
import struct
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import psutil
import pytest
from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import ImageLimits, content_hash, open_image
from minigpt4.serving.errors import ApiError
from minigpt4.serving.pictures import PicturePool
from tests.serving.live import Live, data_url, large_picture, live, picture_file, seeing

T = TypeVar("T")
SIZE = (56, 56, int(Image.Resampling.BICUBIC))
MUCH = 10**9


def pooled(work: Callable[[PicturePool], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        pool = PicturePool(options.pop("limits", ImageLimits()), **{"children": 1, **options})
        try:
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, *, rows: bytes, extra: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(length: int) -> bytes:
    packer = zlib.compressobj(9)
    block = b"\0" * 2**20
    return (
        b"".join(packer.compress(block) for _ in range(length // 2**20))
        + packer.compress(b"\0" * (length % 2**20))
        + packer.flush()
    )


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that unfold; each has to be refused, or decoded within the child's bounds."""
    for side in (6_000, 7_000, 13_000, 20_000, 30_000, 50_000, 65_535, 100_000, 10**6, 2**31 - 1):
        yield f"1 bit, {side} a side", png(side, side, 1, 0, rows=zeros(2**20))
        yield f"rgba, {side} a side", png(side, side, 8, 6, rows=zeros(2**20))
    yield "wide", png(2**31 - 1, 1, 8, 0, rows=zeros(100))
    yield "high", png(1, 2**31 - 1, 8, 0, rows=zeros(100))
    yield "longer than its size says", png(10, 10, 8, 2, rows=zeros(200 * 2**20))
    yield "no side", png(0, 0, 8, 2, rows=b"")
    text = chunk(b"zTXt", b"k\0\0" + zeros(100 * 2**20))
    profile = chunk(b"iCCP", b"k\0\0" + zeros(100 * 2**20))
    international = chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(50 * 2**20))
    rows = zlib.compress(b"\0" * 310)
    for name, extra in (("zTXt", text), ("iCCP", profile), ("iTXt", international)):
        yield name, png(10, 10, 8, 2, rows=rows, extra=extra)
        yield f"many {name}", png(10, 10, 8, 2, rows=rows, extra=extra * 10)
    yield "many chunks", png(10, 10, 8, 2, rows=rows, extra=chunk(b"tEXt", b"k\0v") * 50_000)
    yield (
        "frames",
        b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0, 0, 0) + b"\x2c\0\0\0\0\xff\xff\xff\xff\0\2\0" * 1000 + b";",
    )
    yield "gif", b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";"
    yield "bmp", b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    yield (
        "bmp, negative",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, -(2**31), -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield "webp", b"RIFF\x1e\0\0\0WEBPVP8X\n\0\0\0\2\0\0\0" + b"\xff\xff\xff" * 2
    start = picture_file(1, "JPEG")
    frame = start.index(b"\xff\xc0")
    yield "jpeg", start[: frame + 5] + struct.pack(">HH", 65_535, 65_535) + start[frame + 9 :]
    yield "exif", start[:2] + (b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0" + b"\0" * 65_527) * 100 + start[2:]
    scan = start[start.index(b"\xff\xda") : -2]
    yield "scans", start[:-2] + scan * 2000 + start[-2:]
    yield "truecolour, 39 million pixels", large_picture(6240, 6240, "RGBA")
    yield "grey, 40 million pixels", large_picture(20_000, 2_000, "L")


def mutants(count: int, seed: int = 0) -> Iterator[bytes]:
    """Pictures with a few bytes changed, cut, doubled or moved."""
    chance = random.Random(seed)
    originals = [picture_file(n, kind) for n, kind in enumerate(["PNG", "JPEG", "GIF", "BMP", "WEBP", "MPO"])]
    for _ in range(count):
        data = bytearray(chance.choice(originals))
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(data))
            match chance.randrange(5):
                case 0:
                    data[place] ^= 1 << chance.randrange(8)
                case 1:
                    data[place] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
                case 2:
                    del data[place : place + chance.randint(1, 50)]
                case 3:
                    data[place:place] = data[place : place + chance.randint(1, 50)]
                case 4:
                    data[place : place + 4] = struct.pack(
                        ">I", chance.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
                    )
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)


def test_a_picture_comes_as_the_model_reads_it() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        file = picture_file(1, kind)
        expected = open_image(file).resize((56, 56), Image.Resampling.BICUBIC)
        for source in (file, data_url(file, kind.lower())):
            decoded = pooled(lambda pool, source=source: pool.decode(source, SIZE, MUCH))
            assert decoded.image.tobytes() == expected.tobytes()
            assert (decoded.key, decoded.pixels) == (content_hash(expected), 20 * 24)


def test_what_is_no_picture_is_the_openers_sentence() -> None:
    with pytest.raises(ImageError, match="is not a picture file, expected JPEG, PNG"):
        pooled(lambda pool: pool.decode(b"nothing", SIZE, MUCH))
    with pytest.raises(ImageError, match="expected at most 100 in all"):
        pooled(lambda pool: pool.decode(picture_file(), SIZE, 100))


def test_bombs_are_bounded_in_memory_and_time_and_the_parent_does_not_grow() -> None:
    async def explode(pool: PicturePool) -> int:
        await pool.decode(picture_file(), SIZE, MUCH)
        files = list(bombs())
        before = psutil.Process().memory_info().rss
        for name, file in files:
            started = time.monotonic()
            try:
                decoded = await pool.decode(file, SIZE, MUCH)
                assert decoded.image.size == (56, 56), name
            except ImageError as error:
                assert len(error.message) < 300, name
            assert time.monotonic() - started < 12, name
        grown = psutil.Process().memory_info().rss - before
        print(f"{len(files)} bombs: parent grew by {grown / 2**20:.1f} MB")
        assert grown < 64 * 2**20
        assert (await pool.decode(picture_file(), SIZE, MUCH)).pixels == 480
        return len(files)

    assert pooled(explode) >= 40


def test_mutated_pictures_are_decoded_or_refused() -> None:
    async def decode_all(pool: PicturePool) -> tuple[int, int]:
        decoded = refused = 0
        for file in mutants(400):
            try:
                await pool.decode(file, SIZE, MUCH)
                decoded += 1
            except ImageError as error:
                assert " at 0x" not in error.message and "object" not in error.message
                refused += 1
        assert pool.deaths == 0
        return decoded, refused

    decoded, refused = pooled(decode_all)
    assert decoded > 20 and refused > 20


def test_a_child_that_is_killed_is_replaced() -> None:
    async def kill(pool: PicturePool) -> None:
        for round_number in range(3):
            await pool.decode(picture_file(), SIZE, MUCH)
            os.kill(pool.processes[0], signal.SIGKILL)
            with pytest.raises(ImageError, match="cannot be decoded"):
                await pool.decode(picture_file(), SIZE, MUCH)
            assert pool.deaths == round_number + 1
        assert (await pool.decode(picture_file(), SIZE, MUCH)).pixels == 480
        assert len(pool.processes) == 1

    pooled(kill)


def test_a_child_that_takes_too_long_is_ended() -> None:
    async def stop(pool: PicturePool) -> None:
        await pool.decode(picture_file(), SIZE, MUCH)
        os.kill(pool.processes[0], signal.SIGSTOP)
        pool.seconds = 0.3
        with pytest.raises(ImageError, match="took longer"):
            await pool.decode(picture_file(), SIZE, MUCH)
        pool.seconds = 20
        assert (await pool.decode(picture_file(), SIZE, MUCH)).pixels == 480

    pooled(stop, seconds=20)


def test_a_child_without_memory_refuses_and_the_next_picture_is_decoded() -> None:
    async def starve(pool: PicturePool) -> None:
        await pool.decode(picture_file(), SIZE, MUCH)
        with pytest.raises(ImageError, match=r"not enough memory|cannot be decoded"):
            await pool.decode(large_picture(6000, 6000, "RGBA"), SIZE, MUCH)
        assert (await pool.decode(picture_file(), SIZE, MUCH)).pixels == 480

    pooled(starve, memory=300 * 2**20)


def test_when_no_child_is_free_the_wait_ends() -> None:
    async def crowd(pool: PicturePool) -> None:
        await pool.decode(picture_file(), SIZE, MUCH)
        os.kill(pool.processes[0], signal.SIGSTOP)
        slow = asyncio.create_task(pool.decode(picture_file(), SIZE, MUCH))
        await asyncio.sleep(0.05)
        with pytest.raises(ApiError) as refused:
            await pool.decode(picture_file(), SIZE, MUCH)
        assert refused.value.http_status == 503
        os.kill(pool.processes[0], signal.SIGCONT)
        assert (await slow).pixels == 480

    pooled(crowd, wait=0.2)


def test_children_are_renewed_have_no_secret_and_end_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_API_KEY", "a-secret-of-the-server")

    async def many(pool: PicturePool) -> list[int]:
        await pool.start()
        (child,) = pool.processes
        assert "MINIGPT4_API_KEY" not in psutil.Process(child).environ()
        for _ in range(5):
            await pool.decode(picture_file(), SIZE, MUCH)
        assert pool.processes != [child] and pool.deaths == 0
        return [child, *pool.processes]

    assert not any(psutil.pid_exists(child) for child in pooled(many, renew=3))


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as running:
        yield running


def test_a_child_that_dies_over_a_request_is_a_400_and_is_counted(server: Live) -> None:
    body = {"messages": [seeing("what?", picture_file(3))]}
    assert server.chat(body).status == 200
    os.kill(server.server.handler.pool.processes[0], signal.SIGKILL)
    reply = server.chat(body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_image")
    assert server.chat(body).status == 200
    assert b"minigpt4_decoder_deaths_total 1.0" in server.ask("GET", "/metrics").body


def test_all_pictures_of_a_request_share_one_bound(server: Live) -> None:
    files = [large_picture(7000, 5000)] * 3  # 35 million pixels each, 100 million together
    reply = server.chat({"messages": [seeing("what?", *files)]})
    assert (reply.status, reply.error["param"]) == (400, "messages[0].content[2].image_url.url")
    reply = server.chat({"messages": [seeing("what?", *[picture_file()] * 17)]})
    assert reply.status == 400 and "17 pictures" in reply.error["message"]
