"""The servers a comparison drives: how each is started, when it is ready, and how it is stopped."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import llama_cpp
from bench.client import Endpoint
from bench.workloads import WORKLOADS

ALL = tuple(workload.name for workload in WORKLOADS)
ONE_STREAM = ("open", "copy", "math", "1 streams")
REFERENCE = "outrider, off"


@dataclass(frozen=True, slots=True)
class Arm:
    name: str
    command: Callable[[int], list[str]]  # port -> argv
    workloads: tuple[str, ...] = ALL
    prediction: bool = False  # send the expected answers along


@dataclass(frozen=True, slots=True)
class Running:
    endpoint: Endpoint
    pid: int
    start_seconds: float  # from the start of the process to the first answer that says it is healthy


def arms(model: Path, folder: Path, slots: int) -> list[Arm]:
    """Outrider without and with its drafters, and llama.cpp's server without and with its n-gram map, on the same weights."""

    def outrider(*flags: str) -> Callable[[int], list[str]]:
        # No prefix cache, as with llama.cpp: each repeat pays for its prefill.
        serve = [sys.executable, "-m", "server.cli", "serve", str(model), "--no-enable-prefix-caching", "--max-queue", "256"]
        return lambda port: [*serve, "--port", str(port), *flags]

    def llama(*flags: str) -> Callable[[int], list[str]]:
        return lambda port: [
            *llama_cpp.command(llama_cpp.server(folder), llama_cpp.weights(model, folder), port, slots),
            *flags,
        ]

    ngram_map = ("--spec-type", "ngram-map-k", "--spec-ngram-map-k-size-n", "4", "--spec-ngram-map-k-size-m", "8")
    return [
        Arm(REFERENCE, outrider("--policy", "off")),
        Arm("outrider, ngram", outrider("--drafters", "ngram")),
        Arm("outrider, prediction", outrider("--drafters", "prediction,ngram"), ("copy",), prediction=True),
        Arm("llama.cpp", llama()),
        Arm("llama.cpp, n-gram map 4/8", llama(*ngram_map), (*ONE_STREAM, "4 streams")),
    ]


@contextmanager
def running(arm: Arm, log: Path, limit: float = 120.0) -> Iterator[Running]:
    """The arm's server, up and healthy; ended on leaving. Raises RuntimeError, naming the log, when it does not get ready."""
    port = _free_port()
    with log.open("ab") as output:
        started = time.monotonic()
        process = subprocess.Popen(arm.command(port), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() - started > limit:
                raise RuntimeError(f"{arm.name} did not get ready: see {log}")
            time.sleep(0.02)
        yield Running(Endpoint(f"http://127.0.0.1:{port}/v1"), process.pid, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
