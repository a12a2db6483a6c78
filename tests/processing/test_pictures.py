import base64
import hashlib
import io
import os
import random
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minigpt4.errors import ImageError
from minigpt4.processing.pictures import ImageLimits, content_hash, open_image
from tests.processing.picture_files import adobe_segment, exif, flat_jpeg, jpeg_segment, png, png_chunk, saved

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.jpg"))

PALETTE = png_chunk(b"PLTE", bytes([10, 20, 30, 3, 4, 5, 200, 100, 50]))
RED, GREEN, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128,) * 3
BLOCKS = [[RED, GREEN, BLUE], [WHITE, BLACK, GREY]]


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    assert image.mode == "RGB"
    return [tuple(pixel) for row in np.asarray(image).tolist() for pixel in row]


def blocks(side: int = 1) -> np.ndarray:
    """Six colours, three wide and two high, each a square of `side` pixels: no two orientations look alike."""
    return np.asarray(BLOCKS, dtype=np.uint8).repeat(side, axis=0).repeat(side, axis=1)


# What the pixels must be, from the meaning of each format.
#
# On white, a sample s of opacity a (of 255) is (s * a + 255 * (255 - a)) / 255, rounded: 3 at 128 is 128.5 -> 129.
# A 16-bit sample s is s / 257, rounded. Printing inks take away light: red is (255 - cyan) * (255 - black) / 255.
GOLDEN_PNG = {
    "grey-8-bit": (png(2, 1, 8, 0, bytes([0, 7, 250])), [(7,) * 3, (250,) * 3]),
    "grey-1-bit": (png(2, 1, 1, 0, b"\0\x40"), [BLACK, WHITE]),
    "grey-2-bit": (png(4, 1, 2, 0, b"\0\x1b"), [BLACK, (85,) * 3, (170,) * 3, WHITE]),
    "grey-4-bit": (png(2, 1, 4, 0, b"\0\x1f"), [(17,) * 3, WHITE]),
    "grey-16-bit": (
        png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 255, 32768, 65535, 385)),
        [(1,) * 3, (128,) * 3, WHITE, (1,) * 3],
    ),
    "grey-16-bit-key": (
        png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 257, 514), png_chunk(b"tRNS", struct.pack(">H", 257))),
        [WHITE, (2,) * 3],
    ),
    "grey-8-bit-key": (png(2, 1, 8, 0, bytes([0, 7, 8]), png_chunk(b"tRNS", b"\0\7")), [WHITE, (8,) * 3]),
    "grey-alpha": (png(3, 1, 8, 4, bytes([0, 0, 128, 9, 255, 9, 0])), [(127,) * 3, (9,) * 3, WHITE]),
    "rgb": (png(2, 1, 8, 2, bytes([0, 1, 2, 3, 250, 251, 252])), [(1, 2, 3), (250, 251, 252)]),
    "rgb-key": (
        png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), png_chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))),
        [WHITE, (4, 5, 6)],
    ),
    "rgba": (
        png(3, 1, 8, 6, bytes([0, 3, 4, 5, 128, 255, 0, 0, 255, 9, 9, 9, 0])),
        [(129, 129, 130), RED, WHITE],
    ),
    "palette": (png(3, 1, 8, 3, bytes([0, 2, 1, 0]), PALETTE), [(200, 100, 50), (3, 4, 5), (10, 20, 30)]),
    "palette-4-bit": (png(2, 1, 4, 3, b"\0\x20", PALETTE), [(200, 100, 50), (10, 20, 30)]),
    "palette-alpha": (
        png(3, 1, 8, 3, bytes([0, 0, 1, 2]), PALETTE, png_chunk(b"tRNS", b"\0\x80")),
        [WHITE, (129, 129, 130), (200, 100, 50)],
    ),
}


@pytest.mark.parametrize(("data", "expected"), GOLDEN_PNG.values(), ids=GOLDEN_PNG.keys())
def test_png_pixels_are_what_the_format_means(data: bytes, expected: list[tuple[int, ...]]) -> None:
    assert pixels(open_image(data)) == expected


