"""The picture file formats that are accepted: recognised by content, measured, reduced to what their pixels need.

Five formats, each for a reason: JPEG (cameras, the web), PNG (screenshots), WebP (the web), GIF (the web, first frame)
and BMP (clipboards); a phone's MPO is a JPEG followed by more JPEGs, of which the first is read. Every further
decoder would be attack surface: TIFF, AVIF, HEIC, PSD, EPS, SVG and PDF have to be converted first.

Sizes are read here, so that an oversized picture is refused before any decoder sees it. Metadata is cut out here,
because reading it is where decoders can be kept busy for a long time by a small file: a 1 MB PNG of colour profiles
took Pillow 13.0.0 2.6 s, and joining the Exif segments of a JPEG takes time quadratic in their number. Only the
orientation is kept of it.

This module knows bytes alone: it decodes no pixels, and does not know where the bytes came from.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

ACCEPTED = "JPEG, PNG, WebP, GIF or BMP"

MAX_JPEG_SCANS = 50
"""Scans of a progressive JPEG of any size; encoders write about 10, and never more than 16."""

MAX_SCANNED_PIXELS = 640_000_000
"""Pixels times scans of a JPEG, since each scan is a pass over all pixels: 16 scans of 40 million."""

MAX_PARTS = 20_000
"""Segments of a JPEG, or chunks of a PNG or WebP; a 20 MiB file of encoders' usual 8 KiB chunks has 2 560."""

MAX_GIF_BLOCKS = 200_000
"""Blocks of a GIF up to the end of its first frame; a 20 MiB file of encoders' usual 255 bytes each has 82 000."""

_ORIENTATION_TAG = 0x0112
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # neither escaped data, nor a restart, nor padding
_JPEG_FRAMES = frozenset(b"\xc0\xc1\xc2")  # sequential and progressive; no browser reads arithmetic ones: slow
_JPEG_METADATA = frozenset([*range(0xE0, 0xF0), 0xFE])
_PNG_KEPT = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])


class UnreadableFileError(ValueError):
    """Bytes that are no acceptable picture file; the text completes the sentence "the picture ..."."""


@dataclass(frozen=True)
class PictureFile:
    """What the outside of a picture file says.

    Args:
        format: Pillow's name of the format.
        width: In pixels, before the orientation is applied.
        height: The same.
        orientation: Exif's, 1 (upright) to 8.
        data: The file, without metadata, further frames and whatever follows them.
    """

    format: str
    width: int
    height: int
    orientation: int
    data: bytes


def inspect(data: bytes) -> PictureFile:
    """Recognise, measure and reduce a picture file.

    Args:
        data: The whole file.

    Returns:
        Its format, size, orientation and the bytes its first frame needs.

    Raises:
        UnreadableFileError: The format is not accepted, or its structure is damaged or cut short.
    """
    for magic, name, reader in _READERS:
        if magic.match(data):
            try:
                return reader(data)
            except (struct.error, IndexError) as error:
                raise UnreadableFileError(f"is a {name} file that is damaged or cut short") from error
    for magic, name in _REFUSED:
        if magic.match(data):
            raise UnreadableFileError(f"is {name}, expected {ACCEPTED}")
    raise UnreadableFileError(f"is not a picture file, expected {ACCEPTED}")


def exif_orientation(exif: bytes) -> int:
    """Find the orientation in an Exif block, without trusting any of it.

    Args:
        exif: The block, with or without the `Exif` prefix that JPEG puts before it.

    Returns:
        1 to 8; 1 (upright) where the block is missing, broken or silent, as viewers do.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    byteorder: Literal["big", "little"] = "big" if tiff[:2] == b"MM" else "little"

    def number(field: bytes) -> int:
        return int.from_bytes(field, byteorder)

    start = number(tiff[4:8])
    table = tiff[start + 2 : start + 2 + 12 * number(tiff[start : start + 2])]
    for entry in (table[position : position + 12] for position in range(0, len(table), 12)):
        if number(entry[:2]) == _ORIENTATION_TAG:
            value = number(entry[8:12] if number(entry[2:4]) == 4 else entry[8:10])  # type 4: 32 bits, else 16
            return value if 1 <= value <= 8 else 1
    return 1


def _read_jpeg(data: bytes) -> PictureFile:
    size, scans, orientation = None, 0, None
    kept = [data[:2]]
    for marker, segment in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            if size:
                raise UnreadableFileError("is a JPEG file with two sizes")
            height, width = struct.unpack_from(">HH", segment, 5)
            size = width, height
        scans += marker == 0xDA
        if scans > MAX_JPEG_SCANS:
            raise UnreadableFileError(f"is a JPEG file of more than {MAX_JPEG_SCANS} scans")
        if orientation is None and marker == 0xE1 and segment[4:].startswith(b"Exif\0\0"):
            orientation = exif_orientation(segment[4:])
        # JFIF's and Adobe's segments say which colours the numbers mean.
        if marker not in _JPEG_METADATA or segment[4:].startswith((b"JFIF\0", b"Adobe")):
            kept.append(segment)
    if not size or not scans:
        raise UnreadableFileError("is a JPEG file without a picture, or of a kind that is not accepted")
    if scans * size[0] * size[1] > MAX_SCANNED_PIXELS:
        most = MAX_SCANNED_PIXELS // (size[0] * size[1])
        raise UnreadableFileError(
            f"is a JPEG file of {scans} scans, expected at most {most} with {size[0]} x {size[1]} pixels"
        )
    return PictureFile("JPEG", *size, orientation or 1, b"".join(kept))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes of each segment; marker 0 for what lies between them, the compressed pixels."""
    position = 2
    for _ in range(MAX_PARTS):
        match = _JPEG_MARKER.search(data, position)
        if not match:  # no end marker: whether the pixels are complete, the decoder finds out
            yield 0, data[position:]
            return
        start, marker = match.start(), data[match.start() + 1]
        yield 0, data[position:start]
        if marker == 0xD9:  # end of the picture: an MPO's next one or a film may follow
            yield marker, data[start : start + 2]
            return
        (length,) = struct.unpack_from(">H", data, start + 2)
        position = start + 2 + length
        if length < 2 or position > len(data):
            raise UnreadableFileError("is a JPEG file that is damaged or cut short")
        yield marker, data[start:position]
    raise UnreadableFileError(f"is a JPEG file of more than {MAX_PARTS} segments")


