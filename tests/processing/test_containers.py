import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minigpt4.processing import containers
from minigpt4.processing.containers import UnreadableFileError, exif_orientation, inspect
from minigpt4.processing.pictures import DEFAULT_LIMITS
from tests.processing.picture_files import (
    adobe_segment,
    exif,
    flat_jpeg,
    jpeg_segment,
    png,
    png_chunk,
    saved,
    webp,
    webp_chunk,
)

GREY = Image.new("L", (23, 11), 77)
COLOUR = Image.new("RGB", (23, 11), (200, 100, 50))
SEE_THROUGH = Image.new("RGBA", (23, 11), (200, 100, 50, 99))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (saved(COLOUR, "JPEG"), "JPEG"),
        (saved(GREY, "JPEG", progressive=True), "JPEG"),
        (saved(COLOUR, "PNG"), "PNG"),
        (saved(COLOUR, "GIF"), "GIF"),
        (saved(COLOUR, "WEBP"), "WEBP"),
        (saved(COLOUR, "WEBP", lossless=True), "WEBP"),
        (saved(SEE_THROUGH, "WEBP", exif=exif(1)), "WEBP"),
        (saved(COLOUR, "BMP"), "BMP"),
        (saved(COLOUR, "DIB").join([b"BM" + struct.pack("<IHHI", 0, 0, 0, 54), b""]), "BMP"),
    ],
    ids=["jpeg", "progressive", "png", "gif", "webp", "webp-lossless", "webp-extended", "bmp", "bmp-no-length"],
)
def test_size_is_read_without_decoding(data: bytes, name: str) -> None:
    file = inspect(data)

    assert (file.format, file.width, file.height) == (name, 23, 11)


def test_bmp_written_from_the_top_has_a_positive_height() -> None:
    data = bytearray(saved(COLOUR, "BMP"))
    struct.pack_into("<i", data, 22, -11)

    assert inspect(bytes(data)).height == 11


def test_bmp_with_the_oldest_header_is_measured() -> None:
    data = b"BM" + struct.pack("<IHHIIHHHH", 30, 0, 0, 26, 12, 23, 11, 1, 24)

    assert (inspect(data).width, inspect(data).height) == (23, 11)


def test_gif_is_as_large_as_a_frame_that_leaves_its_screen() -> None:
    data = bytearray(saved(GREY, "GIF"))
    struct.pack_into("<HH", data, 6, 1, 1)

    assert (inspect(bytes(data)).width, inspect(bytes(data)).height) == (23, 11)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_orientation_is_found_in_either_byte_order(byteorder: str, prefix: bytes) -> None:
    assert exif_orientation(prefix + exif(6, byteorder)) == 6


def test_orientation_is_found_after_other_tags_and_as_32_bits() -> None:
    other = struct.pack(">HHII", 0x0100, 4, 1, 640)
    orientation = struct.pack(">HHII", 0x0112, 4, 1, 8)

    assert exif_orientation(b"MM" + struct.pack(">HIH", 42, 8, 2) + other + orientation) == 8


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientation_outside_the_standard_is_upright(value: int) -> None:
    assert exif_orientation(exif(value)) == 1


@given(st.binary(max_size=64) | st.binary(max_size=30).map(lambda tail: exif(6)[:20] + tail))
def test_orientation_of_any_bytes_is_one_to_eight(block: bytes) -> None:
    assert 1 <= exif_orientation(block) <= 8


def test_jpeg_loses_metadata_and_whatever_follows_its_end() -> None:
    plain = flat_jpeg((90,))
    profile = jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + b"p" * 900)
    camera = jpeg_segment(0xE1, b"Exif\0\0" + exif(3))
    second = jpeg_segment(0xE1, b"Exif\0\0" + exif(8))
    comment = jpeg_segment(0xFE, b"a comment")

    file = inspect(flat_jpeg((90,), camera, profile, second, comment) + plain + b"PK\3\4 an archive")

    assert file.data == plain
    assert file.orientation == 3


def test_jpeg_keeps_the_segments_that_say_what_its_numbers_mean() -> None:
    data = flat_jpeg((10, 20, 30, 40), adobe_segment(2))

    assert inspect(data).data == data


def test_png_loses_metadata_and_animation() -> None:
    plain = png(1, 1, 8, 0, b"\0\x09")
    bulky = (png_chunk(b"zTXt", b"k\0\0" + b"z" * 99), png_chunk(b"iCCP", b"p" * 99), png_chunk(b"acTL", b"\0" * 8))

    file = inspect(png(1, 1, 8, 0, b"\0\x09", *bulky, png_chunk(b"eXIf", exif(8))) + b"<?php")

    assert file.data == plain
    assert file.orientation == 8


def test_gif_loses_comments_and_later_frames() -> None:
    first, second = Image.new("L", (4, 4), 10), Image.new("L", (4, 4), 200)
    animation = saved(first, "GIF", save_all=True, append_images=[second], comment=b"c" * 500, loop=0)

    file = inspect(animation)

    assert b"ccc" not in file.data
    assert b"NETSCAPE" not in file.data
    assert file.data.count(b"\x2c\0\0\0\0\x04\0\x04\0") == 1


