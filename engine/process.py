"""The surroundings of an engine process: its parent, its signals, its threads, its sockets. Not the loop that runs in it."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from typing import Protocol

import msgspec
import zmq

from engine.config import ProcessConfig
from engine.messages import Fatal

logger = logging.getLogger("outrider.engine")

HIGH_WATER_MARK = 10_000  # messages; a full pipe makes the engine wait for the front end, nothing is dropped
PR_SET_PDEATHSIG = 1


def read_config() -> ProcessConfig:
    """From standard input: neither the command line nor the environment nor a file, which others could read."""
    return msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessConfig)


class Child(Protocol):
    """What a process is told about the one that started it."""

    @property
    def parent(self) -> int: ...  # process id

    @property
    def log_level(self) -> str: ...


def settle(config: Child) -> None:
    """Never outlive the supervisor, and leave only when it says so.

    SIGTERM, SIGINT and SIGHUP reach a whole process group or container while the front end still drains, so they are ignored
    here: the process leaves on Shutdown, with its parent, or by SIGKILL. SIGUSR1 writes all stacks to stderr.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config.parent:  # it went before the line above
        raise SystemExit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format=layout)


SPIN_COUNT = "3000"
# Compiled by oneDNN, one per shape; 1,024 by default. Measured at 200: 70-86 MB less at the peak of 32 streams, as fast.
KERNELS_KEPT = "256"


def set_threads(count: int | None, ranks: int = 1) -> None:
    """To be called before torch is imported: OpenMP reads its environment once. None: as the environment says, or all cores.

    That many processes share `count`, or the cores; what the environment says is meant for each.

    The front end and the clients share the cores. A thread that waits spins, and while it does, whoever has the work may get
    no core: among busy neighbours a step took 800 ms by default and 34 ms with 2,000 turns. Sleeping at once (passive)
    makes a step of 13 ms one of 25 on an idle machine; 3,000 turns cost nothing there. See bench/RESULTS.md.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS_KEPT)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    cores = len(os.sched_getaffinity(0))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        if count is not None or name not in os.environ:
            os.environ[name] = str(max(1, (count or cores) // ranks))


def connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(HIGH_WATER_MARK)
    socket.connect(endpoint)
    return socket


def cannot_start(error: Exception) -> Fatal:
    """A bad model file or setting is the operator's to mend (exit code 2, no traceback); anything else is ours."""
    if isinstance(error, ValueError | OSError | KeyError):
        message = f"missing {error}" if isinstance(error, KeyError) else str(error)
        return Fatal(" ".join(message.split()), exit_code=2)
    logger.error("the engine cannot start", exc_info=error)
    return Fatal(f"the engine cannot start: {type(error).__name__}: {error}")
