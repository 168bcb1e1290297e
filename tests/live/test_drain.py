"""A signal to leave: what was accepted is finished, what comes later is refused, and the server leaves with exit code 0."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from tests.live.conftest import MODEL, start


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_drains(number: signal.Signals, smollm2_gguf: Path, tmp_path: Path) -> None:
    flags = ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20), "--num-threads", "1"]
    server = await asyncio.to_thread(start, smollm2_gguf, tmp_path / "stderr", *flags)
    family = psutil.Process(server.process.pid).children(recursive=True)
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 150, "ignore_eos": True, "stream": True}
    try:
        async with (
            httpx.AsyncClient(base_url=server.url, timeout=120) as http,
            http.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            for process in (server.process, *family):  # a container that stops and a terminal that closes tell the engine too
                process.send_signal(number)
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as other, asyncio.timeout(30):
                while (await other.get("/ready")).status_code == 200:  # noqa: ASYNC110  # until the signal has been seen
                    await asyncio.sleep(0.01)
                refused = await other.post("/v1/completions", json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
                assert (await other.get("/live")).status_code == 200
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in rest[-2]
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        assert not [process for process in family if process.is_running()]
    finally:
        server.process.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()
