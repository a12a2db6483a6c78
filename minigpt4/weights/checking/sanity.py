"""Whether the weights of a language model are those of one that was trained.

Finds what loads without an error and then babbles: a delta that was not merged, a broken merge, a table with a row too
few, random or broken numbers. The model runs layer after layer over one fixed sentence, each tensor read when its layer
runs, so that a model of any size needs the memory of its largest tensor.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload, init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.text import first_line
from minigpt4.weights.files.tensor_files import TensorFiles, open_tensors
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer
from minigpt4.weights.llama.version import LARGEST_NORM_OF_A_DELTA, LAST_NORM

SENTENCE = (
    "The sun rises in the east and sets in the west. Water freezes when it is very cold, and it boils when it is hot. "
    "A dog is an animal with four legs, and a bird is an animal with two legs and two wings."
)
"""Known to every model that has read English; SmolLM2-135M, the smallest here, has a loss of 2.2 on it."""

LARGEST_SHARE_OF_CHANCE = 0.5
"""A loss above this share of ln(vocabulary), which is what guessing costs, is no trained model's."""

LARGEST_SHARE_OF_EMPTY_ROWS = 0.1
"""Of embeddings that are all zero; some models keep up to a hundredth of their rows for words to come."""

SMALL_MODEL_BYTES = 1_000_000_000
"""Stored weights up to this are checked without being asked to: it takes seconds."""

AGAIN_HINT = "fetch or merge the files again, and check them with `minigpt4 weights verify`"


@dataclass
class Sanity:
    """What the check found.

    Args:
        loss: Of the fixed sentence, in nats a token; None where a fault was found before it could be computed.
        chance: ln(vocabulary), the loss of guessing.
        embedding_norm: Median length of an embedding.
        problem: What is wrong, in one sentence; empty where nothing is.
        hint: The cure.
        notes: Sentences about what was mended on the way.
    """

    loss: float | None = None
    chance: float = 0.0
    embedding_norm: float | None = None
    problem: str = ""
    hint: str = ""
    notes: list[str] = field(default_factory=list)


