"""One model with its KV cache and attention backend: a batch goes in, logits of the judged rows come out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.models.decoder import Attend


class Model(Protocol):
    """What a runner needs of a model: the native decoder and the transformers fallback both give it."""

    weight_bytes: int

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, hidden_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]: ...

    def logits(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class PagedModel(Protocol):
    """A model that reads and writes the KV cache itself: attention and layers in one."""

    weight_bytes: int

    def step(self, batch: ForwardBatch, kv: KVCache, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]: ...

    def step_logits(self, hidden: Tensor, rows: Tensor) -> Tensor: ...

    def move(self, kv: Tensor, moves: list[tuple[int, int]]) -> None: ...  # engine/kv.py


class AttentionBackend(Protocol):
    """Plans once per step, runs once per layer."""

    name: str

    def plan(self, batch: ForwardBatch) -> None: ...

    def run(self, kv: Tensor, q: Tensor, new: Tensor, scale: float) -> Tensor: ...


@runtime_checkable
class WarmsUp(Protocol):
    """An attention backend that is compiled as it is used, and can be beforehand."""

    def warm_up(self, kv: Tensor) -> None: ...


class ModelRunner:
    """`attention` serves models that do not bring their own."""

    def __init__(self, model: Model | PagedModel, kv: KVCache, attention: AttentionBackend) -> None:
        self.model, self.kv, self.attention = model, kv, attention
        if isinstance(model, PagedModel):
            kv.native = model.move

    def forward(self, batch: ForwardBatch, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states of every fed row [T, C], and those after the named layers; the KV cache has the rows afterwards."""
        if isinstance(self.model, PagedModel):
            return self.model.step(batch, self.kv, hidden_layers)
        self.attention.plan(batch)
        layers, run = self.kv.layers, self.attention.run

        def attend(layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
            return run(layers[layer], q, new, scale)

        return self.model.forward(batch.token_ids, batch.positions, attend, hidden_layers)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, V] of fed rows `rows` [R]; the next call may use their memory again."""
        if isinstance(self.model, PagedModel):
            return self.model.step_logits(hidden, rows)
        if len(rows) != len(hidden):
            hidden = hidden.index_select(0, rows)
        return self.model.logits(hidden)

    def node_logits(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits of every node of the draft forest, in node order [nodes, V]."""
        return self.logits(hidden, batch.node_rows)

    @property
    def backend(self) -> str:
        return "native" if isinstance(self.model, PagedModel) else self.attention.name

    @property
    def scratch_slot(self) -> int | None:
        """Where padding rows are stored; None where rows need no padding."""
        return None if isinstance(self.model, PagedModel) else self.kv.scratch_slot

    @property
    def device(self) -> torch.device:
        return self.kv.kv.device
