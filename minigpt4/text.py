"""Small texts that messages and tables share, and the small JSON files around weights. Needs nothing of the package."""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
"""Number types that a model runs in, by torch's names."""

LONGEST_QUOTE = 200
"""Characters of another program's message that are repeated in ours."""

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length:,}",
    "too_long": "a list of at most {max_length:,}",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
    "dict_type": "keys with values",
    "greater_than": "more than {gt:,.10g}",
    "greater_than_equal": "at least {ge:,.10g}",
    "less_than": "less than {lt:,.10g}",
    "less_than_equal": "at most {le:,.10g}",
    "literal_error": "{expected}",
}
"""What was expected, by pydantic's names of what is wrong; its own sentences are a programmer's."""


def expected(error: Mapping[str, Any], words: Mapping[str, str] = EXPECTED) -> str:
    """Return what was expected instead of a value; `error` is one of pydantic's `ValidationError.errors()`."""
    if error["type"] in words:
        return "expected " + words[error["type"]].format_map(error.get("ctx", {}))
    reason = str(error["msg"]).removeprefix("Value error, ")
    return reason[:1].lower() + reason[1:]


def counted(number: int, what: str) -> str:
    """Return a number with its noun: `1 picture`, `2,000 pictures`; `what` forms its plural with an s."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def size_text(size: int) -> str:
    """Return a number of bytes in megabytes; in kilobytes if it is less than one."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def gigabytes_text(size: int) -> str:
    """Return a number of bytes in gigabytes."""
    return f"{size / 1e9:.1f} GB"


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6) -> str:
    """Return a hint with the known name nearest to an unknown one; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, as the end of a sentence; the error's class if it has no message."""
    line = next(iter(str(error).strip().splitlines()), "").strip()
    return line[:LONGEST_QUOTE].rstrip(".:") or type(error).__name__


MAX_JSON_BYTES = 64 * 2**20
"""More than any settings or tokenizer file has; a longer one is not read into memory."""


def read_json_object(path: Path, error: Callable[[str, str], Exception], hint: str) -> dict[str, Any]:
    """Read a JSON file whose outermost value is an object.

    Raises:
        Exception: `error(message, hint)`, if the file cannot be read or holds something else.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("no file, or too long")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON", hint) from problem
    if not isinstance(value, dict):
        raise error(f"{path} holds no keys", hint)
    return value
