"""A Ray cluster as an engine's process sees it: joining it, reserving a place for each rank, finding the way between nodes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import struct
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

PLACE_SECONDS = 300.0  # for Ray to find room; a cluster that grows takes minutes
SIOCGIFADDR = 0x8915  # the address of an interface, of Linux's netdevice(7)


def join_cluster() -> None:
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


def reserve(size: int, on_gpus: bool) -> PlacementGroup:
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


def got(refs: list[Any]) -> list[Any]:
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


def free_port(address: str) -> int:
    """Free a moment ago: rank 0 takes it next."""
    with socket.socket() as sock:
        sock.bind((address, 0))
        return int(sock.getsockname()[1])
