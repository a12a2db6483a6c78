"""Looking through a source before training on it: how many records, what is broken, how large, how long, how often.

Small sources are read whole and every picture is decoded; of large ones a seeded sample is, besides every record that
is known to be bad. What a record becomes for a model is not known here.
"""

import hashlib
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from minigpt4.data.record import Record, Source
from minigpt4.data.sources.formats import Report
from minigpt4.data.sources.safe_files import kind_of
from minigpt4.errors import DataError, ImageError
from minigpt4.processing.pictures import open_image
from minigpt4.weights.files.atomic import write_file

ALL_UP_TO = 10_000
"""Records of a source that is read whole."""
SAMPLE = 2_000
"""Records looked at of a larger one."""
EXAMPLES = 3
"""Sentences kept of each fault."""
SHOWN = 12
"""Records for a contact sheet."""
COLUMNS, CELL, MARGIN = 4, (280, 330), 16
"""Of a contact sheet; width and height of a record, and the space between them, in pixels."""
PICTURE = (280, 210)
"""Largest width and height of a picture there."""
_LINE, _LETTERS, _LINES = 17, 44, 6


@dataclass
class Fault:
    """One kind of what is broken.

    Args:
        count: How many records of those looked at.
        examples: What was said of the first of them.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    minimum: int
    median: int
    maximum: int


@dataclass
class SourceCheck:
    """What a look through a source gave; a bad share of a large one is by its sample and what is known of all."""

    source: str
    identity: str
    records: int  # bad ones included
    sampled: int  # records looked at besides the known bad ones
    seed: int | None  # of the sample; None where every record was looked at
    known_bad: int  # of all, without reading
    good: int = 0
    faults: dict[str, Fault] = field(default_factory=dict)
    bad_share: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    widths: Spread | None = None  # in pixels
    heights: Spread | None = None
    characters: Spread | None = None  # of what is learnt from each record
    tokens: Spread | None = None  # the same, where a model's were counted
    cut: int | None = None  # answers of more than `max_text_tokens`
    max_text_tokens: int | None = None
    turns: dict[int, int] = field(default_factory=dict)  # sound records by number of questions and answers
    text_only: int = 0
    same_picture: int = 0  # records whose picture, to the byte, an earlier one has
    same_record: int = 0  # those whose text is the same too
    samples: list[int] = field(default_factory=list)  # sound records with a picture, spread over the source

    @property
    def bad(self) -> int:
        """Bad records among those looked at."""
        return sum(fault.count for fault in self.faults.values())

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {**asdict(self), "bad": self.bad}


@dataclass
class _Seen:
    """What is gathered while looking."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pictures: set[bytes] = field(default_factory=set)
    records: set[bytes] = field(default_factory=set)
    turns: Counter[int] = field(default_factory=Counter)
    shown: list[int] = field(default_factory=list)
    surprises: int = 0  # bad records that were not known to be


def check_source(
    source: Source,
    *,
    everything: bool = False,
    seed: int = 1,
    count_tokens: Callable[[str], int] | None = None,
    max_text_tokens: int | None = None,
    report: Report | None = None,
) -> SourceCheck:
    """Look through a source.

    Args:
        source: The source.
        everything: Look at every record of a large one too.
        seed: Of the sample of a large one.
        count_tokens: Counts a text's tokens as a model does.
        max_text_tokens: Answers with more, their end symbol included, will be cut off.
        report: Called after each record.
    """
    known_bad = set(source.known_bad())
    whole = everything or len(source) <= ALL_UP_TO
    chosen: Sequence[int] = range(len(source))
    if not whole:
        chosen = np.random.default_rng(seed).choice(len(source), SAMPLE, replace=False).tolist()
    check = SourceCheck(source.name, source.identity, len(source), len(chosen), None if whole else seed, len(known_bad))
    check.skipped, check.max_text_tokens = dict(source.skipped), max_text_tokens
    numbers = chosen if whole else sorted({*chosen, *known_bad})
    seen = _Seen()
    for done, number in enumerate(numbers, 1):
        try:
            record = source.read(number)
            size = open_image(record.picture).size if record.picture is not None else None
        except (DataError, ImageError) as error:
            _note(check, error, source, number)
            seen.surprises += number not in known_bad
        else:
            _measure(check, seen, record, count_tokens)
            if size:
                seen.sizes.append(size)
                seen.shown.append(number)
        if report:
            report("checking records", done, len(numbers))
    known = len(known_bad.intersection(numbers))  # all of them were looked at; the others are a sample of their kind
    surprising = seen.surprises / max(1, len(numbers) - known) * (check.records - known)
    check.bad_share = (check.bad - seen.surprises + surprising) / max(1, check.records)
    _sum_up(check, seen)
    return check


