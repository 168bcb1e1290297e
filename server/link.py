"""The two ZeroMQ sockets between the HTTP process and one engine process. Not the process: see supervisor.py."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from engine.messages import FromEngine, Ready, ToEngine

logger = logging.getLogger("outrider.link")

HIGH_WATER_MARK = 10_000  # messages
CONNECT_SECONDS = 0.001  # between two looks
MAX_PATH = 100  # bytes; the kernel's limit for a socket's path is 107
# Descriptors that must be free for a link and the process at its end: they take about 20. libzmq does not report it when it
# gets none for its threads or for a connection that it accepts: it ends the whole process.
SPARE_DESCRIPTORS = 32


def private_directory() -> Path:
    """A new directory that only this user can enter. Raises OSError when its path is too long for sockets."""
    path = Path(tempfile.mkdtemp(prefix="outrider-"))  # mode 0700
    if len(str(path).encode()) > MAX_PATH - len("/out"):
        path.rmdir()
        raise OSError(f"the directory for temporary files ({tempfile.gettempdir()}) has too long a path for sockets; set TMPDIR")
    return path


class Link:
    """Bound sockets, one pair for each life of the engine, so that no message of a dead engine meets a new one.

    They lie in a private directory of their own: one that somebody swept away, as cleaners of temporary files do, is missed
    by no later life. Messages are handed to `receive` from the event loop as they arrive; nothing waits in ZeroMQ's queues
    for long. Raises OSError or zmq.ZMQError when something cannot be had, and then leaves nothing open.
    """

    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        _need_descriptors(SPARE_DESCRIPTORS)
        self._receive = receive
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as opened:
            self.directory = private_directory()
            opened.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.inbox = f"ipc://{self.directory}/in"
            self.outbox = f"ipc://{self.directory}/out"
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            opened.callback(self._context.destroy, linger=0)
            self._push = self._bind(zmq.PUSH, self.inbox)
            self._pull = self._bind(zmq.PULL, self.outbox)
            fd = int(self._pull.getsockopt(zmq.FD))
            self._loop.add_reader(fd, self.drain)
            opened.callback(self._loop.remove_reader, fd)
            self._opened = opened.pop_all()
        self._open = True

    def _bind(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(HIGH_WATER_MARK)
        socket.bind(endpoint)
        return socket

    def send(self, message: ToEngine) -> bool:
        """False when the engine is not there or has stopped reading; never blocks."""
        try:
            self._push.send(self._encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def drain(self) -> None:
        """Hand over all that has arrived. ZeroMQ's descriptor signals edges: it must be read until nothing is left."""
        while self._open:
            try:
                raw = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decoder.decode(raw)
            except msgspec.DecodeError as error:
                logger.error("dropped a message of %d bytes from the engine: %s", len(raw), error)
                continue
            self._hand_over(message)

    def _hand_over(self, message: FromEngine) -> None:
        """Ready not before there is a way back: ZeroMQ makes the two connections in any order, and sends nothing without one."""
        if not self._open:
            return
        if isinstance(message, Ready) and not self._push.poll(0, zmq.POLLOUT):
            self._loop.call_later(CONNECT_SECONDS, self._hand_over, message)
        else:
            self._receive(message)

    async def drain_rest(self) -> None:
        """After the engine's end: what it sent last may still be on its way through ZeroMQ's own thread."""
        deadline = self._loop.time() + 1.0
        while self._open and self._loop.time() < deadline and self._pull.poll(20):
            self.drain()
            await asyncio.sleep(0)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._opened.close()


def _need_descriptors(count: int) -> None:
    """Raises OSError when so many cannot be opened now."""
    with contextlib.ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
