"""The batch of a step: the examples that the order puts there, opened, encoded and padded.

A data set whose items are whole batches: item `i` is a process's `i`-th batch of a stage. Any number of workers gives
the same batches, and a resumed run begins at the item where it stopped. A bad example is replaced by another of the
same source, the same one every time, and named in the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from minigpt4.data.examples import Cleaning, Layout, TextExample, blip_caption, padded, pixel_values
from minigpt4.data.order import Order, bucketed
from minigpt4.data.packing import pack, packed_positions
from minigpt4.data.record import Record, Source, Turns
from minigpt4.data.sources.safe_files import kind_of
from minigpt4.errors import DataError, ImageError, MiniGPT4Error, PromptError

MAX_ATTEMPTS = 100
"""This many bad examples in a row are no accident."""

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory")
"""What torch says in a RuntimeError, of the CPU's memory and of an accelerator's."""


@dataclass(frozen=True)
class BadSample:
    """An example that could not be used.

    Args:
        source: Its source's name.
        group: Its shard, or what else it came in.
        key: Its own name.
        reason: Why, in a sentence.
        kind: Why, in a few words to count by, of `minigpt4.data.sources.safe_files`.
    """

    source: str
    group: str
    key: str
    reason: str
    kind: str


@dataclass(frozen=True)
class Process:
    """Which of the processes of a run this is."""

    rank: int = 0
    world_size: int = 1


class KeptPictures(Protocol):
    """Pictures that were looked at before."""

    def picture(self, record: Record) -> Any:  # noqa: ANN401  (what `batch` reads)
        """Return what is kept of a record's picture.

        Raises:
            ImageError: It could not be opened.
        """

    def batch(self, pictures: Sequence[Any]) -> dict[str, Any]:
        """Return the entries of a batch that has these pictures."""


@dataclass
class SourceBatches(Dataset[dict[str, Any]]):
    """The batches of a stage, for one process.

    Args:
        sources: Where examples come from.
        order: Which example stands where.
        layout: How its text is written.
        prompts: Ask where a record has no question; none may be an empty list in the layout `original`.
        length: Items: batches of this process in the stage.
        batch_size: Examples in one.
        process: Which process this is.
        crop: Cut a random part out of each picture that is opened.
        prompt_for: One prompt for each sample, or for a whole batch.
        bucket_batches: Number of batches over which examples are sorted by length.
        blip_captions: For each source, how its texts are cleaned as the original did in its first stage; None leaves
            them as they are.
        kept: Gives the pictures; None opens them.
    """

    sources: Sequence[Source]
    order: Order
    layout: Layout
    prompts: Sequence[str]
    length: int
    batch_size: int
    process: Process = field(default_factory=Process)
    crop: bool = True
    prompt_for: Literal["sample", "batch"] = "sample"
    bucket_batches: int = 1
    blip_captions: Sequence[Cleaning | None] = ()
    kept: KeptPictures | None = None
    _window: tuple[int, list[list[int]]] | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Batches in the stage."""
        return self.length

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `input_ids`, `attention_mask`, `labels` `(batch, longest)`; also `segment_ids` and `position_ids` where a
            row is packed; `pixel_values` `(pictures, 3, height, width)` where there are pictures, or the entries that
            `kept` makes of them; `keys` and `groups` of the examples; `bad`, those that were replaced; `cut`, how many
            lost their end.

        Raises:
            DataError: `MAX_ATTEMPTS` bad examples in a row.
        """
        bad: list[BadSample] = []
        rows = [self.example(item, place, bad) for place in self._places(item)]
        texts = [text for text, _, _, _ in rows]
        batch: dict[str, Any] = padded(texts, self.layout.processor.tokenizer.pad_token_id or 0) | packed_positions(
            texts
        )
        pictures = [picture for _, picture, _, _ in rows if picture is not None]
        if pictures:
            batch |= self.kept.batch(pictures) if self.kept else {"pixel_values": torch.stack(pictures)}
        batch["keys"] = [key for _, _, key, _ in rows]
        batch["groups"] = [group for _, _, _, group in rows]
        batch["bad"] = bad
        batch["cut"] = sum(text.cut > 0 for text in texts)
        return batch

    def _places(self, item: int) -> list[int]:
        """Return this process's places in the order: every `world_size`-th of the batch of all processes."""
        total = self.batch_size * self.process.world_size
        window, at = divmod(item, self.bucket_batches)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._deal(window, total))
        return self._window[1][at][self.process.rank :: self.process.world_size]

    def _deal(self, window: int, total: int) -> list[list[int]]:
        first = window * self.bucket_batches * total
        places = range(first, first + self.bucket_batches * total)
        if self.bucket_batches == 1:
            return [list(places)]
        lengths = [self._text_length(place) for place in places]
        dealt = bucketed(lengths, total, (self.order.seed, self.order.stage, window))
        return [[places[position] for position in batch] for batch in dealt]

    def _text_length(self, place: int) -> int:
        source, number = self.order.pick(place)
        lengths = self.sources[source].text_lengths
        return int(lengths[number]) if lengths is not None else 0

    def example(self, item: int, place: int, bad: list[BadSample]) -> tuple[TextExample, Any, str, str]:
        """Return text, picture, key and group of the example at a place; bad ones on the way to it go to `bad`.

        Raises:
            DataError: `MAX_ATTEMPTS` bad examples in a row.
        """
        source_number, number = self.order.pick(place)
        source = self.sources[source_number]
        for attempt in range(1, MAX_ATTEMPTS + 1):
            key, group = f"record {number}", f"{source.name}: {source.group(number)}"
            try:
                with _memory_for_record(source.name, number):
                    record = self.record(source_number, number)
                    key = record.key
                    text = self.encoded(record, self._prompt(item, place))
                    picture = self._picture(record, place, attempt) if record.picture is not None else None
                return text, picture, key, group
            except (DataError, ImageError, PromptError) as error:
                if lacks_memory(error):
                    raise
                bad.append(BadSample(source.name, group, key, error.message, kind_of(error)))
                number = self.order.replacement(place, attempt)
        raise DataError(
            f"{MAX_ATTEMPTS} examples in a row of {source.name} are bad; the last: {bad[-1].key}: {bad[-1].reason}",
            hint=f"minigpt4 data check {source.name} lists what is wrong",
        )

    def record(self, source: int, number: int) -> Record:
        """Return a record of a source, its text as it is learnt.

        Raises:
            DataError: It is bad.
        """
        record = self.sources[source].read(number)
        cleaning = self.blip_captions[source] if self.blip_captions else None
        if cleaning is None:
            return record
        turns, *beside = (cleaned(turns, cleaning) for turns in (record.turns, *record.beside))
        return replace(record, turns=turns, beside=tuple(beside))

    def text(self, place: int) -> TextExample:
        """Return the text of a place in the order, its picture unopened.

        Raises:
            DataError: The example is bad.
            PromptError: Its text cannot be a prompt.
        """
        record = self.record(*self.order.pick(place))
        return self.encoded(record, self._prompt(place // self.batch_size, place))

    def encoded(self, record: Record, prompt: str) -> TextExample:
        """Turn a record's texts into ids; `prompt` asks where it has no question.

        Raises:
            DataError: One of its texts is bad.
            PromptError: One cannot be a prompt.
        """
        if not record.beside:
            return self.layout.encode(record, prompt)
        texts = [self.layout.encode(replace(record, turns=turns), prompt) for turns in (record.turns, *record.beside)]
        return pack(texts, self.layout.processor.image_token_id)

    def _picture(self, record: Record, place: int, attempt: int) -> Any:  # noqa: ANN401  (pixels, or what is kept)
        if self.kept is not None:
            return self.kept.picture(record)
        crop_seed = (self.order.seed, self.order.stage, place, attempt) if self.crop else None
        return pixel_values(record, self.layout.processor, crop_seed)

    def _prompt(self, item: int, place: int) -> str:
        if not self.prompts:
            return ""
        key = item if self.prompt_for == "batch" else place
        kind = 11 if self.prompt_for == "batch" else 12
        drawn = np.random.default_rng([self.order.seed, self.order.stage, key, kind])
        return self.prompts[int(drawn.integers(len(self.prompts)))]


def cleaned(turns: Turns, cleaning: Cleaning) -> Turns:
    """Clean answers as the original did in its first stage."""
    return tuple((question, blip_caption(answer, cleaning.max_words, cleaning.prompt)) for question, answer in turns)


def lacks_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or what it was raised from, says that there was not enough memory."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


@contextmanager
def _memory_for_record(source: str, number: int) -> Iterator[None]:
    """Read a record of a source.

    Too little memory is the machine's fault: if the example counted as bad, a resumed run would learn from others.

    Raises:
        DataError: There was not enough memory for it.
    """
    try:
        yield
    except (MiniGPT4Error, MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise DataError(
            f"there was not enough memory for record {number} of {source}",
            hint="fewer workers, or end what else needs memory; the same command goes on",
        ) from error
