"""Ray, with two raylets of its own cluster utility on this machine: a model over both, and replicas behind Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.live.conftest import MODEL, Server, start, stop
from tests.models import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (the extra outrider[ray])"),
]
FLAGS = ("--dtype", "float32", "--device", "cpu", "--num-threads", "1", "--no-profile")
RANKS = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray", "--rank-timeout", "10")
JSON = {"content-type": "application/json"}
SECONDS = 120.0  # for what Ray takes its time over


class Cluster:
    """tests/live/ray_cluster.py, told what to do."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, do: str, **told: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **told}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())["answer"]


@contextmanager
def cluster(errors: Path, head: dict[str, Any], node: dict[str, Any]) -> Iterator[Cluster]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.live.ray_cluster"]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        family: list[psutil.Process] = []
        try:
            process.stdin.write(json.dumps({"head": head, "node": node}) + "\n")
            process.stdin.flush()
            assert process.stdout.readline(), errors.read_text()[-4000:]
            yield Cluster(process)
            family = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.stdin.close()
            process.wait(60)
    _, left = psutil.wait_procs(family, 30)
    assert left == []


def until(true: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + SECONDS
    while not (found := true()):
        assert time.monotonic() < end, f"in {SECONDS:g} s: not {what}"
        time.sleep(0.2)  # another process: it has no event of ours
    return found


def ask(url: str, seed: int) -> httpx.Response:
    body = {"model": MODEL, "prompt": f"Once upon a time {seed}", "max_tokens": 60, "seed": seed, "temperature": seed % 2}
    return httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60)


def answers(url: str) -> list[str]:
    return [ask(url, seed).raise_for_status().json()["choices"][0]["text"] for seed in range(4)]


