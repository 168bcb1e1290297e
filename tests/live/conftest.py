"""A real server in its own processes: the command a user runs, a real model, a free port. One per test session."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

KEY = "sk-live"
MODEL = "live-model"
READY = re.compile(r"outrider is ready: (http://\S+)")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    errors: Path

    def engine(self) -> psutil.Process:
        """The engine's process."""
        return self.engines()[0]

    def engines(self) -> list[psutil.Process]:
        """The processes of all engines, the oldest first."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        return sorted(
            (child for child in family if "engine.loop" in " ".join(child.cmdline())), key=lambda child: child.create_time()
        )


def start(model: Path, errors: Path, *flags: str) -> Server:
    """Returns when the server says that it is ready; fails with what it wrote when it ends before."""
    command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", "0", "--served-model-name", MODEL, *flags]
    root = Path(__file__).resolve().parents[2]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    for line in process.stdout:
        if ready := READY.search(line):
            return Server(process, ready[1], errors)
    raise RuntimeError(f"the server ended with {process.wait()}:\n{errors.read_text()[-4000:]}")


def stop(server: Server) -> int:
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(60)
    finally:
        server.process.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.fixture(scope="session")
def server(smollm2_gguf: Path) -> Iterator[Server]:
    """In float32, where an answer does not depend on what else is computed beside it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(256 << 20)]
        # Two threads on two busy cores are many times slower than one. What is measured is not kept.
        flags += ["--cache-dir", folder, "--num-threads", "1", "--api-key", KEY, "--drafters", "prediction,suffix,ngram"]
        running = start(smollm2_gguf, Path(folder) / "stderr", *flags)
        yield running
        code = stop(running)
        assert code == 0, running.errors.read_text()[-4000:]


@pytest.fixture
def base_url(server: Server) -> str:
    return server.url


@pytest.fixture
def model() -> str:
    return MODEL


@pytest.fixture
def api_key() -> str:
    return KEY
