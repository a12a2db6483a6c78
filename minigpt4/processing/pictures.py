"""The one place where pictures enter: a guarded opener that gives upright RGB, or one sentence about what is wrong.

Everything that comes from a user passes `open_image`: paths, uploads, data URLs, pixels that are already decoded.
Limits are enforced before a decoder runs, the format is told from the content and never from a name, only the first
frame is read, and nothing is fetched from a network.

Colour: transparency is composed on white, as on a page; 16-bit grey is scaled; CMYK follows Adobe's inverted JPEGs, as
browsers do. ICC profiles are ignored, as the original does: the models were trained on pictures opened that way.

This module does not know models, nor the size they want.
"""

import base64
import hashlib
import io
import os
import re
import stat
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image

from minigpt4.errors import ImageError
from minigpt4.processing.containers import ACCEPTED, PictureFile, UnreadableFileError, exif_orientation, inspect

PictureSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
"""A path (`-` is standard input), a data URL, a file's bytes, a binary file object or a Pillow image."""


@dataclass(frozen=True)
class ImageLimits:
    """How much of a picture is accepted. There is no limit on the aspect ratio: 1 x 10000 pixels work, as 1 x 1 do.

    Args:
        max_bytes: Length of the file. 20 MiB: more than cameras of phones and screenshots need.
        max_pixels: Width times height. 40 million: with transparency they need 500 MB while being converted. Above 89
            million Pillow's own guard refuses too.
        max_side: Width or height, in pixels. 20 000: resizing to 448 holds 448 x height pixels, 36 MB for this one;
            a picture of 1 x 40 million pixels would need 72 GB.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 40_000_000
    max_side: int = 20_000


DEFAULT_LIMITS = ImageLimits()

_MEND_HINT = "open it in a picture viewer and save it as JPEG or PNG, or fetch it again"
_SMALLER_HINT = "make it smaller: the model looks at a few hundred pixels a side"
_FILE_HINT = "check the path, or name another picture file"
_SOURCE_HINT = "give a path, a data URL, the bytes of a file, a file opened with 'rb', or a Pillow image"

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[^/?#]*@)?([^/?#]*)", re.IGNORECASE)
_DATA_URL_HEADER_LENGTH = 200
_SHOWN_NAME_LENGTH = 80

_OPAQUE_MODES = frozenset(["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
_ALPHA_MODES = frozenset(["LA", "PA", "RGBA", "RGBa"])
_16_BIT_MODES = frozenset(["I;16", "I;16L", "I;16B", "I;16N"])
_STRIP = 2**19
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(source: PictureSource, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open a picture as upright RGB.

    Args:
        source: A path (`-` is standard input), a data URL (`data:image/...;base64,...`), the bytes of a file, a binary
            file object (read from where it stands), or a Pillow image (left as it is; its current frame is taken).
        limits: Largest file and picture accepted.

    Returns:
        A new image: mode RGB, 8 bits, fully loaded, turned as its Exif orientation says, without metadata.

    Raises:
        ImageError: The source cannot be read, is no accepted picture, is damaged or exceeds a limit.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, name, limits)
        return _from_pillow(source, name)
    data = _read(source, name, limits.max_bytes)
    if not data:
        raise ImageError(f"{name} is empty, expected {ACCEPTED}", "fetch it again, or name another picture file")
    try:
        file = inspect(data)
    except UnreadableFileError as error:
        raise ImageError(f"{name} {error}", _MEND_HINT) from error
    _check_size(file.width, file.height, name, limits)
    return _decode(file, name)


def content_hash(image: Image.Image) -> str:
    """Name a picture by what a model sees of it.

    Args:
        image: Any Pillow image; one that `open_image` accepts.

    Returns:
        The SHA-256 of mode, size and pixels of the picture as `open_image` gives it, in hexadecimal. Pictures that
        look alike share it, however they were stored.

    Raises:
        ImageError: As `open_image`.
    """
    rgb = _from_pillow(image, "the given image")
    digest = hashlib.sha256(f"{rgb.mode} {rgb.width} {rgb.height}\n".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def _name(source: object) -> str:
    """Say which picture is meant: short, printable, no secrets, no memory addresses."""
    if isinstance(source, Image.Image):
        return "the given image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the given data"
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if path == "-":
            return "standard input"
        if _is_data_url(source):
            return "the data URL"
        if remote := _REMOTE.match(path):
            path = f"{remote[1]}://{remote[2]}"  # the rest may hold a password or a key
        if len(path) > _SHOWN_NAME_LENGTH:
            half = _SHOWN_NAME_LENGTH // 2
            path = f"{path[:half]}...{path[-half:]}"
        return f"picture {path!r}"  # repr escapes control and direction characters
    return "the given file object" if hasattr(source, "read") else f"the given {type(source).__name__}"


def _is_data_url(source: object) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _read(source: object, name: str, max_bytes: int) -> bytes:
    if isinstance(source, (bytes, bytearray, memoryview)):
        _check_length(memoryview(source).nbytes, name, max_bytes)
        return bytes(source)
    if isinstance(source, str) and _is_data_url(source):
        return _read_data_url(source, name, max_bytes)
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if path == "-":
            return _read_standard_input(name, max_bytes)
        if _REMOTE.match(path):
            raise ImageError(
                f"{name} is a remote address, and pictures are not fetched from a network",
                "download it first (curl -o picture.jpg ADDRESS) and give the file",
            )
        return _read_path(path, name, max_bytes)
    if hasattr(source, "read"):
        return _read_limited(source.read, name, max_bytes)
    raise ImageError(f"{name} is not a picture", _SOURCE_HINT)


def _read_path(path: str, name: str, max_bytes: int) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise ImageError(f"{name} does not exist", "relative paths start at the current folder") from error
    except PermissionError as error:
        raise ImageError(f"{name} must not be read by this user", "change its permissions (chmod +r)") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character or a lone surrogate
        reason = getattr(error, "strerror", None) or "the name is not valid"
        raise ImageError(f"{name} cannot be opened: {reason}", _FILE_HINT) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            if stat.S_ISDIR(status.st_mode):
                raise ImageError(f"{name} is a folder, expected a file", "name a picture file in it")
            raise ImageError(
                f"{name} is a pipe or a device, expected a file",
                "give - in its place and the picture on standard input",
            )
        _check_length(status.st_size, name, max_bytes)
        return _read_limited(lambda length: os.read(descriptor, length), name, max_bytes)
    finally:
        os.close(descriptor)


def _read_standard_input(name: str, max_bytes: int) -> bytes:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or stream.isatty():
        raise ImageError(f"{name} is not connected to a picture", "for instance: minigpt4 ask - QUESTION < PICTURE")
    return _read_limited(stream.read, name, max_bytes)


def _read_data_url(url: str, name: str, max_bytes: int) -> bytes:
    header_end = url.find(",", 0, _DATA_URL_HEADER_LENGTH)
    header = url[: max(header_end, 0)].lower()
    if not header.startswith("data:image/") or not header.endswith(";base64"):
        raise ImageError(f"{name} is not one of a picture", "expected data:image/jpeg;base64,... or another image type")
    payload = url[header_end + 1 :]
    _check_length(len(payload) // 2, name, max_bytes)  # a coarse bound, before anything is copied
    try:
        data = base64.b64decode(payload.encode("ascii").translate(None, string.whitespace.encode()), validate=True)
    except ValueError as error:
        raise ImageError(f"{name} is not valid base64", "use the standard alphabet, with padding") from error
    _check_length(len(data), name, max_bytes)
    return data


def _read_limited(read: Callable[[int], object], name: str, max_bytes: int) -> bytes:
    """Read to the end, or one byte more than the limit; never more."""
    parts, length = [], 0
    while length <= max_bytes:
        try:
            part = read(max_bytes + 1 - length)
        except (OSError, ValueError) as error:  # ValueError: a closed file, or text that is not text
            if reason := getattr(error, "strerror", None):
                raise ImageError(f"{name} cannot be read: {reason}", _FILE_HINT) from error
            raise ImageError(f"{name} cannot be read: it is closed, or opened as text", _SOURCE_HINT) from error
        if not isinstance(part, bytes):
            raise ImageError(f"{name} gives {type(part).__name__}, expected bytes", _SOURCE_HINT)
        if not part:
            break
        parts.append(part)
        length += len(part)
    _check_length(length, name, max_bytes)
    return b"".join(parts)


def _check_length(length: int, name: str, max_bytes: int) -> None:
    if length > max_bytes:
        raise ImageError(f"{name} is longer than {max_bytes / 2**20:.4g} MiB", _SMALLER_HINT)


def _check_size(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if not (width > 0 and height > 0):
        raise ImageError(f"{name} has {width} x {height} pixels, expected at least 1 x 1", _MEND_HINT)
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            f"{name} has {width} x {height} pixels, expected at most {limits.max_pixels} in all"
            f" and {limits.max_side} a side",
            _SMALLER_HINT,
        )


def _decode(file: PictureFile, name: str) -> Image.Image:
    damaged = f"{name} is a {file.format} file that is damaged, cut short or of a kind that is not accepted"
    with _explained(damaged), Image.open(io.BytesIO(file.data), formats=(file.format,)) as image:
        if image.size != (file.width, file.height):
            raise ImageError(damaged, _MEND_HINT)
        return _upright_rgb(image, file.orientation, name)


def _from_pillow(image: Image.Image, name: str) -> Image.Image:
    exif = image.info.get("exif")
    with _explained(f"{name} cannot be loaded: its file is closed or damaged"):
        return _upright_rgb(image, exif_orientation(exif) if isinstance(exif, bytes) else 1, name)


@contextmanager
def _explained(message: str) -> Iterator[None]:
    """Turn what a decoder raises into one sentence; its own text may hold memory addresses."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("there is not enough memory for a picture of this size", _SMALLER_HINT) from error
    except Exception as error:  # on damaged data a decoder raises whatever its code runs into
        raise ImageError(message, _MEND_HINT) from error


