"""The language model of a new model: its configuration, tokenizer, prompt template, and its weights.

A picture's places need an id that no text makes: a token of the tokenizer that its makers kept for such uses, or a
new one, for which the table of embeddings grows if it has no row to spare.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from minigpt4.errors import ConfigError, PromptError, WeightsError
from minigpt4.processing.prompts import IMAGE_TOKEN, TEMPLATES, Control, PromptTemplate, Text
from minigpt4.weights.composing.part_folder import UNREADABLE, first_line, read_config
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer

WHAT = "language model"
SPARE_TOKENS = (
    re.compile(r"<\|?image(_pad|_soft_token)?\|?>"),
    re.compile(r"<\|?(reserved_special_token|reserved|unused|extra|placeholder|dummy)_?\d+\|?>"),
)
"""Names of control tokens that wait for a use, the best first: LLaMA 3, Qwen, Gemma, Phi have such."""

_QUESTION: list[dict[str, object]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]},
]
_CONVERSATION: list[dict[str, object]] = [
    *_QUESTION,
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?"},
]


@dataclass(frozen=True)
class LanguagePart:
    """A language model that was looked at, not loaded.

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
    config: PreTrainedConfig
    rows: int
    tokenizer: PreTrainedTokenizerBase
    image_token: str
    template: PromptTemplate
    stop_ids: list[int] = field(default_factory=list)

    @property
    def image_token_id(self) -> int:
        """The id of `image_token`."""
        return token_id(self.tokenizer, self.image_token)

    def generation_config(self) -> GenerationConfig:
        """What ends an answer, and what is never said; how words are chosen is the asker's choice."""
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=[self.image_token_id],
        )

    def check_context(self, num_image_tokens: int) -> None:
        """Refuse pictures that leave no room for a question and an answer.

        Raises:
            ConfigError: The context is too short.
        """
        context = getattr(self.config, "max_position_embeddings", None)
        needed = len(self._encode(_QUESTION, num_image_tokens))
        if isinstance(context, int) and needed >= context:
            raise ConfigError(
                f"a picture of {num_image_tokens} tokens and a short question make {needed} tokens, the {WHAT} in "
                f"{self.folder} reads less than {context}",
                hint="set qformer to new, num_query_tokens to less, or name a model with a longer context",
            )

    def _encode(self, messages: list[dict[str, object]], num_image_tokens: int) -> list[int]:
        prompt = self.template.encode(
            self.tokenizer, messages, image_token_id=self.image_token_id, num_image_tokens=num_image_tokens
        )
        return prompt.input_ids


def read_language(folder: Path, template: PromptTemplate) -> LanguagePart:
    """Look at a language model's folder.

    Raises:
        WeightsError: Its files are missing or no model's, or its tokenizer is another model's.
        ConfigError: It is no causal language model, or the template does not fit its tokenizer.
    """
    config: Any = read_config(folder, WHAT)
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
            f"the tokenizer in {folder} has the id {largest}, while the {WHAT}'s table has {rows} rows",
            hint="the tokenizer is another model's: copy the files of one model again",
        )
    image_token = _spare_token(tokenizer, template) or _added_token(tokenizer)
    config.vocab_size = max(rows, token_id(tokenizer, image_token) + 1)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or image_token
    tokenizer.chat_template = None  # the processor's own takes its place
    stop_ids = _stop_ids(folder, config, tokenizer, template)
    return LanguagePart(folder, config, rows, tokenizer, image_token, template, stop_ids)


