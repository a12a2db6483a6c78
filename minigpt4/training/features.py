"""Cached features (`features: cache`): the frozen parts look at each picture once, and training reads what they saw.

Kept is what the projection reads, where nothing before it learns; what the vision encoder says, where the Q-Former or
its queries learn. Computed is what a recipe's stages will read and the store lacks, in the same precision as in
training, so the loss is the same but for the rounding that depends on how many pictures are computed together.

The store of a fingerprint is `features/` in `MINIGPT4_HOME`, in a folder named by it, so that all runs that fit one
share it. On several machines it must be a folder that all of them see.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from minigpt4.data.batches import Process, SourceBatches
from minigpt4.data.record import Record
from minigpt4.errors import MiniGPT4Error
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.model.vision_efficientnet_lite import EfficientNetLiteOutput
from minigpt4.processing import MiniGPT4Processor
from minigpt4.text import counted
from minigpt4.training.feature_fingerprint import fingerprint_of
from minigpt4.training.feature_needs import NeededRecords, num_places
from minigpt4.training.feature_reading import Read, read_records
from minigpt4.training.feature_store import (
    FeatureStore,
    Fingerprint,
    Kind,
    ShardWriter,
    create_store,
    is_done,
    note_done,
    only_writer,
    remove_damaged,
)
from minigpt4.training.memory import memory_for
from minigpt4.training.preparing import Prepared, seeing_on
from minigpt4.training.processes import by_the_main_process, summed
from minigpt4.training.readers import readers_alive
from minigpt4.training.recipe import Recipe, SourcesData
from minigpt4.training.stage_data import RunSources, context_of, num_sample_places, source_batches, validation_batches
from minigpt4.training.update import PRECISIONS
from minigpt4.weights.folder import Report
from minigpt4.weights.parts import home

FOLDER = "features"
ACCELERATOR_BATCH = 32
CPU_BATCH = 1
"""Pictures computed together; a CPU gains nothing by more."""

HEARTBEAT_SECONDS = 5.0
"""The other processes of a run hear from the one that computes so often, and wait in between."""


@dataclass(frozen=True)
class CachedPictures:
    """Gives the batches of a stage what is kept of their pictures.

    Args:
        store: Where it is kept.
        kind: Of the features.
    """

    store: FeatureStore
    kind: Kind

    def picture(self, record: Record) -> dict[str, Tensor]:
        """Return the features of a record's picture.

        Raises:
            ImageError: It could not be opened.
            StorageError: It was not looked at.
        """
        return self.store.read(hashlib.sha256(record.picture or b"").digest())

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
        computed: Pictures that the frozen parts looked at.
        known: Records whose picture the store had, or that share one.
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

    Args:
        recipe: The run's.
        prepared: Its model, not yet spread over processes.
        here: The processes.
        report: Told of the records looked at, in the main process.
        opened: Opens the run's sources.

    Raises:
        ConfigError: Features cannot be kept: the pictures are cropped, or the vision encoder learns.
        DataError: A source cannot be opened, or read for lack of memory; what was computed is kept.
        StorageError: The store cannot be read or written.
    """
    fingerprint = fingerprint_of(recipe, prepared, here)
    folder = store_folder(fingerprint)
    opened = opened or RunSources()
    work = _compute(recipe, prepared, here, fingerprint, folder, report, Counts(), opened, anew=False)
    _by_the_main_process_in_steps(work, here)
    return CachedPictures(FeatureStore.open(folder, fingerprint), fingerprint.kind)


