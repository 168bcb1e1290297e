"""EngineClient against a live engine process (the real loop, a fake engine): streams, aborts, deaths, restarts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.messages import EngineStats, TokenDelta
from engine.request import Request, SamplingParams
from server.client import EngineClient, EngineDead
from server.supervisor import MAX_DELAY, MAX_FAILED_STARTS, EngineGoneError, restart_delay, start_limit
from tests import fake_engine


def request(request_id: str, command: int = fake_engine.COUNT, max_tokens: int = 3, n: int = 1) -> Request:
    return Request(request_id=request_id, prompt_ids=[command], params=SamplingParams(max_tokens=max_tokens), n=n)


@asynccontextmanager
async def running(model: str = "ok", watchdog_timeout: float = 60.0) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(model=model), command=fake_engine.COMMAND, watchdog_timeout=watchdog_timeout)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def collect(client: EngineClient, wanted: Request) -> list[TokenDelta]:
    return [delta async for delta in client.submit(wanted)]


async def until(client: EngineClient, true: Callable[[EngineStats], bool]) -> EngineStats:
    """The engine's first statistics of which `true` is true."""
    found: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()

    def look(stats: EngineStats) -> None:
        if true(stats) and not found.done():
            found.set_result(stats)

    client.on_stats = look
    look(client.stats)
    return await asyncio.wait_for(found, 20)


async def stats_where(client: EngineClient, steps: int = 0, running: int = 0, aborts: int = 0) -> EngineStats:
    return await until(client, lambda s: s.steps >= steps and s.running == running and s.preemptions >= aborts)


async def restarted(client: EngineClient, old_pid: int | None) -> None:
    """Wait for another process than `old_pid`."""
    await until(client, lambda _: client.ready and client.pid != old_pid)


async def test_a_stream_has_every_token_in_order_and_ends_after_each_samples_final_delta() -> None:
    async with running() as client:
        await client.wait_ready()
        deltas = await collect(client, request("r", max_tokens=4, n=3))
        for index in range(3):
            mine = [delta for delta in deltas if delta.index == index]
            assert [token for delta in mine for token in delta.token_ids] == [0, 1, 2, 3]
            assert [delta.finish_reason for delta in mine] == [None, None, None, "length"]
        assert client.num_inflight == 0


async def test_many_requests_at_once_keep_their_own_deltas() -> None:
    async with running() as client:
        await client.wait_ready()
        wanted = [request(f"r{i}", max_tokens=1 + i % 7, n=1 + i % 2) for i in range(100)]
        for asked, deltas in zip(wanted, await asyncio.gather(*(collect(client, r) for r in wanted)), strict=True):
            assert {delta.request_id for delta in deltas} == {asked.request_id}
            assert sum(len(delta.token_ids) for delta in deltas) == asked.params.max_tokens * asked.n


async def test_what_the_engine_says_about_itself() -> None:
    async with running() as client:
        assert not client.ready
        assert client.live
        assert (await client.wait_ready()) is client.info
        assert client.ready
        assert client.info.vocab_size == 64
        await collect(client, request("r", max_tokens=5))
        assert (await stats_where(client, steps=5)).steps == 5


async def test_before_it_is_ready_and_after_it_is_closed_a_request_finds_no_engine() -> None:
    client = EngineClient(EngineConfig(model="ok"), command=fake_engine.COMMAND)
    with pytest.raises(EngineDead):
        await collect(client, request("r"))
    await client.start()
    with pytest.raises(EngineDead, match="starting"):
        await collect(client, request("r"))
    await client.close()
    with pytest.raises(EngineDead, match="shutting down"):
        await collect(client, request("r"))
    await client.close()


async def test_leaving_a_stream_early_aborts_it_in_the_engine() -> None:
    async with running() as client:
        await client.wait_ready()
        async with aclosing(client.submit(request("r", fake_engine.ENDLESS))) as stream:
            await anext(stream)
            await anext(stream)
        assert client.num_inflight == 0
        await stats_where(client, steps=2, running=0, aborts=1)


async def test_a_cancelled_consumer_aborts_too() -> None:
    async with running() as client:
        await client.wait_ready()
        consumer = asyncio.create_task(collect(client, request("r", fake_engine.ENDLESS)))
        await stats_where(client, steps=2, running=1)
        consumer.cancel()
        await asyncio.wait([consumer])
        await stats_where(client, running=0, aborts=1)


async def test_abort_ends_the_stream_with_a_final_delta_for_every_unfinished_sample() -> None:
    async with running() as client:
        await client.wait_ready()
        consumer = asyncio.create_task(collect(client, request("r", fake_engine.ENDLESS, n=2)))
        await stats_where(client, steps=2, running=2)
        client.abort("r")
        client.abort("unknown")
        deltas = await consumer
        assert [(d.index, d.finish_reason) for d in deltas if d.finish_reason] == [(0, "abort"), (1, "abort")]
        await stats_where(client, running=0, aborts=1)


