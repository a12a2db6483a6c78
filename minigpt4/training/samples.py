"""Sample answers on fixed pictures, as one page to look at while a run goes on: how does it speak by now?

`samples.jsonl` keeps what was answered, so that a resumed run continues the page; `samples.html` shows it, and is whole
in itself: no script, nothing fetched.
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

import torch
from PIL import Image
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.errors import DataError
from minigpt4.inference.generation import AnswerWriter
from minigpt4.inference.reading import never_said, stops
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing.pictures import PictureSource, open_image
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.weights.files.atomic import write_file
from minigpt4.weights.files.disk import storing

SAMPLES_FILE = "samples.jsonl"
PAGE_FILE = "samples.html"
PICTURE_SIDE = 320
"""Longest side of a picture on the page, in pixels."""

SHOWN_ROUNDS = 4
"""So many of a picture's last answers are open to the eye; earlier ones unfold."""


@dataclass(frozen=True)
class Sample:
    """An answer about a picture.

    Args:
        picture: The picture, made small, as a data URL.
        reference: What a person says of it; empty where nothing is known.
        answer: What the model says.
    """

    picture: str
    reference: str
    answer: str


@dataclass(frozen=True)
class Round:
    """The answers at one step.

    Args:
        stage: The stage's name.
        step: Updates made in it.
        samples: An answer a picture, in the same order each time.
    """

    stage: str
    step: int
    samples: tuple[Sample, ...]


def make_round(
    stage: str, step: int, pictures: Sequence[PictureSource], references: Sequence[str], answers: Sequence[str]
) -> Round:
    """Put pictures, captions and answers together.

    Raises:
        ImageError: A picture cannot be opened.
        ValueError: They differ in number.
    """
    told = zip(pictures, references, answers, strict=True)
    return Round(stage, step, tuple(Sample(_small(picture), reference, answer) for picture, reference, answer in told))


def add_round(folder: Path, title: str, new: Round) -> Path:
    """Add a round to a run's page; it takes the place of an earlier round of the same stage and step.

    Args:
        folder: The run's.
        title: Of the page.
        new: What was answered now.

    Returns:
        The page.

    Raises:
        DataError: `samples.jsonl` is damaged.
        StorageError: The folder cannot be read or written.
    """
    rounds = {(old.stage, old.step): old for old in read_rounds(folder)}
    rounds[new.stage, new.step] = new
    _write_rounds(folder, list(rounds.values()))
    return write_samples_page(folder, title, list(rounds.values()))


def read_rounds(folder: Path) -> list[Round]:
    """Return the rounds that a run's folder holds, the first one first.

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
    """Write a line a round; a picture stands in the first round that shows it."""
    names: dict[str, str] = {}
    with write_file(folder / SAMPLES_FILE, "w") as file:
        for entry in rounds:
            new = {s.picture: "" for s in entry.samples if s.picture not in names}
            names |= {picture: str(number) for number, picture in enumerate(new, len(names))}
            line: dict[str, Any] = {"stage": entry.stage, "step": entry.step}
            line["samples"] = [[names[s.picture], s.reference, s.answer] for s in entry.samples]
            line["pictures"] = {names[picture]: picture for picture in new}
            file.write(json.dumps(line) + "\n")


def _small(source: PictureSource) -> str:
    """Return a picture as a data URL of some ten kilobytes."""
    picture = open_image(source)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5b6370; --paper: #f4f5f7; --card: #fff; --line: #dfe3e8;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ed; --soft: #a3abb8; --paper: #15181d; --card: #1e2229;
  --line: #343a44; --mark: #6cb8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 100rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
header p { margin: 0 0 1rem; color: var(--soft); }
main { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr));
  align-items: start; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden; }
img { display: block; width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--paper); }
dl { margin: 0; padding: .2rem 1rem .8rem; }
dt { margin-top: .6rem; color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.reference dd { font-style: italic; }
.newest dt { color: var(--mark); font-weight: 600; }
details dl { padding: 0; }
details { padding: 0 1rem .8rem; }
dl:has(+ details) { padding-bottom: 0; }
summary { margin-top: .6rem; color: var(--soft); font-size: .85rem; cursor: pointer; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{summary}</p>
</header>
<main>
{columns}
</main>
</body>
</html>
"""