# Stored samples, Adobe's transform (None: no such segment), the colour meant. Adobe stores inks inverted, 255 - ink.
# YCCK's first three are luminance and colour differences of 255 - stored, which is the inks; (76, 85, 255) are those
# of (255, 0, 0), the fourth is as in CMYK.
GOLDEN_JPEG = {
    "grey": ((90,), None, (90, 90, 90)),
    "ycbcr-red": ((76, 85, 255), None, RED),
    "rgb": ((200, 100, 50), 0, (200, 100, 50)),
    "cmyk-no-ink": ((255, 255, 255, 255), 0, WHITE),
    "cmyk-cyan": ((0, 255, 255, 255), 0, (0, 255, 255)),
    "cmyk-black": ((255, 255, 255, 0), 0, BLACK),
    "cmyk-half-cyan-some-black": ((127, 255, 255, 191), 0, (95, 191, 191)),
    "ycck-no-ink": ((0, 128, 128, 255), 2, WHITE),
    "ycck-cyan": ((76, 85, 255, 255), 2, (0, 255, 255)),
    "ycck-black": ((0, 128, 128, 0), 2, BLACK),
}


@pytest.mark.parametrize(("samples", "transform", "expected"), GOLDEN_JPEG.values(), ids=GOLDEN_JPEG.keys())
def test_jpeg_pixels_are_what_the_format_means(
    samples: tuple[int, ...], transform: int | None, expected: tuple[int, ...]
) -> None:
    data = flat_jpeg(samples, *([] if transform is None else [adobe_segment(transform)]))

    image = np.asarray(open_image(data))

    # 2: one rounding in the inverse cosine transform, one in the change of colour space.
    np.testing.assert_allclose(image, np.broadcast_to(expected, (8, 8, 3)), atol=2)


def test_gif_transparency_is_white() -> None:
    frame = Image.new("P", (2, 1))
    frame.putpalette([10, 20, 30, 40, 50, 60])
    frame.putpixel((1, 0), 1)

    assert pixels(open_image(saved(frame, "GIF", transparency=0))) == [WHITE, (40, 50, 60)]


def test_webp_transparency_is_composed_on_white() -> None:
    frame = Image.new("RGBA", (1, 1), (3, 4, 5, 128))

    assert pixels(open_image(saved(frame, "WEBP", lossless=True, exact=True))) == [(129, 129, 130)]


def test_bmp_rows_are_read_from_the_bottom() -> None:
    header = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54 + 8, 0, 0, 54, 40, 1, 2, 1, 24, 0, 8, 0, 0, 0, 0)

    assert pixels(open_image(header + bytes([3, 2, 1, 0, 6, 5, 4, 0]))) == [(4, 5, 6), (1, 2, 3)]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, WHITE),
        ("L", 9, (9, 9, 9)),
        ("LA", (0, 128), (127, 127, 127)),
        ("I;16", 32768, (128, 128, 128)),
        ("RGBA", (3, 4, 5, 128), (129, 129, 130)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
        ("YCbCr", (255, 128, 128), WHITE),
        ("HSV", (0, 255, 255), RED),
    ],
)
def test_pillow_images_follow_the_same_rules(
    mode: str, value: int | tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert pixels(open_image(Image.new(mode, (1, 1), value))) == [expected]


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_pillow_mode_without_a_meaning_is_refused(mode: str) -> None:
    with pytest.raises(ImageError, match=f"mode {mode}, expected colour or grey"):
        open_image(Image.new(mode, (1, 1)))


# How the upright picture comes out of the stored rows and columns, as the Exif standard defines the eight values.
UPRIGHT_FROM_STORED = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored[::-1].transpose(1, 0, 2),  # row 0 is the right side, column 0 the top
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: stored[:, ::-1].transpose(1, 0, 2),  # row 0 is the left side, column 0 the bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 100, "subsampling": 0}, 4)],
    ids=["png", "webp", "jpeg"],
)
def test_every_orientation_is_turned_upright(
    orientation: int, file_format: str, options: dict[str, object], tolerance: int
) -> None:
    stored = blocks(side=16)
    data = saved(Image.fromarray(stored), file_format, exif=b"Exif\0\0" + exif(orientation), **options)

    image = open_image(data)

    expected = UPRIGHT_FROM_STORED[orientation](stored)
    np.testing.assert_allclose(np.asarray(image, dtype=int), expected, atol=tolerance)
    assert image.info == {}


