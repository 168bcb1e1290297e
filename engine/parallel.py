"""The ranks of one model, and all that they say to each other: sums of activations, columns of logits, rank 0's messages.

torch.distributed carries it: gloo for what lies on CPUs and for messages, NCCL for what lies on GPUs. Nothing is pickled. Where
the ranks run, and who starts them, is an executor's business (engine/executors).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

FRAME_BYTES = 4096  # of a message; what is longer takes a second broadcast
LENGTH_BYTES = 8
# A rank waits for as long as the others are silent: an idle server says nothing. Who died closes its connections, which is
# noticed at once; who hangs is ended by whoever watches (engine/executors/watchdog.py).
PATIENCE = timedelta(days=365)


class GoneError(RuntimeError):
    """Another rank is gone."""


class Group:
    """One rank's way to the others. All ranks call `reduce`, `gather`, `least` and `total` together and in the same order; what
    rank 0 tells, the others hear.

    Raises GoneError.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, in_order: bool = False) -> None:
        """in_order: sums are made in the order of the ranks, whatever the number of rows, also where that is slower."""
        self.rank, self.size = rank, size
        self._in_order = in_order
        self._calls = 0
        self._waiting = False

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: str, device: torch.device, *, in_order: bool = False) -> Group:
        """Returns when all `size` ranks are there. One group per process at a time: `leave` it before another.

        rendezvous: `file:///a/path` of a file that does not exist yet, for ranks on one machine, which then talk over loopback
        only; or `tcp://host:port`, where rank 0 listens.
        """
        place = urlsplit(rendezvous)
        store: Any  # torch exports these without types
        if place.scheme == "file":
            _loopback_only()
            store = dist.FileStore(unquote(place.path), size)  # type: ignore[attr-defined]
        else:
            store = dist.TCPStore(place.hostname or "127.0.0.1", place.port or 0, size, rank == 0)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        return cls(rank, size, in_order=in_order or device.type == "cpu")

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def pulse(self) -> int | None:
        """Which call this rank waits in for the others just now; None while it does not. For a thread that watches."""
        return self._calls if self._waiting else None

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, the same bits on every rank; x may be overwritten.

        Two numbers have one sum; of more, a ring adds in an order that depends on the place in the tensor, and so on the number
        of rows.
        """
        if self.size == 1:
            return x
        if self.size == 2 or not self._in_order:
            x = x.contiguous()
            self._wait(lambda: dist.all_reduce(x))
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(parts, x.contiguous()))
        whole = parts[0]
        for part in parts[1:]:
            whole += part
        return whole

    def gather(self, x: Tensor, widths: list[int]) -> Tensor:
        """On rank 0 the columns of all ranks side by side [R, sum(widths)]; on the others their own, x [R, widths[rank]]."""
        if self.size == 1:
            return x
        widest = max(widths)
        own = x if x.shape[1] == widest else F.pad(x, (0, widest - x.shape[1]))
        parts = [torch.empty_like(own) for _ in widths] if self.rank == 0 else None
        self._wait(lambda: dist.gather(own.contiguous(), parts))
        if parts is None:
            return x
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return self._number(number, dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        """The sum of all ranks' numbers."""
        return self._number(number, dist.ReduceOp.SUM)

    def tell(self, message: bytes) -> None:
        """To every other rank; only rank 0 does."""
        frame = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
        raw = torch.frombuffer(bytearray(len(message).to_bytes(LENGTH_BYTES, "little") + message), dtype=torch.uint8)
        frame[: len(raw)] = raw[:FRAME_BYTES]
        self._wait(lambda: dist.broadcast(frame, 0))
        if len(raw) > FRAME_BYTES:
            self._wait(lambda: dist.broadcast(raw[FRAME_BYTES:].clone(), 0))

    def hear(self) -> bytes:
        """Rank 0's next message, however long that takes."""
        frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(frame, 0))
        raw = frame.numpy().tobytes()
        length = int.from_bytes(raw[:LENGTH_BYTES], "little")
        inline, raw = FRAME_BYTES - LENGTH_BYTES, raw[LENGTH_BYTES:]
        if length <= inline:
            return raw[:length]
        rest = torch.empty(length - inline, dtype=torch.uint8)
        self._wait(lambda: dist.broadcast(rest, 0))
        return raw + rest.numpy().tobytes()

    def _number(self, number: int, how: dist.ReduceOp.RedOpType) -> int:
        if self.size == 1:
            return number
        box = torch.tensor([number], dtype=torch.int64)
        self._wait(lambda: dist.all_reduce(box, how))
        return int(box.item())

    def _wait(self, call: Callable[[], object]) -> None:
        self._calls += 1
        self._waiting = True
        try:
            call()
        except RuntimeError as error:
            raise GoneError(f"another rank does not answer: {error}") from error
        finally:
            self._waiting = False


ALONE = Group()


def _loopback_only() -> None:
    """Gloo listens at the address of the machine's name otherwise."""
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