def compute_features(
    recipe: Recipe, prepared: Prepared, here: PartialState, report: Report, opened: RunSources | None = None
) -> tuple[Path, Counts]:
    """Look through all that a recipe's stages read, also what was looked through before, and compute what is missing.

    Every byte that is kept is compared with its checksum: what is damaged is missing.

    Returns:
        The store's folder, and what there was to do.

    Raises:
        ConfigError: Features cannot be kept: the pictures are cropped, or the vision encoder learns.
        DataError: A source cannot be opened, or read for lack of memory; what was computed is kept.
        StorageError: The store cannot be read or written.
    """
    fingerprint = fingerprint_of(recipe, prepared, here)
    folder, counts = store_folder(fingerprint), Counts()
    opened = opened or RunSources()
    work = _compute(recipe, prepared, here, fingerprint, folder, report, counts, opened, anew=True)
    _by_the_main_process_in_steps(work, here)
    return folder, counts


def store_folder(fingerprint: Fingerprint) -> Path:
    """Return where the features of a fingerprint are kept."""
    return home() / FOLDER / f"{fingerprint.kind}-{fingerprint.digest}"


def _by_the_main_process_in_steps(work: Iterator[None], here: PartialState) -> None:
    """Go through a long work in the main process; the others hear of it often enough not to take it for dead."""
    going_on = False

    def advance() -> None:
        nonlocal going_on
        until = time.monotonic() + HEARTBEAT_SECONDS
        going_on = any(time.monotonic() > until for _ in work)

    while True:
        by_the_main_process(advance, here)
        if not summed([float(going_on)], here)[0]:
            return


def _compute(
    recipe: Recipe,
    prepared: Prepared,
    here: PartialState,
    fingerprint: Fingerprint,
    folder: Path,
    report: Report | None,
    counts: Counts,
    opened: RunSources,
    *,
    anew: bool,
) -> Iterator[None]:
    """Compute what is missing; yields now and then.

    Args:
        recipe: The run's.
        prepared: Its model.
        here: The processes.
        fingerprint: Of the features.
        folder: Of the store.
        report: Told of the records looked at.
        counts: Told what there was to do.
        opened: Opens the run's sources; who is told what takes long there is told of their order, too.
        anew: Look through what was looked through before as well, and at every byte that is kept.
    """
    create_store(folder, fingerprint)
    with only_writer(folder), seeing_on(prepared.model, here.device):
        yield from remove_damaged(folder, thorough=anew, report=report)
        store = FeatureStore.open(folder, fingerprint)
        reports = report, opened.report
        maker = _Maker(prepared.model.eval(), prepared.processor, fingerprint, here.device, store, *reports)
        done = []
        for name, batches in _works(recipe, prepared, here, opened):
            work = _work_digest(batches)
            if (anew or not is_done(folder, work)) and work not in done:
                try:
                    with readers_alive():
                        yield from maker.work(name, batches, recipe.workers, counts)
                except MiniGPT4Error:
                    maker.writer.write()
                    raise
                done.append(work)
        maker.writer.write()
        for work in done:
            note_done(folder, work)


