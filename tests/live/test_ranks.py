"""A whole server over two ranks: one of them is killed, or frozen, under 16 streams, and the server comes back by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live.conftest import MODEL, Server, start, stop

STREAMS = 16
FLAGS = [
    "--tensor-parallel-size",
    "2",
    "--num-threads",
    "1",
    "--no-profile",
    "--drafters",
    "none",
    "--kv-cache-memory-bytes",
    str(64 << 20),
]


@pytest.fixture(scope="module")
def server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("ranks")
    running = start(tiny_llama_dir, folder / "stderr", *FLAGS, "--rank-timeout", "1", "--cache-dir", str(folder))
    yield running
    processes = [running.engine(), rank(running)]
    assert stop(running) == 0, running.errors.read_text()[-4000:]
    _, alive = psutil.wait_procs(processes, 5)
    assert not alive


def rank(server: Server) -> psutil.Process:
    """Rank 1, a child of the engine's process."""
    [child] = server.engine().children()
    assert "rank_process" in " ".join(child.cmdline())
    return child


async def stream(http: httpx.AsyncClient, began: asyncio.Queue[int], number: int) -> str:
    """What the last event of an endless answer says."""
    body = {"model": MODEL, "prompt": f"{number} a", "max_tokens": 200, "ignore_eos": True, "stream": True, "seed": number}
    last = ""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                if not last:
                    began.put_nowait(number)
                last = line
    return last


async def lose(server: Server, end: Callable[[psutil.Process], None]) -> float:
    """Do something to rank 1 under STREAMS streams. Returns the seconds until the server was ready again."""
    lost = rank(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        began: asyncio.Queue[int] = asyncio.Queue()
        async with asyncio.TaskGroup() as group, asyncio.timeout(60):
            streams = [group.create_task(stream(http, began, i)) for i in range(STREAMS)]
            for _ in range(STREAMS):
                await began.get()
            started = time.monotonic()
            end(lost)
        last = [one.result() for one in streams]
        assert len(last) == STREAMS
        assert all('"code":"engine_unavailable"' in line and "rank" in line for line in last), last
        async with asyncio.timeout(100):
            while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110  # as a load balancer does
                await asyncio.sleep(0.05)
        seconds = time.monotonic() - started
        answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 4, "ignore_eos": True})
        assert answer.status_code == 200
    assert not lost.is_running()
    return seconds


@pytest.mark.long
async def test_a_killed_rank(server: Server) -> None:
    assert await lose(server, psutil.Process.kill) < 60


async def test_a_frozen_rank(server: Server) -> None:
    assert await lose(server, psutil.Process.suspend) < 60
