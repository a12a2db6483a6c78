"""The two models a new MiniGPT-4 is composed of: what their folders say, and their weights.

Everything that can be wrong is found before a weight is read. The vision encoder is built on torch's device `meta`,
and a picture of its folder's size goes through it, which tells the number and the width of its tokens. The places of a
picture need an id that no text makes: a control token that the tokenizer keeps for such uses, or a new one, for which
the table of embeddings grows if it has no row to spare.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Blip2VisionModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from minigpt4.errors import ConfigError, PromptError, WeightsError
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.prompts import IMAGE_TOKEN, TEMPLATES, Control, PromptTemplate, Text
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.hub import Report, hub_folder, is_on_hub
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer

VISION, LANGUAGE = "vision encoder", "language model"
UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What the library raises of files and sizes it cannot use."""

AGAIN = "fetch or copy its files again"
PICTURES_AGAIN = "copy preprocessor_config.json from where the model was published"
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Settings of pictures: of a model that reads pictures alone, and of one with text."""

INSIDE = {r"^(.*\.)?vision_(model|tower)\.": ""}
"""Where larger models (CLIP, BLIP-2, LLaVA, ours) keep the tensors of their vision encoder."""

SPARE_TOKENS = (
    re.compile(r"<\|?image(_pad|_soft_token)?\|?>"),
    re.compile(r"<\|?(reserved_special_token|reserved|unused|extra|placeholder|dummy)_?\d+\|?>"),
)
"""Names of unused control tokens, the best first: LLaMA 3, Qwen, Gemma, Phi have such."""

_QUESTION: list[dict[str, object]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
]
_CONVERSATION: list[dict[str, object]] = [
    *_QUESTION,
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
]


def part_folder(name: str, what: str, report: Report | None = None) -> Path:
    """Return the folder of a part (a path, or an id of the hub), fetching it from the hub if need be.

    Raises:
        WeightsError: There is no such folder, or it is no model's, or its tensors are in another format.
        DownloadError: The hub does not give it.
    """
    folder = hub_folder(name, report) if is_on_hub(name) else Path(name).expanduser()
    if not folder.is_dir():
        raise WeightsError(
            f"there is no {what} {name!r}, expected a folder written by save_pretrained or an id of the hub",
            hint="check the path, or name it as owner/name",
        )
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"the {what} {name} has no config.json, expected a folder written by save_pretrained",
            hint="name the folder that holds the whole model, not one of its files, an adapter or a GGUF",
        )
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"the {what} {name} has no tensors in safetensors files",
            hint="load it with transformers once and write it by save_pretrained, which makes them",
        )
    return folder


def _read_config(folder: Path, what: str) -> Any:  # noqa: ANN401  (of any kind)
    """Read a part's configuration; nothing that comes with it is run."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise WeightsError(
            f"the {what} in {folder} has a config.json of no kind that transformers knows: {first_line(error)}",
            hint="name a model of transformers itself, not one that brings code of its own",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the {what} in {folder} is quantized, expected its full weights",
            hint="name the model it was made from; quantize in the recipe loads it in fewer bits",
        )
    return config