def test_a_model_over_two_raylets(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same tokens as in one piece. What befalls a rank ends its requests, and then the model is whole again."""
    alone = start(tiny_llama_dir, tmp_path / "alone", *FLAGS)
    expected = answers(alone.url)
    assert stop(alone) == 0
    # Room for one rank on each.
    with cluster(tmp_path / "cluster", {"num_cpus": 1}, {"num_cpus": 1}) as ray:
        monkeypatch.setenv("RAY_ADDRESS", ray("address"))
        server = start(tiny_llama_dir, tmp_path / "split", *FLAGS, *RANKS)
        try:
            ((where, rank),) = ray("actors")
            assert where == "node" and answers(server.url) == expected

            breaks(server, lambda: os.kill(rank, signal.SIGSTOP))  # longer than --rank-timeout
            (second,) = recovered(server, ray, expected)
            assert not psutil.pid_exists(rank)

            breaks(server, server.engine().kill)
            recovered(server, ray, expected)
            assert not psutil.pid_exists(second)

            breaks(server, lambda: ray("kill"))
            ray("add")
            recovered(server, ray, expected)
        finally:
            code = stop(server)
        assert code == 0, server.errors.read_text()[-4000:]
        until(lambda: ray("actors") == [], "no actor left")


def breaks(server: Server, what: Callable[[], object]) -> None:
    """Requests find out, with an error that says so."""
    codes = Counter[int]()
    what()
    until(lambda: codes.update([ask(server.url, 1).status_code]) or codes.keys() - {200}, "an error")
    assert codes.keys() <= {200, 500, 503}


def recovered(server: Server, ray: Cluster, expected: list[str]) -> list[int]:
    """The process ids of the ranks beside the first."""
    until(lambda: httpx.get(f"{server.url}/ready").status_code == 200, "ready again")
    assert answers(server.url) == expected
    actors = until(lambda: len(found := ray("actors")) == 1 and found, "one rank")
    assert [where for where, _ in actors] == ["node"]
    return [pid for _, pid in actors]


def test_a_cluster_that_is_not_there_is_the_operators_to_mend(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "server.cli", "serve", str(tiny_llama_dir), "--port", "0", *FLAGS, *RANKS]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "outrider: error: distributed_executor_backend: there is no Ray cluster to join" in done.stderr


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def settings(model: Path, **more: object) -> dict[str, Any]:
    return {
        "model": str(model), "served_model_name": MODEL, "dtype": "float32", "device": "cpu", "num_threads": 1, "profile": False,
        "kv_cache_memory_bytes": 128 << 20, **more,
    }  # fmt: skip


class Stream:
    """One client's: who answers, and what comes."""

    def __init__(self) -> None:
        self.replica = ""
        self.events: list[dict[str, Any]] = []
        self.done = False
        self.begun = asyncio.Event()

    async def run(self, http: httpx.AsyncClient, prompt: str, tokens: int) -> None:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            self.replica = response.headers["x-outrider-replica"]
            async for line in response.aiter_lines():
                self.done = self.done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    self.begun.set()

    @property
    def error(self) -> str | None:
        return self.events[-1].get("error", {}).get("code")

    @property
    def text(self) -> str:
        return "".join(event["choices"][0]["text"] for event in self.events if event.get("choices"))


@asynccontextmanager
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as http:
        yield http


async def streams(http: httpx.AsyncClient, meanwhile: Callable[[], object] | None = None) -> list[Stream]:
    """Eight at once; `meanwhile` is done when all have begun."""
    all_of_them = [Stream() for _ in range(8)]
    tasks = [asyncio.create_task(stream.run(http, f"{i} and then", 250)) for i, stream in enumerate(all_of_them)]
    if meanwhile is not None:
        await asyncio.gather(*(stream.begun.wait() for stream in all_of_them))
        await asyncio.to_thread(meanwhile)
    await asyncio.gather(*tasks)
    return all_of_them


async def test_a_raylet_killed_under_load_takes_its_own_replica_only(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Two replicas behind Ray Serve: the other's requests finish, new ones are answered, and the lost replica comes back."""
    port = free_port()
    args = {
        "settings": settings(smollm2_gguf, max_model_len=512),
        "min_replicas": 2, "max_replicas": 2, "routing": "balanced",
        "replica_options": {"max_replicas_per_node": 1, "health_check_period_s": 1},
        "gate_options": {"ray_actor_options": {"num_cpus": 0.1, "resources": {"node:__internal_head__": 0.001}}},
    }  # fmt: skip
    with cluster(tmp_path / "cluster", {"num_cpus": 4}, {"num_cpus": 1}) as ray:
        ray("deploy", port=port, args=args)
        assert ray("running") == 2
        async with client(f"http://127.0.0.1:{port}") as http:
            whole = await streams(http)
            assert all(stream.done and stream.error is None for stream in whole)
            assert len({stream.replica for stream in whole}) == 2

            broken = await streams(http, lambda: ray("kill"))
            lost = {stream.replica for stream in broken if not stream.done}
            assert len(lost) == 1
            for stream, reference in zip(broken, whole, strict=True):
                if stream.replica in lost:
                    assert stream.error == "replica_lost" and reference.text.startswith(stream.text)
                else:
                    assert stream.done and stream.text == reference.text

            after = await streams(http)
            assert all(stream.done and stream.error is None for stream in after)
            ray("add")
            await asyncio.to_thread(until, lambda: ray("running") == 2, "two replicas again")
            again = await streams(http)
            assert all(stream.done and stream.error is None for stream in again)
            assert len({stream.replica for stream in again}) == 2
            assert not lost & {stream.replica for stream in again}


async def test_the_gate(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Prompts that begin alike meet at one replica; errors are the server's; who leaves is noticed; what is too much is refused;
    work that waits brings a second replica; a replica may have its model over several nodes.
    """
    port = free_port()
    args = {"settings": settings(tiny_llama_dir, max_body_bytes=4096), "min_replicas": 2, "max_replicas": 2}
    with cluster(tmp_path / "cluster", {"num_cpus": 4}, {"num_cpus": 1}) as ray:
        ray("deploy", port=port, args=args)
        async with client(f"http://127.0.0.1:{port}") as http:
            await prefixes_meet(http)
            await errors_are_the_servers_own(http)
            await who_leaves_is_noticed(http)

            ray("deploy", port=port, args=args | {"max_ongoing_requests": 1, "max_queued_requests": 1})
            body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "ignore_eos": True, "n": 8, "seed": 1}
            found = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(8)))
            refused = [response for response in found if response.status_code == 429]
            assert {response.status_code for response in found} == {200, 429}
            assert {response.json()["error"]["code"] for response in refused} == {"server_overloaded"}
            assert refused[0].headers["retry-after"] == "1"

            scaling = {"upscale_delay_s": 0.5, "downscale_delay_s": 0.5, "metrics_interval_s": 0.5, "look_back_period_s": 1}
            more = {"min_replicas": 1, "target_ongoing_requests": 2, "max_ongoing_requests": 4, "autoscaling": scaling}
            ray("deploy", port=port, args=args | more)
            await asyncio.to_thread(until, lambda: ray("running") == 1, "one replica")
            load = [asyncio.create_task(keep_asking(http, body)) for _ in range(12)]
            await asyncio.to_thread(until, lambda: ray("running") == 2, "a second replica")
            for task in load:
                task.cancel()
            await asyncio.gather(*load, return_exceptions=True)

            split = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}
            ray("deploy", port=port, args={"settings": args["settings"] | split})
            await asyncio.to_thread(until, lambda: ray("running") == 1, "one replica")
            whole = next(response.json()["choices"][0]["text"] for response in found if response.status_code == 200)
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200 and response.json()["choices"][0]["text"] == whole


async def keep_asking(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    while True:
        assert (await http.post("/v1/completions", json=body)).status_code == 200


async def prefixes_meet(http: httpx.AsyncClient) -> None:
    where: dict[str, set[str]] = {}
    for turn in range(5):
        for topic in ("rivers", "bread", "clouds", "trains"):
            messages = [{"role": "user", "content": topic * 15}, {"role": "user", "content": f"{turn}"}]
            response = await http.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 2})
            assert response.status_code == 200, response.text
            where.setdefault(topic, set()).add(response.headers["x-outrider-replica"])
    assert [len(replicas) for replicas in where.values()] == [1] * 4
    assert len(set.union(*where.values())) == 2


async def errors_are_the_servers_own(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"model": "another", "prompt": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    response = await http.post("/v1/completions", content=b"{", headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    response = await http.post("/v1/completions", content=b" " * 5000, headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    response = await http.get("/v1/models")
    assert [model["id"] for model in response.json()["data"]] == [MODEL]
    assert len(response.headers.get_list("x-request-id")) == len(response.headers.get_list("server")) == 1


async def who_leaves_is_noticed(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 240, "ignore_eos": True, "stream": True, "n": 32}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        replica = response.headers["x-outrider-replica"]
        await anext(response.aiter_bytes())
    async with asyncio.timeout(SECONDS):
        while True:
            scrape = await http.get("/metrics")
            gone = re.search(r"^outrider:client_disconnects_total{.*} (\S+)", scrape.text, re.MULTILINE)
            if scrape.headers["x-outrider-replica"] == replica and gone is not None and float(gone[1]) == 1:
                return