def _note(check: SourceCheck, error: DataError | ImageError, source: Source, number: int) -> None:
    message = error.message
    if isinstance(error, ImageError):
        message = f"{source.read(number).key}: {message.replace('the given data', 'the picture')}"
    fault = check.faults.setdefault(kind_of(error), Fault())
    fault.count += 1
    if len(fault.examples) < EXAMPLES:
        fault.examples.append(message)


def _measure(check: SourceCheck, seen: _Seen, record: Record, count_tokens: Callable[[str], int] | None) -> None:
    check.good += 1
    seen.turns[len(record.turns)] += 1
    seen.characters.append(sum(len(answer) for _, answer in record.turns))
    if count_tokens:
        counts = [count_tokens(answer) + 1 for _, answer in record.turns]  # and the end symbol
        seen.tokens.append(sum(counts))
        if check.max_text_tokens is not None:
            check.cut = (check.cut or 0) + sum(count > check.max_text_tokens for count in counts)
    if record.picture is None:
        check.text_only += 1
        return
    picture = hashlib.sha256(record.picture).digest()
    whole = hashlib.sha256(picture + repr(record.turns).encode("utf-8", "surrogatepass")).digest()
    check.same_picture += picture in seen.pictures
    check.same_record += whole in seen.records
    seen.pictures.add(picture)
    seen.records.add(whole)


def _sum_up(check: SourceCheck, seen: _Seen) -> None:
    check.widths, check.heights = (_spread([size[side] for size in seen.sizes]) for side in (0, 1))
    check.characters, check.tokens = _spread(seen.characters), _spread(seen.tokens)
    check.turns = dict(sorted(seen.turns.items()))
    check.faults = dict(sorted(check.faults.items(), key=lambda item: -item[1].count))
    count = min(SHOWN, len(seen.shown))
    check.samples = [seen.shown[i * len(seen.shown) // count] for i in range(count)]


def _spread(numbers: Sequence[int]) -> Spread | None:
    ordered = sorted(numbers)
    return Spread(ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None


def write_contact_sheet(target: Path, records: Sequence[Record]) -> None:
    """Write records, four in a row, each with its words under its picture, as a PNG file.

    Raises:
        ImageError: A picture cannot be opened.
        StorageError: The place cannot be written.
    """
    width, height = (side + MARGIN for side in CELL)
    page = Image.new("RGB", (COLUMNS * width + MARGIN, -(-len(records) // COLUMNS) * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), _font()
    for number, record in enumerate(records):
        x, y = MARGIN + number % COLUMNS * width, MARGIN + number // COLUMNS * height
        if record.picture is not None:
            picture = ImageOps.contain(open_image(record.picture), PICTURE)
            page.paste(picture, (x + (PICTURE[0] - picture.width) // 2, y + PICTURE[1] - picture.height))
        said = "\n".join(f"{question} - {answer}" if question else answer for question, answer in record.turns)
        lines = [line for part in said.splitlines() for line in textwrap.wrap(_printable(part), _LETTERS)]
        if len(lines) > _LINES:
            lines[_LINES - 1 :] = [f"{lines[_LINES - 1][: _LETTERS - 4]} ..."]
        for at, line in enumerate([_printable(record.key)[-_LETTERS:], *lines]):
            draw.text((x, y + PICTURE[1] + 2 + at * _LINE), line, "black" if at else "gray", font)
    with write_file(target) as file:
        page.save(file, "PNG")


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 11)  # has more letters than Pillow's own, where a system has it
    except OSError:
        return ImageFont.load_default(13)


def _printable(text: str) -> str:
    """Replace what no font can show by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text.replace("\t", " "))
