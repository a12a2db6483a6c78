"""A contact sheet: pictures of a source with their words under them, on one page.

Knows records and Pillow; where records come from, and what a model makes of them, it is told.
"""

import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from minigpt4.data.record import Record
from minigpt4.errors import DataError
from minigpt4.processing.pictures import open_image
from minigpt4.weights.files.atomic import write_file

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLUMNS = 4
PICTURE = (280, 210)
"""Largest width and height of a picture on the sheet, in pixels."""
_MARGIN, _LINE, _LINES, _FONT, _WIDER_FONT = 16, 17, 6, 13, 11
_SYSTEMS_FONTS = (
    "DejaVuSans.ttf", "Arial.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc", "PingFang.ttc", "msyh.ttc", "wqy-microhei.ttc",
)  # fmt: skip
"""For letters that Pillow's own font has not, which are all beyond ASCII; a system has some of them, or none."""
_NO_LETTER = "\u0378"
"""Belongs to no letter, so that a font draws what it draws for any letter that it has not."""
_LETTERS = 44
"""In a line; the font's widest letters then still fit nearly always, and a line is cut off where they do not."""


def plain_words(record: Record) -> str:
    """Return what a record says, for people: its answers, after their questions where it has any."""
    return "\n".join(f"{question} - {answer}" if question else answer for question, answer in record.turns)


def draw_contact_sheet(records: Sequence[Record], words: Callable[[Record], str] = plain_words) -> Image.Image:
    """Draw records with pictures, four in a row.

    Args:
        records: What to show; those without a picture show their words alone.
        words: What stands under a picture.

    Returns:
        The page, RGB.

    Raises:
        DataError: There is nothing to show.
        ImageError: A picture cannot be opened.
    """
    if not records:
        raise DataError("there is no sound record to show", "minigpt4 data check says what is wrong with them")
    texts = [_wrapped(words(record)) for record in records]
    cell = PICTURE[0], PICTURE[1] + (max(map(len, texts)) + 1) * _LINE + _MARGIN
    width, height = cell[0] + _MARGIN, cell[1] + _MARGIN
    rows = -(-len(records) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width + _MARGIN, rows * height + _MARGIN), "white")
    for number, (record, lines) in enumerate(zip(records, texts, strict=True)):
        place = _MARGIN + number % COLUMNS * width, _MARGIN + number // COLUMNS * height
        page.paste(_draw_cell(record, lines, cell), place)
    return page


def write_contact_sheet(target: Path, records: Sequence[Record], words: Callable[[Record], str] = plain_words) -> None:
    """Write a contact sheet as a PNG file; see `draw_contact_sheet`.

    Raises:
        DataError: There is nothing to show.
        StorageError: The place cannot be written.
    """
    page = draw_contact_sheet(records, words)
    with write_file(target) as file:
        page.save(file, "PNG")


def _draw_cell(record: Record, lines: Sequence[str], size: tuple[int, int]) -> Image.Image:
    cell = Image.new("RGB", size, "white")
    if record.picture is not None:
        picture = ImageOps.contain(open_image(record.picture), PICTURE)
        cell.paste(picture, ((PICTURE[0] - picture.width) // 2, PICTURE[1] - picture.height))
    draw, font = ImageDraw.Draw(cell), _font_for("".join([record.key, *lines]))
    draw.text((0, PICTURE[1] + 2), _printable(record.key)[-_LETTERS:], "gray", font)
    for number, line in enumerate(lines, 1):
        draw.text((0, PICTURE[1] + 2 + number * _LINE), line, "black", font)
    return cell


def _font_for(text: str) -> Font:
    """Return the font that has the most letters of a text, Pillow's own where that has as many as others."""
    return max(_fonts(), key=lambda font: sum(_has(font, letter) for letter in set(text)))


@cache
def _fonts() -> list[Font]:
    found: list[Font] = [ImageFont.load_default(_FONT)]
    for name in _SYSTEMS_FONTS:
        try:
            found.append(ImageFont.truetype(name, _WIDER_FONT))
        except OSError:  # this system has it not
            continue
    return found


def _has(font: Font, letter: str) -> bool:
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))


def _wrapped(text: str) -> list[str]:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(_printable(part), _LETTERS)]
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"{lines[_LINES - 1][: _LETTERS - 4]} ..."]


def _printable(text: str) -> str:
    """Replace what no font can show by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\t", " "))
