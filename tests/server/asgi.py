"""One request to an ASGI app, with the client's end of the connection in the test's hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI


class Connection:
    """`call` runs until the app returns; `hang_up` is the client going away. `sent` is set at every message of the app."""

    def __init__(self, app: FastAPI, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"content-type": "application/json", "host": "test", **(headers or {})}
        self.app = app
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET" if body is None else "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.incoming.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.messages: list[Any] = []
        self.sent = asyncio.Event()

    async def call(self) -> None:
        await self.app(self.scope, self.incoming.get, self._send)  # type: ignore[arg-type]

    async def _send(self, message: Any) -> None:
        self.messages.append(message)
        self.sent.set()

    def hang_up(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return next((message["status"] for message in self.messages if message["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        start = next(message for message in self.messages if message["type"] == "http.response.start")
        return {name.decode(): value.decode() for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)
