"""The ranks of a model over the nodes of a Ray cluster: a placement group reserves them, an actor each runs them.

Rank 0 stays in the engine's own process, on its own node, where the group's first bundle is; Ray places the others on as few
nodes as it can. What the ranks say to each other in a step goes through torch.distributed (engine/parallel.py), never through
Ray. The cluster has to be there, with Outrider installed on every node: this starts none. When the engine's process ends, Ray
ends the actors and frees the group.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import struct
import threading
from typing import Any

import msgspec
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.config import EngineConfig
from engine.executors.parallel import ParallelExecutor
from engine.executors.rank import RankConfig, run_rank
from engine.executors.rank_process import Report
from engine.executors.ranks import RankLostError
from engine.process import cannot_start, set_threads

PLACE_SECONDS = 300.0  # for Ray to find room; a cluster that grows takes minutes
LEAVE_SECONDS = 5.0  # for a Stop to be obeyed
GONE = "another rank is gone"
SIOCGIFADDR = 0x8915  # the address of an interface, of Linux's netdevice(7)

logger = logging.getLogger("outrider.engine.ranks")


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
        _join_cluster()
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
        self._group = group = _reserve(config.tensor_parallel_size, on_gpus)
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
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_got([actors[0].place.remote()])[0])
        address = ray.util.get_node_ip_address()
        talk_over(address)
        self.rendezvous = f"tcp://{address}:{_free_port(address)}"
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


def _join_cluster() -> None:
    """Raises ValueError when there is none."""
    ignored = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace="outrider", configure_logging=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"distributed_executor_backend: there is no Ray cluster to join ({str(error).splitlines()[0]}); "
            f"`ray start --head` starts one, RAY_ADDRESS names one that is elsewhere"
        ) from None
    signal.signal(signal.SIGTERM, ignored)  # Ray's own handler would end a process that leaves only when it is told to


def _reserve(size: int, on_gpus: bool) -> PlacementGroup:
    """A bundle for each rank, the first one on this node. Raises ValueError when Ray finds no room."""
    bundle = {"CPU": 1.0} | ({"GPU": 1.0} if on_gpus else {})
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    group = placement_group([bundle] * size, strategy="PACK", bundle_label_selector=[here] + [{}] * (size - 1))
    try:
        ray.get(group.ready(), timeout=PLACE_SECONDS)
    except GetTimeoutError:
        remove_placement_group(group)
        wanted = " and ".join(f"{count:g} {kind}" for kind, count in bundle.items())
        raise ValueError(
            f"tensor_parallel_size: in {PLACE_SECONDS:g} s Ray found no room for {size} ranks with {wanted} each, the first of "
            f"them on this node; the cluster has {_resources()}"
        ) from None
    return group


def _resources() -> str:
    there = ray.cluster_resources()
    return ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))


def _got(refs: list[Any]) -> list[Any]:
    """Raises ValueError when an actor cannot be made: its node lacks Outrider, or went."""
    try:
        return list(ray.get(refs, timeout=PLACE_SECONDS))
    except (RayError, GetTimeoutError) as error:
        raise ValueError(f"distributed_executor_backend: a rank cannot be placed: {str(error).splitlines()[0]}") from None


def talk_over(address: str) -> None:
    """Gloo and NCCL listen at the interface with this address; of themselves they may take another."""
    interface = interface_of(address)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # one without an address
                if socket.inet_ntoa(fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


def _free_port(address: str) -> int:
    """Free a moment ago: rank 0 takes it next."""
    with socket.socket() as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])
