"""create_app: routes, middleware and error handlers around the engines. Importing this starts nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.exceptions import HTTPException

from server import health
from server.auth import RequireKey
from server.cors import Cors
from server.frontend import Frontend, frontend
from server.openai import chat, completions, models, tokenize
from server.openai.errors import from_status
from server.openai.shield import Shield
from server.openapi import describe
from server.request_id import RequestId
from server.version import VERSION

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.fleet import Fleet
    from server.tokenizer import Tokenizer

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    # Prometheus would rather have OpenMetrics, and prometheus-client 0.26 then writes `outrider_` instead of `outrider:`.
    return Response(generate_latest(frontend(request).metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


def create_app(config: ServerConfig, client: Fleet, tokenizer: Tokenizer) -> FastAPI:
    """The HTTP application. `client` is started and stopped by the caller; `app.state.frontend.admission.drain()` drains."""
    app = FastAPI(title="Outrider", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    front = app.state.frontend = Frontend(config, client, tokenizer)
    for part in (chat.router, completions.router, models.router, tokenize.router, health.router, router):
        app.include_router(part)
    describe(app)
    app.add_exception_handler(HTTPException, _framework_error)
    # The last added is the outermost.
    if config.api_key:
        app.add_middleware(RequireKey, keys=config.api_key)
    app.add_middleware(Shield, metrics=front.metrics)
    if config.cors_allow_origins:
        app.add_middleware(Cors, origins=config.cors_allow_origins)
    app.add_middleware(RequestId)
    return app


async def _framework_error(request: Request, error: Exception) -> Response:
    """The framework's own answers (404, 405) become ours."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = {404: f"There is no {path}.", 405: f"{path} takes no {request.method}."}.get(error.status_code, str(error.detail))
    raise from_status(error.status_code, message, dict(error.headers or {}))
