"""Errors in the form that OpenAI clients read: `{"error": {"message", "type", "param", "code"}}`, and nothing else.

What is told is a sentence that was written to be told; of anything else only its status leaves the server.
"""

import logging
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from minigpt4.errors import ContextOverflowError, MiniGPT4Error, ServerBusyError

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1000
MAX_PLACE = 200

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_CODES = {
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}


class ApiError(MiniGPT4Error):
    """What a request may be told.

    Args:
        status: HTTP status.
        message: One sentence, without a full stop.
        hint: The cure.
        param: The field of the request that is meant.
        code: A word for programs; default one that goes with the status.
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
    """Return what a client may be told of an error; what is not its own doing is logged and stays here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ServerBusyError):
        return ApiError(429, error.message, error.hint, headers={"Retry-After": "2"})
    if isinstance(error, ContextOverflowError):
        return ApiError(400, error.message, error.hint, param="messages", code="context_length_exceeded")
    if isinstance(error, MiniGPT4Error) and error.http_status < 500:
        return ApiError(error.http_status, error.message, error.hint)
    if isinstance(error, MiniGPT4Error):
        logger.error("%s", error.message)
    else:
        logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "the server could not answer", "ask again; its log says more")


def error_body(error: ApiError) -> dict[str, Any]:
    """Write an error as clients read it."""
    name = (error.param or "").partition(".")[0].partition("[")[0]
    begins_with_name = bool(name) and error.message.startswith(name)
    message = error.message if begins_with_name else error.message[:1].upper() + error.message[1:]
    text = f"{message}. {error.hint[:1].upper()}{error.hint[1:]}." if error.hint else f"{message}."
    text = text[:MAX_MESSAGE].encode("utf-8", "replace").decode()
    status = error.http_status
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": text, "type": kind, "param": error.param, "code": error.code or _CODES.get(status)}}


def error_response(error: ApiError) -> JSONResponse:
    """Write an error as a response."""
    return JSONResponse(error_body(error), error.http_status, headers=error.headers)


def sentence_of(error: ValidationError | RequestValidationError) -> ApiError:
    """Name the first field that a request body got wrong."""
    first = error.errors()[0]
    # Tags of unions are no part of where a field stands; they are written <so>.
    places = [place for place in first["loc"] if not str(place).startswith("<") and place != "body"]
    where = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).lstrip(".")
    if len(where) > MAX_PLACE:  # its last part may be a client's own name, of any length
        where = f"{where[:MAX_PLACE]}..."
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, MiniGPT4Error):
        return ApiError(400, raised.message, raised.hint, param=where or None)
    if first["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where)
    if first["type"] == "union_tag_invalid":
        found, expected = (
            first["ctx"]["tag"].strip("<>"),
            first["ctx"]["expected_tags"].replace("<", "").replace(">", ""),
        )
        return ApiError(400, f"{where}.type is {found!r}, expected one of {expected}", param=f"{where}.type")
    said = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    said = re.sub(r"valid dictionary or instance of \w+", "JSON object", said[:1].lower() + said[1:])
    said = said.replace(" after validation", "")
    return ApiError(400, f"{where or 'the body'} is not acceptable: {said}", param=where or None)


def install(app: FastAPI) -> None:
    """Let every error of an application take this form."""

    # Coroutines: for plain functions the framework starts threads, up to forty, just when a server has no time.
    async def ours(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        return error_response(sentence_of(error) if isinstance(error, RequestValidationError) else as_api_error(error))

    async def http(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            return await ours(request, error)
        said = {404: "there is nothing at this address", 405: "this address does not take this method"}
        message = said.get(error.status_code) or HTTPStatus(error.status_code).phrase
        return error_response(ApiError(error.status_code, message, headers=error.headers))

    app.add_exception_handler(MiniGPT4Error, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
