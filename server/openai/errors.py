"""Every error the API can answer with, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.responses import Response

RETRY_SOON = "1"  # seconds: a slot in the queue frees within a request
RETRY_LATER = "5"  # seconds: an engine restart


class ApiError(Exception):
    """An answer that is an error. Raise it anywhere below a route; the message is shown to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def payload(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        return msgspec.json.encode(self.payload())

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def context_length(message: str, param: str) -> ApiError:
    return invalid(message, param, "context_length_exceeded")


def unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def model_not_found(name: str) -> ApiError:
    return ApiError(404, f"The model {name[:200]!r} does not exist.", param="model", code="model_not_found")


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


def unsupported_media(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def overloaded(limit: int) -> ApiError:
    message = f"The server already has {limit} requests, the most it takes at once. Try again soon."
    return ApiError(429, message, kind="rate_limit_error", code="server_overloaded", headers={"Retry-After": RETRY_SOON})


def internal(message: str = "The server had an error while processing the request.", code: str = "internal_error") -> ApiError:
    return ApiError(500, message, kind="server_error", code=code)


def unavailable(message: str, code: str = "engine_unavailable") -> ApiError:
    return ApiError(503, message, kind="server_error", code=code, headers={"Retry-After": RETRY_LATER})


def timed_out(seconds: float) -> ApiError:
    return ApiError(504, f"The request took longer than {seconds:g} seconds.", kind="server_error", code="request_timeout")


_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}


def from_status(status: int, message: str, headers: dict[str, str] | None) -> ApiError:
    """What the framework itself answers: no such route, wrong method."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ApiError(status, message, kind=kind, code=_BY_STATUS.get(status, f"http_{status}"), headers=headers)


# ---- pydantic's complaints -----------------------------------------------------------------------------------------

_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "unknown_field": "unknown_parameter",
    "unsupported": "unsupported_parameter",
}


def from_validation(error: ValidationError) -> ApiError:
    """The first complaint, named the way OpenAI names it. The offending value is never repeated in the answer."""
    detail = error.errors(include_url=False, include_input=False)[0]
    kind, message = detail["type"], detail["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return invalid(f"The request body is no valid JSON: {message.removeprefix('Invalid JSON: ')}.", None, "invalid_json")
    loc = detail["loc"]
    if kind == "unknown_field":  # raised by the object that holds it, so the location ends there
        loc = (*loc, detail["ctx"]["name"])
    param = path(loc)
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind in ("extra_forbidden", "unknown_field"):
        message = f"Unknown parameter: '{param}'."
    else:
        message = f"Invalid '{param}': {message}." if param else f"Invalid request: {message}."
    return invalid(message, param, _CODES.get(kind) or ("invalid_type" if kind.endswith("_type") else "invalid_value"))


def path(loc: tuple[int | str, ...]) -> str | None:
    """("messages", 0, "content") -> messages[0].content; None for the body itself."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")[:200] or None
