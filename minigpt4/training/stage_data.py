"""The examples of a stage, and of its validation: from a recipe's sections to a data set of batches."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch.utils.data import Dataset

from minigpt4.data.batches import KeptPictures, Process, SourceBatches
from minigpt4.data.examples import DEFAULT_PROMPTS, IMAGE_MARK, MAX_WORDS, Cleaning, Layout
from minigpt4.data.order import Order
from minigpt4.data.record import Source
from minigpt4.data.sources import open_source
from minigpt4.data.sources.by_picture import by_picture
from minigpt4.errors import ConfigError, DataError
from minigpt4.model import MiniGPT4ForConditionalGeneration
from minigpt4.processing import MiniGPT4Processor
from minigpt4.training.model_setup import Prepared
from minigpt4.training.recipe import Recipe, SourceRecipe, SourcesData, StageRecipe, ValidationRecipe
from minigpt4.training.schedule import batches_before
from minigpt4.weights.hub import Report

VALIDATION_SEED = 0
"""Validation has the same examples every time, whatever the run's seed."""

SAMPLE_ATTEMPTS = 10
"""Places of validation's order for each sample answer, among which pictures that can be opened are looked for."""


class RunSources:
    """Opens the sources of a run, each once: lists, and shards without an index, are read whole for it.

    Args:
        report: Called where that takes long.
    """

    def __init__(self, report: Report | None = None) -> None:
        self.report = report
        self._opened: dict[tuple[object, ...], Source] = {}
        self._skipped: dict[str, dict[str, int]] = {}

    def passed_over(self) -> list[str]:
        """Return what the sources that were opened pass over, a sentence each."""
        return [
            f"{name} passes over {', '.join(f'{count:,} x {what}' for what, count in skipped.items())}"
            for name, skipped in self._skipped.items()
            if skipped
        ]

    def open(self, wanted: Sequence[SourceRecipe]) -> list[Source]:
        """Return the sources that sections of a recipe name.

        Raises:
            DataError: One is not there, or cannot be read.
        """
        return [self._open(source) for source in wanted]

    def _open(self, wanted: SourceRecipe) -> Source:
        key = (wanted.path, wanted.format, wanted.images, wanted.text, wanted.texts_per_picture)
        if key not in self._opened:
            source = open_source(
                wanted.path, format=wanted.format, images=wanted.images, text=wanted.text, report=self.report
            )
            self._skipped[source.name] = source.skipped
            most = wanted.texts_per_picture
            self._opened[key] = by_picture(source, most) if most > 1 else source
        return self._opened[key]


def check_data(recipe: Recipe, opened: RunSources) -> None:
    """Open what a run will read, which takes seconds, before its model is loaded, which may take minutes.

    Raises:
        ConfigError: The prompts cannot be read.
        DataError: A source is not there, or cannot be read.
    """
    for stage in recipe.stages:
        if (data := recipe.data_of(stage)) is None:
            continue
        prompts_of(stage, data)
        for source in opened.open(data.sources):
            # Who leaves such shards out without a word learns from less.
            if barren := source.barren():
                more = f", and {len(barren) - 1:,} more" if len(barren) > 1 else ""
                raise DataError(
                    f"{source.name}: no sample of {barren[0]} can be used{more}",
                    hint=f"`minigpt4 data check {source.name}` says what is wrong; fetch it again, or take it away",
                )
        if stage.layout == "original" and is_packed(recipe):
            raise ConfigError(
                f"stage {stage.name} has the layout original, which has no texts side by side",
                hint="leave texts_per_picture out",
            )
    if recipe.validation:
        opened.open(recipe.validation.sources)


def records_of(recipe: Recipe, opened: RunSources) -> dict[str, dict[str, Any]]:
    """Return which records a run learns from: `path`, number of `records` and `identity` of each source."""
    sections = [("data", recipe.data)]
    sections += [(f"stages.{n}.data", recipe.data_of(stage)) for n, stage in enumerate(recipe.stages) if stage.data]
    return {
        f"{place}.sources.{number}": {"path": wanted.path, "records": len(source), "identity": source.identity}
        for place, data in sections
        if data is not None
        for number, (wanted, source) in enumerate(zip(data.sources, opened.open(data.sources), strict=True))
    }


def is_packed(recipe: Recipe) -> bool:
    """Return whether rows of a run's examples have several texts."""
    sections = [recipe.data_of(stage) for stage in recipe.stages] + [recipe.validation]
    return any(source.texts_per_picture > 1 for section in sections if section for source in section.sources)


def stage_data(
    recipe: Recipe,
    prepared: Prepared,
    here: PartialState,
    kept: KeptPictures | None = None,
    sources: RunSources | None = None,
) -> Callable[[int, StageRecipe], Dataset[dict[str, Any]]]:
    """Return a function that makes a stage's batches for this process; `kept` has the pictures if they are cached."""
    opened = sources or RunSources()

    def of_stage(number: int, stage: StageRecipe) -> Dataset[dict[str, Any]]:
        data = recipe.data_of(stage)
        if data is None:
            raise ConfigError("the recipe has no data", hint="name data.sources, or give the run its batches")
        process, context = Process(here.process_index, here.num_processes), context_of(prepared.model)
        return source_batches(recipe, prepared.processor, number, stage, data, process, kept, opened, context)

    return of_stage