def test_orientation_of_a_pillow_image_is_applied_once() -> None:
    sideways = Image.open(io.BytesIO(saved(Image.fromarray(blocks()), "PNG", exif=exif(6))))

    once = open_image(sideways)

    assert once.size == (2, 3)
    assert open_image(once).tobytes() == once.tobytes()


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\xff", b"garbage" * 9, exif(99)])
def test_broken_exif_leaves_the_picture_as_it_is(block: bytes) -> None:
    data = flat_jpeg((90,), jpeg_segment(0xE1, b"Exif\0\0" + block))

    assert open_image(data).getpixel((0, 0)) == (90, 90, 90)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "MPO"])
def test_first_frame_is_the_picture(file_format: str) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), BLUE)
    data = saved(first, file_format, save_all=True, append_images=[second])

    image = open_image(data)

    np.testing.assert_allclose(np.asarray(image, dtype=int), np.broadcast_to(RED, (16, 16, 3)), atol=4)


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_photographs_have_the_pixels_that_pillow_gives(path: Path) -> None:
    with Image.open(path) as image:
        assert open_image(path).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"progressive": True}),
        ("JPEG", {"quality": 30, "optimize": True, "comment": b"c" * 99}),
        ("JPEG", {"restart_marker_blocks": 1}),
        ("PNG", {"optimize": True}),
        ("GIF", {"interlace": 1, "comment": b"c" * 999}),
        ("WEBP", {"quality": 40}),
        ("BMP", {}),
    ],
)
def test_leaving_out_metadata_changes_no_pixel(file_format: str, options: dict[str, object]) -> None:
    with Image.open(EXAMPLES[0]) as photograph:
        data = saved(photograph, file_format, **options)

    with Image.open(io.BytesIO(data)) as image:
        assert open_image(data).tobytes() == image.convert("RGB").tobytes()


PICTURE = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 250, 251, 252]))
EXPECTED = [(1, 2, 3), (250, 251, 252)]


def test_path_and_open_file_give_the_picture_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "b\u00fccher \u56fe.jpg"
    path.write_bytes(PICTURE)

    assert pixels(open_image(path)) == EXPECTED
    assert pixels(open_image(str(path))) == EXPECTED
    with path.open("rb") as file:
        assert pixels(open_image(file)) == EXPECTED


@pytest.mark.parametrize(
    "source",
    [
        PICTURE,
        bytearray(PICTURE),
        memoryview(PICTURE),
        "data:image/png;base64," + base64.b64encode(PICTURE).decode(),
        "DATA:image/jpeg;name=x;BASE64," + base64.encodebytes(PICTURE).decode(),
    ],
    ids=["bytes", "bytearray", "memoryview", "data-url", "data-url-with-line-breaks"],
)
def test_bytes_and_data_urls_give_the_picture(source: bytes | str) -> None:
    assert pixels(open_image(source)) == EXPECTED


def test_stream_that_gives_little_at_a_time_is_read_to_its_end() -> None:
    class Trickle(io.RawIOBase):
        rest = PICTURE

        def read(self, size: int = -1) -> bytes:
            piece, self.rest = self.rest[:5], self.rest[5:]
            return piece

    assert pixels(open_image(Trickle())) == EXPECTED


def test_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    path.write_bytes(PICTURE)
    with path.open() as text:
        monkeypatch.setattr(sys, "stdin", text)

        assert pixels(open_image("-")) == EXPECTED