def _load(model_class: Any, folder: Path, what: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:  # noqa: ANN401
    """Load a part in its stored number type; returns it, and the tensors that are missing or of another shape."""
    try:
        model, loading = model_class.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except UNREADABLE as error:
        raise WeightsError(f"the {what} in {folder} cannot be loaded: {first_line(error)}", AGAIN) from error
    return model.eval(), {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}


def _refuse_lacking(folder: Path, what: str, names: set[str]) -> None:
    if names:
        raise WeightsError(f"the {what} in {folder} lacks the tensor {min(names)}, or has it in another shape", AGAIN)


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library from listing tensors that a part has too many or too few: those that matter are checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class VisionPart:
    """A vision encoder whose folder was read and whose weights were not.

    Args:
        folder: Where it is.
        config: Of the encoder alone, also where the folder holds more.
        inside: The folder holds more than the encoder, as CLIP's does.
        model: The encoder without weights.
        tokens: What it makes of a picture, without numbers: `(1, tokens, width)`.
        pictures: Makes its pixel values.
    """

    folder: Path
    config: Any
    inside: bool
    model: PreTrainedModel
    tokens: torch.Tensor
    pictures: MiniGPT4ImageProcessor

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, before the patches; encoders that join patches on their way (Swin) have none."""
        patch = getattr(self.config, "patch_size", None)
        if not isinstance(patch, int):
            return 0
        size = self.pictures.size
        return max(0, self.tokens.shape[1] - (size["height"] // patch) * (size["width"] // patch))

    @property
    def num_patches(self) -> int:
        """Tokens that stand for a place in the picture."""
        return self.tokens.shape[1] - self.num_prefix_tokens

    def load(self) -> PreTrainedModel:
        """Load it in its stored number type.

        Raises:
            WeightsError: A tensor that its tokens depend on is missing or of another shape, or a file is damaged.
        """
        options = {"config": self.config, "key_mapping": INSIDE if self.inside else None}
        model, unfit = _load(type(self.model), self.folder, VISION, **options)
        # A pooler's tensors, say, may be missing: the tokens have no gradient by them (which needs no numbers).
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad and name in unfit}
        gradients = torch.autograd.grad(self.tokens.sum(), [*named.values()], allow_unused=True) if named else ()
        needed = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        _refuse_lacking(self.folder, VISION, needed)
        return model


def read_vision(folder: Path) -> VisionPart:
    """Read a vision encoder's folder, all but its weights.

    Raises:
        WeightsError: Its files are missing or no model's.
        ConfigError: It is no vision encoder, or one that a MiniGPT-4 cannot use.
    """
    whole = _read_config(folder, VISION)
    config: Any = getattr(whole, "vision_config", None) or whole
    if not isinstance(config, PreTrainedConfig):
        _refuse_vision(folder, "has a vision_config of no kind that transformers knows")
    pictures = _image_processor(folder, config)
    if config.model_type == "vit_mae":
        _refuse_vision(folder, "hides most of a picture by chance, as it was trained to")
    if config.model_type == "efficientnet_lite":
        config.num_concepts = 0  # words in the embeddings of nano's language model, which others cannot read
    model = _vision_on_meta(folder, config)
    height, width = pictures.size["height"], pictures.size["width"]
    try:
        tokens = model(torch.zeros(1, 3, height, width, device="meta")).last_hidden_state
    except UNREADABLE as error:
        _refuse_vision(folder, f"does not read a picture of {height} x {width} pixels: {first_line(error)}")
    if tokens.ndim != 3:
        _refuse_vision(folder, f"makes a map of the shape {tuple(tokens.shape[1:])} of a picture, expected tokens")
    if getattr(config, "hidden_size", None) is None:
        config.hidden_size = tokens.shape[2]
    if tokens.shape[2] != config.hidden_size:
        _refuse_vision(folder, f"makes tokens {tokens.shape[2]} wide, while its hidden_size is {config.hidden_size}")
    return VisionPart(folder, config, config is not whole, model, tokens, pictures)


def _refuse_vision(folder: Path, why: str) -> NoReturn:
    hint = "name a vision model such as DINOv2, ViT, SigLIP, CLIP or BLIP-2"
    raise ConfigError(f"the {VISION} in {folder} {why}", hint)


def _vision_on_meta(folder: Path, config: PreTrainedConfig) -> Any:  # noqa: ANN401  (of any kind)
    is_blip2 = config.model_type == "blip_2_vision_model"  # which is not among the library's AutoModel classes
    if not is_blip2 and type(config) not in MODEL_MAPPING:
        _refuse_vision(folder, f"is of the kind {config.model_type}, which is none of transformers' vision models")
    with torch.device("meta"):
        try:
            model = Blip2VisionModel._from_config(config) if is_blip2 else AutoModel.from_config(config)
        except UNREADABLE as error:
            _refuse_vision(folder, f"cannot be built: {first_line(error)}")
    if model.main_input_name != "pixel_values":
        _refuse_vision(folder, f"is of the kind {config.model_type}, which reads no pictures alone")
    return model.eval()


def _image_processor(folder: Path, config: PreTrainedConfig) -> MiniGPT4ImageProcessor:
    """Return an image processor with the settings that a vision encoder was trained with.

    Where the settings cut out the middle (CLIP, DINOv2: the short side to 256, then the middle 224 x 224), the whole
    picture is squashed to that size instead, as MiniGPT-4 does: an answer should be about all of a picture.
    """
    settings = _picture_settings(folder)
    size = settings.get("size")
    if settings.get("crop_size") is not None and settings.get("do_center_crop", True):
        size = settings["crop_size"]
    size = getattr(config, "image_size", None) if size is None else size
    if isinstance(size, dict):  # the forms in which the library has written sizes over the years
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise WeightsError(
            f"the {VISION} in {folder} has settings for pictures whose size is {size}, expected a height and a width",
            PICTURES_AGAIN,
        )
    for name in ("image_mean", "image_std"):
        if settings.get("do_normalize", True) and not settings.get(name):
            raise WeightsError(f"the {VISION} in {folder} has settings for pictures without {name}", PICTURES_AGAIN)
    names = ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return MiniGPT4ImageProcessor(size={"height": sides[0], "width": sides[1]}, **chosen)


def _picture_settings(folder: Path) -> dict[str, Any]:
    for name in PICTURE_FILES:
        if (folder / name).is_file():
            content = read_json_object(folder / name, WeightsError, PICTURES_AGAIN)
            section = content if name == PICTURE_FILES[0] else content.get("image_processor")  # beside the text's
            if isinstance(section, dict):
                return section
    raise WeightsError(
        f"the {VISION} in {folder} has no {PICTURE_FILES[0]}, which tells how its pictures are scaled", PICTURES_AGAIN
    )


@dataclass(frozen=True)
class LanguagePart:
    """A language model whose folder was read and whose weights were not.

    Args:
        folder: Where it is.
        config: Its configuration, with as many rows in its table as the whole needs.
        rows: Of its table as it is stored.
        tokenizer: With `image_token`, and with a token to pad with.
        image_token: Holds a picture's places.
        template: How a conversation is written.
        stop_ids: Tokens that end an answer.
    """

    folder: Path
    config: Any
    rows: int
    tokenizer: PreTrainedTokenizerBase
    image_token: str
    template: PromptTemplate
    stop_ids: list[int]

    @property
    def image_token_id(self) -> int:
        """The id of `image_token`."""
        return _token_id(self.tokenizer, self.image_token)

    def generation_config(self) -> GenerationConfig:
        """Return what ends an answer and what is never generated; how tokens are chosen is the asker's choice."""
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=[self.image_token_id],
        )

    def question_length(self, num_image_tokens: int) -> int:
        """Return the tokens of one picture and a short question."""
        prompt = self.template.encode(
            self.tokenizer, _QUESTION, image_token_id=self.image_token_id, num_image_tokens=num_image_tokens
        )
        return len(prompt.input_ids)

    @torch.no_grad()
    def load(self) -> PreTrainedModel:
        """Load it in its stored number type, its table as long as the whole needs it.

        New rows are the mean of the others, so that none stands out.

        Raises:
            WeightsError: A tensor is missing or of another shape, or a file is damaged.
        """
        model, unfit = _load(AutoModelForCausalLM, self.folder, LANGUAGE)
        _refuse_lacking(self.folder, LANGUAGE, unfit)
        table: Any = model.get_input_embeddings()
        before = table.num_embeddings
        if self.config.vocab_size > self.rows:
            model.resize_token_embeddings(self.config.vocab_size, mean_resizing=False)
            for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                for parameter in () if module is None else module.parameters():
                    parameter[before:] = parameter[:before].float().mean(dim=0).to(parameter.dtype)
        return model


