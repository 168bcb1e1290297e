"""One model with its KV cache and attention backend: a batch goes in, logits of the judged rows come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.kv import KVCache
from engine.models.batch import ForwardBatch, padded_rows
from engine.models.decoder import Attend, Paged


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

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """Store the fed rows' keys and values new [T, 2, K, D] in one layer's kv [N, 2, K, S, D], None: they are there already;
        then attend with q [T, H, D]. -> [T, H * D]."""
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """An attention backend that is compiled as it is used, and can be beforehand."""

    def warm_up(self, kv: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a recorded step has room for, and how few sequences it is ever used for."""

    sequences: int
    tokens: int  # rows of the forward, all sequences together
    rows: int  # most of one sequence
    least: int = 1  # sequences


class Tables(Protocol):
    """What a recorded step attends to, in memory that does not move. Empty at first: no row belongs to anybody."""

    def fits(self, batch: ForwardBatch) -> bool: ...

    def write(self, batch: ForwardBatch) -> None:
        """Tell the next run about a batch that fits."""
        ...

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """As AttentionBackend.run; nothing but sizes decides what is launched."""
        ...


@runtime_checkable
class Recordable(Protocol):
    """An attention backend whose steps can be recorded once and run again."""

    def room(self, most: Bucket, longest: int, device: torch.device) -> Room:
        """For steps of up to `most` and contexts of up to `longest` keys, a step's own rows among them."""
        ...


class Room(Protocol):
    """The memory that all of a model's recorded steps share. `name`: of the backend that attends in them."""

    name: str

    def tables(self, bucket: Bucket, slots: Tensor, positions: Tensor) -> Tables:
        """slots, positions [tokens] int64 of the bucket's rows, where the step will find them."""
        ...


class Replays(Protocol):
    """Recorded steps (engine/graphs.py)."""

    @property
    def attention(self) -> str:
        """Name of the backend in them."""
        ...

    def forward(self, batch: ForwardBatch, hidden_layers: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]] | None:
        """As ModelRunner.forward; None: no recorded step fits. The hidden states are overwritten by the next call."""
        ...

    def tier(self, tokens: int) -> int | None: ...


class ModelRunner:
    """`attention` serves models that do not bring their own; `graphs` the steps that were recorded, if any were."""

    def __init__(self, model: Model | PagedModel, kv: KVCache, attention: AttentionBackend) -> None:
        self.model, self.kv, self.attention = model, kv, attention
        self.graphs: Replays | None = None
        if isinstance(model, PagedModel):
            kv.native = model.move

    def forward(self, batch: ForwardBatch, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states of every fed row [T, C], and those after the named layers; the KV cache has the rows afterwards."""
        if isinstance(self.model, PagedModel):
            return self.model.step(batch, self.kv, hidden_layers)
        if self.graphs is not None and (recorded := self.graphs.forward(batch, hidden_layers)) is not None:
            return recorded
        self.attention.plan(batch)
        attend = Paged(self.kv.layers, batch.slots, self.attention.run)
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

    def tier(self, tokens: int) -> int:
        """How many rows a decoding step of so many tokens is run with. (Prompt chunks that are not recorded: `padded_rows`.)"""
        if self.scratch_slot is None:
            return tokens
        recorded = None if self.graphs is None else self.graphs.tier(tokens)
        return padded_rows(tokens) if recorded is None else recorded

    @property
    def backend(self) -> str:
        """What attends: in steps as they come, and in recorded ones."""
        if isinstance(self.model, PagedModel):
            return "native"
        own = self.attention.name
        return own if self.graphs is None else f"{own}, {self.graphs.attention} in graphs"

    @property
    def scratch_slot(self) -> int | None:
        """Where padding rows are stored; None where rows need no padding."""
        return None if isinstance(self.model, PagedModel) else self.kv.scratch_slot

    @property
    def device(self) -> torch.device:
        return self.kv.kv.device
