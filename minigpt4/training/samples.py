"""Sample answers on fixed pictures, as one page to look at while a run goes on.

`samples.jsonl` keeps the answers, so that a resumed run continues the page; `samples.html` shows them, without a script
and without anything fetched.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import category

from PIL import Image

from minigpt4.errors import DataError
from minigpt4.processing.pictures import PictureSource, open_image
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import storing

SAMPLES_FILE = "samples.jsonl"
PAGE_FILE = "samples.html"
PICTURE_SIDE = 320
"""Longest side of a picture on the page, in pixels."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 1rem; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #8888; padding: .4rem .6rem; text-align: start; vertical-align: top; min-width: 10rem; }}
td {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
img {{ max-width: 20rem; max-height: 15rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<table>
{rows}
</table>
</body>
</html>
"""


@dataclass(frozen=True)
class Sample:
    """An answer about a picture.

    Args:
        picture: The picture, made small, as a data URL.
        reference: Its caption; empty where it has none.
        answer: The model's.
    """

    picture: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Round:
    """The answers at one step of a stage, one for each picture."""

    stage: str
    step: int
    samples: tuple[Sample, ...]


def make_round(
    stage: str, step: int, pictures: Sequence[PictureSource], references: Sequence[str], answers: Sequence[str]
) -> Round:
    """Put pictures, captions and answers together.

    Raises:
        ImageError: A picture cannot be opened.
    """
    rows = zip(pictures, references, answers, strict=True)
    return Round(stage, step, tuple(Sample(_small(picture), reference, answer) for picture, reference, answer in rows))


def add_round(folder: Path, title: str, new: Round) -> Path:
    """Add a round to a run's page; it replaces an earlier round of the same stage and step.

    Args:
        folder: The run's.
        title: Of the page.
        new: The answers.

    Returns:
        The page.

    Raises:
        DataError: `samples.jsonl` is damaged.
        StorageError: The folder cannot be read or written.
    """
    rounds = {(old.stage, old.step): old for old in read_rounds(folder)}
    rounds[new.stage, new.step] = new
    _write_rounds(folder, list(rounds.values()))
    rows = _rows(new.samples, list(rounds.values()))
    with write_file(folder / PAGE_FILE, "w") as file:
        file.write(_PAGE.format(title=_text(title), rows="\n".join(rows)))
    return folder / PAGE_FILE


def read_rounds(folder: Path) -> list[Round]:
    """Return the rounds in a run's folder, the first one first.

    Raises:
        DataError: `samples.jsonl` is damaged.
        StorageError: It cannot be read.
    """
    path = folder / SAMPLES_FILE
    with storing(path, doing="read"):
        if not path.exists():
            return []
        lines = path.read_bytes().splitlines()
    rounds: list[Round] = []
    pictures: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            pictures |= entry["pictures"]
            samples = tuple(Sample(pictures[name], reference, text) for name, reference, text in entry["samples"])
            rounds.append(Round(entry["stage"], entry["step"], samples))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {number} of {path} holds no sample answers", "remove the file") from error
    return rounds


def _write_rounds(folder: Path, rounds: Sequence[Round]) -> None:
    """Write a line a round; a picture is part of the line of the first round that shows it."""
    names: dict[str, str] = {}
    with write_file(folder / SAMPLES_FILE, "w") as file:
        for entry in rounds:
            new = {s.picture: "" for s in entry.samples if s.picture not in names}
            names |= {picture: str(number) for number, picture in enumerate(new, len(names))}
            line: dict[str, Any] = {"stage": entry.stage, "step": entry.step}
            line["samples"] = [[names[s.picture], s.reference, s.answer] for s in entry.samples]
            line["pictures"] = {names[picture]: picture for picture in new}
            file.write(json.dumps(line) + "\n")


def _rows(shown: Sequence[Sample], rounds: Sequence[Round]) -> list[str]:
    """Write the page's table: a column for each picture of the last round, its caption, its answers, newest first."""
    rows = [("", [f'<img src="{_text(sample.picture)}" alt="">' for sample in shown])]
    rows.append(("reference", [_text(sample.reference) for sample in shown]))
    for entry in reversed(rounds):
        answers = {(sample.picture, sample.reference): sample.answer for sample in entry.samples}
        cells = [_text(answers.get((sample.picture, sample.reference), "")) for sample in shown]
        rows.append((_text(f"{entry.stage}, step {entry.step:,}"), cells))
    return ["".join(["<tr><th>", name, *(f'<td dir="auto">{cell}' for cell in cells)]) for name, cells in rows]


def _small(source: PictureSource) -> str:
    """Return a picture as a data URL of some ten kilobytes."""
    picture = open_image(source)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _text(text: str) -> str:
    """Escape text for the page; what no page can hold, such as half a character, becomes a question mark."""
    return html.escape("".join("?" if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text))