def _read_png(data: bytes) -> PictureFile:
    if data[12:16] != b"IHDR":
        raise UnreadableFileError("is a PNG file whose header is missing")
    width, height = struct.unpack_from(">II", data, 16)
    kept, position, orientation, kind = [data[:8]], 8, None, b""
    for _ in range(MAX_PARTS):
        if position >= len(data) or kind == b"IEND":
            return PictureFile("PNG", width, height, orientation or 1, b"".join(kept))
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise UnreadableFileError("is a PNG file that is damaged or cut short")
        if kind in _PNG_KEPT:
            kept.append(data[position:end])
        elif kind == b"eXIf" and orientation is None:
            orientation = exif_orientation(data[position + 8 : end - 4])
        position = end
    raise UnreadableFileError(f"is a PNG file of more than {MAX_PARTS} chunks")


def _read_gif(data: bytes) -> PictureFile:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + _palette_length(flags)
    header, control, blocks = data[:position], b"", 0
    while data[position] == 0x21:  # extensions: comments, the number of loops, and the one that counts
        end, blocks = _after_sub_blocks(data, position + 2, blocks)
        if data[position + 1] == 0xF9:  # how to draw the next frame: its transparent colour
            control = data[position:end]
        position = end
    if data[position] != 0x2C:
        raise UnreadableFileError("is a GIF file without a picture")
    left, top, frame_width, frame_height, flags = struct.unpack_from("<HHHHB", data, position + 1)
    end, _ = _after_sub_blocks(data, position + 11 + _palette_length(flags), blocks)
    size = max(width, left + frame_width), max(height, top + frame_height)
    return PictureFile("GIF", *size, 1, header + control + data[position:end] + b";")


def _palette_length(flags: int) -> int:
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


def _after_sub_blocks(data: bytes, position: int, blocks: int) -> tuple[int, int]:
    """Return where a row of sub-blocks ends, and how many blocks there are by then."""
    length = 1
    while length:  # an empty one is the last
        blocks += 1
        if blocks > MAX_GIF_BLOCKS:
            raise UnreadableFileError(f"is a GIF file of more than {MAX_GIF_BLOCKS} blocks")
        length = data[position]
        position += 1 + length
    return position, blocks


def _read_webp(data: bytes) -> PictureFile:
    size, orientation, position, parts = None, None, 12, 0
    while position + 8 <= len(data):
        parts += 1
        if parts > MAX_PARTS:
            raise UnreadableFileError(f"is a WebP file of more than {MAX_PARTS} chunks")
        kind, length = struct.unpack_from("<4sI", data, position)
        body = position + 8
        if size is None and kind == b"VP8X":
            size = tuple(1 + int.from_bytes(data[start : start + 3], "little") for start in (body + 4, body + 7))
        elif size is None and kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, body + 1)
            size = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        elif size is None and kind == b"VP8 ":
            size = tuple(side & 0x3FFF for side in struct.unpack_from("<HH", data, body + 6))
        elif kind == b"EXIF" and orientation is None:
            orientation = exif_orientation(data[body : body + length])
        position = body + length + length % 2
    if size is None:
        raise UnreadableFileError("is a WebP file without a picture")
    # libwebp neither unpacks nor joins metadata, so it may stay.
    return PictureFile("WEBP", size[0], size[1], orientation or 1, data)


def _read_bmp(data: bytes) -> PictureFile:
    (header_length,) = struct.unpack_from("<I", data, 14)
    if header_length == 12:
        width, height = struct.unpack_from("<HH", data, 18)
        return PictureFile("BMP", width, height, 1, data)
    width, height, _planes, _depth, compression = struct.unpack_from("<IiHHI", data, 18)
    if compression not in (0, 3):  # none, or none with colour masks; Pillow unpacks the others pixel by pixel
        raise UnreadableFileError("is a compressed BMP file, expected an uncompressed one")
    return PictureFile("BMP", width, abs(height), 1, data)


_READERS: tuple[tuple[re.Pattern[bytes], str, Callable[[bytes], PictureFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), "JPEG", _read_jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG", _read_png),
    (re.compile(rb"GIF8[79]a"), "GIF", _read_gif),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP", _read_webp),
    (re.compile(rb"BM"), "BMP", _read_bmp),
)

_REFUSED: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"....ftyp", re.DOTALL), "a HEIC, AVIF or video file"),
    (re.compile(rb"II\*\0|MM\0\*"), "a TIFF or raw camera file"),
    (re.compile(rb"%PDF|%!PS"), "a PDF or PostScript file"),
    (re.compile(rb"\s*<"), "an SVG, HTML or XML file"),
)
