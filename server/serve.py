"""`outrider serve` from start to end: engine, tokenizer and HTTP side by side; then signals, draining, the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import uvloop

from engine.messages import EngineInfo
from server.config import ServerConfig
from server.fleet import Fleet
from server.resolve import ResolvedModel
from server.supervisor import EngineGoneError

if TYPE_CHECKING:
    from server.frontend import Frontend
    from server.http import HttpServer

logger = logging.getLogger("outrider.serve")

DRAIN_LOOK_SECONDS = 0.05


def run(config: ServerConfig, model: ResolvedModel, announce: Callable[[str], None]) -> int:
    """Serve until a signal or the engine's final failure; returns the exit code. `announce` gets the ready line.

    Raises OSError when the address cannot be had and ValueError when the tokenizer cannot be used.
    """
    from server.http import bind

    sock = bind(config.host, config.port)  # first of all: a port in use should not cost a model's loading time
    with sock:
        return uvloop.run(Server(config, model, announce).serve(sock))


class Server:
    def __init__(self, config: ServerConfig, model: ResolvedModel, announce: Callable[[str], None]) -> None:
        self.config = config.model_copy(update={"served_model_name": config.served_model_name or model.name})
        self.model = model
        self.announce = announce
        self.client = Fleet.of(
            config.engine_config(model.path),
            config.data_parallel_size,
            watchdog_timeout=config.watchdog_timeout,
            log_level=config.log_level,
        )
        self.signalled = asyncio.Event()

    async def serve(self, sock: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # ignored: nohup wants it so
                loop.add_signal_handler(number, self._on_signal)
        try:
            await self.client.start()  # loads the model while we import the app and read the tokenizer
            return await self._serve(sock)
        except EngineGoneError as error:
            sys.stderr.write(f"outrider: error: {error}\n")
            return error.exit_code
        finally:
            await self.client.close()

    async def _serve(self, sock: socket.socket) -> int:
        http, front = await self._build_app()
        serving = asyncio.create_task(http.serve(sockets=[sock]))
        stop = asyncio.create_task(self.signalled.wait())
        try:
            await _first(self._come_up(sock, front), stop, serving)
            await _first(self.client.wait_failed(), stop, serving)
            if stop.done():
                await self._drain(front)
        finally:
            stop.cancel()
            await self.client.close()  # what is still in flight gets its error now
            http.should_exit = True
            await serving
        return 0

    async def _build_app(self) -> tuple[HttpServer, Frontend]:
        from server.http import HttpServer
        from server.tokenizer import Tokenizer

        tokenizer = asyncio.create_task(asyncio.to_thread(Tokenizer.load, self.model.path))
        from server.app import create_app

        app = create_app(self.config, self.client, await tokenizer)
        if self.config.datastore is not None:
            from server.datastore import check

            await asyncio.to_thread(check, self.config.datastore, tokenizer.result())
        _return_memory()
        return HttpServer(app), app.state.frontend

    async def _come_up(self, sock: socket.socket, front: Frontend) -> None:
        from server.http import url

        infos = await self.client.wait_ready()
        compare_vocabularies(front.tokenizer.vocab_size, infos[0])
        self.announce(ready_line(url(sock), self.config.served_model_name or "", *infos))

    def _on_signal(self) -> None:
        if self.signalled.is_set():
            self.client.kill()
            os._exit(1)
        self.signalled.set()

    async def _drain(self, front: Frontend) -> None:
        """Let what was accepted finish; everything new gets 503."""
        front.admission.drain()
        if front.admission.in_flight:
            logger.info("draining %d requests for up to %g s", front.admission.in_flight, self.config.shutdown_timeout)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.shutdown_timeout):
                while front.admission.in_flight:  # noqa: ASYNC110  # a count; watched only here, once in a life
                    await asyncio.sleep(DRAIN_LOOK_SECONDS)
        if front.admission.in_flight:
            logger.warning("%d requests did not finish in time", front.admission.in_flight)


def _return_memory() -> None:
    """What the tokenizer's files took while they were read goes back to the system (10 MB; glibc only)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def _first(coroutine: Coroutine[Any, Any, None], *others: asyncio.Task[Any]) -> None:
    """Wait for the coroutine or one of the tasks; raises what the coroutine, or a task that failed, raised."""
    task = asyncio.create_task(coroutine)
    try:
        done, _ = await asyncio.wait([task, *others], return_when=asyncio.FIRST_COMPLETED)
        for finished in done:
            finished.result()
    finally:
        task.cancel()


def compare_vocabularies(tokens: int, info: EngineInfo) -> None:
    """Tell the operator now what clients would find out one by one. The other way round is usual: matrices are padded."""
    more = tokens - info.vocab_size
    if more > 0:
        what = "a token" if more == 1 else f"{more} tokens"
        told = "the tokenizer knows %s that the model lacks (from id %d on): a prompt that holds one is refused"
        logger.warning(told, what, info.vocab_size)


def ready_line(address: str, name: str, *infos: EngineInfo) -> str:
    """`infos`: one per engine."""
    info = infos[0]
    most = {"fixed": info.budget, "off": 0}.get(info.policy, info.max_budget)
    policy = f"{info.policy}({most})" if most else info.policy
    lossy = "" if info.lossless else " (LOSSY: answers may differ from the model's own)"
    weights = f" weights=({info.quantization})" if info.quantization else ""
    seconds = max(info.load_seconds for info in infos)
    return (
        f"outrider is ready: {address} model={name} device={info.device} dtype={info.dtype}{weights} "
        f"drafters={','.join(info.drafters)} verifier={info.verifier}{lossy} policy={policy} "
        f"{_memory(infos)}, loaded in {seconds:.1f} s"
    )


def _memory(infos: Sequence[EngineInfo]) -> str:
    """What each engine plans for itself; GPUs may differ."""
    plans = [
        f"weights {info.weight_bytes / 1e6:,.0f} MB, KV {info.kv_bytes / 1e6:,.0f} MB = {info.num_blocks:,} blocks "
        f"= {info.num_blocks * info.block_size:,} tokens, context {info.max_model_len:,}"
        for info in infos
    ]
    if len(plans) == 1:
        return f"memory: {plans[0]}"
    if len(set(plans)) == 1:
        return f"engines={len(plans)} memory of each: {plans[0]}"
    return f"engines={len(plans)} memory: " + "; ".join(f"engine {i}: {plan}" for i, plan in enumerate(plans))
