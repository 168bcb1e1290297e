"""The two ZeroMQ sockets between the HTTP process and one engine process. Not the process: see supervisor.py."""

from __future__ import annotations

import asyncio
import logging
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


def private_directory() -> Path:
    """A new directory that only this user can enter. Raises OSError when its path is too long for sockets."""
    path = Path(tempfile.mkdtemp(prefix="outrider-"))  # mode 0700
    if len(str(path).encode()) > MAX_PATH - len("/000000.out"):
        path.rmdir()
        raise OSError(f"the directory for temporary files ({tempfile.gettempdir()}) has too long a path for sockets; set TMPDIR")
    return path


class Link:
    """Bound sockets, one pair for each life of the engine, so that no message of a dead engine meets a new one.

    Messages are handed to `receive` from the event loop as they arrive; nothing waits in ZeroMQ's queues for long.
    """

    def __init__(self, directory: Path, life: int, receive: Callable[[FromEngine], None]) -> None:
        self.inbox = f"ipc://{directory}/{life}.in"
        self.outbox = f"ipc://{directory}/{life}.out"
        self._receive = receive
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._push = self._bind(zmq.PUSH, self.inbox)
        self._pull = self._bind(zmq.PULL, self.outbox)
        self._loop = asyncio.get_running_loop()
        self._fd = int(self._pull.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)
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
            self._loop.remove_reader(self._fd)
            self._context.destroy(linger=0)


def remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
