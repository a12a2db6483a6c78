"""What is wrong with a recipe, in a sentence with its place: the library's own words are a programmer's."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from minigpt4.errors import ConfigError

_WHOLE, _NUMBER, _TRUTH, _LIST, _KEYS = "a whole number", "a number", "true or false", "a list", "keys with values"

_EXPECTED = {
    "int_type": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE,
    "int_from_float": _WHOLE,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "a finite number",
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "string_type": "a text",
    "path_type": "a path",
    "list_type": _LIST,
    "tuple_type": _LIST,
    "too_short": "a list of at least {min_length:,}",
    "too_long": "a list of at most {max_length:,}",
    "model_type": _KEYS,
    "model_attributes_type": _KEYS,
    "dict_type": _KEYS,
    "greater_than": "more than {gt:,.10g}",
    "greater_than_equal": "at least {ge:,.10g}",
    "less_than": "less than {lt:,.10g}",
    "less_than_equal": "at most {le:,.10g}",
    "literal_error": "{expected}",
}


def named(path: Path, overridden: Sequence[str], place: str) -> str:
    """Name where a key comes from: the file, or the command line."""
    return "--set" if any(f"{place}.".startswith(f"{key}.") for key in overridden) else str(path)


def complaint(
    error: ValidationError,
    where: str,
    path: Path,
    overridden: Sequence[str],
    sections: Sequence[tuple[str, type[BaseModel]]],
) -> ConfigError:
    """Turn the library's complaint about a recipe into one sentence and a hint.

    Args:
        error: The library's.
        where: The place of what was validated, with a dot behind; empty for the whole.
        path: The recipe's file.
        overridden: Keys that come from the command line, by their places.
        sections: Where keys may stand, and which.
    """
    # A misspelt key is often also a missing one; the misspelling is the cause.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    known = sorted({name for _, section in sections for name in section.model_fields})
    *parents, last = first["loc"] or ("",)
    # Where a value may be of several kinds, the library puts the kind's name among the keys.
    keys = [part for part in parents if isinstance(part, int) or part in known]
    if isinstance(last, int) or last in known or first["type"] == "extra_forbidden":
        keys.append(last)
    place = (where + ".".join(str(part) for part in keys)).rstrip(".")
    origin = named(path, overridden, place)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"{origin}: unknown key {place}", hint=_meant(str(last), known, sections))
    if first["type"] == "missing" and not isinstance(last, int):
        return ConfigError(f"{origin}: {place} is missing", hint="add that key; the files in recipes/ have it")
    if first["type"] == "missing":
        place = place.rpartition(".")[0]
    in_brackets = first["type"] in ("list_type", "tuple_type")
    hint = "put it in brackets: [...]" if in_brackets else "mend that value; the files in recipes/ have examples"
    return ConfigError(": ".join(part for part in (origin, place, _expected(first)) if part), hint=hint)


def _meant(key: str, known: Sequence[str], sections: Sequence[tuple[str, type[BaseModel]]]) -> str:
    """Say which key may be meant, or where this one belongs."""
    places = dict.fromkeys(f"{place}.{key}".lstrip(".") for place, section in sections if key in section.model_fields)
    if places:
        return f"that key is {' or '.join(places)}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"


def _expected(error: Any) -> str:  # noqa: ANN401  (one of `ValidationError.errors()`)
    """Say what was expected and what there is."""
    if error["type"] == "missing":  # of a list of a certain length
        reason = f"expected a list of more than {len(error['input']):,}"
    elif error["type"] in _EXPECTED:
        reason = f"expected {_EXPECTED[error['type']].format(**error.get('ctx', {}))}"
    else:
        reason = error["msg"].removeprefix("Value error, ")
        reason = f"{reason[:1].lower()}{reason[1:]}"
    found = error["input"]
    if hasattr(found, "model_dump") or (isinstance(found, dict) and error["type"] not in _EXPECTED):
        return reason  # a whole section, whose keys do not go together
    shown = "null" if found is None else str(found).lower() if isinstance(found, bool) else repr(found)
    return f"{reason}, but it is {shown[:180]}"
