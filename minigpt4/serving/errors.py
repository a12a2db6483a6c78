"""Errors in the form that OpenAI clients read: `{"error": {"message", "type", "param", "code"}}`, and nothing else.

A client reads sentences that were written for it; of any other exception only the status leaves the server.
"""

import json
import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from minigpt4.errors import ContextOverflowError, MiniGPT4Error, ServerBusyError
from minigpt4.text import EXPECTED

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1000
MAX_PLACE = 200
MAX_SHOWN = 60

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout",
    413: "request_too_large", 415: "unsupported_media_type", 429: "queue_full", 500: "internal_error",
    503: "unavailable",
}  # fmt: skip

# By pydantic's names of errors, or by a field's name where that says more.
_EXPECTED = EXPECTED | {
    "string_type": "a string", "model_type": "an object", "model_attributes_type": "an object",
    "dict_type": "an object",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "content": "a string or a list of parts",
    "stop": "a string or a list of up to 4",
    "type": "'text' or 'image_url'",
}  # fmt: skip
_UNQUOTED = frozenset({"bool_type", "int_type", "float_type"})
_HELLO = '{"role": "user", "content": "Hello"}'
_TEXT = '{"type": "text", "text": "Hello"}'
_URL = '{"url": "data:image/jpeg;base64,..."}'
_CURES = {
    "messages": f'for instance "messages": [{_HELLO}]',
    "role": f"for instance {_HELLO}",
    "content": f"for instance {_HELLO}",
    "type": f'for instance {_TEXT} or {{"type": "image_url", "image_url": {_URL}}}',
    "text": f"for instance {_TEXT}",
    "image_url": f'for instance "image_url": {_URL}',
    "url": f"for instance {_URL[1:-1]}",
}


class ApiError(MiniGPT4Error):
    """A refusal or failure as a client reads it.

    Args:
        status: HTTP status.
        message: One sentence, without a full stop.
        hint: The cure.
        param: The field of the request that is wrong.
        code: A word for programs; default the status's own.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        hint: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.http_status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def as_api_error(error: BaseException) -> ApiError:
    """Return any exception as a client may read it; what is not the client's doing is logged and stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        known = {404: "there is nothing at this address", 405: "this address does not take this method"}
        message = known.get(error.status_code) or HTTPStatus(error.status_code).phrase
        return ApiError(error.status_code, message, headers=error.headers)
    if isinstance(error, ServerBusyError):
        return ApiError(429, error.message, error.hint, headers={"Retry-After": "2"})
    if isinstance(error, ContextOverflowError):
        return ApiError(400, error.message, error.hint, param="messages", code="context_length_exceeded")
    if isinstance(error, MiniGPT4Error) and error.http_status < 500:
        place = re.match(r"messages\[\d+\]", error.message)
        return ApiError(error.http_status, error.message, error.hint, param=place[0] if place else None)
    if isinstance(error, MiniGPT4Error):
        logger.error("%s", error.message)
    else:
        logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "the server could not answer", "ask again; its log says more")


def error_body(error: ApiError) -> dict[str, Any]:
    """Return the body of an error."""
    name = (error.param or "").partition(".")[0].partition("[")[0]
    begins_with_name = bool(name) and error.message.startswith(name)
    message = error.message if begins_with_name else error.message[:1].upper() + error.message[1:]
    text = f"{message}. {error.hint[:1].upper()}{error.hint[1:]}." if error.hint else f"{message}."
    text = text[:MAX_MESSAGE].encode("utf-8", "replace").decode()
    status = error.http_status
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": error.param, "code": error.code or _CODES.get(status)}}


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as a response."""
    return JSONResponse(error_body(error), error.http_status, headers=error.headers)


def validation_error(error: ValidationError) -> ApiError:
    """Return an error that names the first wrong field, what it holds, what was expected, and the cure."""
    first = error.errors()[0]
    # Tags of unions are no part of where a field stands; they are written <so>.
    places = [place for place in first["loc"] if not str(place).startswith("<")]
    where = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).lstrip(".")
    if len(where) > MAX_PLACE:  # its last part may be a client's own name, of any length
        where = f"{where[:MAX_PLACE]}..."
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, MiniGPT4Error):
        return ApiError(400, raised.message, raised.hint, param=where or None)
    kind, given, name = first["type"], first["input"], str(places[-1]) if places else ""
    if kind.startswith("union_tag"):  # a part of a message: an object whose type says what else it has
        part = isinstance(given, dict)
        where, name, kind = (f"{where}.type" if part else where), "type", "literal_error" if part else "model_type"
        if part and "type" not in given:
            kind = "missing"
        given = given.get("type") if part else given
    if kind == "missing":
        return ApiError(400, f"{where} is missing", _CURES.get(name, "add it"), param=where)
    if kind == "extra_forbidden":
        return ApiError(400, f"{where} is not known here", "leave it out", param=where, code="unknown_parameter")
    if kind == "string_type" or (name == "type" and kind == "literal_error"):
        kind = name if name in _EXPECTED else kind
    bounds = {
        bound: int(value) if value == int(value) else value
        for bound, value in first.get("ctx", {}).items()
        if isinstance(value, int | float)
    }
    expected = _EXPECTED.get(kind, str(first["msg"]).lower()).format_map(first.get("ctx", {}) | bounds)
    named = next((str(place) for place in reversed(places) if isinstance(place, str)), "")
    cure = _CURES.get("type" if name == "type" else named, "leave it out for the default" if len(places) == 1 else "")
    if isinstance(given, str) and kind in _UNQUOTED:
        cure = "write it without quotation marks"
    return ApiError(400, f"{where or 'the body'} is {_shown(given)}, expected {expected}", cure, param=where or None)


def _shown(given: object) -> str:
    """Return what a field holds, in a few words."""
    if isinstance(given, list):
        return f"a list of {len(given)}" if given else "an empty list"
    if isinstance(given, dict):
        return "an object"
    if isinstance(given, str) and len(given) > MAX_SHOWN:
        return f"a text of {len(given)} characters"
    said = json.dumps(given, ensure_ascii=False)
    return said if len(said) <= MAX_SHOWN else f"{said[:MAX_SHOWN]}..."
