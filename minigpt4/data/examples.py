"""From a record to what a model reads: token ids, where its loss is taken, and pixel values.

Two layouts. `template` writes the conversation as the model's prompt template does, so that training and chatting see
the same ids. `original` is MiniGPT-4's own: `[bos]`, the prompt with the picture in it (stage 2) or the picture alone
(stage 1), then the answer with its end symbol; nothing else of the conversation template.

Knows tokenizers and pictures; no files, no order and no model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minigpt4.data.record import Record
from minigpt4.errors import DataError, PromptError
from minigpt4.processing.augmentation import random_resized_crop
from minigpt4.processing.pictures import open_image
from minigpt4.processing.processing_minigpt4 import MiniGPT4Processor
from minigpt4.processing.text_encoding import TextEncoder

IGNORED = -100
"""The label of a position without a loss."""

IMAGE_MARK = "<ImageHere>"
"""Where a prompt of the original has its picture."""

DEFAULT_PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""What asks for a caption; the four of the paper's second stage (section 3.2)."""

MAX_WORDS = 50
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class Cleaning(NamedTuple):
    """How the captions of a source are cleaned: words kept at most, and what is put before them."""

    max_words: int = MAX_WORDS
    prompt: str = ""


def blip_caption(text: str, max_words: int = MAX_WORDS, prompt: str = "") -> str:
    """Return a caption as the original cleans those of shards in its first stage.

    Lower case, without most punctuation, at most `max_words` words, after a prompt. Source: LAVIS's
    `BlipCaptionProcessor`; the original leaves the captions of `cc_sbu_align` alone.
    """
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
    text = text.rstrip("\n").strip(" ")
    words = text.split(" ")
    return prompt + (" ".join(words[:max_words]) if len(words) > max_words else text)


