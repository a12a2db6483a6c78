"""JSON of strangers: bounded before it is built, every name once, no numbers that are none, no half characters."""

import json
import re
from collections import Counter
from typing import Any, NoReturn

from minigpt4.serving.http.openai_errors import ApiError
from minigpt4.serving.settings import Limits

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def read_json(body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """Read a body that has to be one JSON object.

    Args:
        body: As it came; its length is bounded already.
        limits: Of text, values and depth.

    Raises:
        ApiError: 400, with what is wrong.
    """
    # Counted before anything is built: a megabyte of brackets would become a hundred of lists. Pictures have none of
    # these characters; the texts may consist of them.
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > limits.max_json_values + limits.max_text:
        raise _too_many(limits)
    try:
        read = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg.lower()}, at character {error.pos}") from error
    except RecursionError as error:
        raise _too_deep(limits) from error
    except ValueError as error:  # more than 4 300 digits
        raise ApiError(400, "the body holds a number that is too long") from error
    if not isinstance(read, dict):
        raise ApiError(400, "the body is not a JSON object", 'expected {"messages": [...]}')
    _check_values(read, limits)
    return read


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ApiError(400, f"the body names {twice[:40]!r} twice in one object")
    return made


def _no_number(name: str) -> NoReturn:
    raise ApiError(400, f"the body holds {name}, which is no JSON")


def _check_values(read: object, limits: Limits) -> None:
    """Count values and levels, and refuse halves of characters, which no text may hold."""
    level: list[Any] = [read]
    depth = count = 0
    while level:
        count, depth = count + len(level), depth + 1
        if count > limits.max_json_values:
            raise _too_many(limits)
        if depth > limits.max_json_depth:
            raise _too_deep(limits)
        inside: list[Any] = []
        for value in level:
            if isinstance(value, str) and not value.isascii() and _HALF_CHARACTER.search(value):
                raise ApiError(400, "the body holds half a character (a lone surrogate)")
            if isinstance(value, dict):
                inside += value
                inside += value.values()
            elif isinstance(value, list):
                inside += value
        level = inside


def _too_many(limits: Limits) -> ApiError:
    return ApiError(400, f"the body holds more than {limits.max_json_values} values, or too much text")


def _too_deep(limits: Limits) -> ApiError:
    return ApiError(400, f"the body has more than {limits.max_json_depth} levels of lists and objects")
