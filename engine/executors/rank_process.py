"""The process of one rank: `python -m engine.executors.rank_process`, with its RankProcessConfig on standard input.

It says on standard output that it is there, and, when it has to end early, why: one JSON line each.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys

import msgspec

from engine.executors.rank import RankConfig, run_rank
from engine.process import cannot_start, set_threads, settle

GONE = 4  # exit code of a rank that ended because another had

logger = logging.getLogger("outrider.engine.ranks")


class RankProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    rank: RankConfig
    parent: int  # process id of rank 0
    log_level: str


class Report(msgspec.Struct):
    """Empty: the rank is there. Else why it is not any more, and whether that is for the operator to mend."""

    why: str = ""
    bad_setting: bool = False


def main() -> int:
    """Returns the exit code: 0 when it was told to stop."""
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=RankProcessConfig)
    # What anybody prints belongs to standard error; the parent reads the rest.
    out = io.FileIO(os.dup(1), "wb")
    os.dup2(2, 1)
    settle(config)
    set_threads(config.rank.engine.num_threads, config.rank.size)
    import torch  # noqa: F401  # what takes seconds comes before the others wait for this rank

    out.write(msgspec.json.encode(Report()) + b"\n")
    try:
        run_rank(config.rank)
    except Exception as error:
        return _report(config.rank.rank, error, out)
    return 0


def _report(rank: int, error: Exception, out: io.FileIO) -> int:
    from engine.broadcast import DivergedError
    from engine.parallel import GoneError

    if isinstance(error, GoneError):
        logger.warning("rank %d: %s", rank, error)
        return GONE
    if isinstance(error, DivergedError):
        logger.error("rank %d: %s", rank, error)
        report = Report(str(error))
    else:
        fatal = cannot_start(error)
        report = Report(fatal.message, fatal.exit_code == 2)
    with contextlib.suppress(BrokenPipeError):
        out.write(msgspec.json.encode(report) + b"\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