def _upright_rgb(image: Image.Image, orientation: int, name: str) -> Image.Image:
    image.load()  # before it, neither mode nor info are final
    rgb = _rgb(image, name)
    if orientation in _TRANSPOSITIONS:
        rgb = rgb.transpose(_TRANSPOSITIONS[orientation])
    rgb.info = {}
    return rgb


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Copy a loaded image into mode RGB."""
    if image.mode in _16_BIT_MODES:
        return _rgb_from_16_bit(image)
    if image.mode in _ALPHA_MODES or (image.mode in _OPAQUE_MODES and "transparency" in image.info):
        return _on_white(image)
    if image.mode in _OPAQUE_MODES:
        return image.convert("RGB")
    # Modes I and F say nothing about which number is white.
    raise ImageError(
        f"{name} is of Pillow's mode {image.mode}, expected colour or grey", "convert it to mode RGB first"
    )


def _on_white(image: Image.Image) -> Image.Image:
    """Compose on white, strip by strip: whole, a large picture would be copied three times over."""
    page = Image.new("RGB", image.size, "white")
    for strip, top in _strips(image):
        rgba = strip if strip.mode == "RGBA" else strip.convert("RGBA")
        page.paste(rgba, (0, top), rgba)
    return page


def _rgb_from_16_bit(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255, where Pillow's `convert` would clip."""
    page = Image.new("RGB", image.size)
    for strip, top in _strips(image):
        grey = np.asarray(strip).astype(np.uint32)
        if "transparency" in image.info:
            grey[grey == image.info["transparency"]] = 65535
        page.paste(Image.fromarray(((grey + 128) // 257).astype(np.uint8)), (0, top))
    return page


def _strips(image: Image.Image) -> Iterator[tuple[Image.Image, int]]:
    """Cut a picture into strips of about `_STRIP` pixels; yields each and its upper edge."""
    height = max(1, _STRIP // image.width)
    for top in range(0, image.height, height):
        yield image.crop((0, top, image.width, min(image.height, top + height))), top
