"""The engine's loop between two sockets: order, errors, statistics, rest. In-process, around a scripted engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from engine.config import EngineConfig, ProcessConfig
from engine.loop import Loop, serve
from engine.messages import Abort, Add, Deltas, EngineStats, Fatal, FromEngine, Ready, Shutdown, Stats, ToEngine, TokenDelta
from engine.process import set_threads
from engine.request import Request, SamplingParams
from tests import fake_engine
from tests.fake_engine import FakeEngine

DECODER = msgspec.msgpack.Decoder(FromEngine)


class Wire:
    """The front end's ends of the sockets."""

    def __init__(self, name: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.inbox, self.outbox = (f"ipc://{name}.{end}" for end in ("in", "out"))
        self.push = self.context.socket(zmq.PUSH)
        self.push.bind(self.inbox)
        self.pull = self.context.socket(zmq.PULL)
        self.pull.bind(self.outbox)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.push.send(msgspec.msgpack.encode(message))

    def receive(self) -> FromEngine:
        assert self.pull.poll(20_000), "the engine is silent"
        return DECODER.decode(self.pull.recv())

    def until(self, kind: type) -> list[Any]:
        """Messages up to and including the first of this kind."""
        got = [self.receive()]
        while not isinstance(got[-1], kind):
            got.append(self.receive())
        return got

    def deltas(self, finals: int) -> list[TokenDelta]:
        """Deltas until this many final ones have come."""
        got: list[TokenDelta] = []
        while sum(delta.finish_reason is not None for delta in got) < finals:
            message = self.receive()
            got += message.deltas if isinstance(message, Deltas) else []
        return got

    def config(self, model: str = "ok", parent: int | None = None) -> ProcessConfig:
        parent = os.getppid() if parent is None else parent
        return ProcessConfig(engine=EngineConfig(model=model), inbox=self.inbox, outbox=self.outbox, parent=parent)


@pytest.fixture
def wire(tmp_path: Any) -> Iterator[Wire]:
    wire = Wire(str(tmp_path / "s"))
    yield wire
    wire.context.destroy(linger=0)


class Running:
    """serve() in a thread: its sockets are its own, and its parent is this process's parent."""

    def __init__(self, wire: Wire, factory: Any = FakeEngine, **config: Any) -> None:
        self.code: int | None = None
        self.engine: Any = None

        def build(engine_config: EngineConfig) -> Any:
            self.engine = factory(engine_config)
            return self.engine

        def run() -> None:
            self.code = serve(wire.config(**config), build)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def join(self) -> int | None:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.code


@pytest.fixture
def running(wire: Wire) -> Iterator[Running]:
    running = Running(wire)
    assert isinstance(wire.receive(), Ready)
    yield running
    wire.send(Shutdown())
    assert running.join() == 0


def request(request_id: str, command: int = fake_engine.COUNT, max_tokens: int = 3, n: int = 1) -> Request:
    return Request(request_id=request_id, prompt_ids=[command], params=SamplingParams(max_tokens=max_tokens), n=n)


def test_ready_comes_first_with_the_engines_facts(wire: Wire) -> None:
    running = Running(wire)
    ready = wire.receive()
    assert isinstance(ready, Ready)
    assert ready.info == running.engine.info
    wire.send(Shutdown())
    assert running.join() == 0


def test_a_request_is_answered_to_its_end(wire: Wire, running: Running) -> None:
    wire.send(Add(request("r", n=2)))
    deltas = wire.deltas(2)
    assert [d.token_ids for d in deltas if d.index == 1] == [[0], [1], [2]]
    assert deltas[-1].usage is not None


def test_all_that_has_arrived_is_taken_before_a_step(wire: Wire) -> None:
    class Patient(FakeEngine):
        def has_work(self) -> bool:  # it starts when the last message is in
            return super().has_work() and self.aborts > 0

    running = Running(wire, Patient)
    wire.send(*(Add(request(f"r{i}")) for i in range(20)), Abort("r7"))
    assert {d.request_id for d in wire.deltas(19)} == {f"r{i}" for i in range(20) if i != 7}
    assert running.engine.steps == 3
    wire.send(Shutdown())
    assert running.join() == 0


def test_an_abort_ends_a_request_without_a_word(wire: Wire, running: Running) -> None:
    wire.send(Add(request("endless", fake_engine.ENDLESS)))
    wire.until(Deltas)
    wire.send(Abort("endless"), Abort("never heard of"))
    while True:
        stats = wire.until(Stats)[-1].stats
        if stats.preemptions == 2:
            break
    assert stats.running == 0
    wire.send(Add(request("next")))
    assert {d.request_id for d in wire.deltas(1)} == {"next"}


def test_undecodable_messages_are_dropped(wire: Wire, running: Running, caplog: pytest.LogCaptureFixture) -> None:
    for raw in (b"", b"\xc1", b"\x80", b"junk" * 100, msgspec.msgpack.encode({"type": "add", "request": {"prompt_ids": "x"}})):
        wire.push.send(raw)
    wire.push.send(msgspec.msgpack.encode({"type": "ready"}))
    wire.send(Add(request("r")))
    assert len(wire.deltas(1)) == 3
    assert sum("dropped a message" in record.message for record in caplog.records) == 6


def test_a_refused_request_gets_an_error_for_each_sample(wire: Wire, running: Running) -> None:
    wire.send(Add(request("r", fake_engine.REFUSE, n=3)), Add(request("s", fake_engine.CHOKE)), Add(request("t")))
    got = {(d.request_id, d.index): d for d in wire.deltas(5) if d.finish_reason}
    assert [got["r", i].error for i in range(3)] == ["prompt: is refused"] * 3
    assert got["s", 0].error == "the engine could not take this request"
    assert got["t", 0].finish_reason == "length"


def test_a_failed_step_tells_every_open_sample_then_ends(wire: Wire) -> None:
    running = Running(wire)
    wire.send(Add(request("done", max_tokens=1)))
    wire.deltas(1)
    wire.send(Add(request("bystander", fake_engine.ENDLESS, n=2)), Add(request("culprit", fake_engine.RAISE)))
    messages = wire.until(Fatal)
    errors = [d for m in messages if isinstance(m, Deltas) for d in m.deltas if d.finish_reason == "error"]
    assert sorted((d.request_id, d.index) for d in errors) == [("bystander", 0), ("bystander", 1), ("culprit", 0)]
    assert messages[-1].exit_code == 1
    assert "step failed" in messages[-1].message
    assert running.join() == 1


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (ValueError("model.gguf is\nnot whole"), 2, "model.gguf is not whole"),
        (FileNotFoundError(2, "No such file", "x.gguf"), 2, "[Errno 2] No such file: 'x.gguf'"),
        (KeyError("model.norm.weight"), 2, "missing 'model.norm.weight'"),
        (RuntimeError("out of memory"), 1, "the engine cannot start: RuntimeError: out of memory"),
    ],
)
def test_an_engine_that_cannot_be_built_says_why(wire: Wire, error: Exception, exit_code: int, message: str) -> None:
    def build(config: EngineConfig) -> Any:
        raise error

    running = Running(wire, build)
    assert wire.receive() == Fatal(message, exit_code)
    assert running.join() == exit_code


