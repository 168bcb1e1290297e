"""One model with its KV cache and attention backend: a batch goes in, logits of the judged rows come out."""

from __future__ import annotations

from typing import Protocol

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


class AttentionBackend(Protocol):
    """Plans once per step, runs once per layer."""

    name: str

    def plan(self, batch: ForwardBatch) -> None: ...

    def run(self, kv: Tensor, q: Tensor, new: Tensor, scale: float) -> Tensor: ...


class ModelRunner:
    def __init__(self, model: Model, kv: KVCache, attention: AttentionBackend) -> None:
        self.model, self.kv, self.attention = model, kv, attention

    def forward(self, batch: ForwardBatch, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states of every fed row [T, C], and those after the named layers; the KV cache has the rows afterwards."""
        self.attention.plan(batch)
        layers, run = self.kv.layers, self.attention.run

        def attend(layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
            return run(layers[layer], q, new, scale)

        return self.model.forward(batch.token_ids, batch.positions, attend, hidden_layers)

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits [R, V] of fed rows `rows` [R]."""
        if len(rows) != len(hidden):
            hidden = hidden.index_select(0, rows)
        return self.model.logits(hidden)

    def node_logits(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """Logits of every node of the draft forest, in node order [nodes, V]."""
        return self.logits(hidden, batch.node_rows)

    @property
    def device(self) -> torch.device:
        return self.kv.kv.device
