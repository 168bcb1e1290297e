"""The two processes of a real server: who dies with whom, what is left behind, and what a start that fails says."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.conftest import MODEL, Server, start

FLAGS = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20), "--num-threads", "1", "--no-profile")
ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where servers put their private directories: short enough for a socket, and ours alone to look at."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="o") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def left_in(folder: Path) -> list[str]:
    return os.listdir(folder)


@asynccontextmanager
async def running(model: Path, tmp_path: Path, *flags: str) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    server = await asyncio.to_thread(start, model, tmp_path / "stderr", *FLAGS, *flags)
    family = psutil.Process(server.process.pid).children(recursive=True)
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            yield server, http
    finally:
        server.process.kill()
        server.process.wait()
        assert server.process.stdout is not None
        server.process.stdout.close()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
    assert not alive, "the engine outlived its server"


async def stream(http: httpx.AsyncClient, started: asyncio.Event) -> list[str]:
    """The lines of an endless answer; `started` is set with its first token."""
    async with http.stream("POST", "/v1/completions", json=ENDLESS) as response:
        lines = []
        async for line in response.aiter_lines():
            lines.append(line)
            started.set()
        return [line for line in lines if line]


async def streams(http: httpx.AsyncClient, count: int) -> list[asyncio.Task[list[str]]]:
    """This many endless answers, all of them begun."""
    events = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(stream(http, event)) for event in events]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in events)), 60)
    return tasks


async def until_ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110  # as a load balancer does
            await asyncio.sleep(0.05)


async def test_a_killed_engine_ends_every_stream_and_comes_back(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path) as (server, http):
        for _ in range(2):
            tasks = await streams(http, 8)
            old = server.engine()
            old.kill()
            for lines in await asyncio.wait_for(asyncio.gather(*tasks), 10):
                assert '"error"' in lines[-1] or '"error"' in lines[-2]
            await until_ready(http)
            assert server.engine().pid != old.pid
            assert (await http.post("/v1/completions", json=SHORT)).status_code == 200
        assert len(left_in(sockets)) == 1


async def test_a_stopped_engine_is_replaced(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path, "--watchdog-timeout", "3") as (server, http):
        tasks = await streams(http, 2)
        server.engine().send_signal(signal.SIGSTOP)
        for lines in await asyncio.wait_for(asyncio.gather(*tasks), 20):
            assert "no sign of life" in "".join(lines[-2:])
        await until_ready(http)
        assert (await http.post("/v1/completions", json=SHORT)).status_code == 200


async def test_an_engine_never_outlives_its_server(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path) as (server, http):
        tasks = await streams(http, 2)
        engine = server.engine()
        server.process.kill()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(engine.wait, 10)


async def test_a_second_signal_means_now(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path) as (server, http):
        tasks = await streams(http, 2)
        server.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            while (await http.get("/ready")).status_code == 200:  # noqa: ASYNC110  # until the first has been seen
                await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(server.process.wait, 5) == 1
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not left_in(sockets)


async def test_what_does_not_finish_in_time_ends_with_an_error(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path, "--shutdown-timeout", "0.2") as (server, http):
        tasks = await streams(http, 2)
        server.process.send_signal(signal.SIGINT)
        for lines in await asyncio.wait_for(asyncio.gather(*tasks), 20):
            assert "shutting down" in "".join(lines[-2:])
        assert await asyncio.to_thread(server.process.wait, 20) == 0
        assert not left_in(sockets)


async def test_clients_that_leave_in_a_crowd_leave_nothing_behind(smollm2_gguf: Path, tmp_path: Path, sockets: Path) -> None:
    async with running(smollm2_gguf, tmp_path) as (server, http):
        for stay in range(6):
            tasks = await streams(http, 3 + stay)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(30):
            while True:
                text = (await http.get("/metrics")).text
                gauges = [
                    line for line in text.splitlines() if line.startswith(("outrider:num_requests_", "outrider:kv_cache_usage"))
                ]
                if len(gauges) == 3 and all(line.endswith(" 0.0") for line in gauges):
                    break
                await asyncio.sleep(0.1)
        assert server.process.poll() is None
        assert "Traceback" not in server.errors.read_text()


def refused(*argv: str) -> str:
    """The one line of a server that cannot start."""
    done = subprocess.run([sys.executable, "-m", "server.cli", "serve", *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("outrider: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_start_that_fails_says_why_in_one_line(smollm2_gguf: Path, smollm2_dir: Path, tmp_path: Path, sockets: Path) -> None:
    half = tmp_path / "half.gguf"
    with smollm2_gguf.open("rb") as whole:
        half.write_bytes(whole.read(20 << 20))
    assert "half.gguf is not a valid GGUF file: truncated" in refused(str(half), "--port", "0")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in smollm2_dir.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).symlink_to(file)
    with (smollm2_dir / "model.safetensors").open("rb") as whole:
        (broken / "model.safetensors").write_bytes(whole.read(1 << 20))
    assert "model.safetensors" in refused(str(broken), "--port", "0")
    assert "ngrams" in refused(str(smollm2_gguf), "--drafters", "ngrams", "--port", "0")
    assert not left_in(sockets)


async def test_a_signal_while_the_model_loads_ends_it(smollm2_gguf: Path, sockets: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", str(smollm2_gguf), "--port", "0", *FLAGS]
    process = await asyncio.create_subprocess_exec(*command, env=os.environ | {"TMPDIR": str(sockets)}, stdout=subprocess.PIPE)
    front = psutil.Process(process.pid)
    async with asyncio.timeout(30):
        while not front.children():  # noqa: ASYNC110  # until the engine's process is there
            await asyncio.sleep(0.01)
    [engine] = front.children()
    process.send_signal(signal.SIGTERM)
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (0, b"")
    await asyncio.to_thread(psutil.wait_procs, [engine], 5)
    assert not engine.is_running()
    assert not left_in(sockets)


async def test_it_serves_where_triton_is_missing(smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is None among the modules is not found, whoever asks: as on a machine for which there is no Triton."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    path = [str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    command = [sys.executable, "-c", "import triton"]
    missing = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert "import of triton halted" in missing.stderr
    async with running(smollm2_gguf, tmp_path) as (_, http):
        response = await http.post("/v1/completions", json=SHORT)
        assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 2