def write_samples_page(folder: Path, title: str, rounds: Sequence[Round]) -> Path:
    """Write the page: a column for each picture of the last round, with what was answered, the newest first.

    Args:
        folder: Where `samples.html` appears or is replaced.
        title: Of the page.
        rounds: The first one first. Earlier answers are found by their picture, so that the pictures may change.

    Returns:
        The page.

    Raises:
        StorageError: The folder cannot be written.
    """
    last = rounds[-1] if rounds else None
    columns = [_column(sample, rounds) for sample in (last.samples if last else ())]
    summary = f"Newest answers: {last.stage}, step {last.step:,}" if last else "No answers yet"
    page = _PAGE.format(title=_text(title), style=_STYLE, summary=_text(summary), columns="\n".join(columns))
    with write_file(folder / PAGE_FILE, "w") as file:
        file.write(page)
    return folder / PAGE_FILE


def _column(shown: Sample, rounds: Sequence[Round]) -> str:
    """Write one picture's column."""
    answers = [
        (f"{entry.stage}, step {entry.step:,}", sample.answer)
        for entry in reversed(rounds)
        for sample in entry.samples
        if sample.picture == shown.picture and sample.reference == shown.reference
    ]
    name = _text(shown.reference or "a picture without a caption")
    rows = [_row("reference", shown.reference, "reference")] if shown.reference else []
    rows += [_row(when, answer, "" if number else "newest") for number, (when, answer) in enumerate(answers)]
    split = SHOWN_ROUNDS + (1 if shown.reference else 0)
    lines = ["<article>", f'<img src="{_text(shown.picture)}" alt="{name}">', "<dl>", *rows[:split], "</dl>"]
    if rows[split:]:
        count = len(rows[split:])
        lines += [f"<details><summary>{count} earlier</summary><dl>", *rows[split:], "</dl></details>"]
    return "\n".join([*lines, "</article>"])


def _row(name: str, text: str, kind: str) -> str:
    return f'<div class="{kind}"><dt>{_text(name)}</dt><dd dir="auto">{_text(text)}</dd></div>'


def _text(text: str) -> str:
    """Escape text for the page; what no page can hold, such as half a character, becomes a question mark."""
    return html.escape("".join("?" if category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text))


def answer_pictures(
    model: MiniGPT4ForConditionalGeneration,
    processor: MiniGPT4Processor,
    pictures: Sequence[PictureSource],
    question: str,
    max_new_tokens: int,
    *,
    features: BaseModelOutputWithPooling | None = None,
    together: bool = False,
) -> list[str]:
    """Ask one question about each picture by itself, and return the likeliest answers, as `ask` would.

    All are answered in one batch: the prompts are equally long, so none is padded. The parts' modes (training or
    evaluation) are as before when it ends.

    Args:
        model: The model, on any device, in any mode.
        processor: Its processor.
        pictures: The pictures.
        question: The question.
        max_new_tokens: Longest answer.
        features: What the model made of the pictures before, `pooler_output` a row a picture; None looks at them.
        together: All processes of a run answer, since each has a part of the model only; none ends before the others.

    Raises:
        ImageError: A picture cannot be opened.
        PromptError: The question cannot be turned into a prompt.
    """
    if not pictures:
        return []
    asked = {"type": "text", "text": question}
    conversations: list[Any] = [
        [{"role": "user", "content": [{"type": "image", "image": open_image(picture)}, asked]}] for picture in pictures
    ]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    inputs = inputs.to(model.device)
    pixels = inputs.pop("pixel_values").to(model.dtype)
    inputs |= {"pixel_values": pixels} if features is None else {"mm_encoder_outputs": {"image": features}}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        length = inputs["input_ids"].shape[1]
        penalty = RepetitionPenaltyLogitsProcessor(
            float(model.generation_config.repetition_penalty or 1.0), prompt_ignore_length=length
        )  # as in a conversation: on what is newly said
        output: torch.Tensor = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
            logits_processor=LogitsProcessorList([penalty]),
            suppress_tokens=never_said(model),
            synced_gpus=together,
            **stops(model, processor, processor.prompt_template),
        )
    finally:
        for module, mode in modes:
            module.training = mode
    return [_answer(ids, processor) for ids in output[:, length:].tolist()]


def _answer(ids: list[int], processor: MiniGPT4Processor) -> str:
    writer = AnswerWriter(processor.tokenizer, processor.prompt_template.stop_strings)
    for token in ids:
        writer.write(token)
    writer.end()
    return writer.text