@dataclass(frozen=True)
class TextExample:
    """The text of an example.

    Args:
        input_ids: Token ids; the image token's id at the picture's positions.
        labels: As many; the ids themselves where the loss is taken, else `IGNORED`.
        cut: Tokens of answers, or whole turns, that did not fit.
        segments: Lengths of prefix and texts in a packed example (`data.packing`); empty for one text.
        turns_left_out: How many of `cut` are turns.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int
    segments: tuple[int, ...] = ()
    turns_left_out: int = 0


@dataclass(frozen=True)
class Layout:
    """How a record becomes ids.

    Args:
        processor: The model's.
        kind: See above.
        max_text_tokens: Largest number of tokens of an answer, its end symbol included.
        max_turns: Largest number of questions in a conversation.
        keep_end: A text that is cut off keeps its end symbol; the original cuts it off too.
        prompt_template: In the layout `original`, what stands round a prompt.
        end_symbol: In the layout `original`, what ends an answer.
        context: Largest number of positions, those that the language model reads; None for no limit.
    """

    processor: MiniGPT4Processor
    kind: Literal["template", "original"] = "template"
    max_text_tokens: int = 160
    max_turns: int = 4
    keep_end: bool = True
    prompt_template: str = "###Human: {} ###Assistant: "
    end_symbol: str = "###"
    context: int | None = None

    def encode(self, record: Record, prompt: str) -> TextExample:
        """Turn a record's text into ids.

        Args:
            record: The record.
            prompt: Asks where the record has no question; empty for none, which the layout `original` permits.

        Raises:
            DataError: There is no answer to learn from.
            PromptError: The text cannot be a prompt, or is longer than the language model reads.
        """
        turns = [(question or prompt, answer) for question, answer in record.turns]
        if not turns or not all(answer.strip() for _, answer in turns):
            raise DataError(f"{record.key} has an empty answer, expected something to learn")
        example = self._original(record, turns) if self.kind == "original" else self._conversation(record, turns)
        if self.context is not None and len(example.input_ids) > self.context:
            raise PromptError(
                f"{record.key} takes {len(example.input_ids):,} places with its questions, the language model reads "
                f"{self.context:,}"
            )
        return example

    def _conversation(self, record: Record, turns: Sequence[tuple[str, str]]) -> TextExample:
        kept = turns[: self.max_turns]
        answers = [self._shortened(answer) for _, answer in kept]
        messages: list[dict[str, Any]] = []
        for (question, _), answer in zip(kept, answers, strict=True):
            parts = [{"type": "image"}] if not messages and record.picture is not None else []
            text = {"type": "text", "text": _without_marks(question)}
            messages.append({"role": "user", "content": [*parts, text]})
            messages.append({"role": "assistant", "content": answer})
        prompt = self.processor.encode(messages, add_generation_prompt=False, return_assistant_mask=True)
        labels = [
            i if answered else IGNORED for i, answered in zip(prompt.input_ids, prompt.assistant_mask, strict=True)
        ]
        shortened = sum(a.strip() != b for (_, a), b in zip(kept, answers, strict=True))
        left_out = len(turns) - len(kept)
        # What a template writes after the last end symbol, such as a line end, teaches nothing: nobody need read it.
        end = max((place for place, label in enumerate(labels, 1) if label != IGNORED), default=len(labels))
        return TextExample(prompt.input_ids[:end], labels[:end], left_out + shortened, turns_left_out=left_out)

    def _shortened(self, answer: str) -> str:
        """Cut an answer until it fits; the template then adds the end symbol."""
        encoder = TextEncoder(self.processor.tokenizer)
        answer = answer.strip()
        while (count := len(encoder.encode(answer))) >= self.max_text_tokens:
            answer = answer[: min(len(answer) - 1, len(answer) * (self.max_text_tokens - 1) // count)].rstrip()
        return answer

    def _original(self, record: Record, turns: Sequence[tuple[str, str]]) -> TextExample:
        tokenizer = self.processor.tokenizer
        question, answer = turns[0]
        picture = (
            [self.processor.image_token_id] * self.processor.num_image_tokens if record.picture is not None else []
        )
        before, after = self._original_prompt(question, bool(picture))
        prompt = [
            tokenizer.bos_token_id,
            *(self._parsed(before) if before else []),
            *picture,
            *(self._parsed(after) if after else []),
        ]
        said, end = self._parsed(answer + self.end_symbol), self._parsed(self.end_symbol)
        if self.keep_end and len(end) >= self.max_text_tokens:
            raise PromptError(
                f"the end symbol {self.end_symbol!r} takes {len(end)} tokens, which leaves none of the "
                f"{self.max_text_tokens} of max_text_tokens for an answer"
            )
        target = said[: self.max_text_tokens]
        if self.keep_end and len(said) > self.max_text_tokens:
            target = [*said[: self.max_text_tokens - len(end)], *end]
        # The original pads with the token that ends a text, and takes no loss wherever that token stands. Its later
        # version pads with another, so that answers may end with it: without a loss nobody would learn to stop.
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id not in end else None
        labels = [IGNORED if i == padding else i for i in target]
        left_out = len(turns) - 1
        cut = len(said) - len(target) + left_out
        return TextExample([*prompt, *target], [IGNORED] * len(prompt) + labels, cut, turns_left_out=left_out)

    def _parsed(self, text: str) -> list[int]:
        """Encode text as the original's tokenizer does, which reads "</s>" in a prompt or a caption as the token.

        The picture's token is none of the original's: a caption that has its name has no place for a picture there.
        """
        reserved = self.processor.image_token_id
        ids = TextEncoder(self.processor.tokenizer).encode(text, parse_special=True, reserved_id=reserved)
        if reserved in ids:
            raise PromptError(f"Text encodes to the id {reserved}, which holds the places of pictures")
        return ids

    def _original_prompt(self, question: str, has_picture: bool) -> tuple[str, str]:
        if not question:
            return "", ""
        if IMAGE_MARK not in question and has_picture:
            question = f"<Img>{IMAGE_MARK}</Img> {question}"
        before, _, after = self.prompt_template.format(question).partition(IMAGE_MARK)
        return before, after


def _without_marks(question: str) -> str:
    """Return a question without the marks that a prompt of the original has at its picture's place.

    In its own template they are text that the language model was aligned with; in another they would be odd words.
    """
    if IMAGE_MARK not in question:
        return question
    texts = question.replace(f"<Img>{IMAGE_MARK}</Img>", IMAGE_MARK).split(IMAGE_MARK)
    return " ".join(text.strip() for text in texts if text.strip())


def as_read(example: TextExample, processor: MiniGPT4Processor) -> str:
    """Write an example as the model reads it, on one line: `(picture)` for its places, `>>` and `<<` round the learnt.

    For people; the strings can stand in the text itself.
    """
    pieces: list[str] = []
    run: list[int] = []
    kind = ""

    def end_run() -> None:
        if run:
            text = "(picture)" if kind == "picture" else processor.tokenizer.decode(run, skip_special_tokens=False)
            pieces.append(f">>{text}<<" if kind == "learnt" else text)
            run.clear()

    for token, label in zip(example.input_ids, example.labels, strict=True):
        now = "picture" if token == processor.image_token_id else "text" if label == IGNORED else "learnt"
        if now != kind:
            end_run()
            kind = now
        run.append(token)
    end_run()
    return "".join(pieces).replace("\n", "\\n")


def pixel_values(record: Record, processor: MiniGPT4Processor, crop_seed: Sequence[int] | None) -> Tensor:
    """Open a record's picture and make it what the vision encoder reads.

    Args:
        record: The record; it has a picture.
        processor: The model's.
        crop_seed: Of the random part that is cut out; None takes the whole picture, as for answers.

    Returns:
        `(3, height, width)`.

    Raises:
        ImageError: The picture cannot be opened or exceeds a limit.
    """
    picture: Any = open_image(record.picture or b"")
    if crop_seed is not None:
        size = processor.image_processor.size
        picture = random_resized_crop(picture, size["height"], seeded(crop_seed))
    values: Tensor = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    return values


def seeded(key: Sequence[int]) -> torch.Generator:
    """Return a generator that numbers name."""
    mixed = 0
    for number in key:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


def padded(examples: Sequence[TextExample], pad_token_id: int) -> dict[str, Tensor]:
    """Put examples into one batch, padded on the right.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each `(batch, longest)`.
    """
    length = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    labels = torch.full((len(examples), length), IGNORED)
    attention_mask = torch.zeros(len(examples), length, dtype=torch.long)
    for row, example in enumerate(examples):
        end = len(example.input_ids)
        input_ids[row, :end] = torch.tensor(example.input_ids)
        labels[row, :end] = torch.tensor(example.labels)
        attention_mask[row, :end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
