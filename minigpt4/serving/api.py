"""The HTTP API: OpenAI's chat completions and models, and what those who run a server need."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse, JSONResponse, Response

from minigpt4 import __version__
from minigpt4.serving.http import openai_errors
from minigpt4.serving.http.attention_route import AttentionRequest, add_attention
from minigpt4.serving.http.bodies import ChatRequest
from minigpt4.serving.http.completions import ChatCompletion, ErrorBody, ModelCard, ModelList
from minigpt4.serving.http.desk import Desk
from minigpt4.serving.http.docs_page import docs_page
from minigpt4.serving.http.doorman import COMPLETIONS, Doorman
from minigpt4.serving.http.edge import Edge
from minigpt4.serving.http.openai_errors import ApiError
from minigpt4.serving.http.security import Gate
from minigpt4.serving.page import page_policy
from minigpt4.serving.settings import Settings

if TYPE_CHECKING:
    from minigpt4.inference.engine import Engine  # loads torch

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
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


def make_app(engine: "Engine | None", settings: Settings, page: str | None = None) -> FastAPI:
    """Make the application.

    Args:
        engine: Answers; None while the model is loading: `app.state.desk.open(engine)` brings it.
        settings: Who may ask, and for how much.
        page: HTML for `GET /`.

    Returns:
        An ASGI application. Its desk (`app.state.desk`) is to be closed at the end; the lifespan does it.
    """
    desk = Desk(settings)
    if engine is not None:
        desk.open(engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await desk.pool.start()
        yield
        await desk.close()

    app = FastAPI(
        title="minigpt4", version=__version__, description="Ask questions about pictures.", lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.desk = desk
    openai_errors.install(app)
    app.add_middleware(Doorman, desk=desk)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Edge, metrics=desk.metrics, max_bytes=settings.limits.max_header_bytes)
    _add_completions(app, desk)
    add_attention(app, desk, _only(400, 401, 403, 404, 408, 413, 415, 429, 500, 503))
    _add_models(app, desk)
    _add_state(app, desk)
    _add_descriptions(app, page, has_key=settings.api_key is not None)
    return app


def _add_completions(app: FastAPI, desk: Desk) -> None:
    schema = {"$ref": "#/components/schemas/ChatRequest"}

    @app.post(
        COMPLETIONS,
        response_model=ChatCompletion,
        responses=_ERRORS | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )
    async def create_chat_completion(http: Request) -> Response:
        """Answer a conversation about pictures, whole or as a stream of server-sent events."""
        return await desk.answer(http, http.scope["place"])


def _add_models(app: FastAPI, desk: Desk) -> None:
    def card() -> ModelCard:
        if not desk.is_ready:
            return ModelCard(id=desk.settings.model_id, created=desk.started)
        text_config = desk.engine.model.config.get_text_config()
        length = getattr(text_config, "max_position_embeddings", None)
        return ModelCard(
            id=desk.settings.model_id,
            created=desk.started,
            max_model_len=length,
            attention_maps=desk.engine.model.config.qformer_config is not None,
        )

    @app.get("/v1/models", responses=_only(401))
    async def list_models() -> ModelList:
        """List the models: one."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{model:path}", responses=_only(401, 404))
    async def get_model(model: str) -> ModelCard:
        """Describe a model."""
        if model != desk.settings.model_id:
            raise ApiError(404, f"there is no model {model[:80]!r} here", param="model", code="model_not_found")
        return card()


def _add_state(app: FastAPI, desk: Desk) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server lives; needs no key."""
        return {"status": "ok"}

    @app.get("/ready", responses=_only(401, 503))
    async def ready() -> JSONResponse:
        """Say whether requests are answered now."""
        if not desk.is_ready:
            raise ApiError(
                503, "the server is closing" if desk.closing else "the model is still loading", code="loading"
            )
        counts = desk.engine.counts
        return JSONResponse({"status": "ok", "waiting": counts.waiting, "answering": counts.answering})

    @app.get("/metrics", response_class=Response, responses=_only(401))
    async def metrics() -> Response:
        """Count, for Prometheus."""
        return Response(desk.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version", responses=_only(401))
    async def version() -> dict[str, str]:
        """Say which version answers."""
        return {"version": __version__, "model": desk.settings.model_id}


def _add_descriptions(app: FastAPI, page: str | None, *, has_key: bool) -> None:
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            asked = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            looked = AttentionRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            made["components"]["schemas"] |= asked.pop("$defs", {}) | {"ChatRequest": asked}
            made["components"]["schemas"] |= looked.pop("$defs", {}) | {"AttentionRequest": looked}
            _leave_out_422(made)
            if has_key:
                made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                made["security"] = [{"key": []}]
                made["paths"]["/health"]["get"]["security"] = []
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def description() -> JSONResponse:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()), headers={"Content-Security-Policy": PAGE_POLICY})

    if page is not None:
        policy = page_policy(page)

        @app.get("/", include_in_schema=False)
        async def index() -> HTMLResponse:
            return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def _leave_out_422(description: dict[str, Any]) -> None:
    """Take out what the framework says of every parameter: here it is 400 with OpenAI's error object."""
    for operations in description["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}
