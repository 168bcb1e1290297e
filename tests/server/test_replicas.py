"""Replicas of a server behind Ray Serve, as far as that goes without a cluster: tests/live/test_ray.py has one."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.config import ConfigError
from server.replicas.ask import passed_on, routing_text
from server.replicas.process import ServerProcess
from tests.models import ROOT

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (the extra outrider[ray])")


def text(**body: object) -> str:
    return routing_text(json.dumps(body).encode())


def test_a_router_compares_what_a_cache_compares() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    longer = [*chat, {"role": "assistant", "content": "Hi"}]
    assert "Be brief." in text(messages=chat) and "Hello" in text(messages=chat)
    assert text(messages=longer).startswith(text(messages=chat))
    assert text(prompt="Once upon").startswith(text(prompt="Once"))
    assert text(prompt=[1, 2, 3]).startswith(text(prompt=[1, 2]))
    assert "Once" in text(prompt=["Once", "upon"])
    assert text(prompt="Once", cache_salt="a")[0] != text(prompt="Once", cache_salt="b")[0]
    assert text(prompt="Once", temperature=1) == text(prompt="Once", temperature=0)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"messages": 5}', b'{"prompt": {"a": 1}}', b"\xff\xfe", b"null"]
)
def test_what_is_no_prompt_goes_anywhere(body: bytes) -> None:
    one, other = routing_text(body), routing_text(body)
    assert one and one != other


def test_headers_of_one_connection_stay_there() -> None:
    headers = [("Host", "a"), ("Content-Type", "b"), ("connection", "c"), ("Transfer-Encoding", "chunked"), ("Date", "d")]
    assert passed_on(headers, frozenset({"date"})) == [("Content-Type", "b")]


def settings(model: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": str(model), "dtype": "float32", "device": "cpu", "num_threads": 1, "profile": False, "cache_dir": str(folder),
        "api_key": ["secret"], "port": 1, "host": "0.0.0.0",
    }  # fmt: skip


def test_a_server_is_started_asked_and_stopped(tiny_llama_dir: Path, tmp_path: Path) -> None:
    server = ServerProcess(settings(tiny_llama_dir, tmp_path))
    try:
        assert server.url.startswith("http://127.0.0.1:") and server.exit_code is None
        with urllib.request.urlopen(f"{server.url}/ready") as response:
            assert response.status == 200
    finally:
        server.stop(30)
    assert server.exit_code == 0
    server.stop(30)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"outrider serve ended with 2: .*no such model: ./nothing"):
        ServerProcess({"model": "./nothing"})


def test_a_server_ends_with_the_process_that_started_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    own = settings(tiny_llama_dir, tmp_path)
    code = f"from server.replicas.process import ServerProcess as S; print(S({own!r}).url, flush=True); input()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None and starter.stdout.readline().startswith(b"http://")
        family = psutil.Process(starter.pid).children(recursive=True)
        assert any("engine.loop" in process.cmdline() for process in family)
        starter.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, 20)
    assert left == []


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"replicas": 2}, r"args: replicas: Extra inputs"),
        ({"settings": {"max_num_seq": 2}}, r"args: settings: unknown setting max_num_seq"),
        ({"settings": {"port": "x"}}, r"args: settings: --port: "),
        ({"config": "nothing.yaml"}, r"--config nothing.yaml: "),
        ({"min_replicas": 3, "max_replicas": 2}, r"args: min_replicas: 3 are more than max_replicas"),
        (
            {"max_ongoing_requests": 9, "settings": {"max_queue": 8}},
            r"args: max_ongoing_requests: 9 are more than .* \(max_queue 8\)",
        ),
    ],
)
def test_an_application_with_wrong_settings_is_not_built(args: dict[str, Any], why: str) -> None:
    build = importlib.import_module("server.replicas.app").build
    with pytest.raises(ConfigError, match=why):
        build(args)


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_the_interface_with_an_address_is_found() -> None:
    find = importlib.import_module("engine.executors.ray_cluster").interface_of
    assert find("127.0.0.1") in ("lo", "lo0")
    assert find("198.51.100.1") is None
