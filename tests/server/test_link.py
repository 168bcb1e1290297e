"""The sockets to one engine: order of connections."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import pytest
import zmq

from engine.messages import EngineStats, FromEngine, Ready, Shutdown, Stats
from server.link import Link
from tests.fakes import fake_info


async def test_ready_waits_for_the_way_back() -> None:
    """The engine's outbox may be connected before its inbox is; until then nothing can be sent to it."""
    got: list[FromEngine] = []
    arrived = asyncio.Event()

    def receive(message: FromEngine) -> None:
        got.append(message)
        arrived.set()

    ours = Link(receive)
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


async def test_nothing_is_handed_over_after_the_end() -> None:
    got: list[FromEngine] = []
    ours = Link(got.append)
    ours.close()
    ours._hand_over(Ready(fake_info()))  # one that was waiting
    assert got == []


async def test_a_link_that_cannot_be_made_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bind = Link._bind

    def only_push(link: Link, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        if kind == zmq.PULL:
            raise zmq.ZMQError(24)
        return bind(link, kind, endpoint)

    Link(print).close()  # what is opened once and for all is open now
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(Link, "_bind", only_push)
    with pytest.raises(zmq.ZMQError):
        Link(print)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.listdir(tmp_path) == []


FEW = """
import asyncio, os, resource
from server.link import Link

async def main():
    Link(print).close()
    opened = len(os.listdir("/proc/self/fd")) - 1
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + spare, hard))
        try:
            Link(print).close()
        except OSError as error:
            print(error.strerror)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

asyncio.run(main())
"""


def test_too_few_descriptors_are_an_error_and_not_the_end_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", FEW], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["Too many open files"] * 12
