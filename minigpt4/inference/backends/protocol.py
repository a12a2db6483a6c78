"""What the engine needs of a run time, and no more: encode pictures, read prompts, step answers, keep slots.

A slot holds what the language model has read of one conversation: its keys and values. Ids of pictures are
`num_image_tokens` times `image_token_id`; their embeddings come beside the ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from minigpt4.processing.prompts import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minigpt4.inference.backends.torch.attention import AttentionMap

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is.

    Args:
        context: Most ids of prompt and answer together; None where nothing says so.
        image_token_id: The id that holds the places of pictures.
        num_image_tokens: Places of a picture.
        image_size: Width, height and Pillow's resampling filter that pictures are brought to; None if the size stays.
        end_ids: End an answer.
        suppressed_ids: Never generated; the image token is one of them.
        repetition_penalty: Where a request has none; likewise the following.
        top_p: Smallest sum of probabilities that is drawn from.
        min_p: Least share of the largest probability.
        min_new_tokens: Shortest answer.
        has_attention_maps: Whether it can show where it looked.
    """

    context: int | None
    image_token_id: int
    num_image_tokens: int
    image_size: tuple[int, int, int] | None
    end_ids: tuple[int, ...]
    suppressed_ids: tuple[int, ...]
    repetition_penalty: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_new_tokens: int = 0
    has_attention_maps: bool = False


class ImageEmbeds(Protocol):
    """Image embeddings of one picture, `(num_image_tokens, text width)`, in the run time's own form."""

    @property
    def nbytes(self) -> int:
        """Their size in bytes."""


class Slot(Protocol):
    """What was read of one conversation."""

    @property
    def length(self) -> int:
        """Ids read."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""

    @property
    def can_be_cropped(self) -> bool:
        """Whether it can forget its end and be copied in part."""


class Backend(Protocol):
    """A loaded model in one run time. The engine calls it from one thread at a time."""

    tokenizer: "PreTrainedTokenizerBase"
    template: PromptTemplate

    @property
    def info(self) -> ModelInfo:
        """What the model is now."""

    def encode(self, picture: Image.Image) -> ImageEmbeds:
        """Encode a picture into image embeddings."""

    def new_slot(self) -> Any:  # noqa: ANN401  (its own kind of `Slot`, which only it reads)
        """Return an empty slot."""

    def prefill(self, slot: Any, ids: Sequence[int], images: Sequence[Any]) -> Logits:  # noqa: ANN401
        """Read ids into a slot, and the embeddings of the pictures among them; return the last logits."""

    def step(self, slots: Sequence[Any], tokens: Sequence[int]) -> Logits:
        """Read one id into each slot; return logits `(slots, vocabulary)`."""

    def crop(self, slot: Any, length: int) -> None:  # noqa: ANN401
        """Forget all but the first ids of a slot."""

    def fork(self, slot: Any, length: int) -> Any:  # noqa: ANN401
        """Copy the first ids of a slot into a new one."""

    def drop(self, slot: Any) -> None:  # noqa: ANN401
        """Free a slot, in whatever state an error has left it."""

    def sampling(self, seed: int | None, prompt_length: int, max_new_tokens: int) -> tuple[Any, Any]:
        """Return `draw` and `model_rules` of a `Sampler`, with random numbers from a seed; None for any."""

    def beam_search(
        self, ids: Sequence[int], images: Sequence[Any], options: dict[str, Any], stopped: Callable[[], bool]
    ) -> list[int]:
        """Return the ids of the best answer; `stopped` is called after every token and ends the search if true.

        Raises:
            UsageError: The run time has no beam search.
        """

    def attention_map(self, messages: Sequence[dict[str, Any]], span: tuple[int, int] | None) -> "AttentionMap":
        """Return where the model looked; may be called beside the engine's thread.

        Raises:
            UsageError: The model or the run time cannot say.
        """
