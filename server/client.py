"""The front end's way to the engine: requests in, token deltas out. One per engine; lives in one event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.messages import Abort, Add, Deltas, EngineInfo, EngineStats, Fatal, FromEngine, Ready, Stats, TokenDelta
from engine.request import Request
from server.supervisor import COMMAND, Supervisor

logger = logging.getLogger("outrider.client")


class EngineDead(Exception):
    """The engine died, or is not there, while a request needed it. Trying again later may work."""


class _Stream:
    """What has arrived for one request, and which of its samples are not finished yet.

    The engine knows it by `wire_id`, which is never used twice: deltas of an aborted request that are still on their way
    cannot end up in a later one of the same name.
    """

    __slots__ = ("left", "queue", "request_id", "wire_id")

    def __init__(self, request: Request, wire_id: str) -> None:
        self.request_id = request.request_id
        self.wire_id = wire_id
        self.left = set(range(request.n))
        self.queue: asyncio.Queue[TokenDelta | EngineDead] = asyncio.Queue()


class EngineClient:
    """`info` and `stats` are the engine's latest words; `on_stats`, if set, is called with every new `stats`. `gives_up` is
    asked when the engine has failed to start again and again.

    `ready`: the engine takes requests now. `live`: it does, or it is being started; false means for good.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog_timeout: float = 120.0,
        log_level: str = "info",
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] | None = None,
        number: int | None = None,
    ) -> None:
        """`environment` and `number` are for one of several engines: see Supervisor."""
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.ready = False
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.gives_up: Callable[[], bool] = lambda: True
        self._config = config
        self._options: dict[str, Any] = {"watchdog_timeout": watchdog_timeout, "log_level": log_level, "command": command}
        self._options |= {"environment": environment, "number": number, "gives_up": lambda: self.gives_up()}
        self._supervisor: Supervisor | None = None
        self._streams: dict[str, _Stream] = {}  # by wire id
        self._wire_ids: dict[str, str] = {}  # request id -> wire id
        self._count = 0
        self._became_ready = asyncio.Event()
        self._why = "the engine has not been started"

    @property
    def live(self) -> bool:
        return self._supervisor is not None and not self._supervisor.failed.done()

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts if self._supervisor else 0

    @property
    def pid(self) -> int | None:
        """Process id of the engine's latest life."""
        return self._supervisor.pid if self._supervisor else None

    @property
    def num_inflight(self) -> int:
        """Requests the engine has not finished."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the engine process and return at once; see `wait_ready`. A second call does nothing."""
        if self._supervisor is None:
            self._why = "the engine is starting"
            self._supervisor = Supervisor(self._config, self._on_message, self._on_lost, **self._options)

    async def wait_ready(self) -> EngineInfo:
        """Raises supervisor.EngineGoneError when the engine cannot be started."""
        if self._supervisor is None:
            raise RuntimeError("start() comes first")
        became_ready = asyncio.ensure_future(self._became_ready.wait())
        waiting: list[asyncio.Future[Any]] = [became_ready, self._supervisor.failed]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        became_ready.cancel()
        if self.info is None:
            await self._supervisor.failed
        assert self.info is not None
        return self.info

    async def wait_failed(self) -> None:
        """Returns never; raises supervisor.EngineGoneError when the engine is gone for good."""
        if self._supervisor is None:
            raise RuntimeError("start() comes first")
        await asyncio.shield(self._supervisor.failed)

    async def close(self) -> None:
        """Shut the engine down; what is in flight ends with EngineDead. A second call does nothing."""
        self._on_lost("the server is shutting down")
        if self._supervisor is not None:
            await self._supervisor.stop()

    def kill(self) -> None:
        """End the engine at once."""
        if self._supervisor is not None:
            self._supervisor.kill()

    async def submit(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of all n samples, ending after each sample's final one. To be closed when left early: that aborts.

        Raises EngineDead when there is no engine or it dies, ValueError for a request id that is in use.
        """
        if not self.ready:
            raise EngineDead(self._why)
        if request.request_id in self._wire_ids:
            raise ValueError(f"request id {request.request_id} is in use")
        self._count += 1
        stream = _Stream(request, f"{request.request_id}#{self._count}")
        self._streams[stream.wire_id] = stream
        self._wire_ids[stream.request_id] = stream.wire_id
        try:
            if not self._send(Add(msgspec.structs.replace(request, request_id=stream.wire_id))):
                raise EngineDead("the engine does not take requests")
            left = request.n
            while left:
                item = await stream.queue.get()
                if isinstance(item, EngineDead):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            if self._forget(stream.wire_id):  # the engine still works on it
                self._send(Abort(stream.wire_id))

    def abort(self, request_id: str) -> None:
        """End a request now; its unfinished samples get a final delta "abort". Unknown ids are ignored."""
        stream = self._forget(self._wire_ids.get(request_id, ""))
        if stream is None:
            return
        self._send(Abort(stream.wire_id))
        for index in sorted(stream.left):
            stream.queue.put_nowait(TokenDelta(request_id=request_id, index=index, finish_reason="abort"))

    def _forget(self, wire_id: str) -> _Stream | None:
        stream = self._streams.pop(wire_id, None)
        if stream is not None:
            del self._wire_ids[stream.request_id]
        return stream

    def _send(self, message: Add | Abort) -> bool:
        return self._supervisor is not None and self._supervisor.send(message)

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Deltas):
            for delta in message.deltas:
                self._on_delta(delta)
        elif isinstance(message, Stats):
            self.stats = message.stats
            if self.on_stats is not None:
                self.on_stats(message.stats)
        elif isinstance(message, Ready):
            self.info = message.info
            self.ready = True
            self._became_ready.set()
        elif isinstance(message, Fatal):  # it is on its way out
            self.ready, self._why = False, message.message

    def _on_delta(self, delta: TokenDelta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:  # aborted while this was on its way
            return
        delta.request_id = stream.request_id
        stream.queue.put_nowait(delta)
        if delta.finish_reason is not None:
            stream.left.discard(delta.index)
            if not stream.left:
                self._forget(stream.wire_id)

    def _on_lost(self, why: str) -> None:
        """The engine is gone, and with it every request it held."""
        self.ready = False
        self._why = why
        self.stats = EngineStats()
        for wire_id in list(self._streams):
            if stream := self._forget(wire_id):
                stream.queue.put_nowait(EngineDead(why))
