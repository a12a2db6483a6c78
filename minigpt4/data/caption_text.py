"""Captions as the original cleaned them for its first stage.

Source: `blip_caption` of the original (LAVIS's `BlipCaptionProcessor`). It is applied to captions of the shards, not
to those of `cc_sbu_align`.
"""

import re
from typing import NamedTuple

MAX_WORDS = 50

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


class Cleaning(NamedTuple):
    """How captions of a source are cleaned.

    Args:
        max_words: Longer ones lose the rest.
        prompt: Stands before each.
    """

    max_words: int = MAX_WORDS
    prompt: str = ""


def blip_caption(text: str, max_words: int = MAX_WORDS, prompt: str = "") -> str:
    """Return a caption in lower case, without most punctuation, cut after so many words, and behind a prompt."""
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower()))
    text = text.rstrip("\n").strip(" ")
    words = text.split(" ")
    return prompt + (" ".join(words[:max_words]) if len(words) > max_words else text)
