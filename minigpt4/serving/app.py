"""The HTTP API: OpenAI's chat completions and models, and what an operator of a server needs."""

import html
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from minigpt4 import __version__
from minigpt4.serving.attention import AttentionHandler
from minigpt4.serving.errors import ApiError, as_api_error, error_response
from minigpt4.serving.middleware import COMPLETIONS, Middleware
from minigpt4.serving.page import page_policy
from minigpt4.serving.requests import RequestHandler
from minigpt4.serving.schema import (
    AttentionAnswer,
    AttentionRequest,
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    ModelCard,
    ModelList,
)
from minigpt4.serving.settings import Settings

if TYPE_CHECKING:
    from minigpt4.inference.engine import Engine  # loads torch

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request is not acceptable; the context may be too short for it.",
        401: "The API key is missing or wrong.",
        403: "The request comes out of another site's page.",
        404: "There is no such model.",
        405: "The method is another one.",
        408: "The body did not arrive in time.",
        413: "The body is too long.",
        415: "The body is not JSON.",
        429: "The queue is full.",
        500: "The server's own fault.",
        503: "The model is still loading, or the answer was given up.",
    }.items()
}
_BODIES = (ChatRequest, AttentionRequest)  # parsed by hand, so the framework does not know them


def make_app(engine: "Engine | None", settings: Settings, page: str | None = None) -> FastAPI:
    """Make the application.

    Args:
        engine: Answers; None while the model is loading: `app.state.handler.open(engine)` brings it.
        settings: Key, names and limits.
        page: HTML for `GET /`.

    Returns:
        An ASGI application. Its lifespan starts the decoders and closes its handler (`app.state.handler`).
    """
    handler = RequestHandler(settings)
    if engine is not None:
        handler.open(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await handler.pool.start()
        yield
        await handler.close()

    app = FastAPI(
        title="minigpt4", version=__version__, description="Ask questions about pictures.", lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.handler = handler

    # A coroutine: for a plain function the framework starts threads, just when a server has no time.
    async def as_json(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    app.add_exception_handler(HTTPException, as_json)
    app.add_middleware(Middleware, settings=settings, metrics=handler.metrics, admit=handler.check_room)
    _add_answers(app, handler)
    _add_models(app, handler)
    _add_state(app, handler)
    _add_descriptions(app, page)
    return app


def _add_answers(app: FastAPI, handler: RequestHandler) -> None:
    attention = AttentionHandler(handler)

    def body(form: type[BaseModel]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{form.__name__}"}
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    @app.post(
        COMPLETIONS,
        response_model=ChatCompletion,
        responses=_ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        openapi_extra=body(ChatRequest),
    )
    async def create_chat_completion(http: Request) -> Response:
        """Answer a conversation about pictures, whole or as a stream of server-sent events."""
        return await handler.chat(http)

    statuses = _only(400, 401, 403, 404, 408, 413, 415, 429, 500, 503)

    @app.post("/v1/attention", responses=statuses, openapi_extra=body(AttentionRequest))
    async def look(http: Request) -> AttentionAnswer:
        """Say where the model looked on the last picture: a grid of numbers from 0 to 1 over the whole of it."""
        return await attention.look(http)


def _add_models(app: FastAPI, handler: RequestHandler) -> None:
    def card() -> ModelCard:
        model, created = handler.settings.model_id, handler.started
        if not handler.is_ready:
            return ModelCard(id=model, created=created)
        info = handler.info
        return ModelCard(id=model, created=created, max_model_len=info.context, attention_maps=info.has_attention_maps)

    @app.get("/v1/models", responses=_only(401))
    async def list_models() -> ModelList:
        """List the models: one."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{model:path}", responses=_only(401, 404))
    async def get_model(model: str) -> ModelCard:
        """Describe a model."""
        if model != handler.settings.model_id:
            raise ApiError(404, f"there is no model {model[:80]!r} here", param="model", code="model_not_found")
        return card()


def _add_state(app: FastAPI, handler: RequestHandler) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server lives; needs no key."""
        return {"status": "ok"}

    @app.get("/ready", responses=_only(401, 503))
    async def ready() -> JSONResponse:
        """Say whether requests are answered now."""
        if not handler.is_ready:
            message = "the server is closing" if handler.closing else "the model is still loading"
            raise ApiError(503, message, code="loading")
        counts = handler.engine.counts
        return JSONResponse({"status": "ok", "waiting": counts.waiting, "answering": counts.answering})

    @app.get("/metrics", response_class=Response, responses=_only(401))
    async def metrics() -> Response:
        """Count, for Prometheus."""
        return Response(handler.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=_only(401))
    async def version() -> dict[str, str]:
        """Say which version answers."""
        return {"version": __version__, "model": handler.settings.model_id}


def _add_descriptions(app: FastAPI, page: str | None) -> None:
    has_key = app.state.handler.settings.api_key is not None

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _description(app, has_key=has_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
        return HTMLResponse(_docs_page(app.openapi()), headers={"Content-Security-Policy": policy})

    if page is not None:
        policy = page_policy(page)

        @app.get("/", include_in_schema=False)
        async def index() -> HTMLResponse:
            return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def _description(app: FastAPI, *, has_key: bool) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = made["components"]["schemas"]
    for form in _BODIES:
        schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {}) | {form.__name__: schema}
    # What the framework says of every parameter: here it is 400 with OpenAI's error object.
    for operations in made["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if has_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
        made["paths"]["/health"]["get"]["security"] = []
    return made


def _docs_page(description: dict[str, Any]) -> str:
    """Return an OpenAPI description as HTML without a script, which loads nothing."""
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    rows, style = [], "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;color-scheme:light dark}"
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            rows.append(f"<dt><code>{method.upper()} {html.escape(path)}</code><dd>{operation['description']}")
    schemas = html.escape(json.dumps(description["components"]["schemas"], indent=1, ensure_ascii=False))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style><h1>{title}</h1>"
        f"<p>For programs: <a href=/openapi.json>openapi.json</a>.<dl>{''.join(rows)}</dl><pre>{schemas}</pre>"
    )


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}
