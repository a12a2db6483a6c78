"""Picture files made byte by byte, so that their pixels are known without asking a decoder."""

import struct
import zlib
from io import BytesIO

from PIL import Image


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    """The file Pillow writes."""
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG; `rows` as they are compressed: a zero (no filter), then the packed samples, for each row."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def webp_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif(orientation: int, byteorder: str = ">") -> bytes:
    """An Exif block (without JPEG's prefix) that holds the orientation alone."""
    mark = b"MM" if byteorder == ">" else b"II"
    return mark + struct.pack(byteorder + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def adobe_segment(transform: int) -> bytes:
    """Adobe's segment; the transform is 0 (RGB or CMYK), 1 (YCbCr) or 2 (YCCK)."""
    return jpeg_segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


def flat_jpeg(samples: tuple[int, ...], *extra: bytes) -> bytes:
    """An 8 x 8 JPEG whose every pixel has these stored samples, one for each component; exact but for the last bit."""
    count = len(samples)
    quantization = jpeg_segment(0xDB, b"\0" + b"\1" * 64)
    frame = jpeg_segment(
        0xC0, struct.pack(">BHHB", 8, 8, 8, count) + b"".join(bytes([i + 1, 0x11, 0]) for i in range(count))
    )
    # First coefficient: sizes 0 to 11, each coded as itself in four bits. Others: one code, 0, "the rest is zero".
    huffman_first = jpeg_segment(0xC4, b"\x00" + bytes([0, 0, 0, 12, *[0] * 12]) + bytes(range(12)))
    huffman_others = jpeg_segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0")
    scan = jpeg_segment(0xDA, bytes([count]) + b"".join(bytes([i + 1, 0]) for i in range(count)) + b"\0\x3f\0")
    bits = "".join(_block_bits(8 * (sample - 128)) for sample in samples)
    bits += "1" * (-len(bits) % 8)
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    parts = (*extra, quantization, frame, huffman_first, huffman_others, scan, pixels)
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xd9"


def _block_bits(value: int) -> str:
    size = abs(value).bit_length()
    code = value if value >= 0 else value + (1 << size) - 1
    return f"{size:04b}" + (f"{code:0{size}b}" if size else "") + "0"
