"""The sockets to one engine: order of connections."""

from __future__ import annotations

import asyncio

import msgspec
import zmq

from engine.messages import EngineStats, FromEngine, Ready, Shutdown, Stats
from server import link
from server.link import Link
from tests.fakes import fake_info


async def test_ready_waits_for_the_way_back() -> None:
    """The engine's outbox may be connected before its inbox is; until then nothing can be sent to it."""
    got: list[FromEngine] = []
    arrived = asyncio.Event()

    def receive(message: FromEngine) -> None:
        got.append(message)
        arrived.set()

    directory = link.private_directory()
    ours = Link(directory, 0, receive)
    theirs: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        outbox, inbox = theirs.socket(zmq.PUSH), theirs.socket(zmq.PULL)
        outbox.connect(ours.outbox)
        for message in (Ready(fake_info()), Stats(EngineStats())):
            outbox.send(msgspec.msgpack.encode(message))
        await asyncio.wait_for(arrived.wait(), 10)
        assert [type(message) for message in got] == [Stats]
        assert not ours.send(Shutdown())
        arrived.clear()
        inbox.connect(ours.inbox)
        await asyncio.wait_for(arrived.wait(), 10)
        assert [type(message) for message in got] == [Stats, Ready]
        assert ours.send(Shutdown())
        assert await asyncio.to_thread(inbox.poll, 10_000)
    finally:
        ours.close()
        theirs.destroy(linger=0)
        link.remove(directory)


async def test_nothing_is_handed_over_after_the_end() -> None:
    got: list[FromEngine] = []
    directory = link.private_directory()
    ours = Link(directory, 0, got.append)
    ours.close()
    ours._hand_over(Ready(fake_info()))  # one that was waiting
    link.remove(directory)
    assert got == []
