"""All engines of a server behind one face. With one engine it only passes on; with several each request is routed (router.py).

Engines share nothing: each has the whole model, its own KV cache, drafters, policy and supervisor. When one dies its requests
end with EngineDead, the others go on, and it is started again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from engine.config import EngineConfig
from engine.messages import EngineInfo, TokenDelta
from engine.request import Request
from server.client import EngineClient
from server.router import Router
from server.shares import shares
from server.supervisor import COMMAND, EngineGoneError

logger = logging.getLogger("outrider.fleet")


class Fleet:
    """`ready`: some engine takes requests now. `live`: not all of them are gone for good. Lives in one event loop."""

    def __init__(self, engines: Sequence[EngineClient], router: Router, *, one_first: bool = False) -> None:
        """one_first: the others are started when the first one is ready, to find on the disk what it has measured."""
        self.engines = list(engines)
        self.router = router
        self._one_first = one_first
        self._where: dict[str, EngineClient] = {}  # by request id
        self._others: asyncio.Task[None] | None = None
        for engine in self.engines:  # while others serve, whoever fails to come back may try for ever
            engine.gives_up = lambda: not self.ready

    @classmethod
    def of(
        cls,
        config: EngineConfig,
        count: int,
        *,
        watchdog_timeout: float = 120.0,
        log_level: str = "info",
        command: Sequence[str] = COMMAND,
    ) -> Fleet:
        """`count` engines that share this machine. Raises ValueError when it does not have what they need."""
        parts = shares(config, count)
        if count > 1:
            threads = parts[0].config.num_threads
            logger.info("%d engines, CPU threads of each: %s", count, "as OMP_NUM_THREADS says" if threads is None else threads)
        engines = [
            EngineClient(
                share.config,
                watchdog_timeout=watchdog_timeout,
                log_level=log_level,
                command=command,
                environment=share.environment,
                number=number if count > 1 else None,
            )
            for number, share in enumerate(parts)
        ]
        router = Router(engines, config.block_size, affinity=config.enable_prefix_caching)
        return cls(engines, router, one_first=config.profile)

    @property
    def ready(self) -> bool:
        return any(engine.ready for engine in self.engines)

    @property
    def live(self) -> bool:
        return any(engine.live for engine in self.engines)

    @property
    def num_inflight(self) -> int:
        """Requests the engines have not finished."""
        return sum(engine.num_inflight for engine in self.engines)

    @property
    def info(self) -> EngineInfo | None:
        """Facts that hold for every engine heard of so far: the least context of all, the rest is equal by configuration."""
        infos = [engine.info for engine in self.engines if engine.info is not None]
        if not infos:
            return None
        least = min(infos, key=lambda info: info.max_model_len)
        if least.max_model_len == infos[0].max_model_len:
            return infos[0]
        return msgspec.structs.replace(infos[0], max_model_len=least.max_model_len)

    async def start(self) -> None:
        """Start the engines and return at once; see `wait_ready`. A second call does nothing."""
        await self.engines[0].start()
        if self._others is None:
            self._others = asyncio.create_task(self._start_others())

    async def _start_others(self) -> None:
        if self._one_first and len(self.engines) > 1:
            try:
                await self.engines[0].wait_ready()
            except EngineGoneError:  # who waits for the engines hears of it there
                return
        for engine in self.engines[1:]:
            await engine.start()

    async def wait_ready(self) -> list[EngineInfo]:
        """Until every engine is. Raises supervisor.EngineGoneError when one cannot be started."""
        if self._others is None:
            raise RuntimeError("start() comes first")
        await self.engines[0].wait_ready()
        await asyncio.shield(self._others)
        return await _all([engine.wait_ready() for engine in self.engines])

    async def wait_failed(self) -> None:
        """Returns never; raises supervisor.EngineGoneError when the last engine is gone for good. Not before all were started."""
        left = {asyncio.create_task(engine.wait_failed()) for engine in self.engines}
        try:
            while True:
                done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if not left and error is not None:
                        raise error
                    logger.error("%s; it is given up, the other engines go on", error)
        finally:
            for task in left:
                task.cancel()

    async def close(self) -> None:
        """Shut the engines down; what is in flight ends with EngineDead. A second call does nothing."""
        if self._others is not None:
            self._others.cancel()
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def kill(self) -> None:
        """End the engines at once."""
        for engine in self.engines:
            engine.kill()

    def submit(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """The deltas of all n samples, ending after each sample's final one. To be closed when left early: that aborts.

        Raises EngineDead when no engine is ready or the one that has it dies, ValueError for a request id that is in use.
        """
        return self._routed(request) if len(self.engines) > 1 else self.engines[0].submit(request)

    async def _routed(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        if request.request_id in self._where:
            raise ValueError(f"request id {request.request_id} is in use")
        placement = self.router.place(request)
        engine = self._where[request.request_id] = self.engines[placement.index]
        try:
            async with aclosing(engine.submit(request)) as deltas:
                async for delta in deltas:
                    placement.took(delta)
                    yield delta
        finally:
            del self._where[request.request_id]
            placement.end()

    def abort(self, request_id: str) -> None:
        """End a request now; its unfinished samples get a final delta "abort". Unknown ids are ignored."""
        engine = self._where.get(request_id) if len(self.engines) > 1 else self.engines[0]
        if engine is not None:
            engine.abort(request_id)


async def _all(coroutines: Sequence[Coroutine[Any, Any, EngineInfo]]) -> list[EngineInfo]:
    """Their results; raises what the first that fails raises, and ends the rest."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