def read_language(folder: Path, template: PromptTemplate) -> LanguagePart:
    """Read a language model's folder, all but its weights.

    Raises:
        WeightsError: Its files are missing or no model's, or its tokenizer is another model's.
        ConfigError: It is no causal language model, or the template does not fit its tokenizer.
    """
    config = _read_config(folder, LANGUAGE)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"{folder} holds a model of the kind {config.model_type}, which is no causal language model",
            hint="name one such as LLaMA, Qwen, Gemma, Mistral, Phi or GPT-2",
        )
    rows = getattr(config.get_text_config(), "vocab_size", 0)
    tokenizer = _tokenizer(folder, config)
    _check_template(template, tokenizer, folder)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise WeightsError(
            f"the tokenizer in {folder} has the id {largest}, while the {LANGUAGE}'s table has {rows} rows",
            hint="the tokenizer is another model's: copy the files of one model again",
        )
    image_token = _spare_token(tokenizer, template) or _added_token(tokenizer)
    config.vocab_size = max(rows, _token_id(tokenizer, image_token) + 1)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or image_token
    tokenizer.chat_template = None  # the processor's own takes its place
    stop_ids = _stop_ids(folder, config, tokenizer, template)
    return LanguagePart(folder, config, rows, tokenizer, image_token, template, stop_ids)


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(number, int):
        raise TypeError(f"{token!r} is not one token")
    return number