def test_pillow_image_is_left_as_it_is() -> None:
    original = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    original.info["exif"] = exif(6)

    image = open_image(original)

    assert (original.mode, original.info) == ("RGBA", {"exif": exif(6)})
    assert image is not original


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes_are_opened(width: int, height: int) -> None:
    assert open_image(png(width, height, 1, 0, (b"\0" + b"\0" * ((width + 7) // 8)) * height)).size == (width, height)


# Refusals


def refusal(source: object, limits: ImageLimits | None = None) -> ImageError:
    """The error, after the checks that hold for every one of them."""
    with pytest.raises(ImageError) as caught:
        open_image(source, limits=limits or ImageLimits())  # type: ignore[arg-type]

    error = caught.value
    assert " at 0x" not in error.message  # an object instead of its name
    assert "\n" not in error.message
    assert not error.message.endswith(".")
    assert len(error.message) < 250
    assert error.hint
    return error


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "the given data is empty, expected JPEG, PNG, WebP, GIF or BMP"),
        (b"just a text", "the given data is not a picture file, expected JPEG, PNG, WebP, GIF or BMP"),
        (saved(Image.new("L", (4, 4)), "TIFF"), "the given data is a TIFF or raw camera file, expected JPEG"),
        (png(0, 5, 8, 0, b""), "has 0 x 5 pixels, expected at least 1 x 1"),
        (PICTURE[:-20], "is a PNG file that is damaged or cut short"),
        (png(9, 9, 8, 2, b"\0\1\2"), "is a PNG file that is damaged, cut short"),
        (saved(Image.fromarray(blocks(16)), "JPEG")[:-40], "is a JPEG file that is damaged, cut short"),
        (PICTURE.replace(b"IDAT", b"IDAT\1"), "is a PNG file that is damaged"),
        (
            png(3, 1, 8, 0, b"\0\1\2", png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0))),
            "that is damaged",
        ),
    ],
    ids=["empty", "text", "tiff", "no-width", "cut", "few-pixels", "cut-jpeg", "shifted", "two-sizes"],
)
def test_data_that_is_no_whole_picture_is_refused(data: bytes, complaint: str) -> None:
    assert complaint in refusal(data).message


def test_missing_file_folder_and_text_file_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("a text")

    assert refusal(tmp_path / "nothing.jpg").message.endswith("nothing.jpg' does not exist")
    assert refusal(tmp_path).message.endswith("' is a folder, expected a file")
    assert "notes.jpg' is not a picture file" in refusal(text).message


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", "nothing/" * 20])
def test_names_that_cannot_exist_are_refused(name: str) -> None:
    refusal(name)


def test_strange_names_are_escaped_and_shortened() -> None:
    message = refusal("a\x1b[2Jb\u202e\n" + "c" * 500 + ".jpg").message

    assert message.isprintable()
    assert message.startswith(r"picture 'a\x1b[2Jb\u202e\nccc")
    assert "ccc...ccc" in message


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Give up the superuser's right to read everything, while the test runs."""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX users")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_file_without_permission_is_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(PICTURE)
    path.chmod(0)
    request.getfixturevalue("unprivileged")

    assert "secret.png' must not be read by this user" in refusal(path).message


@pytest.mark.timeout(10)
def test_pipe_device_and_socket_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))

        assert "is a pipe or a device, expected a file" in refusal(tmp_path / "pipe").message
        assert "'/dev/zero' is a pipe or a device" in refusal("/dev/zero").message
        assert "cannot be opened" in refusal(tmp_path / "socket").message


def test_standard_input_without_a_file_behind_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)

    assert refusal("-").message == "standard input is not connected to a picture"


def test_terminal_is_refused_as_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    with os.fdopen(terminal) as text:
        monkeypatch.setattr(sys, "stdin", text)

        assert "not connected to a picture" in refusal("-").message
    os.close(controller)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host.example/cat.jpg?key=secret", "'http://host.example'"),
        ("HTTPS://user:secret@host.example/secret", "'HTTPS://host.example'"),
        ("ftp://host.example/cat.jpg", "'ftp://host.example'"),
        ("file:///etc/passwd", "'file://'"),
    ],
)
def test_remote_address_is_refused_with_what_to_do(url: str, shown: str) -> None:
    error = refusal(url)

    assert error.message == f"picture {shown} is a remote address, and pictures are not fetched from a network"
    assert "download it first" in error.hint
    assert "secret" not in error.message + error.hint


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("data:image/png;base64,@@@@", "the data URL is not valid base64"),
        ("data:image/png;base64,QUJ", "the data URL is not valid base64"),
        ("data:image/png;base64,\u00e9", "the data URL is not valid base64"),
        ("data:image/png,rawbytes", "the data URL is not one of a picture"),
        ("data:text/html;base64,QUJD", "the data URL is not one of a picture"),
        ("data:" + "x" * 10_000, "the data URL is not one of a picture"),
        ("data:image/png;base64,", "the data URL is empty"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "the data URL is an SVG, HTML or XML file"),
    ],
)
def test_bad_data_url_is_refused_without_being_echoed(url: str, complaint: str) -> None:
    assert refusal(url).message.startswith(complaint)