def test_it_rests_when_idle_but_sends_a_heartbeat(wire: Wire) -> None:
    """Counted in turns of the loop: an idle loop turns once per heartbeat, not as fast as it can."""
    engine = FakeEngine(EngineConfig(model="ok"))
    turns = 0

    class Counting(Loop):
        def drain_inbox(self) -> None:
            nonlocal turns
            turns += 1
            super().drain_inbox()

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(wire.inbox)
    outbox.connect(wire.outbox)
    loop = Counting(engine, inbox, outbox, os.getppid())  # type: ignore[arg-type]  # all the loop asks of an engine
    thread = threading.Thread(target=loop.run)
    thread.start()
    for _ in range(3):
        assert isinstance(wire.receive(), Stats)
    wire.send(Shutdown())
    thread.join(20)
    assert not thread.is_alive()
    assert turns <= 8
    context.destroy(linger=0)


def test_it_studies_while_nobody_is_served(wire: Wire) -> None:
    """Piece by piece until there is nothing left, and not while a message waits or a request runs."""
    seen: list[tuple[bool, int]] = []

    class Studious(FakeEngine):
        left = 40

        def study(self) -> bool:
            seen.append((self.has_work(), self.left))
            if self.left == 20:  # in the middle of it
                wire.send(Add(request("r", max_tokens=5)))
            self.left -= bool(self.left)
            return self.left > 0

    running = Running(wire, Studious)
    assert wire.deltas(finals=1)[-1].finish_reason
    wire.send(Shutdown())
    running.join()
    assert not any(busy for busy, _ in seen)
    assert [left for _, left in seen][:20] == list(range(40, 20, -1))


def test_statistics_follow_news_at_once_but_not_every_step(wire: Wire, running: Running) -> None:
    wire.send(Add(request("r", max_tokens=2000)))
    counts = {Deltas: 0, Stats: 0}
    while True:
        message = wire.receive()
        counts[type(message)] += 1
        if isinstance(message, Stats) and message.stats.steps == 2000:
            break
    assert message.stats.running == 0
    assert counts[Deltas] == 2000
    assert counts[Stats] < 200


def test_it_leaves_when_its_parent_is_another(wire: Wire) -> None:
    running = Running(wire, parent=1 if os.getppid() != 1 else 2)
    assert running.join() == 0


def test_a_front_end_that_does_not_read_loses_nothing(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a few messages only the engine waits; every delta arrives once the front end reads again."""
    monkeypatch.setattr("engine.process.HIGH_WATER_MARK", 2)
    wire.pull.close()
    wire.pull = wire.context.socket(zmq.PULL)
    wire.pull.set_hwm(2)
    wire.pull.bind(wire.outbox)
    running = Running(wire)
    wire.send(Add(request("r", max_tokens=5000)))
    tokens = [token for delta in wire.deltas(1) for token in delta.token_ids]
    assert tokens == list(range(5000))
    wire.send(Shutdown())
    while running.thread.is_alive():
        if wire.pull.poll(100):
            wire.pull.recv()
    assert running.join() == 0


def test_threads_are_set_before_torch_would_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    set_threads(None)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["MKL_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    set_threads(3)
    assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "3"


def test_stats_keep_their_types_on_the_wire() -> None:
    stats = EngineStats(steps=3, draft_nodes=[1, 2], draft_tokens_by_drafter={"ngram": 4}, seconds_step=0.5)
    assert DECODER.decode(msgspec.msgpack.encode(Stats(stats))) == Stats(stats)
