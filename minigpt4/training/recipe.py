"""A training recipe: one validated YAML file; an unknown key is an error that names the nearest known one.

`compat: original` puts the original's choices in the place of ours; each of them is also a key of its own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, overload

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from minigpt4.data.sources.formats import NAMES
from minigpt4.errors import ConfigError
from minigpt4.training.recipe_yaml import (
    LARGEST,
    LARGEST_SEED,
    Batch,
    Count,
    Decay,
    Name,
    Number,
    Place,
    Template,
    complaint,
    different,
    is_of_the_original,
    named,
    read_yaml,
    set_value,
)

ORIGINAL: dict[str, Any] = {
    "schedule": "linear_warmup_cosine_lr",
    "betas": [0.9, 0.999],
    "clip_norm": None,
    "loss_over": "batch",
    "mix": "batches",
    "prompt_for": "batch",
    "layout": "original",
    "keep_end": False,
    "bucket_batches": 1,
}
"""What `compat: original` sets in every stage that says nothing else."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_number_is_no_truth(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401  (not validated yet)
        """Refuse `yes` for a number, which the library takes for 1."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("expected a number")
        return value


def _known_format(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return name


class SourceRecipe(_Section):
    """One place examples come from; see `minigpt4.data.sources`.

    `path` is a folder, a file, or `hub:owner/name`; `share` is its part of the samples, relative to the others'.
    """

    path: Name
    format: Annotated[str, AfterValidator(_known_format)] = "auto"
    share: float = Field(1.0, gt=0, le=LARGEST)
    images: Place | None = Field(None, description="Where the pictures lie that a list of conversations names.")
    text: Name | None = Field(None, description="Name of the column or key that holds the caption.")
    captions: Literal["as_is", "blip"] = Field("as_is", description="blip: cleaned as the original did in stage 1.")
    max_words: Count | None = Field(None, description="A caption cleaned as `blip` is cut after so many; else 50.")
    caption_prompt: str | None = Field(None, description="What a caption cleaned as `blip` begins with.")
    texts_per_picture: int = Field(
        1, gt=0, le=64, description="So many texts of a list about the same picture are read side by side, at most."
    )

    @model_validator(mode="after")
    def _read_how_they_are_cleaned(self) -> "SourceRecipe":
        for key in ("max_words", "caption_prompt"):
            if self.captions != "blip" and getattr(self, key) is not None:
                raise ValueError(f"{key} changes nothing: only captions: blip reads it")
        return self


class SourcesData(_Section):
    """Pictures with captions or conversations.

    `prompts` ask for a caption where a record has no question: a file with one a line, or a list.
    """

    sources: list[SourceRecipe] = Field(min_length=1, max_length=1000)
    prompts: Place | list[str] | None = None
    crop: bool = Field(True, description="Cut a random part out of each picture, as the original does.")

    @field_validator("prompts", mode="before")
    @classmethod
    def _say_something(cls, value: Any) -> Any:  # noqa: ANN401  (not validated yet)
        of_list = isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
        if not (of_list or value is None or isinstance(value, str | Path)):
            raise ValueError("expected a file with one prompt a line, or a list of texts that say something")
        return value


class ValidationRecipe(_Section):
    """What a run looks at besides its loss: pictures it does not learn from, and questions about them."""

    sources: list[SourceRecipe] = Field(min_length=1, max_length=1000)
    every_steps: Count = 500
    batches: Count = 10
    pictures: int = Field(8, ge=0, le=10_000, description="So many get sample answers.")
    question: Name = "Describe this image in detail."


class PartsRecipe(_Section):
    """A model put together from a vision encoder and a language model, with new joining parts."""

    vision_model: Name
    language_model: Name
    qformer: Literal["new", "none"] = "new"
    qformer_layers: int = Field(4, gt=0, le=1000)
    num_query_tokens: int = Field(32, gt=0, le=10_000)
    template: Name = "chatml"


class LoraRecipe(_Section):
    """Low-rank adapters on the language model (arXiv 2106.09685)."""

    rank: int = Field(16, gt=0, le=10_000)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: Annotated[list[Name], Field(min_length=1), AfterValidator(different)] | None = Field(
        None, description="Left out: the library's choice for the model."
    )


class StageRecipe(_Section):
    """One stage of training.

    Args:
        name: Of the stage; no other has it.
        objective: `language`: the language model says the answers.
        steps: Updates of the weights; in the original's schedules `warmup_steps` and `steps_per_epoch` count batches.
        batch_size: Examples a process reads at once.
        accumulation: So many batches make one update.
        learning_rate: The highest.
        warmup_steps: It rises over so many steps.
        warmup_learning_rate: Where it rises from; below 0 from `learning_rate` itself, as in the original.
        final_learning_rate: Where it ends.
        schedule: `cosine`, or one of the original's, which count in epochs.
        steps_per_epoch: For the original's schedules.
        decay_rate: An epoch, for `linear_warmup_step_lr`.
        weight_decay: Of matrices; vectors are not decayed.
        betas: Of AdamW.
        clip_norm: Largest norm of all gradients together; null does not clip.
        loss_over: `tokens`: every target token counts the same, across accumulation and processes. `batch`: every
            batch counts the same and accumulation adds up, as in the original.
        mix: `samples` mixes sources in a batch, `batches` draws whole batches from one.
        prompt_for: One prompt drawn for each `sample`, or for a whole `batch`.
        layout: `template`: as the model is asked later. `original`: `[bos]`, then the prompt with the picture where
            there is one, else the picture alone, then the answer.
        prompt_template: What stands round a prompt in the layout `original`.
        end_symbol: What ends an answer in the layout `original`.
        keep_end: A text that is cut off keeps its end symbol.
        max_text_tokens: Longer answers are cut off; in the layout `template`, longer conversations lose turns.
        bucket_batches: Batches are made of examples of like length, out of so many batches; 1 leaves them as they come.
        turns: The largest number of questions about a picture.
        threads: The trainer's own, beside the loader's workers; null leaves them alone.
        data: What differs from the recipe's `data` in this stage.
    """

    name: Name
    objective: Literal["language"] = "language"
    steps: Count
    batch_size: Batch
    accumulation: Batch = 1
    learning_rate: float = Field(gt=0)
    warmup_steps: Number = 50
    warmup_learning_rate: float = 0.0
    final_learning_rate: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "linear_warmup_cosine_lr", "linear_warmup_step_lr"] = "cosine"
    steps_per_epoch: Count | None = None
    decay_rate: float | None = Field(None, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    clip_norm: float | None = Field(1.0, gt=0)
    loss_over: Literal["tokens", "batch"] = "tokens"
    mix: Literal["samples", "batches"] = "samples"
    prompt_for: Literal["sample", "batch"] = "sample"
    layout: Literal["template", "original"] = "template"
    prompt_template: Template = "###Human: {} ###Assistant: "
    end_symbol: str = Field("###", min_length=1)
    keep_end: bool = True
    max_text_tokens: int = Field(160, gt=1, le=LARGEST)
    bucket_batches: Batch = 8
    turns: Count = 4
    threads: int | None = Field(None, gt=0, le=1024)
    data: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fit_together(self) -> "StageRecipe":
        if self.mix == "batches" and self.bucket_batches > 1:
            raise ValueError("mix: batches keeps sources apart, so bucket_batches must be 1")
        if self.schedule == "linear_warmup_cosine_lr" and self.steps_per_epoch is None:
            raise ValueError("the schedule linear_warmup_cosine_lr needs steps_per_epoch")
        if self.schedule == "linear_warmup_step_lr" and None in (self.steps_per_epoch, self.decay_rate):
            raise ValueError("the schedule linear_warmup_step_lr needs steps_per_epoch and decay_rate")
        return self


Trainable = Literal["language_projection", "query_tokens", "qformer", "vision_model", "vision_layernorms", "lora"]
"""What can learn: `vision_model` is the vision encoder as a whole, with the norm after it (the original's
`freeze_vit: False`); `vision_layernorms` its norms alone; `lora` adapters on the language model."""


class Recipe(_Section):
    """All of a training run.

    Args:
        model: `nano`, a model or alignment folder, or parts to put together.
        joining_parts: Go on from the model's own projection and Q-Former, or begin with new ones.
        output: The run's folder.
        seed: Of everything drawn.
        trainable: What learns, see `Trainable`. Left out: what the model's own configuration says.
        lora: How, where `trainable` names it.
        precision: Of the computation: `auto` is `bf16` on an accelerator that has it, else `fp32`. What learns is
            float32 always.
        quantize: The frozen language model in fewer bits.
        gradient_checkpointing: Compute activations twice rather than keep them.
        parallel: With several processes: each holds the whole model (`ddp`), or a part of it (`fsdp2`).
        features: `cache` keeps on disk what the frozen parts make of a picture, and needs uncropped pictures and a
            vision encoder of which nothing learns.
        compat: `original` sets `ORIGINAL` in every stage.
        report_to: Besides `metrics.jsonl`.
        data: Where the examples come from; None where a run is given its batches.
        validation: What else is looked at.
        stages: One after another.
        checkpoint_steps: A checkpoint after so many updates, and at a stage's end.
        keep_checkpoints: So many of the last are kept, and the one with the smallest validation loss.
        workers: Processes that read ahead.
        max_bad_fraction: More bad samples than this among the last 1,000 stop the run.
        max_skipped_steps: So many updates in a row may be left out because of a loss or gradient that is no number.
    """

    model: Annotated[
        Annotated[Name, Tag("(name)")] | Annotated[PartsRecipe, Tag("(parts)")],
        Discriminator(lambda value: "(parts)" if isinstance(value, dict | PartsRecipe) else "(name)"),
    ] = "nano"
    joining_parts: Literal["trained", "new"] = "trained"
    output: Place
    seed: int = Field(1, ge=0, le=LARGEST_SEED)
    trainable: Annotated[list[Trainable], Field(min_length=1), AfterValidator(different)] | None = None
    lora: LoraRecipe = LoraRecipe()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    quantize: Literal["none", "int8", "nf4"] = "none"
    gradient_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    features: Literal["compute", "cache"] = "compute"
    compat: Literal["none", "original"] = "none"
    report_to: Annotated[list[Literal["tensorboard", "wandb"]], AfterValidator(different)] = Field(default_factory=list)
    data: SourcesData | None = None
    validation: ValidationRecipe | None = None
    stages: list[StageRecipe] = Field(min_length=1)
    checkpoint_steps: Count = 50
    keep_checkpoints: Count = 2
    workers: int = Field(1, ge=0, le=1024)
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    max_skipped_steps: Number = 5

    @model_validator(mode="before")
    @classmethod
    def _choose_as_the_original(cls, content: Any) -> Any:  # noqa: ANN401  (not validated yet)
        stages = content.get("stages") if isinstance(content, dict) and content.get("compat") == "original" else None
        if isinstance(stages, list):
            return {**content, "stages": [{**ORIGINAL, **s} if isinstance(s, dict) else s for s in stages]}
        return content

    @model_validator(mode="after")
    def _fit_together(self) -> "Recipe":
        if self.parallel == "fsdp2" and self.quantize == "int8":
            raise ValueError("quantize: int8 cannot be cut into parts (parallel: fsdp2); use nf4, or parallel: ddp")
        names = [stage.name for stage in self.stages]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two stages have the name {twice[0]!r}")
        return self

    def data_of(self, stage: StageRecipe) -> SourcesData | None:
        """Return where a stage's examples come from."""
        if self.data is None or not stage.data:
            return self.data
        return SourcesData.model_validate({**self.data.model_dump(), **stage.data})


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


