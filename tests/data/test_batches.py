"""The batch of a step is a function: of the step, and of nothing that happened before."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from minigpt4.data.batches import MAX_ATTEMPTS, Process, SourceBatches
from minigpt4.data.examples import Cleaning, Layout
from minigpt4.data.order import Order
from minigpt4.data.record import Record
from minigpt4.errors import DataError
from tests import tiny_chat


@dataclass
class Made:
    """A source of plain pictures; the numbers in `bad` have none."""

    size: int
    name: str = "made"
    bad: frozenset[int] = frozenset()
    identity: str = "made"
    text_lengths: Sequence[int] | None = None
    read_numbers: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    def group(self, number: int) -> str:
        return f"shard {number // 10}"

    def read(self, number: int) -> Record:
        self.read_numbers.append(number)
        if number in self.bad:
            raise DataError(f"record {number} has no picture")
        file = io.BytesIO()
        Image.new("RGB", (20, 20), (number % 256, 0, 0)).save(file, "PNG")
        return Record(f"{self.name}/{number}", file.getvalue(), (("", "x" * (1 + number % 7)),))


def batches(source: Made, **changes: Any) -> SourceBatches:
    values: dict[str, Any] = {
        "sources": [source],
        "order": Order((len(source),), (1.0,), seed=1, stage=0),
        "layout": Layout(tiny_chat.processor()),
        "prompts": ["What?", "Say it.", "Describe."],
        "length": 12,
        "batch_size": 4,
    }
    return SourceBatches(**{**values, **changes})


def keys(data: SourceBatches) -> list[list[str]]:
    return [data[item]["keys"] for item in range(len(data))]


def test_a_batch_has_what_the_model_reads() -> None:
    batch = batches(Made(40))[0]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["pixel_values"].shape == (4, 3, tiny_chat.SIZE, tiny_chat.SIZE)
    assert (len(batch["keys"]), batch["bad"], batch["cut"]) == (4, [], 0)


def test_batches_do_not_depend_on_what_was_read_before() -> None:
    forth, back = batches(Made(40)), batches(Made(40))
    there = [forth[item] for item in range(12)]
    for item in reversed(range(12)):
        again = back[item]
        assert again["keys"] == there[item]["keys"]
        assert torch.equal(again["pixel_values"], there[item]["pixel_values"])
        assert torch.equal(again["input_ids"], there[item]["input_ids"])


@pytest.mark.parametrize("bucket_batches", [1, 3])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
def test_any_number_of_workers_gives_the_same_batches(workers: int, bucket_batches: int) -> None:
    source = Made(40, text_lengths=[1 + n % 7 for n in range(40)])
    alone = keys(batches(source, bucket_batches=bucket_batches))
    loader = DataLoader(
        batches(source, bucket_batches=bucket_batches),
        batch_size=None,
        num_workers=workers,
        collate_fn=lambda b: b["keys"],
    )
    assert list(loader) == alone


def test_two_processes_share_the_batches_of_one() -> None:
    one = keys(batches(Made(40), batch_size=8, length=6))
    two = [keys(batches(Made(40), batch_size=4, length=6, process=Process(rank, 2))) for rank in range(2)]
    for whole, first, second in zip(one, *two, strict=True):
        assert sorted(whole) == sorted([*first, *second])
        assert not set(first) & set(second)


def test_buckets_put_like_lengths_together() -> None:
    lengths = [1 + n % 7 for n in range(40)]
    padding = []
    for size in (1, 6):
        data = batches(Made(40, text_lengths=lengths), bucket_batches=size, prompts=["What?"])
        padding.append(sum(int((data[item]["attention_mask"] == 0).sum()) for item in range(12)))
    assert padding[1] < padding[0] / 2


def test_a_bad_example_is_replaced_by_the_same_one_each_time_and_named() -> None:
    source = Made(40, bad=frozenset({3, 17, 30}))
    data = batches(source)
    found = [data[item] for item in range(10)]
    bad = [sample for batch in found for sample in batch["bad"]]
    assert {sample.key for sample in bad} == {"record 3", "record 17", "record 30"}  # an epoch: each once
    assert {sample.reason for sample in bad} == {f"record {n} has no picture" for n in (3, 17, 30)}
    assert {sample.group for sample in bad} == {"made: shard 0", "made: shard 1", "made: shard 3"}
    assert all(len(batch["keys"]) == 4 for batch in found)
    assert [batch["keys"] for batch in found] == keys(batches(source))[:10]


@pytest.mark.parametrize("told", ["by Python", "by Pillow", "by torch"])
def test_an_example_there_was_no_memory_for_is_not_bad_and_not_replaced(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resumed run would read other examples than one that was never stopped."""
    read = Made.read

    def without_memory(self: Made, number: int) -> Record:
        if told == "by Python":
            raise MemoryError
        if told == "by torch":
            torch.empty(2**60, dtype=torch.uint8)
        return read(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Made, "read", without_memory)
        if told == "by Pillow":
            patch.setattr(Image.Image, "load", lambda _: bytearray(2**62))
        with pytest.raises(DataError, match=r"^there was not enough memory for record \d+ of made$") as caught:
            batches(Made(40))[0]
    assert "the same command goes on" in caught.value.hint
    assert batches(Made(40))[0]["bad"] == []


def test_nothing_but_bad_examples_ends_at_once() -> None:
    source = Made(40, bad=frozenset(range(40)))
    with pytest.raises(DataError, match=rf"{MAX_ATTEMPTS} examples in a row of made are bad; the last: record \d+"):
        batches(source)[0]
    assert len(source.read_numbers) == MAX_ATTEMPTS


def prompts(batch: dict[str, Any]) -> list[str]:
    tokenizer = tiny_chat.processor().tokenizer
    texts = [tokenizer.decode(row) for row in batch["input_ids"]]
    return [next(p for p in ("What?", "Say it.", "Describe.") if p in text) for text in texts]


def test_each_sample_has_a_prompt_of_its_own_or_the_batch_has_one() -> None:
    per_sample, per_batch = batches(Made(40)), batches(Made(40), prompt_for="batch")
    assert any(len(set(prompts(per_sample[item]))) > 1 for item in range(12))
    drawn = [set(prompts(per_batch[item])) for item in range(12)]
    assert all(len(one) == 1 for one in drawn) and len(set.union(*drawn)) > 1


def test_captions_are_cleaned_where_the_source_says_so() -> None:
    @dataclass
    class Loud(Made):
        def read(self, number: int) -> Record:
            return replace(super().read(number), turns=(("", "A Dog. RUNS!"),))

    tokenizer = tiny_chat.processor().tokenizer
    cleanings = {None: "A Dog. RUNS!", Cleaning(): "a dog runs", Cleaning(2, "it is "): "it is a dog"}
    for clean, expected in cleanings.items():
        batch = batches(Loud(40), blip_captions=[clean])[0]
        learned = [tokenizer.decode(row[row != -100], skip_special_tokens=True) for row in batch["labels"]]
        assert learned == [expected] * 4
