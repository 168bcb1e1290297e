"""The life of one rank, wherever it was placed: join the others, load its part of the model, follow rank 0 to the end.

Rank 0 lives in the engine's own process (engine/executors/parallel.py: `ParallelExecutor`). Whoever places the others calls
`run_rank` in a process of its own for each rank 1 ... size - 1: `multiproc.py` in processes of this machine.
"""

from __future__ import annotations

import msgspec

from engine.config import EngineConfig


class RankConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has to know, and all that it has to know."""

    engine: EngineConfig  # the same for every rank
    rank: int
    rendezvous: str  # engine/parallel.py: Group.join
    local_rank: int = 0  # which of the GPUs that its process sees

    @property
    def size(self) -> int:
        return self.engine.tensor_parallel_size


def run_rank(config: RankConfig) -> None:
    """Returns when rank 0 says so.

    Raises ValueError or OSError, fit for the command line, when its part cannot be loaded; DivergedError when it is not where
    rank 0 is; GoneError when another rank is gone. `set_threads` (engine/process.py) comes first: this imports torch.
    """
    from engine.follower import Follower, follower_config
    from engine.parallel import Group
    from engine.worker import Worker, device_of

    device = device_of(config.engine, config.local_rank)
    group = Group.join(config.rank, config.size, config.rendezvous, device, in_order=config.engine.deterministic)
    try:
        Follower(Worker(follower_config(config.engine), group, device)).follow()
    finally:
        group.leave()
