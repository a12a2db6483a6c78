"""Cached features (`features: cache`): the frozen parts look at each picture once, and training reads what they made.

Kept is the input of the projection where nothing before it learns, else the output of the vision encoder. Computed is
what a recipe's stages will read and the store lacks, in the precision of training, so the loss is the same but for the
rounding that depends on how many pictures are computed together.

The store of a fingerprint is a folder named by it in `features/` of `MINIGPT4_HOME`, so all runs that fit one share it.
On several machines it must be a folder that all of them see.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from minigpt4.data.batches import BadSample, Process, SourceBatches
from minigpt4.data.examples import pixel_values
from minigpt4.data.order import Order
from minigpt4.data.record import Record
from minigpt4.errors import ConfigError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.vision_efficientnet_lite import EfficientNetLiteOutput
from minigpt4.processing import MiniGPT4Processor
from minigpt4.text import counted
from minigpt4.training.data_loader import read_ahead, workers_alive
from minigpt4.training.feature_store import (
    FeatureStore,
    Fingerprint,
    Kind,
    ShardWriter,
    create_store,
    fingerprint_of,
    is_done,
    note_done,
    remove_damaged,
)
from minigpt4.training.model_setup import Prepared, seeing_on
from minigpt4.training.optimizer_step import PRECISIONS, chosen_precision, memory_for
from minigpt4.training.processes import by_the_main_process, summed
from minigpt4.training.recipe import Recipe
from minigpt4.training.stage_data import RunSources, context_of, num_sample_places, source_batches, validation_batches
from minigpt4.weights.files.disk import lock
from minigpt4.weights.hub import Report
from minigpt4.weights.parts import home

FOLDER = "features"
ACCELERATOR_BATCH = 32
CPU_BATCH = 1
"""Pictures computed together; a CPU gains nothing by more."""

CHUNK = 8
"""Neighbouring records are read by one worker: they often show the same picture, and lie together on the disk."""
CHUNKS_AHEAD = 2

REPORT_EVERY = 10_000
"""Places of the order between two reports, which take about a tenth of a second."""

HEARTBEAT_SECONDS = 5.0
"""The other processes of a run hear this often from the one that computes, and wait in between."""


@dataclass(frozen=True)
class CachedPictures:
    """Pictures of a stage's batches, as their cached features."""

    store: FeatureStore
    kind: Kind
    processor: MiniGPT4Processor

    def picture(self, record: Record) -> dict[str, Tensor]:
        """Return the features of a record's picture.

        Raises:
            ImageError: The picture cannot be opened.
            StorageError: There are none, or they cannot be read or are damaged.
        """
        digest = hashlib.sha256(record.picture or b"").digest()
        if digest not in self.store:
            pixel_values(record, self.processor, None)  # says why the frozen parts could not look at it
        return self.store.read(digest)

    def batch(self, pictures: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        """Return `qformer_outputs` or `vision_outputs` of some pictures."""
        rows = {name: torch.stack([picture[name] for picture in pictures]) for name in pictures[0]}
        if self.kind == "qformer_outputs":
            return rows
        output: type[ModelOutput] = EfficientNetLiteOutput if "concept_embeds" in rows else BaseModelOutput
        return {"vision_outputs": output(**rows)}


@dataclass
class Counts:
    """What there was to do.

    Args:
        computed: Pictures whose features were computed.
        known: Records whose picture had features, or shares them.
        bad: Records that cannot be used.
    """

    computed: int = 0
    known: int = 0
    bad: int = 0


def cached_pictures(
    recipe: Recipe,
    prepared: Prepared,
    here: PartialState,
    report: Report | None = None,
    opened: RunSources | None = None,
) -> CachedPictures:
    """Compute what is missing of the features that a run reads, in the main process, and open them in all.

    The model is not yet spread over processes; `report` is called with the records read, in the main process.

    Raises:
        ConfigError: Features cannot be kept: the pictures are cropped, or the vision encoder learns.
        DataError: A source cannot be opened, or read for lack of memory; what was computed is kept.
        StorageError: The store cannot be read or written.
    """
    fingerprint, folder, _ = _computed(recipe, prepared, here, report, opened or RunSources(), recheck=False)
    return CachedPictures(FeatureStore(folder, fingerprint), fingerprint.kind, prepared.processor)


def compute_features(
    recipe: Recipe, prepared: Prepared, here: PartialState, report: Report, opened: RunSources | None = None
) -> tuple[Path, Counts]:
    """Check all that the store holds and a recipe's stages read, and compute what is missing or damaged.

    Returns:
        The store's folder, and what there was to do.

    Raises:
        MiniGPT4Error: As `cached_pictures`.
    """
    _, folder, counts = _computed(recipe, prepared, here, report, opened or RunSources(), recheck=True)
    return folder, counts


def run_fingerprint(recipe: Recipe, prepared: Prepared, here: PartialState) -> Fingerprint:
    """Return what identifies the features that a run reads.

    Raises:
        ConfigError: Features cannot be kept.
    """
    _refuse_what_changes(recipe, prepared.model)
    settings = prepared.processor.image_processor.to_dict()
    return fingerprint_of(prepared.model, settings, chosen_precision(recipe, here.device))


def store_folder(fingerprint: Fingerprint) -> Path:
    """Return where the features of a fingerprint are kept."""
    return home() / FOLDER / f"{fingerprint.kind}-{fingerprint.digest}"


def _computed(
    recipe: Recipe, prepared: Prepared, here: PartialState, report: Report | None, opened: RunSources, *, recheck: bool
) -> tuple[Fingerprint, Path, Counts]:
    """Compute in the main process; the others hear from it often enough not to take it for dead."""
    fingerprint = run_fingerprint(recipe, prepared, here)
    maker = _Maker(prepared, fingerprint, here.device, store_folder(fingerprint), report, opened.report)
    work = maker.run(recipe, _stages(recipe, prepared, here, opened), recheck=recheck)
    is_going_on = False

    def advance() -> None:
        nonlocal is_going_on
        until = time.monotonic() + HEARTBEAT_SECONDS
        is_going_on = any(time.monotonic() > until for _ in work)

    while True:
        by_the_main_process(advance, here)
        if not summed([float(is_going_on)], here)[0]:
            return fingerprint, maker.folder, maker.counts


def _stages(
    recipe: Recipe, prepared: Prepared, here: PartialState, opened: RunSources
) -> Iterator[tuple[str, SourceBatches]]:
    """Yield name and batches of each stage, and of what it is validated with."""
    process, context = Process(0, here.num_processes), context_of(prepared.model)
    for number, stage in enumerate(recipe.stages):
        data = recipe.data_of(stage)
        if data is None:
            raise TypeError("refused before")
        batches = source_batches(recipe, prepared.processor, number, stage, data, process, None, opened, context)
        yield stage.name, batches
        if recipe.validation:
            batches = validation_batches(
                recipe, recipe.validation, prepared.processor, stage, process, opened, context=context
            )
            samples = -(-num_sample_places(recipe.validation) // (batches.batch_size * process.world_size))
            yield f"{stage.name}'s validation", replace(batches, length=max(batches.length, samples))


def _digest_of(batches: SourceBatches) -> str:
    """Return what identifies the pictures of batches."""
    layout = {key: value for key, value in vars(batches.layout).items() if key != "processor"}
    content = [
        [source.identity for source in batches.sources], asdict(batches.order), num_places(batches), layout,
        list(batches.prompts), list(batches.blip_captions),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def num_places(batches: SourceBatches) -> int:
    """Return how many places of the order the processes of a stage read: whole windows."""
    windows = -(-batches.length // batches.bucket_batches)
    return windows * batches.bucket_batches * batches.batch_size * batches.process.world_size


class _Looked(NamedTuple):
    """What stands at a place of the order."""

    digest: bytes | None  # the sha256 of the encoded picture; None without one
    pixels: Tensor | None  # (3, height, width); None where the picture is known
    is_bad: bool  # the place's own record is bad: this is another's picture


class _Pictures(Dataset[list[_Looked]]):
    """The pictures at some places of the order, in chunks, found as a batch finds them: another for a bad one.

    Pictures in the store, or met before in the same process, are not opened.
    """

    def __init__(self, batches: SourceBatches, places: np.ndarray, store: FeatureStore) -> None:
        self._batches = replace(batches, kept=self)
        self._places = places
        self._store = store
        self._opened: set[bytes] = set()

    def __len__(self) -> int:
        return -(-len(self._places) // CHUNK)

    def __getitem__(self, item: int) -> list[_Looked]:
        return [self._look(place) for place in self._places[item * CHUNK : (item + 1) * CHUNK].tolist()]

    def _look(self, place: int) -> _Looked:
        bad: list[BadSample] = []
        _, picture, _, _ = self._batches.example(place // self._batches.batch_size, place, bad)
        digest, pixels = picture or (None, None)
        return _Looked(digest, pixels, bool(bad))

    def picture(self, record: Record) -> tuple[bytes, Tensor | None]:
        """Return a picture's digest, and its pixels unless they are known.

        Raises:
            ImageError: It cannot be opened.
        """
        digest = hashlib.sha256(record.picture or b"").digest()
        if digest in self._store or digest in self._opened:
            return digest, None
        pixels = pixel_values(record, self._batches.layout.processor, None)
        self._opened.add(digest)
        return digest, pixels

    def batch(self, pictures: Sequence[Any]) -> dict[str, Any]:
        """Return pictures as they are."""
        return {"pictures": pictures}


@dataclass
class _Maker:
    """Fills a store with the features of stages.

    Args:
        prepared: The model and its processor.
        fingerprint: Of the features.
        device: The model's.
        folder: Of the store.
        report: Called with the records read.
        report_order: Called with the places gone through for the records of a stage.
        counts: What there was to do.
    """

    prepared: Prepared
    fingerprint: Fingerprint
    device: torch.device
    folder: Path
    report: Report | None
    report_order: Report | None
    counts: Counts = field(default_factory=Counts)
    _queue: list[tuple[bytes, Tensor]] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)  # of the stage; about 100 bytes a picture

    def run(self, recipe: Recipe, stages: Iterator[tuple[str, SourceBatches]], *, recheck: bool) -> Iterator[None]:
        """Compute what is missing; yields now and then.

        `recheck` compares every byte that is kept, and reads again the records of stages that are done.
        """
        create_store(self.folder, self.fingerprint)
        done: set[str] = set()
        with lock(self.folder / "features"), seeing_on(self.prepared.model.eval(), self.device):
            yield from remove_damaged(self.folder, thorough=recheck, report=self.report)
            self.writer = ShardWriter(self.folder)
            for name, batches in stages:
                digest = _digest_of(batches)
                if digest in done or (not recheck and is_done(self.folder, digest)):
                    continue
                try:
                    with workers_alive():
                        yield from self._stage(name, batches, recipe.workers)
                finally:  # what was computed is kept, whatever ends the stage
                    self.writer.write()
                note_done(self.folder, digest)
                done.add(digest)

    def _stage(self, name: str, batches: SourceBatches, workers: int) -> Iterator[None]:
        """Look at every record that a stage reads once, then at what stands for the bad ones at their other places."""
        records = np.empty(num_places(batches), np.int64)
        yield from self._find(f"which records {name} reads", batches.order, records)
        _, first = np.unique(records, return_index=True)  # in the order in which sources hold the records
        is_bad = np.zeros(len(first), bool)
        yield from self._look(f"features of {name}", batches, first, workers, is_bad)
        others = np.setdiff1d(np.flatnonzero(np.isin(records, records[first[is_bad]])), first)
        yield from self._look(f"features of {name}, in place of bad ones", batches, others, workers)

    def _find(self, what: str, order: Order, records: np.ndarray) -> Iterator[None]:
        """Number the record at each place, counting those of all sources."""
        starts = np.cumsum([0, *order.sizes])
        for place in range(len(records)):
            source, number = order.pick(place)
            records[place] = starts[source] + number
            done, is_last = place + 1, place + 1 == len(records)
            if done % REPORT_EVERY == 0 or (is_last and done > REPORT_EVERY):
                if self.report_order is not None:
                    self.report_order(what, done, len(records))
                yield

    def _look(
        self, what: str, batches: SourceBatches, places: np.ndarray, workers: int, is_bad: np.ndarray | None = None
    ) -> Iterator[None]:
        """Compute the features of the pictures at some places; notes in `is_bad` whose records are bad, if given."""
        if not len(places):
            return
        store = FeatureStore(self.folder, self.fingerprint)
        self._seen.clear()
        with closing(read_ahead(_Pictures(batches, places, store), workers, ahead=CHUNKS_AHEAD)) as chunks:
            for number, looked in enumerate(looked for chunk in chunks for looked in chunk):
                is_new = self._take(looked)
                if is_bad is not None:
                    is_bad[number] = looked.is_bad
                    self.counts.bad += looked.is_bad
                    self.counts.known += not looked.is_bad and looked.digest is not None and not is_new
                done = number + 1
                if self.report is not None and (done % 16 == 0 or done == len(places)):
                    self.report(what, done, len(places))
                yield
        self._compute()
        self.writer.write()

    def _take(self, looked: _Looked) -> bool:
        """Queue a picture; returns whether it is new."""
        if looked.digest is None or looked.pixels is None or looked.digest in self._seen:
            return False
        self._seen.add(looked.digest)
        self._queue.append((looked.digest, looked.pixels))
        self.counts.computed += 1
        if len(self._queue) == (CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH):
            self._compute()
        return True

    def _compute(self) -> None:
        """Compute what is queued."""
        if not self._queue:
            return
        digests = [digest for digest, _ in self._queue]
        pixels = torch.stack([pixels for _, pixels in self._queue]).to(self.device)
        self._queue = []
        with memory_for(f"the features of {counted(len(digests), 'picture')} at once", "end what else needs memory"):
            self.writer.add(digests, make_features(self.prepared.model, pixels, self.fingerprint))


@torch.no_grad()
def make_features(
    model: MiniGPT4ForConditionalGeneration, pixels: Tensor, fingerprint: Fingerprint
) -> dict[str, Tensor]:
    """Run the frozen parts on pictures, as training would.

    Args:
        model: In evaluation mode.
        pixels: `(pictures, 3, height, width)`, on its device.
        fingerprint: Says how far to go, and in which precision.

    Returns:
        Tensors with a row a picture, on the CPU: `qformer_outputs`, or `last_hidden_state` and perhaps
        `concept_embeds`.
    """
    precision = PRECISIONS[fingerprint.precision]
    computing: Any = nullcontext() if precision is None else torch.autocast(pixels.device.type, dtype=precision)
    with computing:
        if fingerprint.kind == "qformer_outputs":
            # Caught where the projection reads it, so that it is that whatever comes before.
            caught: list[Tensor] = []
            projection = model.model.language_projection
            hook = projection.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
            try:
                model.model.get_image_features(pixels, return_dict=True)
            finally:
                hook.remove()
            # In training it would be cast so on its way into the projection; nothing is lost.
            features = {"qformer_outputs": caught[0] if precision is None else caught[0].to(precision)}
        else:
            output = model.model.vision_model(pixels, return_dict=True)
            features = {"last_hidden_state": output.last_hidden_state}
            if getattr(output, "concept_embeds", None) is not None:
                features["concept_embeds"] = output.concept_embeds
    return {name: rows.cpu() for name, rows in features.items()}


def _refuse_what_changes(recipe: Recipe, model: MiniGPT4ForConditionalGeneration) -> None:
    """Refuse pictures of which the frozen parts see another thing each time."""
    if any(p.requires_grad for p in model.model.vision_model.parameters()):
        raise ConfigError(
            "features: cache keeps what the vision encoder sees, and the vision encoder learns",
            hint="leave vision_model and vision_layernorms out of trainable, or set features=compute",
        )
    for stage in recipe.stages:
        data = recipe.data_of(stage)
        if data is None:
            raise ConfigError(
                "features: cache keeps what is seen in the pictures of data.sources, and the recipe has none",
                hint="name data.sources, or set features=compute",
            )
        if data.crop:
            raise ConfigError(
                f"features: cache keeps what is seen in a whole picture, and stage {stage.name} crops it anew each "
                "time",
                hint="set data.crop=false, or features=compute",
            )
