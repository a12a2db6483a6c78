"""Files that sources of examples are made of, written by the tests themselves."""

import io
import json
import tarfile
from functools import cache
from pathlib import Path

from PIL import Image

from tests.nano.test_shards import shard


@cache
def picture(number: int = 0, file_format: str = "JPEG") -> bytes:
    """A small picture file, another for each number."""
    colour = (number * 37 % 256, number * 101 % 256, number * 7 % 256)
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number % 5, 8), colour).save(buffer, file_format)
    return buffer.getvalue()


def sample(key: str, caption: object, number: int = 0) -> dict[str, bytes]:
    """The members of one sample of img2dataset."""
    return {f"{key}.jpg": picture(number), f"{key}.json": json.dumps({"caption": caption, "key": key}).encode()}


def samples(count: int, first: int = 0) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= sample(f"{number:09d}", f"picture number {number}", number)
    return members


def write(path: Path, content: object) -> Path:
    """Write text, bytes, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def special_member(name: str, type_: bytes, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = type_, size, link
    return member


__all__ = ["picture", "sample", "samples", "shard", "special_member", "write"]
