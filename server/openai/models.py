"""GET /v1/models: the one model this server has."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.frontend import Frontend, frontend
from server.version import VERSION

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(frontend(request))]}


@router.get("/v1/models/{name:path}")  # a name may hold slashes
async def retrieve_model(request: Request, name: str) -> dict[str, Any]:
    front = frontend(request)
    front.check_model(name)
    return _model(front)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": VERSION}


def _model(front: Frontend) -> dict[str, Any]:
    model = {"id": front.model, "object": "model", "created": front.created, "owned_by": "outrider"}
    if front.client.info is not None:
        model["max_model_len"] = front.client.info.max_model_len  # vLLM's extension: clients size their prompts by it
    return model
