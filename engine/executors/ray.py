"""The ranks of a model over the nodes of a Ray cluster: a placement group reserves them, an actor each runs them.

Rank 0 stays in the engine's own process, on its own node, where the group's first bundle is; Ray places the others on as few
nodes as it can. What the ranks say to each other in a step goes through torch.distributed (engine/parallel.py), never through
Ray. The cluster has to be there, with Outrider installed on every node: this starts none. When the engine's process ends, Ray
ends the actors and frees the group.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import EngineConfig
from engine.executors.parallel import ParallelExecutor
from engine.executors.rank import RankConfig, run_rank
from engine.executors.rank_process import Report
from engine.executors.ranks import RankLostError
from engine.executors.ray_cluster import free_port, got, join_cluster, reserve, talk_over
from engine.process import cannot_start, set_threads

LEAVE_SECONDS = 5.0  # for a Stop to be obeyed
GONE = "another rank is gone"


class RayExecutor(ParallelExecutor):
    """To be made in the main thread. Raises ValueError, fit for the command line, when there is no cluster or no room in it."""

    def __init__(self, config: EngineConfig) -> None:
        ranks = RayRanks(config)
        super().__init__(config, ranks, ranks.rendezvous)


class RankActor:
    """One rank's process, wherever Ray put it."""

    def place(self) -> list[str]:
        """The GPUs that Ray gave it."""
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    def follow(self, raw: bytes) -> Report:
        """Returns when rank 0 says so, or why it cannot go on. `raw`: a RankConfig in MessagePack."""
        config = msgspec.msgpack.decode(raw, type=RankConfig)
        talk_over(ray.util.get_node_ip_address())
        set_threads(config.engine.num_threads, 1)
        return followed(config)


def followed(config: RankConfig) -> Report:
    try:
        run_rank(config)
    except Exception as error:
        from engine.broadcast import DivergedError
        from engine.parallel import GoneError

        if isinstance(error, GoneError):
            return Report(GONE)
        if isinstance(error, DivergedError):
            return Report(str(error))
        fatal = cannot_start(error)
        return Report(fatal.message, fatal.exit_code == 2)
    return Report()


class RayRanks:
    """Actors on the nodes of a cluster; see engine/executors/ranks.py."""

    def __init__(self, config: EngineConfig) -> None:
        join_cluster()
        self._why: Exception | None = None
        self._lock = threading.Lock()
        self._actors: list[Any] = []  # on GPUs the first one is there for rank 0, and idle
        self._followed: list[Any] = []  # what each rank from 1 on ends with
        self._group: PlacementGroup | None = None
        try:
            self._place(config)
        except BaseException:
            self.leave()
            raise

    def _place(self, config: EngineConfig) -> None:
        on_gpus = config.device.startswith("cuda") or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        self._group = group = reserve(config.tensor_parallel_size, on_gpus)
        make = ray.remote(RankActor)
        gpus = 1 if on_gpus else 0
        actors = [
            make.options(
                num_cpus=0 if rank == 0 else 1, num_gpus=gpus, scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank)
            ).remote()
            for rank in range(0 if on_gpus else 1, config.tensor_parallel_size)
        ]
        self._actors = actors
        if on_gpus:  # rank 0 is this process, and computes where Ray keeps a GPU for it
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(got([actors[0].place.remote()])[0])
        address = ray.util.get_node_ip_address()
        talk_over(address)
        self.rendezvous = f"tcp://{address}:{free_port(address)}"
        self._followed = [
            actor.follow.remote(msgspec.msgpack.encode(RankConfig(engine=config, rank=rank, rendezvous=self.rendezvous)))
            for rank, actor in enumerate(actors[-(config.tensor_parallel_size - 1) :], start=1)
        ]

    def lost(self) -> Exception | None:
        """The first one that did not go because another had."""
        with self._lock:
            if self._why is None and self._followed:
                gone, _ = ray.wait(self._followed, num_returns=len(self._followed), timeout=0)
                reasons = [_why(self._followed.index(ref) + 1, ref) for ref in gone]
                self._why = next((why for why in reasons if GONE not in str(why)), reasons[0] if reasons else None)
            return self._why

    def end(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)

    def leave(self) -> None:
        if self._followed and self._why is None:
            with contextlib.suppress(RayError):
                ray.wait(self._followed, num_returns=len(self._followed), timeout=LEAVE_SECONDS)
        self.end()
        with self._lock:
            self._actors, self._followed = [], []
        if self._group is not None:
            with contextlib.suppress(RayError):
                remove_placement_group(self._group)
            self._group = None
        ray.shutdown()


def _why(rank: int, ref: Any) -> Exception:
    try:
        report: Report = ray.get(ref)
    except RayError as error:
        return RankLostError(f"rank {rank}: its process or its node is gone ({str(error).splitlines()[0]})")
    if report.bad_setting:
        return ValueError(report.why)
    return RankLostError(f"rank {rank}: {report.why or 'it ended'}")
