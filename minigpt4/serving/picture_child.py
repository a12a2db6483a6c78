"""The program that decodes strangers' pictures, in a process of its own with bounded memory, and answers with pixels.

It reads requests from standard input and writes answers to standard output: a line of JSON, then as many bytes as the
line says. A picture leaves it at the size that the model reads, so a large one never reaches the server.

    {"bytes": 1234, "url": true, "max_pixels": 40000000, "size": [224, 224, 3]}   and the data URL, or the file
    {"bytes": 150528, "width": 224, "height": 224, "pixels": 12000000, "key": "..."}   and RGB, row by row
    {"bytes": 0, "error": "...", "hint": "..."}

It knows nothing of the model, has no secrets in its environment, and opens no file.
"""

import dataclasses
import json
import sys
from typing import Any

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import DEFAULT_LIMITS, ImageLimits, content_hash, open_image


def bound_memory(most: int) -> None:
    """Limit this process to so many bytes of address space, no file written and no core left."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # macOS refuses it
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def decode(request: dict[str, Any], data: bytes, limits: ImageLimits) -> tuple[dict[str, Any], bytes]:
    """Return the answer to one request and the bytes after it; see the module."""
    try:
        limits = dataclasses.replace(limits, max_pixels=min(limits.max_pixels, int(request["max_pixels"])))
        picture = open_image(data.decode("utf-8") if request["url"] else data, limits=limits)
        pixels = picture.width * picture.height
        if request["size"]:
            width, height, resample = request["size"]
            picture = picture.resize((width, height), resample)
        raw = picture.tobytes()
        answer = {"width": picture.width, "height": picture.height, "pixels": pixels, "key": content_hash(picture)}
    except ImageError as error:
        return {"bytes": 0, "error": error.message, "hint": error.hint}, b""
    except MemoryError:
        return {"bytes": 0, "error": "there is not enough memory for a picture of this size", "hint": ""}, b""
    return {"bytes": len(raw), **answer}, raw


def main(arguments: list[str]) -> None:
    """Run the program: most bytes of memory, then the limits of a picture as JSON."""
    from PIL import Image

    Image.init()  # every decoder, before memory is bounded
    bound_memory(int(arguments[0]))
    limits = dataclasses.replace(DEFAULT_LIMITS, **json.loads(arguments[1]))
    source, sink = sys.stdin.buffer, sys.__stdout__.buffer  # type: ignore[union-attr]
    while line := source.readline(4096):
        request = json.loads(line)
        data = source.read(request["bytes"])
        if len(data) < request["bytes"]:
            return
        answer, raw = decode(request, data, limits)
        sink.write(json.dumps(answer).encode() + b"\n" + raw)
        sink.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
