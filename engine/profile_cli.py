"""The process behind `outrider profile`: `python -m engine.profile_cli`. It measures, prints, draws, and keeps the table."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.config import EngineConfig
from engine.process import cannot_start, set_threads

if TYPE_CHECKING:
    from engine.executors.local import LocalExecutor


class ProfileConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line writes to the standard input of this process, as MessagePack."""

    engine: EngineConfig
    seconds: float
    png: str | None = None
    fresh: bool = False  # forget what was measured before


def profile(config: ProfileConfig) -> int:
    """Returns the exit code. Imports torch, so the threads have to be set before."""
    from engine import cost_plot
    from engine.costs import Costs
    from engine.executors.local import LocalExecutor

    executor = LocalExecutor(config.engine)
    info = executor.info
    costs = Costs(config.engine, executor, info, seconds=config.seconds, fresh=config.fresh)
    title = f"{Path(info.model).name} {info.dtype} on {costs.key['device']}, {costs.key['threads']} threads"
    more = "" if costs.profile.complete else "\nnot all is measured yet: run it again, or give it more --seconds"
    sys.stdout.write(f"{title}\n\n{cost_plot.table(costs.model)}\n\nkept in {costs.file}{more}\n")
    sys.stdout.write(_bigrams(executor, config.seconds))
    if config.png is not None:
        cost_plot.draw(costs.model, title, Path(config.png))
        sys.stdout.write(f"drawn in {config.png}\n")
    executor.close()
    return 0


def _bigrams(executor: LocalExecutor, seconds: float) -> str:
    """Read the target's bigrams for so long; a line about how far that went, or nothing where no drafter wants them."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and executor.study():
        pass
    table = executor.successors
    return "" if table is None else f"bigrams of {table.known:,} of {len(table.ids):,} tokens read, kept in {table.file}\n"


def main() -> int:
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProfileConfig)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    set_threads(config.engine.num_threads)
    try:
        return profile(config)
    except Exception as error:
        fatal = cannot_start(error)
        sys.stderr.write(f"outrider: error: {fatal.message}\n")
        return fatal.exit_code


if __name__ == "__main__":
    sys.exit(main())