TINY = flat_jpeg((9,))
WEBP_PICTURE = saved(COLOUR, "WEBP")
TINY_PNG = png(1, 1, 8, 0, b"\0\0")
GIF_START, GIF_FRAME = (
    saved(GREY, "GIF").partition(b"\x2c\0\0\0\0")[0],
    b"\x2c" + saved(GREY, "GIF").partition(b"\x2c")[2],
)
SECOND_FRAME = jpeg_segment(0xC0, b"\x08\0\x09\0\x09\1\1\x11\0")
BROKEN = {
    "jpeg-two-sizes": (TINY.replace(b"\xff\xda", SECOND_FRAME + b"\xff\xda"), "two sizes"),
    "jpeg-empty": (b"\xff\xd8\xff\xd9", "without a picture"),
    "jpeg-lossless": (TINY.replace(b"\xff\xc0", b"\xff\xc3"), "a kind that is not accepted"),
    "jpeg-arithmetic": (TINY.replace(b"\xff\xc0", b"\xff\xc9"), "a kind that is not accepted"),
    "jpeg-arithmetic-progressive": (TINY.replace(b"\xff\xc0", b"\xff\xca"), "a kind that is not accepted"),
    "jpeg-cut": (TINY[:30], "damaged or cut short"),
    "jpeg-scans": (TINY.replace(b"\xff\xda", b"\xff\xda\0\x02" * containers.MAX_JPEG_SCANS + b"\xff\xda"), "50 scans"),
    "jpeg-segments": (flat_jpeg((9,), b"\xff\xfe\0\2" * containers.MAX_PARTS), "20000 segments"),
    "png-chunks": (png(1, 1, 8, 0, b"\0\0", png_chunk(b"tEXt", b"") * containers.MAX_PARTS), "20000 chunks"),
    "png-cut": (TINY_PNG[:-1], "damaged or cut short"),
    "png-cut-in-header": (TINY_PNG[:20], "damaged or cut short"),
    "png-of-a-phone-app": (TINY_PNG.replace(b"IHDR", b"CgBI"), "header is missing"),
    "gif-empty": (b"GIF89a\1\0\1\0\0\0\0;", "without a picture"),
    "gif-cut": (saved(GREY, "GIF")[:-9], "damaged or cut short"),
    "gif-extensions": (GIF_START + b"\x21\xfe\0" * (containers.MAX_GIF_BLOCKS + 1) + GIF_FRAME, "200000 blocks"),
    "gif-comment": (GIF_START + b"\x21\xfe" + b"\1a" * containers.MAX_GIF_BLOCKS + b"\0" + GIF_FRAME, "200000 blocks"),
    "gif-frame": (GIF_START + GIF_FRAME[:11] + b"\1a" * containers.MAX_GIF_BLOCKS + b"\0;", "200000 blocks"),
    "webp-chunks": (webp(WEBP_PICTURE[12:], webp_chunk(b"none", b"") * containers.MAX_PARTS), "20000 chunks"),
    "webp-empty": (b"RIFF\x04\0\0\0WEBP", "without a picture"),
    "webp-cut": (saved(COLOUR, "WEBP")[:24], "damaged or cut short"),
    "bmp-compressed": (saved(GREY, "BMP")[:30] + b"\1" + saved(GREY, "BMP")[31:], "compressed BMP"),
    "bmp-cut": (saved(GREY, "BMP")[:20], "damaged or cut short"),
}


@pytest.mark.parametrize(("data", "complaint"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_structure_is_told(data: bytes, complaint: str) -> None:
    with pytest.raises(UnreadableFileError, match=complaint):
        inspect(data)


def scanned(scans: int, width: int, height: int) -> bytes:
    """A JPEG that says it has so many scans and pixels."""
    size = struct.pack(">HH", height, width)
    return TINY.replace(b"\x08\0\x08\0\x08", b"\x08" + size).replace(
        b"\xff\xda", b"\xff\xda\0\x02" * (scans - 1) + b"\xff\xda"
    )


@pytest.mark.parametrize(("scans", "width", "height"), [(16, 8000, 5000), (50, 4000, 3200), (50, 8, 8)])
def test_jpeg_may_have_as_many_scans_as_its_size_allows(scans: int, width: int, height: int) -> None:
    assert inspect(scanned(scans, width, height)).width == width


@pytest.mark.parametrize(
    ("scans", "width", "height", "most"), [(17, 8000, 5000, 16), (16, 8000, 5001, 15), (50, 4000, 3201, 49)]
)
def test_a_pass_over_all_pixels_too_many_is_told_with_both_numbers(
    scans: int, width: int, height: int, most: int
) -> None:
    with pytest.raises(
        UnreadableFileError, match=f"of {scans} scans, expected at most {most} with {width} x {height} "
    ):
        inspect(scanned(scans, width, height))


def test_as_many_blocks_and_chunks_as_allowed_are_read() -> None:
    frame_blocks = 2  # its bytes, and the empty block at its end
    comments = b"\x21\xfe\0" * (containers.MAX_GIF_BLOCKS - frame_blocks)
    assert inspect(GIF_START + comments + GIF_FRAME).width == 23
    assert inspect(webp(WEBP_PICTURE[12:], webp_chunk(b"none", b"") * (containers.MAX_PARTS - 1))).width == 23


def test_jpeg_of_an_encoder_with_its_usual_scans_is_far_from_the_limit() -> None:
    scans = saved(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG", progressive=True).count(b"\xff\xda")

    assert 8 <= scans <= 12
    assert scans * DEFAULT_LIMITS.max_pixels <= 0.75 * containers.MAX_SCANNED_PIXELS


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(COLOUR, "TIFF"), "TIFF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"%PDF-1.7", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b'\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"plain text", "not a picture file"),
        (b"\x7fELF\2\1\1", "not a picture file"),
        (saved(COLOUR, "ICO"), "not a picture file"),
        (saved(COLOUR, "PPM"), "not a picture file"),
        (b"8BPS\0\1", "not a picture file"),
    ],
    ids=["tiff", "heic", "pdf", "eps", "svg", "text", "program", "ico", "ppm", "psd"],
)
def test_other_formats_are_refused_by_their_content(data: bytes, kind: str) -> None:
    with pytest.raises(UnreadableFileError, match=rf"{kind}.* expected JPEG, PNG, WebP, GIF or BMP"):
        inspect(data)
