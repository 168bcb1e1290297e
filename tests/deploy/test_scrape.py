"""A real Prometheus with the composed configuration, a real server, a short load: every query has an answer."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.files import ALERTS, DEPLOY, alerts, queries
from tests.live.conftest import MODEL, Server, start, stop

pytestmark = pytest.mark.long

PROMPT = "Count to twenty: one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,"
WINDOW = "20s"


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = ["--max-model-len", "512", "--kv-cache-memory-bytes", str(64 << 20), "--num-threads", "1", "--vllm-metrics"]
    running = start(smollm2_gguf, folder / "stderr", *flags, "--cache-dir", str(folder))
    yield running
    stop(running)


@pytest.fixture(scope="module")
def prometheus(server: Server, tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The configuration of deploy/, pointed at the server's own port and at the rules' own place, and in more of a hurry."""
    folder = tmp_path_factory.mktemp("prometheus")
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    for old, new in (
        ("outrider:8000", server.url.removeprefix("http://").rstrip("/")),
        ("/etc/prometheus/rules/alerts.yml", str(ALERTS)),
        ("scrape_interval: 5s", "scrape_interval: 1s"),
        ("evaluation_interval: 15s", "evaluation_interval: 1s"),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, env=os.environ | {"GOMAXPROCS": "1"}
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


async def until(look: Callable[[], Any], seconds: float = 90) -> Any:
    """What `look` answers, once it is not None."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                if (found := await look()) is not None:
                    return found
            except httpx.TransportError:
                pass  # not there yet
            await asyncio.sleep(0.5)


async def load(url: str, done: asyncio.Event) -> None:
    """Requests, one after the other, until it is enough; one in three is wrong."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "ignore_eos": True}
        while not done.is_set():
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert (await http.post("/v1/completions", json=body | {"temperature": 0})).status_code == 200
            assert (await http.post("/v1/completions", json=body | {"model": "another"})).status_code == 404


async def values(http: httpx.AsyncClient, query: str) -> list[float]:
    answer = (await http.get("/api/v1/query", params={"query": query})).json()
    assert answer["status"] == "success", answer
    return [value for series in answer["data"]["result"] if math.isfinite(value := float(series["value"][1]))]


async def test_every_query_of_the_dashboard_has_an_answer(server: Server, prometheus: str) -> None:
    done = asyncio.Event()
    wanted = queries(rate_interval=WINDOW) | {"alias": f"rate(vllm:generation_tokens_total[{WINDOW}])"}
    async with httpx.AsyncClient(base_url=prometheus, timeout=30) as http:

        async def unanswered() -> dict[str, str]:
            return {title: query for title, query in wanted.items() if not await values(http, query)}

        async def complete() -> bool | None:
            missing.clear()
            missing.update(await unanswered())
            return True if not missing else None

        missing: dict[str, str] = {}
        loads = [asyncio.create_task(load(server.url, done)) for _ in range(2)]
        try:
            await until(complete)
        except TimeoutError:
            pytest.fail(f"no answer to {missing}")
        finally:
            done.set()
            await asyncio.gather(*loads)
        assert max(await values(http, f"rate(outrider:generation_tokens_total[{WINDOW}])")) > 0


async def test_prometheus_evaluates_every_alert_and_none_fires_on_a_healthy_server(prometheus: str) -> None:
    async with httpx.AsyncClient(base_url=prometheus, timeout=30) as http:

        async def scraped() -> bool | None:
            targets = (await http.get("/api/v1/targets")).json()["data"]["activeTargets"]
            return True if [target["health"] for target in targets] == ["up"] else None

        async def evaluated() -> list[dict[str, Any]] | None:
            groups = (await http.get("/api/v1/rules")).json()["data"]["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            return rules if rules and all(rule["health"] != "unknown" for rule in rules) else None

        await until(scraped)
        rules = await until(evaluated)
        assert {rule["name"] for rule in rules} == alerts().keys()
        assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
