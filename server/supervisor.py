"""Keeps one engine process alive: starts it, watches it, starts it again. It knows nothing about requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import zmq

from engine.config import EngineConfig, ProcessConfig
from engine.messages import Fatal, FromEngine, Ready, Shutdown, ToEngine
from server.link import Link

logger = logging.getLogger("outrider.supervisor")

# -P: the current directory, which may hold an `engine` of its own, does not come first on the module path.
COMMAND = (sys.executable, "-P", "-m", "engine.loop")
ROOT = Path(__file__).resolve().parent.parent  # where our packages lie
# glibc reads this before main(), so only a parent can set it: weights, which are streamed through once per step, in huge pages.
# One stream on a CPU: steps 3-4 % shorter (medians of three runs each, in turn).
MALLOC = "glibc.malloc.hugetlb=1"
STDERR = 2  # file descriptor: standard output is the server's one line
TICK = 1.0  # seconds between two looks of the watchdog
STOP_SECONDS = 5.0  # for a Shutdown to be obeyed
SHORT_LIFE = 60.0  # seconds; an engine that dies younger is started again with a growing delay
MAX_DELAY = 30.0  # seconds
MAX_FAILED_STARTS = 5  # in a row
START_FACTOR = 3.0  # a restart may take so many times as long as the longest start that came to its end


class EngineGoneError(Exception):
    """The engine is gone for good. `exit_code` is the server's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Supervisor:
    """`receive` gets every message; `lost` is told why when an engine that may hold requests is gone.

    A crash before the first Ready is final, since the same start would only fail again; so are MAX_FAILED_STARTS in a
    row later, unless `gives_up` says no. `failed` then holds an EngineGoneError. A start that this process cannot even
    make (no memory, no descriptor, no such command) is a start that failed like any other.
    """

    def __init__(
        self,
        config: EngineConfig,
        receive: Callable[[FromEngine], None],
        lost: Callable[[str], None],
        *,
        watchdog_timeout: float = 120.0,
        log_level: str = "info",
        command: Sequence[str] = COMMAND,
        environment: Mapping[str, str] | None = None,
        number: int | None = None,
        gives_up: Callable[[], bool] = lambda: True,
    ) -> None:
        """`environment` is added to ours. `number`: which of several engines this is, for the messages."""
        self.config = config
        self.environment = dict(environment or {})
        self.number = number
        self.gives_up = gives_up
        self.log_level = log_level
        self.command = command
        self.watchdog_timeout = watchdog_timeout
        self.restarts = 0
        self.pid: int | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda future: future.cancelled() or future.exception())  # may go unawaited
        self._receive = receive
        self._lost = lost
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._fatal: Fatal | None = None
        self._ready = False
        self._silence = 0.0
        self._failed_starts = 0  # in a row
        self._longest_start: float | None = None  # seconds, of those that ended with Ready
        self._stopping = False
        self._task = asyncio.create_task(self._run())

    def send(self, message: ToEngine) -> bool:
        """False when there is no engine that takes it."""
        return self._link is not None and self._link.send(message)

    async def stop(self) -> None:
        """Shut the engine down, by force if it does not obey, and leave nothing behind. May be called twice."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            obeys = self._ready and self.send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS if obeys else 0)
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._process is not None:
            await self._process.wait()

    def kill(self) -> None:
        """End the engine at once and leave nothing behind; for a server that must go now."""
        self._stopping = True
        self._end_life()

    async def _run(self) -> None:
        """Whatever nobody thought of ends in `failed` too: a server that waits for nothing would look alive for ever."""
        try:
            await self._lives()
        except Exception as error:
            logger.exception("the supervisor of the engine failed")
            why = self._named(f"the supervisor of the engine failed ({type(error).__name__}: {error})")
            self.failed.set_exception(EngineGoneError(why, 1))
            self._lost(why)

    async def _lives(self) -> None:
        """One turn per life of the engine."""
        short_lives = 0
        while True:
            born = asyncio.get_running_loop().time()
            why = self._named(await self._live())
            was_ready = self._longest_start is not None
            self._failed_starts = 0 if self._ready else self._failed_starts + 1
            self._lost(why)
            if self._stopping:
                return
            if not was_ready or (self._failed_starts >= MAX_FAILED_STARTS and self.gives_up()):
                exit_code = self._fatal.exit_code if self._fatal and not was_ready else 1
                self.failed.set_exception(EngineGoneError(why, exit_code))
                return
            young = asyncio.get_running_loop().time() - born < SHORT_LIFE
            short_lives = short_lives + 1 if young else 0
            delay = restart_delay(short_lives)
            logger.error("%s; starting it again in %.0f s", why, delay)
            await asyncio.sleep(delay)
            self.restarts += 1

    async def _live(self) -> str:
        """Start an engine, see it to its end, and say why it ended."""
        self._fatal, self._ready, self._silence = None, False, 0.0
        try:
            code = await self._start_and_wait()
        except Exception as error:  # of this machine, which may have what is missing a moment later, or of the event loop
            self._fatal = self._fatal or self._not_started(error)
            if self._process is not None:
                await self._process.wait()  # killed, if it came so far: never two engines at a time
        return self._fatal.message if self._fatal else f"the engine process ended unexpectedly ({_describe(code)})"

    async def _start_and_wait(self) -> int:
        """The exit code of a new engine."""
        self._link = link = Link(self._on_message)
        try:
            process = await self._start(link)
            watchdog = asyncio.create_task(self._watch(process))
            try:
                code = await process.wait()
            finally:
                watchdog.cancel()
            await link.drain_rest()
        finally:
            self._end_life()
        return code

    async def _start(self, link: Link) -> asyncio.subprocess.Process:
        config = ProcessConfig(
            engine=self.config,
            inbox=link.inbox,
            outbox=link.outbox,
            parent=os.getpid(),
            log_level=self.log_level,  # type: ignore[arg-type]  # checked by ServerConfig
        )
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {"GLIBC_TUNABLES": MALLOC} | os.environ | {"PYTHONPATH": path} | self.environment
        process = await asyncio.create_subprocess_exec(*self.command, stdin=asyncio.subprocess.PIPE, stdout=STDERR, env=env)
        self._process, self.pid = process, process.pid  # from here on it is ended with this life
        assert process.stdin is not None
        process.stdin.write(msgspec.msgpack.encode(config))
        with contextlib.suppress(ConnectionError):  # it died already: its exit code says more
            await process.stdin.drain()
        process.stdin.close()
        return process

    def _not_started(self, error: Exception) -> Fatal:
        """What the system refuses is the operator's to mend (exit code 2, no traceback); anything else is ours."""
        refused = isinstance(error, OSError | zmq.ZMQError)
        what = "could not be seen to its end" if self._ready else "could not be started"
        if not refused:
            logger.error("the engine %s", what, exc_info=error)
        return Fatal(f"the engine {what} ({type(error).__name__}: {error})", exit_code=2 if refused else 1)

    def _named(self, why: str) -> str:
        return why if self.number is None else f"engine {self.number}: {why}"

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """Kill an engine that gives no sign of life for too long: it computes for ever, or hangs.

        Silence is counted in our own ticks, so that a machine that slept, or a stopped process group, is no silence.
        """
        while True:
            await asyncio.sleep(TICK)
            self._silence += TICK
            limit = self._patience()
            if self._silence > limit:
                starting = not self._ready and not self._fatal
                why = f"the engine {'was not ready after' if starting else 'gave no sign of life for'} {limit:g} s"
                self._fatal = self._fatal or Fatal(why)  # one that said why it ends, and then did not end, has said more
                logger.error("%s; its stacks follow, then it is killed", why)
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGUSR1)
                    await asyncio.sleep(TICK)
                    process.kill()
                return

    def _patience(self) -> float:
        """Seconds of silence that the engine may have now: an engine says nothing while it starts."""
        if self._ready or self._fatal:
            return self.watchdog_timeout
        if self._longest_start is None:  # nobody knows how long this model loads and is measured; the operator looks on
            return math.inf
        return start_limit(self.watchdog_timeout, self._longest_start, self._failed_starts)

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self._ready = True
            self._longest_start = max(self._longest_start or 0.0, self._silence + TICK)  # a tick that has begun counts
        elif isinstance(message, Fatal):
            self._fatal = message
        self._silence = 0.0
        self._receive(message)

    def _end_life(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        if self._link is not None:
            self._link.close()
            self._link = None


def start_limit(watchdog_timeout: float, longest_start: float, failed_starts: int) -> float:
    """Seconds that a restart may take.

    Most are shorter than the first start, which compiled and measured what they find on the disk. Some are longer: the
    weights have left the page cache (an engine that died of too little memory), other engines compute or load beside it. An
    end that comes too early costs more than one that comes late, so each failed start doubles the limit for the next: one
    that is only slow gets there, and one that hangs is still given up.
    """
    return max(watchdog_timeout, START_FACTOR * longest_start) * 2.0 ** min(failed_starts, MAX_FAILED_STARTS)


def restart_delay(short_lives: int) -> float:
    """Seconds to wait after so many short lives in a row."""
    doublings = min(short_lives - 2, 30)  # an engine may fail for days while others serve, and floats end at 2 ** 1023
    return min(2.0**doublings, MAX_DELAY) if short_lives > 1 else 0.0


def _describe(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
