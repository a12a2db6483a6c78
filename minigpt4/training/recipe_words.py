"""What a value of a recipe should be, in words: the library's own are a programmer's."""

from typing import Any

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


def expected(error: Any) -> str:  # noqa: ANN401  (one of `ValidationError.errors()`)
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
