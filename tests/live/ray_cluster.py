"""`python -m tests.live.ray_cluster`: a Ray cluster of two raylets on this machine, which does what it is told.

A process of its own, because a cluster's nodes know each other by this machine's own address, which the tests themselves may not
talk to. One JSON object per line in, one out; the end of its input is its end.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

STORE = {"object_store_memory": 80 << 20}  # bytes; no less is taken


class Control:
    def __init__(self, head: dict[str, Any], node: dict[str, Any]) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **STORE, **head})
        self._node_args = {**STORE, **node}
        self.add()

    def add(self) -> None:
        """A second raylet."""
        self._node = self._cluster.add_node(**self._node_args)

    def kill(self) -> None:
        """The second raylet, without a word to anybody."""
        self._cluster.remove_node(self._node, allow_graceful=False)

    def address(self) -> str:
        return str(self._cluster.address)

    def actors(self) -> list[tuple[str, int]]:
        """Where actors are alive, "head" or "node", and their process ids."""
        if not ray.is_initialized():
            ray.init(address=self._cluster.address)
        alive = [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]
        return [("node" if actor["Address"]["NodeID"] == self._node.node_id else "head", actor["Pid"]) for actor in alive]

    def deploy(self, port: int, args: dict[str, Any]) -> None:
        """Behind a proxy on the first node, at this port of the loopback."""
        from server.replicas.app import build

        if not ray.is_initialized():
            ray.init(address=self._cluster.address)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(args), name="outrider", route_prefix="/")

    def running(self) -> int:
        """Replicas that are."""
        return int(serve.status().applications["outrider"].deployments["replica"].replica_states.get("RUNNING", 0))

    def close(self) -> None:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        self._cluster.shutdown()


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    control = Control(**json.loads(sys.stdin.readline()))
    try:
        out.write("{}\n")
        out.flush()
        for line in sys.stdin:
            told = json.loads(line)
            answer = getattr(control, told.pop("do"))(**told)
            out.write(json.dumps({"answer": answer}) + "\n")
            out.flush()
    finally:
        control.close()


if __name__ == "__main__":
    main()
