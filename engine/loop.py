"""The engine process: `python -m engine.loop`. Messages in, steps, messages out. It decides nothing about tokens."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import zmq

from engine.config import EngineConfig, ProcessConfig
from engine.messages import Abort, Add, Deltas, Fatal, FromEngine, Ready, Shutdown, Stats, ToEngine, TokenDelta
from engine.process import cannot_start, connect, read_config, set_threads, settle
from engine.protocols import ExecutorLostError
from engine.request import Request

if TYPE_CHECKING:
    from engine.engine import Engine

logger = logging.getLogger("outrider.engine.loop")

BUSY_STATS_SECONDS = 0.1  # least time between two Stats
IDLE_STATS_SECONDS = 1.0  # most time between two Stats


class Loop:
    """One engine between its two sockets. `live` knows which samples of which request still await their final delta."""

    def __init__(self, engine: Engine, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes], parent: int) -> None:
        self.engine = engine
        self.inbox = inbox
        self.outbox = outbox
        self.parent = parent
        self.decoder = msgspec.msgpack.Decoder(ToEngine)
        self.live: dict[str, set[int]] = {}
        self.running = True
        self.stats_soon = 0.0  # when the next Stats may go out, if there is news
        self.stats_due = 0.0  # when it must

    def run(self) -> int:
        """Serve until Shutdown or the parent's end. Returns the exit code."""
        try:
            while self.running and os.getppid() == self.parent:
                self.drain_inbox()
                self.engine.check()
                if self.engine.has_work():
                    self.send_deltas(self.engine.step())
                    self.stats_due = min(self.stats_due, self.stats_soon)
                self.send_stats()
        except ExecutorLostError as error:  # requests end with this process, as if it had been killed
            logger.error("the engine cannot go on", exc_info=error)
            self.send(Fatal(f"the engine cannot go on: {error}"))
            return 1
        except Exception as error:
            logger.exception("the engine failed")
            for request_id in list(self.live):
                self.fail(request_id, "the engine failed while it worked on this request")
            self.send(Fatal(f"the engine failed: {type(error).__name__}: {error}"))
            return 1
        return 0

    def drain_inbox(self) -> None:
        """Handle all that has arrived; with nothing else to do, study, or wait for it until the next Stats is due."""
        if not self.engine.has_work() and not (self.inbox.poll(0) or self.engine.study()):
            self.inbox.poll(int(1000 * max(self.stats_due - time.monotonic(), 0)) + 1)
        while self.running:
            try:
                raw = self.inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self.handle(self.decoder.decode(raw))
            except msgspec.DecodeError as error:  # a ValidationError is one
                logger.error("dropped a message of %d bytes: %s", len(raw), error)

    def handle(self, message: ToEngine) -> None:
        match message:
            case Add():
                self.add(message.request)
            case Abort():
                self.live.pop(message.request_id, None)
                self.engine.abort(message.request_id)
            case Shutdown():
                self.running = False
        self.stats_due = min(self.stats_due, self.stats_soon)

    def add(self, request: Request) -> None:
        """A request the engine refuses, or chokes on, ends with an error and hurts nobody else."""
        self.live[request.request_id] = set(range(request.n))
        try:
            self.engine.add(request)
        except ValueError as error:
            self.fail(request.request_id, str(error))
        except Exception:
            logger.exception("request %s could not be added", request.request_id)
            self.engine.abort(request.request_id)
            self.fail(request.request_id, "the engine could not take this request")

    def fail(self, request_id: str, why: str) -> None:
        indices = sorted(self.live.get(request_id, ()))
        self.send_deltas([TokenDelta(request_id=request_id, index=i, finish_reason="error", error=why) for i in indices])

    def send_deltas(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            if delta.finish_reason is not None and (left := self.live.get(delta.request_id)) is not None:
                left.discard(delta.index)
                if not left:
                    del self.live[delta.request_id]
        if deltas:
            self.send(Deltas(deltas))

    def send_stats(self) -> None:
        now = time.monotonic()
        if now >= self.stats_due:
            self.send(Stats(self.engine.stats()))
            self.stats_soon, self.stats_due = now + BUSY_STATS_SECONDS, now + IDLE_STATS_SECONDS

    def send(self, message: FromEngine) -> None:
        raw = msgspec.msgpack.encode(message)
        while os.getppid() == self.parent:  # a frozen front end makes us wait; a dead one does not
            if self.outbox.poll(1000, zmq.POLLOUT):
                self.outbox.send(raw, zmq.NOBLOCK)
                return


def serve(config: ProcessConfig, factory: Callable[[EngineConfig], Engine]) -> int:
    """Build the engine, say Ready (or Fatal), run. Returns the exit code."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, outbox = connect(context, zmq.PULL, config.inbox), connect(context, zmq.PUSH, config.outbox)
    try:
        try:
            engine = factory(config.engine)
        except Exception as error:
            fatal = cannot_start(error)
            outbox.send(msgspec.msgpack.encode(fatal), zmq.NOBLOCK)
            return fatal.exit_code
        loop = Loop(engine, inbox, outbox, config.parent)
        loop.send(Ready(engine.info))
        code = loop.run()
        engine.close()
        return code
    finally:
        context.destroy(linger=2000)


def main(factory: Callable[[EngineConfig], Engine] | None = None) -> int:
    config = read_config()
    settle(config)
    set_threads(config.engine.num_threads, config.engine.tensor_parallel_size)
    if factory is not None:
        return serve(config, factory)
    from engine.engine import Engine  # imports torch: after set_threads

    return serve(config, Engine)


if __name__ == "__main__":
    sys.exit(main())