def source_batches(
    recipe: Recipe,
    processor: MiniGPT4Processor,
    number: int,
    stage: StageRecipe,
    data: SourcesData,
    process: Process,
    kept: KeptPictures | None = None,
    opened: RunSources | None = None,
    context: int | None = None,
) -> SourceBatches:
    """Return the batches that a stage learns from, for one process."""
    return _batches(
        (opened or RunSources()).open(data.sources),
        data.sources,
        seed=recipe.seed,
        number=number,
        unit=stage.batch_size * process.world_size if stage.mix == "batches" else 1,
        layout=layout_of(stage, processor, context),
        prompts=prompts_of(stage, data),
        length=batches_before(stage, stage.steps),
        batch_size=stage.batch_size,
        process=process,
        crop=data.crop,
        prompt_for=stage.prompt_for,
        bucket_batches=stage.bucket_batches,
        kept=kept,
    )


def num_sample_places(settings: ValidationRecipe) -> int:
    """Return among how many of validation's first places pictures for sample answers are looked for."""
    return SAMPLE_ATTEMPTS * settings.pictures


def validation_batches(
    recipe: Recipe,
    settings: ValidationRecipe,
    processor: MiniGPT4Processor,
    stage: StageRecipe,
    process: Process,
    opened: RunSources,
    kept: KeptPictures | None = None,
    context: int | None = None,
) -> SourceBatches:
    """Return the batches that a stage is validated with, for one process: whole pictures, the same every time.

    Texts are written and asked for as the stage's own are, so that the two losses can be compared.
    """
    data = recipe.data_of(stage)
    return _batches(
        opened.open(settings.sources),
        settings.sources,
        seed=VALIDATION_SEED,
        number=0,
        layout=layout_of(stage, processor, context),
        prompts=list(DEFAULT_PROMPTS) if data is None else prompts_of(stage, data),
        length=settings.batches,
        batch_size=stage.batch_size,
        process=process,
        crop=False,
        prompt_for=stage.prompt_for,
        kept=kept,
    )


def _batches(
    sources: Sequence[Source], named: Sequence[SourceRecipe], *, seed: int, number: int, unit: int = 1, **settings: Any
) -> SourceBatches:
    """Return batches over sources, mixed and cleaned as the recipe's sections say that name them."""
    shares = tuple(source.share for source in named)
    order = Order(tuple(len(source) for source in sources), shares, seed=seed, stage=number, unit=unit)
    return SourceBatches(sources, order, blip_captions=[_cleaning_of(source) for source in named], **settings)


def context_of(model: MiniGPT4ForConditionalGeneration) -> int | None:
    """Return how many positions a model's language model reads; None where its configuration does not say."""
    positions: int | None = getattr(model.config.text_config, "max_position_embeddings", None)
    return positions


def layout_of(stage: StageRecipe, processor: MiniGPT4Processor, context: int | None = None) -> Layout:
    """Return how a stage writes its examples, for a language model that reads `context` positions."""
    return Layout(
        processor=processor,
        kind=stage.layout,
        max_text_tokens=stage.max_text_tokens,
        max_turns=stage.turns,
        keep_end=stage.keep_end,
        prompt_template=stage.prompt_template,
        end_symbol=stage.end_symbol,
        context=context,
    )


def _cleaning_of(source: SourceRecipe) -> Cleaning | None:
    is_cleaned = source.captions == "blip"
    return Cleaning(source.max_words or MAX_WORDS, source.caption_prompt or "") if is_cleaned else None


def prompts_of(stage: StageRecipe, data: SourcesData) -> list[str]:
    """Return what asks for captions.

    Raises:
        ConfigError: The file of prompts cannot be read, or has none; or a prompt has several places for the picture.
    """
    if data.prompts is None:
        return [] if stage.layout == "original" else list(DEFAULT_PROMPTS)
    prompts = data.prompts if isinstance(data.prompts, list) else _read_prompts(data.prompts)
    # In the layout template a question is read without these marks.
    if stage.layout == "original" and (odd := [prompt for prompt in prompts if prompt.count(IMAGE_MARK) > 1]):
        raise ConfigError(
            f"the prompt {odd[0]!r} has {odd[0].count(IMAGE_MARK)} places for the picture, expected one",
            hint=f"write {IMAGE_MARK} once",
        )
    return prompts


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts {path}: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompts {path} are no text in UTF-8", hint="one prompt a line") from error
    # As the original: lines without a place for the picture are passed over where any line has one.
    marked = [line.strip() for line in lines if IMAGE_MARK in line]
    prompts = marked or [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path} holds no prompt", hint="one prompt a line")
    return prompts
