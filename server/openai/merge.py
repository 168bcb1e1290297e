"""The deltas of several engine requests as one stream, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from engine.messages import TokenDelta
from engine.request import Request

if TYPE_CHECKING:
    from server.fleet import Fleet

Item = tuple[int, TokenDelta]


async def merge(client: Fleet, requests: list[Request]) -> AsyncGenerator[Item]:
    """(position in `requests`, delta) until all have ended. Closing it aborts what still runs. Raises EngineDead."""
    if len(requests) == 1:
        deltas = client.submit(requests[0])
        try:
            async for delta in deltas:
                yield 0, delta
        finally:
            await deltas.aclose()
        return
    queue: asyncio.Queue[Item | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(client, position, request, queue)) for position, request in enumerate(requests)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(client: Fleet, position: int, request: Request, queue: asyncio.Queue[Item | BaseException | None]) -> None:
    deltas = client.submit(request)
    try:
        async for delta in deltas:
            queue.put_nowait((position, delta))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
    finally:
        await deltas.aclose()
