"""Process 1 of a container: signals reach the server, orphans do not stay as zombies, the exit code is the server's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from server import init
from tests import models

# As root of a user namespace of its own, which needs no rights, the program is process 1 and sees its own /proc.
AS_FIRST = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
PRELUDE = """
import os, signal, subprocess, sys, time
from server import init
"""


def possible() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*AS_FIRST, "true"], capture_output=True).returncode == 0


in_namespace = pytest.mark.skipif(not possible(), reason="no process namespaces here (unshare)")


@contextmanager
def first(code: str) -> Iterator[subprocess.Popen[str]]:
    command = [*AS_FIRST, sys.executable, "-c", PRELUDE + code]
    with subprocess.Popen(command, cwd=models.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(code: str) -> tuple[int, str]:
    with first(code) as process:
        out, err = process.communicate(timeout=60)
        assert not err, err
        return process.returncode, out


def children(pid: int) -> Sequence[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def test_any_other_process_just_runs() -> None:
    assert os.getpid() != 1
    assert init.run(lambda: os.getpid()) == os.getpid()


@in_namespace
def test_the_exit_code_is_the_servers() -> None:
    code, out = ended("code = init.run(lambda: print(os.getpid(), os.getppid(), flush=True) or 7)\nsys.exit(code)")
    assert code == 7
    pid, parent = map(int, out.split())
    assert pid > 1 and parent == 1


@in_namespace
def test_a_server_that_a_signal_ends_says_which() -> None:
    assert ended("sys.exit(init.run(lambda: os.kill(os.getpid(), signal.SIGKILL)))")[0] == 128 + signal.SIGKILL


@in_namespace
def test_before_the_server_has_handlers_sigterm_ends_it() -> None:
    with first("sys.exit(init.run(lambda: print('up', flush=True) or time.sleep(60) or 0))") as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        (one,) = children(process.pid)
        os.kill(one, signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


@in_namespace
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_servers_handler(number: signal.Signals) -> None:
    code = """
def serve():
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    print("up", flush=True)
    while not caught:
        signal.pause()
    print(*caught, flush=True)
    return 0
sys.exit(init.run(serve))
"""
    with first(code) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        os.kill(children(process.pid)[0], number)
        assert process.stdout.readline() == f"{int(number)}\n"
        assert process.wait(timeout=30) == 0


@in_namespace
def test_orphans_are_buried() -> None:
    """A grandchild whose parent is gone dies; its number must leave the table of processes, which a zombie's does not."""
    code = """
def serve():
    orphan = int(subprocess.run(["sh", "-c", "sleep 60 >&- & echo $!"], stdout=subprocess.PIPE, check=True).stdout)
    status = open(f"/proc/{orphan}/status").read()
    assert "PPid:\\t1\\n" in status, status
    os.kill(orphan, signal.SIGKILL)
    until = time.monotonic() + 30
    while os.path.exists(f"/proc/{orphan}"):
        assert time.monotonic() < until, open(f"/proc/{orphan}/status").read()
    own = subprocess.run(["sh", "-c", "exit 5"])
    return own.returncode  # a child of the server is still the server's to wait for
sys.exit(init.run(serve))
"""
    assert ended(code)[0] == 5
