"""The ranks of a model as processes of this machine, started by the engine's own process, which is rank 0.

They find each other through a file in a private directory and talk over loopback (engine/parallel.py). They die with the engine's
process, whatever ends it (engine/process.py: settle), and it ends when one of them does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.executors.parallel import ParallelExecutor
from engine.executors.rank import RankConfig
from engine.executors.rank_process import GONE, RankProcessConfig, Report
from engine.executors.ranks import RankLostError

# -P: the current directory, which may hold an `engine` of its own, does not come first on the module path.
COMMAND = (sys.executable, "-P", "-m", "engine.executors.rank_process")
ROOT = Path(__file__).resolve().parent.parent.parent  # where our packages lie
LEAVE_SECONDS = 5.0  # for a Stop to be obeyed

logger = logging.getLogger("outrider.engine.ranks")


class MultiprocExecutor(ParallelExecutor):
    """To be made in the main thread: the ranks die with the thread that started them."""

    def __init__(self, config: EngineConfig, command: Sequence[str] = COMMAND) -> None:
        folder = Path(tempfile.mkdtemp(prefix="outrider-ranks-"))  # readable by this user only
        ranks = LocalRanks(config, folder, command)
        try:
            ranks.await_all()
        except BaseException:
            ranks.end()
            ranks.leave()
            raise
        super().__init__(config, ranks, ranks.rendezvous)
        self.pids = ranks.pids
        if not self._on_gpu:  # NCCL goes on looking there
            ranks.forget_rendezvous()


class LocalRanks:
    """Processes of this machine; see engine/executors/ranks.py."""

    def __init__(self, config: EngineConfig, folder: Path, command: Sequence[str]) -> None:
        """`folder` is theirs alone, and is removed with them."""
        self._folder = folder
        self.rendezvous = (folder / "rendezvous").as_uri()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": path}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._why: Exception | None = None
        self._lock = threading.Lock()
        level = logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()
        for rank in range(1, config.tensor_parallel_size):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            self._processes.append(process)
            own = RankConfig(engine=config, rank=rank, rendezvous=self.rendezvous, local_rank=rank)
            told = msgspec.msgpack.encode(RankProcessConfig(rank=own, parent=os.getpid(), log_level=level))
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died already: its exit code says more
                process.stdin.write(told)
                process.stdin.close()

    def forget_rendezvous(self) -> None:
        """They have met: who is killed leaves no file behind."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def await_all(self) -> None:
        """Until every rank is about to join. Raises what `lost` says when one dies instead."""
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.readline():
                process.wait()
                raise self.lost() or RankLostError("a rank ended before it began")

    def lost(self) -> Exception | None:
        """The first one that did not go because another had."""
        dead = [(rank, process) for rank, process in enumerate(self._processes, start=1) if process.poll() is not None]
        with self._lock:
            if dead and self._why is None:
                rank, process = next(((rank, one) for rank, one in dead if one.returncode != GONE), dead[0])
                self._why = _why(rank, process)
            return self._why

    def end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def leave(self) -> None:
        patience = time.monotonic() + LEAVE_SECONDS
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(patience - time.monotonic(), 0))
        self.end()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self.forget_rendezvous()


def _why(rank: int, process: subprocess.Popen[bytes]) -> Exception:
    """Why a rank that is dead is dead: its last words, or how it ended."""
    lines = process.stdout.read().splitlines() if process.stdout is not None else []
    report = msgspec.json.decode(lines[-1], type=Report) if lines else Report()
    if report.bad_setting:
        return ValueError(report.why)
    code = process.returncode
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RankLostError(f"rank {rank}: {report.why}" if report.why else f"rank {rank} {ended}")