async def test_a_finished_stream_aborts_nothing() -> None:
    async with running() as client:
        await client.wait_ready()
        await collect(client, request("r"))
        await collect(client, request("s"))
        assert (await stats_where(client, steps=6)).preemptions == 0


async def test_a_request_id_can_be_used_again_but_not_twice_at_once() -> None:
    async with running() as client:
        await client.wait_ready()
        async with aclosing(client.submit(request("r", fake_engine.ENDLESS))) as stream:
            await anext(stream)
            with pytest.raises(ValueError, match="in use"):
                await collect(client, request("r"))
            await anext(stream)
        assert len(await collect(client, request("r"))) == 3


async def test_a_request_the_engine_refuses_ends_with_its_words_and_hurts_nobody() -> None:
    async with running() as client:
        await client.wait_ready()
        other = asyncio.create_task(collect(client, request("good", max_tokens=50)))
        refused = await collect(client, request("bad", fake_engine.REFUSE, n=2))
        assert [(d.index, d.finish_reason, d.error) for d in refused] == [(i, "error", "prompt: is refused") for i in range(2)]
        choked = await collect(client, request("bug", fake_engine.CHOKE))
        assert [(d.finish_reason, d.error) for d in choked] == [("error", "the engine could not take this request")]
        assert len(await other) == 50
        assert client.restarts == 0


async def test_a_failed_step_ends_every_request_and_the_engine_comes_back() -> None:
    async with running() as client:
        await client.wait_ready()
        innocent = asyncio.create_task(collect(client, request("innocent", fake_engine.ENDLESS)))
        await stats_where(client, steps=2, running=1)
        first = client.pid
        guilty = await collect(client, request("guilty", fake_engine.RAISE, n=2))
        assert [(d.index, d.finish_reason) for d in guilty] == [(0, "error"), (1, "error")]
        assert (await innocent)[-1].finish_reason == "error"
        await restarted(client, first)
        assert len(await collect(client, request("next"))) == 3


async def test_a_killed_engine_fails_what_it_held_and_comes_back() -> None:
    async with running() as client:
        await client.wait_ready()
        held = [asyncio.create_task(collect(client, request(f"r{i}", fake_engine.ENDLESS))) for i in range(5)]
        await stats_where(client, steps=2, running=5)
        first = client.pid
        os.kill(first, signal.SIGKILL)
        for outcome in await asyncio.wait_for(asyncio.gather(*held, return_exceptions=True), 5):
            assert isinstance(outcome, EngineDead)
            assert "SIGKILL" in str(outcome)
        assert client.num_inflight == 0
        await restarted(client, first)
        assert client.restarts == 1
        assert client.stats.running == 0
        assert len(await collect(client, request("r0"))) == 3


async def test_an_engine_that_ends_in_a_step_is_no_different() -> None:
    async with running() as client:
        await client.wait_ready()
        with pytest.raises(EngineDead):
            await collect(client, request("r", fake_engine.DIE))


async def test_a_silent_engine_is_killed_and_replaced() -> None:
    async with running(watchdog_timeout=2.0) as client:
        await client.wait_ready()
        first = client.pid
        with pytest.raises(EngineDead, match="no sign of life"):
            await collect(client, request("r", fake_engine.HANG))
        await restarted(client, first)
        assert len(await collect(client, request("s"))) == 3


async def test_a_restart_that_hangs_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.supervisor.TICK", 0.1)
    monkeypatch.setattr("server.supervisor.START_FACTOR", 1.0, raising=False)
    async with running(f"stuck:{tmp_path / 'started'}", watchdog_timeout=2.0) as client:
        await client.wait_ready()
        first = client.pid
        os.kill(first, signal.SIGKILL)
        await restarted(client, first)
        assert client.restarts >= 2
        assert "the engine was not ready after " in caplog.text
        assert len(await collect(client, request("r"))) == 3


async def test_the_first_start_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.TICK", 0.001)
    async with running(watchdog_timeout=0.002) as client:
        await client.wait_ready()
        assert client.restarts == 0


async def test_an_engine_that_cannot_start_and_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.TICK", 0.05)
    async with running("linger", watchdog_timeout=0.1) as client:
        with pytest.raises(EngineGoneError, match="no such model") as caught:
            await asyncio.wait_for(client.wait_ready(), 20)
        assert caught.value.exit_code == 2


