"""What is wrong with a record: one error with a kind to count by, and the limits that make a record wrong.

Knows no file format and no folder.
"""

from typing import Any

from minigpt4.errors import DataError, ImageError, MiniGPT4Error, PromptError

MAX_TEXT_BYTES = 256 * 1024
"""Of all that is said about one picture; a model's context ends long before."""

NO_PICTURE = "no picture"
NO_TEXT = "no text"
MISSING_PICTURE = "picture that is missing"
OUTSIDE = "picture outside its folder"
WHOLE_PATH = "picture named by its whole path"
ADDRESS = "picture named by its address"
LARGE_PICTURE = "picture that is too large"
LARGE_TEXT = "text that is too long"
WRONG_TEXT = "text of another kind"
DOUBLED = "name that stands twice"
DAMAGED = "damaged file"
UNREADABLE = "picture that cannot be opened"
NO_PROMPT = "text that cannot be a prompt"
OTHER = "record that cannot be used"


class BadRecordError(DataError):
    """A record that nothing can be learnt from.

    Args:
        kind: A few words to count by, one of this module's.
        message: One sentence that names the record.
        hint: The cure.
    """

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep kind and hint when the error crosses a process border."""
        return type(self), (self.kind, self.message, self.hint)


def kind_of(error: MiniGPT4Error) -> str:
    """Return the kind of what was wrong with a record, whichever error told of it."""
    if isinstance(error, BadRecordError):
        return error.kind
    if isinstance(error, PromptError):
        return NO_PROMPT
    return UNREADABLE if isinstance(error, ImageError) else OTHER


def text_bytes(text: str) -> int:
    """Return the length of a text in UTF-8; half a character, which JSON can hold, counts three bytes."""
    return len(text.encode("utf-8", "surrogatepass"))


def checked_text(value: object, key: str, what: str = "caption") -> str:
    """Return a text that something can be learnt from, as it is: control characters and `</s>` are ordinary text.

    Args:
        value: What a file holds in a text's place.
        key: The record's, for the complaint.
        what: The text's name, for the complaint.

    Raises:
        BadRecordError: Missing, blank, not a text, or longer than `MAX_TEXT_BYTES`.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadRecordError(NO_TEXT, f"{key} has no {what}")
    if not isinstance(value, str):
        raise BadRecordError(WRONG_TEXT, f"{key}: the {what} is {_kind(value)}, expected text")
    if len(value) > MAX_TEXT_BYTES or text_bytes(value) > MAX_TEXT_BYTES:
        raise BadRecordError(
            LARGE_TEXT, f"{key}: the {what} has {len(value):,} characters, up to {MAX_TEXT_BYTES // 1024} KiB are read"
        )
    return value


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)
