"""Rates of what comes before training, measured on this machine: filtering a list, indexing shards, making features.

Each is what the program itself does: the filter is the one that docs/training.md shows, the index is `minigpt4 data
index`'s, and features are made as `minigpt4 data features` does, one picture after another, opened, seen in float32 and
written. Samples are made up: addresses with captions of 3 to 17 words, a fifth of which is filtered out; shards as
img2dataset writes them, of one drawn picture (JPEG) with its texts. Seconds are those of the processor, so that a
machine that does other work gives the same: what one core does in a second.
"""

import hashlib
import io
import json
import re
import resource
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from minigpt4.data.examples import pixel_values
from minigpt4.data.record import Record
from minigpt4.data.sources.shards import index_folder
from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.training.feature_store import Fingerprint, ShardWriter
from minigpt4.training.features import make_features
from minigpt4.weights.folder import load
from nano.scenes.drawing import caption, draw_scene

PAGE = Path(__file__).resolve().parents[1] / "docs/training.md"
PUBLISHED = "eva-vit-g"
"""MiniGPT-4's vision encoder with its Q-Former: of these sizes, with random weights, which are as fast as others."""

ROW_GROUP, RECORDS_A_SHARD = 50_000, 10_000


@dataclass(frozen=True)
class Seeing:
    """What it takes to make the features of a picture: all seconds, those to open it, and billions of operations."""

    seconds: float
    opening: float
    gflop: float


def filtered_per_second(folder: Path, addresses: int) -> float:
    """Return how many addresses of a list the filter of the documentation goes through in a second."""
    [block] = re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    seconds = []
    for number in (1, 1 + addresses):  # the first is what Python and pyarrow take to begin
        write_list(folder / "list.parquet", number)
        seconds.append(cpu_of_program([sys.executable, "-c", textwrap.dedent(block)], folder))
    return addresses / (seconds[1] - seconds[0])


def write_list(path: Path, addresses: int) -> None:
    """Write addresses with captions and the scores that LAION's lists have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(7)
    words = np.array(
        ["a", "the", "dog", "red", "house", "on", "near", "two", "people", "standing", "photo", "of", "old"]
    )
    rows = {
        "url": [f"https://pictures.example/{number % 7}/{random.integers(2**62):x}.jpg" for number in range(addresses)],
        "caption": [" ".join(words[random.integers(len(words), size=3 + n % 15)]) for n in range(addresses)],
        "punsafe": random.random(addresses, np.float32) * 0.105,
        "pwatermark": random.random(addresses, np.float32) * 0.94,
    }
    pq.write_table(pa.table(rows), path, row_group_size=ROW_GROUP)


def indexed_per_second(folder: Path, records: int) -> float:
    """Return how many records of shards are indexed in a second; the machine's memory holds the shards."""
    picture, text = a_picture()
    beside = json.dumps(
        {"caption": text, "url": "https://pictures.example/0.jpg", "width": 640, "height": 480}
    ).encode()
    for first in range(0, records, RECORDS_A_SHARD):
        with tarfile.open(folder / f"{first // RECORDS_A_SHARD:05}.tar", "w") as shard:
            for number in range(first, min(first + RECORDS_A_SHARD, records)):
                for kind, content in (("jpg", picture), ("json", beside), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:09}.{kind}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
    seconds, (_, index) = cpu_seconds(lambda: index_folder(str(folder)))
    if len(index.rows) != records or index.bad:
        sys.exit(f"{len(index.rows)} records were indexed, {index.bad} of them bad, expected {records} good ones")
    return records / seconds


def a_picture() -> tuple[bytes, str]:
    """Draw a picture, JPEG of 640 x 480, and say what it shows."""
    picture, scene = draw_scene(np.random.default_rng(7))
    file = io.BytesIO()
    picture.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue(), f"{caption(scene)}."


def seeing(folder: Path, encoder: str, pictures: int) -> Seeing:
    """Measure how features are made: of `PUBLISHED`, or of what a name or folder of a model has."""
    model, processor = of_published_sizes() if encoder == PUBLISHED else load(encoder, device="cpu", dtype="float32")
    model.eval().requires_grad_(False)
    fingerprint = Fingerprint("qformer_outputs", "", "fp32", {})
    picture, text = a_picture()
    record = Record("one", picture, (("", text),))
    writer = ShardWriter(folder)

    def see(all_pixels: list[torch.Tensor]) -> None:
        for pixels in all_pixels:
            features = make_features(model, pixels[None], fingerprint)
            writer.add([hashlib.sha256(picture).digest()], features)
        writer.write()

    with FlopCounterMode(display=False) as counter:  # not timed: the first time takes longer
        see([pixel_values(record, processor, None)])
    opening, pixels = cpu_seconds(lambda: [pixel_values(record, processor, None) for _ in range(pictures)])
    looking, _ = cpu_seconds(lambda: see(pixels))
    return Seeing((opening + looking) / pictures, opening / pictures, counter.get_total_flops() / 1e9)


def of_published_sizes() -> tuple[MiniGPT4ForConditionalGeneration, Any]:
    """Make the frozen parts that see, beside a small language model, which features do not need."""
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 100}  # fmt: skip
    model = MiniGPT4ForConditionalGeneration(MiniGPT4Config(text_config=text))
    return model, type("Processor", (), {"image_processor": MiniGPT4ImageProcessor()})


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how many seconds of the processor something takes, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def cpu_of_program(command: list[str], folder: Path) -> float:
    """Return how many seconds of the processor a program takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