def _works(
    recipe: Recipe, prepared: Prepared, here: PartialState, opened: RunSources
) -> Iterator[tuple[str, SourceBatches]]:
    """Name what a run reads: the batches of each stage, and those it is validated with."""
    process = Process(0, here.num_processes)
    for number, stage in enumerate(recipe.stages):
        data = recipe.data_of(stage)
        if not isinstance(data, SourcesData):
            raise TypeError("refused before")
        context = context_of(prepared.model)
        yield (
            stage.name,
            source_batches(recipe, prepared.processor, number, stage, data, process, None, opened, context),
        )
        if recipe.validation:
            batches = validation_batches(
                recipe, recipe.validation, prepared.processor, stage, process, opened, context=context
            )
            samples = -(-num_sample_places(recipe.validation) // (batches.batch_size * process.world_size))
            yield f"{stage.name}'s validation", replace(batches, length=max(batches.length, samples))


def _work_digest(batches: SourceBatches) -> str:
    """Return what identifies the pictures that batches are made of."""
    layout = {key: value for key, value in vars(batches.layout).items() if key != "processor"}
    content = [
        [source.identity for source in batches.sources], asdict(batches.order), num_places(batches), layout,
        list(batches.prompts), list(batches.blip_captions),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class _Maker:
    """Makes the features of pictures.

    Args:
        model: In evaluation mode.
        processor: Its.
        fingerprint: Of the features.
        device: The model's.
        store: What there was at the beginning.
        report: Told of the records looked at.
        report_order: Told of the places of a stage's order that are gone through for its records.
    """

    model: MiniGPT4ForConditionalGeneration
    processor: MiniGPT4Processor
    fingerprint: Fingerprint
    device: torch.device
    store: FeatureStore
    report: Report | None
    report_order: Report | None
    _fresh: set[bytes] = field(default_factory=set)  # about 100 bytes a picture
    _fresh_bad: set[bytes] = field(default_factory=set)
    _queue: list[tuple[bytes, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = ShardWriter(self.store.folder)

    def work(self, name: str, batches: SourceBatches, workers: int, counts: Counts) -> Iterator[None]:
        """Look at the pictures of a stage, and at those that stand in for bad ones, until there are no more."""
        needed = NeededRecords(batches)
        while True:
            yield from needed.find(f"which records {name} reads", self.report_order)
            numbers = needed.wanted()
            if not len(numbers):
                return
            for done, read in enumerate(read_records(batches, numbers, self.store, self._fresh, workers), 1):
                bad = self._take(read, counts)
                needed.note(read.source, read.number, bad=bad)
                if self.report is not None and (done % 16 == 0 or done == len(numbers)):
                    self.report(f"features of {name}", done, len(numbers))
                yield
            self._look()

    def _take(self, read: Read, counts: Counts) -> bool:
        """Queue a picture unless it is known; returns whether its record is of no use."""
        if read.digest is None:  # without a picture, or without a text
            counts.bad += read.reason is not None
            return read.reason is not None
        known = read.digest in self.store or read.digest in self._fresh or read.digest in self._fresh_bad
        if not known and read.reason is not None:
            self._fresh_bad.add(read.digest)
            self.writer.add_bad(read.digest, read.reason)
        elif not known and read.pixels is not None:
            self._fresh.add(read.digest)
            self._queue.append((read.digest, read.pixels))
            counts.computed += 1
            if len(self._queue) == (CPU_BATCH if self.device.type == "cpu" else ACCELERATOR_BATCH):
                self._look()
        bad = read.digest in self.store.bad or read.digest in self._fresh_bad
        counts.bad += bad
        counts.known += known and not bad
        return bad

    def _look(self) -> None:
        """Compute what is queued."""
        if not self._queue:
            return
        digests = [digest for digest, _ in self._queue]
        pixels = torch.stack([pixels for _, pixels in self._queue]).to(self.device)
        self._queue = []
        with memory_for(f"the features of {counted(len(digests), 'picture')} at once", "end what else needs memory"):
            self.writer.add(digests, make_features(self.model, pixels, self.fingerprint))


@torch.no_grad()
def make_features(
    model: MiniGPT4ForConditionalGeneration, pixels: Tensor, fingerprint: Fingerprint
) -> dict[str, Tensor]:
    """Let the frozen parts look at pictures, as they would in training.

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
            read = _what_the_projection_reads(model, pixels)
            # In training it would be cast so on its way into the projection; nothing is lost.
            features = {"qformer_outputs": read if precision is None else read.to(precision)}
        else:
            output = model.model.vision_model(pixels, return_dict=True)
            features = {"last_hidden_state": output.last_hidden_state}
            if getattr(output, "concept_embeds", None) is not None:
                features["concept_embeds"] = output.concept_embeds
    return {name: rows.cpu() for name, rows in features.items()}


def _what_the_projection_reads(model: MiniGPT4ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Catch it where it is read, so that it is that whatever comes before."""
    read: list[Tensor] = []
    hook = model.model.language_projection.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        model.model.get_image_features(pixels, return_dict=True)
    finally:
        hook.remove()
    return read[0]
