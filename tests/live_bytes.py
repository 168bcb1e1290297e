"""What torch holds at most within a block: storages that operators made there and that are still alive."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._count(storage, given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        place = storage.data_ptr()
        if place in given or place in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of the tensors in there, packed weights apart: those have none."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
