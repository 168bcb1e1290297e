"""An engine process without torch: `python -m tests.fake_engine`. The real loop around an engine that prompts command.

It counts: token i of an answer is i. The first prompt id says what happens: see the constants.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path

from engine import loop
from engine.config import EngineConfig
from engine.messages import EngineInfo, EngineStats, SequenceUsage, TokenDelta
from engine.request import Request
from tests.fakes import fake_info

COUNT = 0  # one token per step, then "length"
RAISE = 1  # step() raises
DIE = 2  # the process kills itself in step()
HANG = 3  # step() never returns
ENDLESS = 4  # tokens until aborted, whatever max_tokens says
REFUSE = 5  # add() raises ValueError
CHOKE = 6  # add() raises something else

COMMAND = (sys.executable, "-P", "-m", "tests.fake_engine")


class FakeEngine:
    """`config.model` steers the start: "bad" is refused, "crash" raises, "die" kills the process, "once:PATH" dies on every
    start but the first (PATH remembers), "stuck:PATH" hangs in every other start, the first is none of them, and "linger" is
    refused and then does not end."""

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "bad":
            raise ValueError("the model file\nis truncated")
        if config.model == "linger":
            atexit.register(time.sleep, 3600)
            raise ValueError("no such model")
        if config.model == "crash":
            raise RuntimeError("no memory")
        if config.model == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.model.startswith("once:"):
            marker = Path(config.model.removeprefix("once:"))
            if marker.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            marker.touch()
        if config.model.startswith("stuck:"):
            marker = Path(config.model.removeprefix("stuck:"))
            if marker.exists():
                marker.unlink()
                time.sleep(3600)
            marker.touch()
        self.info: EngineInfo = fake_info(max_num_seqs=config.max_num_seqs, num_blocks=100)
        self.requests: dict[str, Request] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.steps = 0
        self.aborts = 0

    def add(self, request: Request) -> None:
        if request.prompt_ids[0] == REFUSE:
            raise ValueError("prompt: is refused")
        if request.prompt_ids[0] == CHOKE:
            raise RuntimeError("a bug")
        self.requests[request.request_id] = request
        self.counts |= {(request.request_id, i): 0 for i in range(request.n)}

    def abort(self, request_id: str) -> None:
        self.aborts += 1
        if self.requests.pop(request_id, None) is not None:
            self.counts = {key: n for key, n in self.counts.items() if key[0] != request_id}

    def study(self) -> bool:
        return False

    def check(self) -> None:
        pass

    def has_work(self) -> bool:
        return bool(self.counts)

    def step(self) -> list[TokenDelta]:
        self.steps += 1
        return [self._advance(*key) for key in list(self.counts)]

    def _advance(self, request_id: str, index: int) -> TokenDelta:
        request = self.requests[request_id]
        command = request.prompt_ids[0]
        if command == RAISE:
            raise RuntimeError("step failed")
        if command == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if command == HANG:
            time.sleep(3600)
        if command == ENDLESS:
            time.sleep(0.001)
        count = self.counts[request_id, index]
        self.counts[request_id, index] += 1
        delta = TokenDelta(request_id=request_id, index=index, token_ids=[count])
        if count + 1 >= request.params.max_tokens and command != ENDLESS:
            del self.counts[request_id, index]
            delta.finish_reason, delta.usage = "length", SequenceUsage(steps=count + 1)
        return delta

    def stats(self) -> EngineStats:
        return EngineStats(steps=self.steps, running=len(self.counts), preemptions=self.aborts, blocks_total=100)

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(loop.main(FakeEngine))  # type: ignore[arg-type]  # all the loop asks of an engine