class _FaultError(Exception):
    """A fault in the weights, raised where it is seen, inside the model's own forward."""

    def __init__(self, problem: str, hint: str = AGAIN_HINT) -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def check_language_model(folder: Path) -> Sanity:
    """Check the weights of a language model's folder, or of the language model in a full folder.

    Returns:
        What was found; faults of the weights are in it and are not raised.

    Raises:
        WeightsError: The folder is no model folder, or a file of it cannot be opened at all.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder} is not a model folder: {first_line(error)}",
            hint="give the folder that has the model's config.json and its weights",
        ) from error
    inside = isinstance(config, MiniGPT4Config)
    text = config.text_config if inside else config
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    weights = _Weights(open_tensors(folder), model, prefix="model.language_model." if inside else None)
    found = Sanity(chance=math.log(text.vocab_size))
    try:
        tokenizer, found.notes = _tokenizer(folder)
        weights.compare(len(tokenizer))
        if text.model_type == "llama":
            _refuse_delta(weights)
        found.loss = _loss(model, weights, tokenizer)
        if not found.loss <= LARGEST_SHARE_OF_CHANCE * found.chance:  # also where the loss is no number
            raise _FaultError(
                f"the language model does not know English: its loss on a plain sentence is {found.loss:.2f}, guessing "
                f"costs {found.chance:.2f} and a trained model less than {LARGEST_SHARE_OF_CHANCE * found.chance:.2f}",
                f"the weights are random, half merged or of two models; {AGAIN_HINT}",
            )
    except _FaultError as fault:
        found.problem, found.hint = fault.problem, fault.hint
    found.embedding_norm = weights.embedding_norm
    return found


def _tokenizer(folder: Path) -> tuple[PreTrainedTokenizerBase, list[str]]:
    if (folder / "tokenizer.model").is_file():
        return load_llama_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the tokenizer of {folder} cannot be read: {first_line(error)}",
            "copy the tokenizer's files there from where the model was published",
        ) from error


class _Weights(Mapping[str, Tensor]):
    """The tensors of a language model in float32, read and checked when they are asked for.

    Args:
        tensors: Of the folder.
        model: The same model without numbers, for names and shapes.
        prefix: What the folder puts in place of the model's own first name; None for a language model's folder.
    """

    def __init__(self, tensors: TensorFiles, model: Any, prefix: str | None) -> None:  # noqa: ANN401  (any model)
        self._tensors = tensors
        self._base, self._prefix = f"{model.base_model_prefix}.", prefix
        parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        self.embeddings = next(name for name, parameter in parameters.items() if parameter is table)
        self._tied = ""
        if model.config.tie_word_embeddings:
            self._tied = next((name for name, parameter in parameters.items() if parameter is head), "")
            self.shapes.pop(self._tied, None)
        self.embedding_norm: float | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        name = self.embeddings if name == self._tied else name
        stored = self._stored(name)
        if stored not in self._tensors:
            raise KeyError(name)
        tensor = self._tensors.read(stored).to(torch.float32)
        if not tensor.sum(dtype=torch.float64).isfinite():  # one pass and no copy: what is no number spoils the sum
            broken = int((~tensor.isfinite()).sum())
            raise _FaultError(f"{broken} of the {tensor.numel()} numbers of tensor {stored} are infinite or no numbers")
        if name == self.embeddings:
            norms = tensor.norm(dim=1)
            self.embedding_norm = float(norms.median())
            empty = int((norms == 0).sum())
            if empty > LARGEST_SHARE_OF_EMPTY_ROWS * len(norms):
                raise _FaultError(f"{empty} of the {len(norms)} rows of {stored} are zero")
        return tensor

    def _stored(self, name: str) -> str:
        """Return what the folder calls a tensor of the model."""
        bare = name.removeprefix(self._base)
        if self._prefix is None:  # some folders hold the model without its head, and leave the first name out
            return name if name in self._tensors or bare not in self._tensors else bare
        return self._prefix + bare if name.startswith(self._base) else name

    def compare(self, num_words: int) -> None:
        """Compare names and shapes with the model's, and the table's rows with the tokenizer's words."""
        for name, expected in self.shapes.items():
            stored = self._stored(name)
            if stored not in self._tensors:
                raise _FaultError(f"tensor {stored} is missing")
            found = tuple(self._tensors.shape(stored))
            if found != expected:
                what = f"{found}, and the configuration says {expected}"
                if found[1:] == expected[1:]:
                    what = f"{found[0]} rows, and the configuration says {expected[0]}"
                raise _FaultError(f"tensor {stored} has {what}")
        rows = self.shapes[self.embeddings][0]
        if num_words > rows:
            raise _FaultError(
                f"the tokenizer has {num_words} words and the table of embeddings {rows} rows",
                "the tokenizer's files are another version's: 32001 words are Vicuna v0, 32000 are v1.1 and LLaMA",
            )


def _refuse_delta(weights: _Weights) -> None:
    mean = float(weights[LAST_NORM].mean()) if LAST_NORM in weights.shapes else 1.0
    if abs(mean) < LARGEST_NORM_OF_A_DELTA:
        raise _FaultError(
            f"the weights of the last norm are {mean:.3f} in the mean, about 1 was expected: "
            "this is a delta, the difference of two models, and no model",
            "merge it with its base: minigpt4 weights apply-delta --base LLAMA --delta THIS --target VICUNA",
        )


@torch.inference_mode()
def _loss(model: Any, weights: _Weights, tokenizer: PreTrainedTokenizerBase) -> float:  # noqa: ANN401  (any model)
    """Return the loss of the fixed sentence, one layer in memory at a time."""
    cpu_offload(model, execution_device=torch.device("cpu"), state_dict=weights)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