@pytest.mark.parametrize("source", [None, 7, ["a.png"], np.zeros((2, 2, 3), np.uint8), io.StringIO("text")])
def test_other_objects_are_refused_by_their_type(source: object) -> None:
    assert "expected" in refusal(source).message or "is not a picture" in refusal(source).message


def test_closed_and_text_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    with path.open(encoding="utf-8") as text, path.open("rb") as closed:
        closed.close()

        assert refusal(text).message == "the given file object cannot be read: it is closed, or opened as text"
        assert refusal(closed).message == "the given file object cannot be read: it is closed, or opened as text"


def test_pillow_image_whose_file_is_closed_is_refused() -> None:
    with Image.open(io.BytesIO(PICTURE)) as image:
        pass

    assert refusal(image).message == "the given image cannot be loaded: its file is closed or damaged"


# Limits


SAME_PICTURE = {
    "bytes": lambda path: PICTURE,
    "path": lambda path: path,
    "stream": lambda path: io.BytesIO(PICTURE),
    "data-url": lambda path: "data:image/png;base64," + base64.b64encode(PICTURE).decode(),
}


@pytest.mark.parametrize("source", SAME_PICTURE.values(), ids=SAME_PICTURE.keys())
def test_file_may_have_exactly_the_permitted_length(source: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)

    assert pixels(open_image(source(path), limits=ImageLimits(max_bytes=len(PICTURE)))) == EXPECTED
    assert "is longer than" in refusal(source(path), ImageLimits(max_bytes=len(PICTURE) - 1)).message


def test_no_more_is_read_than_the_limit_needs() -> None:
    endless = io.BytesIO(PICTURE + b"\0" * 10_000)

    refusal(endless, ImageLimits(max_bytes=500))

    assert endless.tell() == 501


def test_default_limit_of_length_is_told_in_mebibytes() -> None:
    assert refusal(b"\xff" * (20 * 2**20 + 1)).message == "the given data is longer than 20 MiB"


@pytest.mark.parametrize(
    ("width", "height"), [(13_000, 13_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (20_001, 1), (1, 20_001)]
)
def test_oversized_picture_is_refused_from_its_header(width: int, height: int) -> None:
    no_pixels_at_all = png(width, height, 1, 0, b"")

    message = refusal(no_pixels_at_all).message

    assert f"has {width} x {height} pixels, expected at most 40000000 in all and 20000 a side" in message


def test_oversized_pillow_image_is_refused() -> None:
    assert (
        "has 3 x 2 pixels, expected at most 5 in all"
        in refusal(Image.new("L", (3, 2)), ImageLimits(max_pixels=5)).message
    )


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_compressed_metadata_is_never_unpacked(kind: bytes) -> None:
    bomb = png_chunk(kind, (b"k\0\1\0\0\0" if kind == b"iTXt" else b"k\0\0") + zlib.compress(b"\0" * 10**7, 9))
    start = time.process_time()

    image = open_image(png(1, 1, 8, 0, b"\0\x09", *[bomb] * 1000))

    assert image.getpixel((0, 0)) == (9, 9, 9)
    assert time.process_time() - start < 1  # Pillow alone takes several seconds, or gives up


def test_many_exif_segments_take_no_time() -> None:
    long, short = (jpeg_segment(0xE1, b"Exif\0\0" + b"x" * length) for length in (65_000, 1))
    start = time.process_time()

    open_image(flat_jpeg((90,), *[long] * 80, *[short] * 10_000))

    assert time.process_time() - start < 1  # joined one by one, as Pillow does, they take 8 seconds


def test_strictness_of_pillow_is_not_changed() -> None:
    open_image(PICTURE)

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# The name of a picture in caches


def test_hash_is_that_of_mode_size_and_pixels() -> None:
    expected = hashlib.sha256(b"RGB 2 1\n" + bytes([1, 2, 3, 250, 251, 252])).hexdigest()

    assert content_hash(open_image(PICTURE)) == expected


def test_hash_is_equal_for_pictures_that_look_alike() -> None:
    upright = Image.fromarray(blocks())
    turned = Image.open(io.BytesIO(saved(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6))))
    clear = upright.convert("RGBA")

    assert content_hash(turned) == content_hash(clear) == content_hash(upright)