def test_how_long_a_restart_may_take() -> None:
    assert start_limit(120, longest_start=5, failed_starts=0) == 120
    assert start_limit(120, longest_start=200, failed_starts=0) == 600
    assert [start_limit(120, 5, failed) for failed in range(4)] == [120, 240, 480, 960]
    assert start_limit(120, 5, failed_starts=10_000) == 120 * 2**MAX_FAILED_STARTS


@pytest.mark.parametrize(
    ("model", "message", "exit_code"),
    [("bad", "the model file is truncated", 2), ("crash", "RuntimeError: no memory", 1), ("die", "killed by SIGKILL", 1)],
)
async def test_an_engine_that_cannot_start_is_final_at_once(model: str, message: str, exit_code: int) -> None:
    async with running(model) as client:
        with pytest.raises(EngineGoneError, match=message) as caught:
            await client.wait_ready()
        assert caught.value.exit_code == exit_code
        assert not client.live
        assert client.restarts == 0
        with pytest.raises(EngineGoneError):
            await client.wait_failed()


async def test_an_engine_that_never_comes_back_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.MAX_DELAY", 0.01)
    async with running(f"once:{tmp_path / 'started'}") as client:
        await client.wait_ready()
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineGoneError, match="SIGKILL") as caught:
            await client.wait_failed()
        assert caught.value.exit_code == 1
        assert client.restarts == 5
        assert not client.live
        assert not client.ready


def failing_starts(monkeypatch: pytest.MonkeyPatch, error: Exception, count: int) -> None:
    """The next `count` processes cannot be created."""
    create, errors = asyncio.create_subprocess_exec, [error] * count

    async def refuse(*command: str, **options: Any) -> asyncio.subprocess.Process:
        if errors:
            raise errors.pop()
        return await create(*command, **options)

    monkeypatch.setattr("server.supervisor.asyncio.create_subprocess_exec", refuse)


@pytest.mark.parametrize("error", [BlockingIOError(11, "no more processes"), RuntimeError("can't start new thread")])
async def test_a_start_that_raises_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.MAX_DELAY", 0.01)
    async with running() as client:
        await client.wait_ready()
        first = client.pid
        failing_starts(monkeypatch, error, 2)
        os.kill(first, signal.SIGKILL)
        await restarted(client, first)
        assert client.restarts == 3
        assert client.live
        assert len(await collect(client, request("r"))) == 3


async def test_a_start_that_raises_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.MAX_DELAY", 0.01)
    async with running() as client:
        await client.wait_ready()
        failing_starts(monkeypatch, BlockingIOError(11, "no more processes"), 100)
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineGoneError, match=r"could not be started .*no more processes") as caught:
            await asyncio.wait_for(client.wait_failed(), 20)
        assert caught.value.exit_code == 1
        assert client.restarts == MAX_FAILED_STARTS
        with pytest.raises(EngineDead, match="no more processes"):
            await collect(client, request("r"))


async def test_a_command_that_does_not_exist_is_final_at_once() -> None:
    client = EngineClient(EngineConfig(model="ok"), command=["/nowhere/python"])
    await client.start()
    with pytest.raises(EngineGoneError, match="No such file or directory: '/nowhere/python'") as caught:
        await asyncio.wait_for(client.wait_ready(), 20)
    assert caught.value.exit_code == 2
    assert not client.live
    await client.close()


async def test_an_engine_whose_sockets_were_swept_away_comes_back() -> None:
    async with running() as client:
        await client.wait_ready()
        first = client.pid
        shutil.rmtree(client._supervisor._link.directory)
        assert len(await collect(client, request("r"))) == 3
        os.kill(first, signal.SIGKILL)
        await restarted(client, first)
        assert len(await collect(client, request("r"))) == 3
        assert client._supervisor._link.directory.stat().st_mode & 0o777 == 0o700


async def test_a_supervisor_that_fails_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    def delay(short_lives: int) -> float:
        raise OverflowError("a bug")

    monkeypatch.setattr("server.supervisor.restart_delay", delay, raising=False)
    async with running() as client:
        await client.wait_ready()
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineGoneError, match="OverflowError: a bug"):
            await asyncio.wait_for(client.wait_failed(), 20)
        assert not client.live


def test_the_delay_grows_and_has_an_end() -> None:
    assert [restart_delay(count) for count in range(8)] == [0, 0, 1, 2, 4, 8, 16, MAX_DELAY]
    assert restart_delay(10_000) == MAX_DELAY  # days of an engine that others stand in for


async def test_closing_leaves_no_process_and_no_files() -> None:
    async with running() as client:
        await client.wait_ready()
        consumer = asyncio.create_task(collect(client, request("r", fake_engine.ENDLESS)))
        await stats_where(client, steps=2, running=1)
        pid, directory = client.pid, client._supervisor._link.directory
        assert directory.stat().st_mode & 0o777 == 0o700
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineDead, match="shutting down"):
        await consumer