def _tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    if config.model_type == "llama" and (folder / "tokenizer.model").is_file():
        return load_llama_tokenizer(folder)[0]  # old folders name no tokens, or wrong ones
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.to_str()
    except UNREADABLE as error:
        raise WeightsError(
            f"the tokenizer of the {LANGUAGE} in {folder} cannot be read: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json from where the model was published",
        ) from error
    return tokenizer


def _check_template(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a template whose control tokens the tokenizer lacks; name those that it can write."""
    complaints: dict[str, str] = {}
    for candidate in TEMPLATES.values():
        try:  # no place of a picture, so that the id that stands for it does not matter yet
            candidate.encode(tokenizer, _CONVERSATION, image_token_id=-1, num_image_tokens=0)
        except PromptError as error:
            complaints[candidate.name] = error.message
    if complaint := complaints.get(template.name):
        fitting = [name for name in TEMPLATES if name not in complaints]
        raise ConfigError(
            f"the prompt template {template.name} does not fit the {LANGUAGE} in {folder}: "
            f"{complaint[:1].lower()}{complaint[1:]}",
            hint=f"set template to {' or '.join(fitting)}" if fitting else "name another language model",
        )


def _spare_token(tokenizer: Any, template: PromptTemplate) -> str | None:  # noqa: ANN401  (the library's, of any kind)
    """Return a control token that has no use yet, if there is one."""
    fixed = (value for value in vars(template).values() if isinstance(value, tuple))
    controls = {segment.token for segments in fixed for segment in segments if isinstance(segment, Control)}
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    taken |= {_token_id(tokenizer, token) for token in controls}
    added = sorted(tokenizer.added_tokens_decoder.items())
    for pattern in SPARE_TOKENS:
        for number, token in added:
            if token.special and number not in taken and pattern.fullmatch(token.content):
                return str(token.content)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # LLaMA spells what it does not know in bytes and never generates its token for the unknown.
    if model.get("byte_fallback") and tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in taken:
        return str(tokenizer.unk_token)
    return None


def _added_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Add `<image>`; where a word of the vocabulary is spelled so, another name."""
    name = IMAGE_TOKEN
    while name in tokenizer.get_vocab():
        name = name.replace("image", "image_")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False)], special_tokens=True)
    return name


def _stop_ids(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate
) -> list[int]:
    """Return what ends an answer: the template's own end, the tokenizer's, and what the model's makers name."""
    named: list[Any] = [_token_id(tokenizer, part.token) for part in template.answer_end if not isinstance(part, Text)]
    named += [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        content = read_json_object(folder / "generation_config.json", WeightsError, AGAIN)
        named.append(content.get("eos_token_id"))
    flat = [number for one in named for number in (one if isinstance(one, list) else [one])]
    # Old folders of LLaMA name the beginning of a text as its end.
    beginning = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    ids = (n for n in flat if isinstance(n, int) and 0 <= n < config.vocab_size and n not in beginning)
    return list(dict.fromkeys(ids))
