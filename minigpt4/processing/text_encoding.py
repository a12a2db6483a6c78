"""Ordinary text and control tokens to ids, with nothing that a user types turning into a control token.

A tokenizer looks for the names of its added tokens ("</s>", "<|im_end|>", "<image>") in the text before it splits
it into words. `TextEncoder` runs the same pipeline without that search: text stays text, and a control token comes
from its name alone. This file knows tokenizers; it does not know templates, turns or pictures.
"""

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from minigpt4.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


def well_formed(text: str) -> str:
    r"""Return `text` without lone surrogates, which no tokenizer can read.

    Two halves of one character become that character, a half alone becomes U+FFFD. Everything else, the NUL
    character included, stays as it is.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class TextEncoder:
    """Encodes stretches of text with one tokenizer.

    Every stretch is encoded as if it stood alone, so a tokenizer of the SentencePiece kind puts its dummy space
    before each of them: what the first LLaMA tokenizers did, whose ids MiniGPT-4 was trained on.

    Args:
        tokenizer: A transformers tokenizer with a `tokenizers` backend.

    Raises:
        PromptError: If the tokenizer has no such backend.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise PromptError(
                f"The tokenizer {type(tokenizer).__name__} has no backend of the tokenizers library",
                "convert it to a folder with a tokenizer.json",
            )
        self._tokenizer_name = type(tokenizer).__name__
        self._text_only = _without_added_tokens(backend)
        added = backend.get_added_tokens_decoder()
        self._added = {token.content: number for number, token in added.items()}
        unknown = tokenizer.unk_token_id
        self._special = {number for number, token in added.items() if token.special and number != unknown}

    def control_id(self, token: str) -> int:
        """Return the id of a control token.

        Raises:
            PromptError: If the tokenizer has no added token of this name.
        """
        number = self._added.get(token)
        if number is None:
            raise PromptError(
                f"The tokenizer {self._tokenizer_name} has no control token {token!r}, which the prompt template needs",
                "choose the template that the language model was trained with",
            )
        return number

    def encode(self, text: str, *, parse_special: bool = False, reserved_id: int | None = None) -> list[int]:
        """Encode one stretch of text, without a token for its beginning or end.

        Args:
            text: Any string.
            parse_special: Turn the names of added tokens in the text into these tokens, and encode what lies between
                them as stretches of their own. For the parity of training captions only, never for what a user types.
            reserved_id: An added token whose name is text all the same, since it holds places for something else.

        Returns:
            Ids; none of them is a special token's unless `parse_special` is true. A character that the vocabulary
            cannot spell is the unknown token or, where there is none, nothing.

        Raises:
            PromptError: If the tokenizer's own vocabulary spells a special token out of plain text.
        """
        if not parse_special or not self._added:
            return self.encode_with_spans(text)[0]
        added = {name: number for name, number in self._added.items() if number != reserved_id}
        names = sorted(added, key=len, reverse=True)
        ids: list[int] = []
        for stretch in re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]:
            ids += [added[stretch]] if stretch in added else self.encode_with_spans(stretch)[0]
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Encode one stretch of text and tell where in it each token lies.

        Returns:
            The ids, and as many (start, end) positions in `well_formed(text)`. A token that stands for part of a
            character has the whole character's span, SentencePiece's dummy space that of the first character.

        Raises:
            PromptError: If the tokenizer's own vocabulary spells a special token out of plain text.
        """
        encoding = self._text_only.encode(well_formed(text), add_special_tokens=False)
        forged = self._special.intersection(encoding.ids)
        if forged:
            raise PromptError(
                f"The tokenizer {self._tokenizer_name} makes the special token with id {min(forged)} from plain text",
                "repair the vocabulary of this tokenizer: no merge may end in a special token",
            )
        return encoding.ids, encoding.offsets


@dataclass
class IdWriter:
    """Collects the ids of a sequence; neighbouring texts wait, to be encoded together as one stretch.

    Args:
        encoder: Encodes the stretches.
        reserved_id: An id that no text may encode to, since it holds places for something else.
    """

    encoder: TextEncoder
    reserved_id: int
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1 on marked tokens
    _texts: list[str] = field(default_factory=list)  # of the stretch
    _marked: bytearray = field(default_factory=bytearray)  # one flag for each of its characters

    def add_text(self, text: str, marked: bool = False) -> None:
        """Add well-formed text to the stretch that is being collected."""
        self._texts.append(text)
        self._marked += bytes([marked]) * len(text)

    def add_ids(self, ids: list[int], marked: bool = False) -> None:
        """End the stretch and add ids as they are."""
        self.end_stretch()
        self.ids += ids
        self.mask += [int(marked)] * len(ids)

    def end_stretch(self) -> None:
        """Encode the text that waits; call it after the last text.

        A token is marked if any of its characters is.

        Raises:
            PromptError: If the text encodes to a special token or to the reserved id.
        """
        ids, spans = self.encoder.encode_with_spans("".join(self._texts))
        if self.reserved_id in ids:
            raise PromptError(
                f"Text of the conversation encodes to the id {self.reserved_id}, which holds the places of pictures",
                "set image_token_id to an id that the tokenizer never makes from text",
            )
        self.ids += ids
        self.mask += [int(1 in self._marked[start:end]) for start, end in spans]
        self._texts, self._marked = [], bytearray()


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """Return the backend's pipeline from text to ids, blind to its added tokens; the vocabulary is shared."""
    text_only = Tokenizer(backend.model)
    text_only.normalizer = backend.normalizer
    split = backend.pre_tokenizer
    if backend.normalizer is None and isinstance(split, pre_tokenizers.Metaspace) and not split.split:
        # Transformers 5 builds LLaMA's pipeline with a Metaspace that swallows the first space of a text; the two
        # normalizers below do what SentencePiece itself does, so the ids equal those of tokenizer.model.
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", split.replacement)]
        if split.prepend_scheme != "never":
            spaces.insert(0, normalizers.Prepend(split.replacement))
        text_only.normalizer = normalizers.Sequence(spaces)
        return text_only
    text_only.pre_tokenizer = split
    return text_only