def load_language(part: LanguagePart) -> PreTrainedModel:
    """Load a language model in the number type it is stored in, its table as long as the whole needs it.

    Raises:
        WeightsError: A tensor is missing or of another shape, or a file is damaged.
    """
    model_class: Any = AutoModelForCausalLM
    try:
        model, loading = model_class.from_pretrained(
            part.folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise WeightsError(
            f"the {WHAT} in {part.folder} cannot be loaded: {first_line(error)}", hint="fetch or copy its files again"
        ) from error
    unfit = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if unfit:
        raise WeightsError(
            f"the {WHAT} in {part.folder} lacks the tensor {min(unfit)}, or has it in another shape",
            hint="fetch or copy its files again",
        )
    if part.config.vocab_size > part.rows:
        _grow(model, part.config.vocab_size)
    return model.eval()


@torch.no_grad()
def _grow(model: PreTrainedModel, rows: int) -> None:
    """Add rows that are the mean of the others: none stands out, and the numbers of the others stay as they are."""
    table: Any = model.get_input_embeddings()
    before = table.num_embeddings
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if module is None else module.parameters():
            parameter[before:] = parameter[:before].float().mean(dim=0).to(parameter.dtype)


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of a token that the tokenizer has."""
    number = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(number, int):
        raise TypeError(f"{token!r} is not one token")
    return number


def _tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    if config.model_type == "llama" and (folder / "tokenizer.model").is_file():
        return load_llama_tokenizer(folder)[0]  # old folders name no tokens, or wrong ones
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise WeightsError(
            f"the tokenizer of the {WHAT} in {folder} cannot be read: {first_line(error)}",
            hint="copy tokenizer.json and tokenizer_config.json from where the model was published",
        ) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise WeightsError(
            f"the tokenizer of the {WHAT} in {folder} has no form that the tokenizers library reads",
            hint="copy tokenizer.json from where the model was published",
        )
    return tokenizer


def _check_template(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse a template whose control tokens the tokenizer lacks; name those that it can write."""
    complaints: dict[str, str] = {}
    for candidate in TEMPLATES.values():
        try:  # no place of a picture, so that the id that stands for it does not matter yet
            candidate.encode(tokenizer, _CONVERSATION, image_token_id=-1, num_image_tokens=0)
        except PromptError as error:
            complaints[candidate.name] = error.message
    if template.name in complaints:
        fitting = [name for name in TEMPLATES if name not in complaints]
        complaint = complaints[template.name]
        raise ConfigError(
            f"the prompt template {template.name} does not fit the {WHAT} in {folder}: "
            f"{complaint[:1].lower()}{complaint[1:]}",
            hint=f"set template to {' or '.join(fitting)}" if fitting else "name another language model",
        )


def _spare_token(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> str | None:
    """Find a control token that stands for nothing yet."""
    taken = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    taken |= {token_id(tokenizer, token) for token in _controls(template)}
    added = sorted(tokenizer.added_tokens_decoder.items())
    for pattern in SPARE_TOKENS:
        for number, token in added:
            if token.special and number not in taken and pattern.fullmatch(token.content):
                return str(token.content)
    backend: Any = tokenizer
    model = json.loads(backend.backend_tokenizer.to_str())["model"]
    # LLaMA spells what it does not know in bytes and never says its token for the unknown.
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


def _controls(template: PromptTemplate) -> set[str]:
    fixed = (value for value in vars(template).values() if isinstance(value, tuple))
    return {segment.token for segments in fixed for segment in segments if isinstance(segment, Control)}


def _stop_ids(
    folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate
) -> list[int]:
    """Gather what ends an answer: the template's own end, the tokenizer's, and what the model's makers name."""
    named: list[Any] = [token_id(tokenizer, part.token) for part in template.answer_end if not isinstance(part, Text)]
    named += [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    if (folder / "generation_config.json").is_file():
        try:
            named.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
        except UNREADABLE as error:
            raise WeightsError(
                f"{folder / 'generation_config.json'} cannot be read: {first_line(error)}", hint="copy it again"
            ) from error
    flat = [number for one in named for number in (one if isinstance(one, list) else [one])]
    # Old folders of LLaMA name the beginning of a text as its end.
    beginning = {tokenizer.bos_token_id} - {tokenizer.eos_token_id}
    ids = (n for n in flat if isinstance(n, int) and 0 <= n < config.vocab_size and n not in beginning)
    return list(dict.fromkeys(ids))
