"""Health without side effects: what is known about the engine is read, nothing is ever asked of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.frontend import frontend
from server.openai.errors import unavailable

router = APIRouter()


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def live(request: Request) -> dict[str, Any]:
    """200 while this process answers and the engine is neither dead nor stalled. Restart the server when it is not."""
    if not frontend(request).client.live:
        raise unavailable("The engine is not alive.")
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(request: Request) -> dict[str, Any]:
    """200 while new requests are welcome. Send no traffic when it is not."""
    front = frontend(request)
    if front.admission.draining:
        raise unavailable("The server is shutting down.", "server_draining")
    front.check_ready()
    return {"status": "ok"}


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """200 while the engine can work on requests (vLLM's meaning)."""
    front = frontend(request)
    front.check_ready()
    return {"status": "ok"}
