"""A replica: one server, with its engines, on one node. It passes requests on to that and streams the answers back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import aiohttp
import ray
from ray import serve
from yarl import URL

from server.replicas.ask import PROXY_HEADERS, Ask, Head, passed_on
from server.replicas.process import ServerProcess

NO_LIMIT = aiohttp.ClientTimeout(total=None, connect=5.0)  # how long an answer may take is the server's business
REPLICA_HEADER = "x-outrider-replica"  # who answered, by the name that Ray's logs have
HEALTH_LIMIT = aiohttp.ClientTimeout(total=5.0)


class Replica:
    """Ray Serve's deployment. Blocks until its server is ready."""

    def __init__(self, settings: Mapping[str, Any], stop_seconds: float) -> None:
        self._name = serve.get_replica_context().replica_id.unique_id
        self._stop_seconds = stop_seconds
        self._session: aiohttp.ClientSession | None = None
        # For ranks that Ray places (--distributed-executor-backend ray): this very cluster, where a machine has several.
        self._server = ServerProcess(settings, {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})

    async def answer(self, ask: Ask) -> AsyncGenerator[Head | bytes, None]:
        """Head first, then the body as it comes. Left early, the server hears that its client is gone."""
        url = URL(self._server.url + ask.path, encoded=True)
        options: dict[str, Any] = {"headers": passed_on(ask.headers), "data": ask.body or None, "allow_redirects": False}
        async with self._client().request(ask.method, url, **options) as response:
            headers = passed_on(list(response.headers.items()), PROXY_HEADERS)
            yield Head(response.status, [*headers, (REPLICA_HEADER, self._name)])
            async for chunk in response.content.iter_any():
                yield chunk

    async def check_health(self) -> None:
        """Asked by Ray Serve now and then; raises when this replica is to be replaced."""
        if self._server.exit_code is not None:
            raise RuntimeError(f"the server ended with {self._server.exit_code}")
        async with self._client().get(f"{self._server.url}/live", timeout=HEALTH_LIMIT) as response:
            if response.status != 200:
                raise RuntimeError(f"the server is not live: {response.status}")

    async def __del__(self) -> None:
        """Called by Ray Serve when this replica is to go."""
        if self._session is not None:
            await self._session.close()
        await asyncio.to_thread(self._server.stop, self._stop_seconds)

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:  # it belongs to the loop that requests come in
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, timeout=NO_LIMIT, auto_decompress=False)
        return self._session
