"""Several live engine processes (the real loop, a fake engine) behind one Fleet."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from engine.config import EngineConfig
from engine.messages import TokenDelta
from engine.request import Request, SamplingParams
from server.client import EngineClient, EngineDead
from server.fleet import Fleet
from server.router import Router
from server.supervisor import MAX_FAILED_STARTS, EngineGoneError
from tests import fake_engine
from tests.fakes import fake_info


def request(request_id: str, command: int = fake_engine.COUNT, max_tokens: int = 3, n: int = 1) -> Request:
    return Request(request_id=request_id, prompt_ids=[command], params=SamplingParams(max_tokens=max_tokens), n=n)


@asynccontextmanager
async def running(*models: str, profile: bool = False) -> AsyncIterator[Fleet]:
    configs = [EngineConfig(model=model, profile=profile) for model in models or ("ok", "ok")]
    engines = [EngineClient(config, command=fake_engine.COMMAND, number=i) for i, config in enumerate(configs)]
    fleet = Fleet(engines, Router(engines, 16), one_first=profile)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


async def collect(fleet: Fleet, wanted: Request) -> list[TokenDelta]:
    return [delta async for delta in fleet.submit(wanted)]


async def until(engine: EngineClient, true: Callable[[], bool]) -> None:
    """Looked at with each message of the engine; it sends one every second at least."""
    found = asyncio.Event()
    engine.on_stats = lambda _: found.set() if true() else None
    async with asyncio.timeout(20):
        while not true():
            await found.wait()


async def endless(
    fleet: Fleet, count: int
) -> tuple[list[asyncio.Task[list[TokenDelta]]], list[list[asyncio.Task[list[TokenDelta]]]]]:
    """So many answers without an end, all of them begun; and the same by engine."""
    tasks = [asyncio.create_task(collect(fleet, request(f"r{i}", fake_engine.ENDLESS))) for i in range(count)]
    for engine in fleet.engines:
        share = count // len(fleet.engines)
        await until(engine, lambda engine=engine, share=share: engine.stats.running == share)  # type: ignore[misc]
    where = [fleet._where[f"r{i}"] for i in range(count)]
    return tasks, [[task for task, at in zip(tasks, where, strict=True) if at is engine] for engine in fleet.engines]


async def test_all_are_used_and_every_answer_is_whole() -> None:
    async with running() as fleet:
        infos = await fleet.wait_ready()
        assert len(infos) == 2
        wanted = [request(f"r{i}", max_tokens=1 + i % 7, n=1 + i % 2) for i in range(60)]
        for asked, deltas in zip(wanted, await asyncio.gather(*(collect(fleet, r) for r in wanted)), strict=True):
            assert {delta.request_id for delta in deltas} == {asked.request_id}
            assert sum(len(delta.token_ids) for delta in deltas) == asked.params.max_tokens * asked.n
        assert [route.requests for route in fleet.router.routes] == pytest.approx([30, 30], abs=5)
        assert [(route.owed, route.in_flight) for route in fleet.router.routes] == [(0, 0), (0, 0)]
        assert fleet.num_inflight == 0


async def test_a_killed_engine_costs_its_own_requests_only_and_comes_back() -> None:
    async with running() as fleet:
        await fleet.wait_ready()
        _, (its, others) = await endless(fleet, 8)
        assert len(its) == len(others) == 4
        dying, staying = fleet.engines
        first = dying.pid
        os.kill(first, signal.SIGKILL)
        for outcome in await asyncio.wait_for(asyncio.gather(*its, return_exceptions=True), 10):
            assert isinstance(outcome, EngineDead)
            assert "engine 0: " in str(outcome) and "SIGKILL" in str(outcome)
        assert fleet.ready
        assert fleet.live
        during = [asyncio.create_task(collect(fleet, request(f"d{i}"))) for i in range(3)]
        assert [len(deltas) for deltas in await asyncio.gather(*during)] == [3, 3, 3]
        await until(dying, lambda: dying.ready and dying.pid != first)
        assert not [task for task in others if task.done()]
        assert (dying.restarts, staying.restarts) == (1, 0)
        before = fleet.router.routes[0].requests
        await collect(fleet, request("again"))  # the other one has work, this one has none
        assert fleet.router.routes[0].requests == before + 1
        for i in range(8):
            fleet.abort(f"r{i}")
        for deltas in await asyncio.gather(*others):
            assert deltas[-1].finish_reason == "abort"


async def test_ready_with_the_first_engine_that_is() -> None:
    async with running("ok", "ok", profile=True) as fleet:
        assert not fleet.engines[1].live  # it is started when the first has measured what steps cost
        assert fleet.live
        assert not fleet.ready
        with pytest.raises(EngineDead, match="starting"):
            await collect(fleet, request("early"))
        await fleet.engines[0].wait_ready()
        assert fleet.ready
        assert len(await collect(fleet, request("r"))) == 3
        await fleet.wait_ready()
        assert [engine.ready for engine in fleet.engines] == [True, True]


@pytest.mark.parametrize("models", [("bad", "ok"), ("ok", "bad")])
@pytest.mark.parametrize("profile", [True, False])
async def test_an_engine_that_cannot_start_is_final(models: tuple[str, str], profile: bool) -> None:
    async with running(*models, profile=profile) as fleet:
        with pytest.raises(EngineGoneError, match=f"engine {models.index('bad')}: the model file is truncated") as caught:
            await fleet.wait_ready()
        assert caught.value.exit_code == 2


async def test_an_engine_is_not_given_up_while_another_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.MAX_DELAY", 0.01)
    started = tmp_path / "started"
    async with running("ok", f"once:{started}") as fleet:
        await fleet.wait_ready()
        failing = asyncio.create_task(fleet.wait_failed())
        other = fleet.engines[1]
        os.kill(other.pid, signal.SIGKILL)
        await until(fleet.engines[0], lambda: other.restarts > MAX_FAILED_STARTS)
        assert fleet.live and fleet.ready
        assert other.live and not other.ready
        assert [len(await collect(fleet, request(f"r{i}"))) for i in range(4)] == [3] * 4
        started.unlink()  # what kept it from starting is gone
        await until(other, lambda: other.ready)
        assert not failing.done()
        failing.cancel()


async def test_the_last_engine_given_up_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.MAX_DELAY", 0.01)
    async with running(f"once:{tmp_path / 'a'}", f"once:{tmp_path / 'b'}") as fleet:
        await fleet.wait_ready()
        for engine in fleet.engines:
            os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineGoneError, match="SIGKILL"):
            await asyncio.wait_for(fleet.wait_failed(), 20)
        assert not fleet.live


async def test_abort_and_leaving_reach_the_engine_that_has_the_request() -> None:
    async with running() as fleet:
        await fleet.wait_ready()
        tasks, _ = await endless(fleet, 4)
        with pytest.raises(ValueError, match="in use"):
            await collect(fleet, request("r3"))
        fleet.abort("r0")
        fleet.abort("nobody")
        assert (await tasks[0])[-1].finish_reason == "abort"
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks)
        for engine in fleet.engines:
            await until(engine, lambda engine=engine: engine.stats.running == 0 and engine.stats.preemptions == 2)  # type: ignore[misc]
        async with aclosing(fleet.submit(request("r0", fake_engine.ENDLESS))) as deltas:
            await anext(deltas)
        assert sum(route.in_flight for route in fleet.router.routes) == 0


async def test_closing_leaves_no_process() -> None:
    async with running() as fleet:
        await fleet.wait_ready()
        tasks, _ = await endless(fleet, 2)
        pids = [engine.pid for engine in fleet.engines]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, EngineDead)
    await fleet.close()


async def test_closing_before_all_have_started() -> None:
    async with running("ok", "ok", profile=True) as fleet:
        pass
    assert fleet.engines[1].pid is None
    assert not fleet.ready


async def test_one_engine_is_not_routed() -> None:
    fleet = Fleet.of(EngineConfig(model="ok"), 1, command=fake_engine.COMMAND)
    await fleet.start()
    try:
        [info] = await fleet.wait_ready()
        assert fleet.info is info
        assert len(await collect(fleet, request("r"))) == 3
        assert fleet.router.routes[0].requests == 0
        async with aclosing(fleet.submit(request("r", fake_engine.ENDLESS))) as deltas:
            await anext(deltas)
            with pytest.raises(ValueError, match="in use"):
                await collect(fleet, request("r"))
            fleet.abort("r")
            assert [delta async for delta in deltas][-1].finish_reason == "abort"
    finally:
        await fleet.close()


def test_a_request_must_fit_whichever_engine_it_meets() -> None:
    engines = [EngineClient(EngineConfig(model="ok")) for _ in range(3)]
    fleet = Fleet(engines, Router(engines, 16))
    assert fleet.info is None
    whole = fake_info()
    engines[1].info = whole
    assert fleet.info is whole
    engines[2].info = msgspec.structs.replace(whole, max_model_len=7)
    assert fleet.info == msgspec.structs.replace(whole, max_model_len=7)
