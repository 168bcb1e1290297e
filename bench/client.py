"""A streaming HTTP/1.1 client that costs next to nothing while the clock runs.

The client shares its cores with the server it measures, so a packet is only stamped and kept when it arrives; chunks,
events and JSON are taken apart after the measurement. One connection per request: no state of a pool enters a latency.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Packet = tuple[float, bytes]


@dataclass(slots=True)
class Exchange:
    """What came back for one request: the bytes with the time of their arrival, or why nothing did."""

    start: float
    packets: list[Packet] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible base URL such as http://127.0.0.1:8000/v1."""

    base_url: str
    api_key: str | None = None

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        url = urlsplit(self.base_url)
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"{method} {url.path.rstrip('/')}{path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nAccept: */*\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def send(self, message: bytes, start: float, limit: float) -> Exchange:
        """Send one request, keep everything until the server closes or the body ends. Never raises."""
        url = urlsplit(self.base_url)
        secure = url.scheme == "https"
        loop = asyncio.get_running_loop()
        recorder = _Recorder(loop.create_future())
        exchange = Exchange(start, recorder.packets)
        try:
            transport, _ = await asyncio.wait_for(
                loop.create_connection(
                    lambda: recorder,
                    url.hostname or "",
                    url.port or (443 if secure else 80),
                    ssl=ssl.create_default_context() if secure else None,
                ),
                limit,
            )
        except (OSError, TimeoutError) as error:
            exchange.error = f"no connection: {error}"
            return exchange
        try:
            transport.write(message)
            await asyncio.wait_for(recorder.done, limit)
        except (OSError, TimeoutError) as error:
            exchange.error = str(error) or f"no answer within {limit:g} s"
        finally:
            transport.close()
        return exchange

    async def get(self, path: str, limit: float = 10.0) -> Any:
        """The JSON document at `path`; raises ConnectionError when there is none."""
        exchange = await self.send(self.request("GET", path), time.monotonic(), limit)
        if exchange.error:
            raise ConnectionError(exchange.error)
        status, _, body = read_head(exchange.packets)
        if status != 200:
            raise ConnectionError(f"{path}: status {status}")
        return json.loads(b"".join(data for _, data in body))


class _Recorder(asyncio.Protocol):
    def __init__(self, done: asyncio.Future[None]) -> None:
        self.done = done
        self.packets: list[Packet] = []

    def data_received(self, data: bytes) -> None:
        self.packets.append((time.monotonic(), data))
        # The last chunk of a chunked body, for servers that keep the connection open all the same.
        if data.endswith(b"0\r\n\r\n") and (len(data) == 5 or data[-7:-5] == b"\r\n"):
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)


def read_head(packets: list[Packet]) -> tuple[int, dict[str, str], list[Packet]]:
    """Status, headers (lower-case names) and the packets of the body, its chunks taken apart.

    Raises ValueError when the bytes are no HTTP response.
    """
    data, read = b"", 0
    while b"\r\n\r\n" not in data:
        if read == len(packets):
            raise ValueError("the connection ended before the end of the headers")
        data += packets[read][1]
        read += 1
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split(" ", 2)[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    body = [(packets[read - 1][0], rest), *packets[read:]]
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = list(_dechunk(body))
    return status, headers, body


def _dechunk(packets: list[Packet]) -> Iterator[Packet]:
    buffer = b""
    for arrived, data in packets:
        buffer += data
        while True:
            size, separator, rest = buffer.partition(b"\r\n")
            if not separator:
                break
            length = int(size.split(b";")[0], 16)
            if length == 0:
                return
            if len(rest) < length + 2:
                break
            yield arrived, rest[:length]
            buffer = rest[length + 2 :]


def events(body: list[Packet]) -> Iterator[tuple[float, str]]:
    """Server-sent events: the `data` of each with the arrival of its last byte, `[DONE]` included; comments are left out."""
    buffer = b""
    for arrived, data in body:
        buffer = (buffer + data).replace(b"\r\n", b"\n")
        *complete, buffer = buffer.split(b"\n\n")
        for event in complete:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield arrived, b"\n".join(lines).decode()
