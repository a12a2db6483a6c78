"""The language model of a new MiniGPT-4: its configuration, tokenizer, prompt template, and its weights.

The places of a picture need an id that no text makes: a control token that the tokenizer keeps for such uses, or a new
one, for which the table of embeddings grows if it has no row to spare.
"""

import json
import re
from dataclasses import dataclass
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
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.compose_parts import AGAIN, UNREADABLE, load_part, read_config, refuse_lacking
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer

LANGUAGE = "language model"
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
        model, unfit = load_part(AutoModelForCausalLM, self.folder, LANGUAGE, dtype="auto")
        refuse_lacking(self.folder, LANGUAGE, unfit)
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
    config = read_config(folder, LANGUAGE)
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