def test_hash_differs_for_another_shape_orientation_or_pixel() -> None:
    wide = Image.frombytes("RGB", (3, 2), bytes(18))
    tall = Image.frombytes("RGB", (2, 3), bytes(18))
    touched = wide.copy()
    touched.putpixel((2, 1), (0, 0, 1))
    turned = wide.copy()
    turned.info["exif"] = exif(6)

    assert len({content_hash(image) for image in (wide, tall, touched)}) == 3
    assert content_hash(turned) == content_hash(tall)


# Damaged files

SPECIMENS = {
    "jpeg": saved(Image.fromarray(blocks(8)), "JPEG", exif=b"Exif\0\0" + exif(6)),
    "jpeg-progressive": saved(Image.fromarray(blocks(8)), "JPEG", progressive=True),
    "jpeg-cmyk": saved(Image.fromarray(blocks(4)).convert("CMYK"), "JPEG"),
    "mpo": saved(Image.fromarray(blocks(4)), "MPO", save_all=True, append_images=[Image.fromarray(blocks(4))]),
    "png": saved(Image.fromarray(blocks(4)), "PNG", exif=exif(5)),
    "png-palette": png(3, 1, 8, 3, bytes([0, 0, 1, 2]), PALETTE, png_chunk(b"tRNS", b"\0\x80")),
    "png-16-bit": png(2, 1, 16, 0, b"\0" + bytes(4), png_chunk(b"tRNS", b"\0\1")),
    "webp": saved(Image.fromarray(blocks(4)), "WEBP"),
    "webp-animation": saved(
        Image.fromarray(blocks(4)), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (12, 8))]
    ),
    "gif": saved(Image.fromarray(blocks(4)), "GIF", transparency=0),
    "gif-animation": saved(
        Image.fromarray(blocks(4)), "GIF", save_all=True, append_images=[Image.new("RGB", (12, 8))], comment=b"abc"
    ),
    "bmp": saved(Image.fromarray(blocks(2)), "BMP"),
    "bmp-palette": saved(Image.fromarray(blocks(2)).convert("P"), "BMP"),
}


def mutant(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes or bits; half of the time cut the file or repeat a piece of it as well."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        position = chance.randrange(len(changed))
        changed[position] = chance.choice(
            [0, 255, chance.randrange(256), changed[position] ^ (1 << chance.randrange(8))]
        )
    start, end = sorted(chance.randrange(len(changed)) for _ in range(2))
    return bytes(chance.choice([changed, changed, changed[:end], changed[:end] + changed[start:]]))


def open_mutants(data: bytes, count: int) -> tuple[int, int]:
    """How many damaged files still gave a picture, and how many an error. Anything else fails the test."""
    chance = random.Random(0)
    opened = refused = 0
    for _ in range(count):
        try:
            image = open_image(mutant(data, chance), limits=ImageLimits(max_pixels=1_000_000))
        except ImageError:
            refused += 1
        else:
            opened += 1
            assert image.mode == "RGB"
    return opened, refused


@pytest.mark.timeout(60)
@pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())
def test_damaged_file_gives_a_picture_or_one_sentence(specimen: bytes) -> None:
    opened, refused = open_mutants(specimen, 300)

    assert opened > 0
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())
def test_many_damaged_files_give_a_picture_or_one_sentence(specimen: bytes) -> None:
    assert sum(open_mutants(specimen, 20_000)) == 20_000