@overload
def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe: ...


@overload
def read_recipe(path: Path, overrides: list[str] | None, kind: type[AnyRecipe]) -> AnyRecipe: ...


def read_recipe(path: Path, overrides: list[str] | None = None, kind: type[Recipe] = Recipe) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file; relative paths in it are taken from the working directory.
        overrides: `key=value`, dotted (`data.crop=false`, `stages.0.steps=10`); the value is YAML.
        kind: A class with further sections, for a run that is given its batches.

    Raises:
        ConfigError: Not a file, not YAML, an unknown key or a wrong value, each with its place.
    """
    content = read_yaml(path)
    if is_of_the_original(content):
        raise ConfigError(
            f"{path} is one of the original's YAML files, expected a recipe", hint=f"minigpt4 train --cfg-path {path}"
        )
    for override in overrides or []:
        set_value(content, override)
    return make_recipe(content, path, [override.partition("=")[0] for override in overrides or []], kind)


def make_recipe(
    content: dict[str, Any], origin: Path, overridden: Sequence[str] = (), kind: type[Recipe] = Recipe
) -> Recipe:
    """Validate a recipe's keys, which come from the file `origin`, but for those `overridden` on the command line.

    Raises:
        ConfigError: An unknown key, a wrong value, or one that changes nothing, with its place.
    """
    place = ""
    try:
        recipe = kind.model_validate(content)
        for number, stage in enumerate(recipe.stages):
            place = f"stages.{number}.data."
            recipe.data_of(stage)
    except ValidationError as error:
        raise complaint(error, place, origin, overridden, (("", kind), *_SECTIONS)) from error
    if kind is Recipe and recipe.data is None:
        raise ConfigError(f"{origin}: data is missing", hint="add that key; the files in recipes/ have it")
    for place, reason in _unused_options(recipe):
        raise ConfigError(f"{named(origin, overridden, place)}: {place} changes nothing: {reason}", hint="remove it")
    return recipe


_UNREAD: dict[str, dict[str, Any]] = {
    "layout: template": {"prompt_template": None, "end_symbol": None, "keep_end": True},
    "layout: original": {"turns": 1},
    "schedule: cosine": {"steps_per_epoch": None, "decay_rate": None},
    "schedule: linear_warmup_cosine_lr": {"decay_rate": None},
}
"""What is not read of a stage with a setting, each with the value that says what happens anyway."""


def _unused_options(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each key that a person set and that changes nothing, and why; not what `compat` set."""
    if recipe.lora.model_fields_set and "lora" not in (recipe.trainable or []):
        yield f"lora.{min(recipe.lora.model_fields_set)}", "there are no adapters where trainable does not name lora"
    if not isinstance(recipe.model, str) and _is_set(recipe, "joining_parts", "new"):
        yield "joining_parts", "a model that is put together has new ones"
    if recipe.validation and not recipe.validation.pictures and _is_set(recipe.validation, "question", None):
        yield "validation.question", "with pictures: 0 nobody is asked"
    for number, stage in enumerate(recipe.stages):
        for setting in (f"layout: {stage.layout}", f"schedule: {stage.schedule}"):
            for key, happens in _UNREAD.get(setting, {}).items():
                is_compat = recipe.compat == "original" and getattr(stage, key) == ORIGINAL.get(key, stage)
                if _is_set(stage, key, happens) and not is_compat:
                    yield f"stages.{number}.{key}", f"it is not read with {setting}"


def _is_set(section: BaseModel, key: str, happens: object) -> bool:
    """Return whether a person gave a key a value, other than the one that says what happens anyway."""
    value = getattr(section, key)
    return key in section.model_fields_set and value is not None and value != happens


_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (  # where keys may stand
    ("data", SourcesData), ("data.sources.0", SourceRecipe), ("model", PartsRecipe),
    ("lora", LoraRecipe), ("validation", ValidationRecipe), ("stages.0", StageRecipe),
)  # fmt: skip
