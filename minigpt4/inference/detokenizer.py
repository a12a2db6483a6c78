"""Ids to text as they are generated."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """Text of one answer, handed out as soon as it is certain: whole characters, no stop string, no leading blanks.

    Args:
        tokenizer: Decodes ids.
        stop_strings: The first of these to appear ends the answer; neither it nor its beginning is handed out.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_strings: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add an id; return the text that is now certain."""
        self.ids.append(token)
        return self._new(final=False)

    def end(self) -> str:
        """Return what was held back."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        if self.ended:
            return ""
        # Of one list of ids it makes one string.
        text = cast(
            str, self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ).lstrip()
        for stop in self.stop_strings:
            if stop in text:
                text, self.ended, final = text.partition(stop)[0], True, True
        if not final:
            text = text.rstrip("\ufffd")
            starts = (stop[:n] for stop in self.stop_strings for n in range(len(stop) - 1, 0, -1))
            text = text.removesuffix(next((start for start in starts if text.endswith(start)), ""))
        # A later byte can make earlier ones undecodable and so change text that is out; what follows it is still new.
        new = text.rstrip()[len(self.text) :]
        self.text += new
        return new
