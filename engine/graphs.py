"""Steps that are recorded once, before ready, and run again with other contents: CUDA graphs.

A small model's step on a GPU is hundreds of launches that take the host longer than the device. A recorded step is one launch.
It reads everything from memory that does not move, and its launches depend on sizes alone: so there is one recording for each
bucket of (sequences, tokens), a step goes into the smallest that holds it, and what is left over is padding: rows of nobody,
stored in the KV cache's scratch slot. Draft trees of any shape share a bucket: shape is contents. A step that fits none (a prompt
chunk, more tokens than the largest bucket) takes the plain way. Logits, target law and verdict are not part of it.

What it is not: a compiler. The recording holds the very kernels that the plain way would launch.

Never yet run on a GPU (see bench/RESULTS.md): the tests run everything but `CudaRecorder` on a CPU.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Paged
from engine.models.runner import Bucket, Model, ModelRunner, Recordable, Tables

# Up to 7 rows of padding, and beyond 64 up to a quarter: there rows begin to cost. Steps of more than 512 outlast their launches.
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
SEQUENCE_STEP = 4  # sequences without rows cost next to nothing, a recording costs time and memory


def make_buckets(most_sequences: int, most_tokens: int, most_nodes: int) -> list[Bucket]:
    """Every bucket of an engine with these limits, the largest first. most_nodes: draft nodes of one sequence."""
    each = 1 + most_nodes
    limit = min(most_tokens, TOKENS[-1], most_sequences * each)
    tiers = TOKENS[: bisect_left(TOKENS, limit) + 1]
    found, fewer, sequences = [], 0, 1
    while fewer < min(most_sequences, limit):
        sequences = min(sequences, most_sequences)
        # From the tier that one sequence more than the smaller buckets have may need, to the one that holds all of these.
        first, last = bisect_left(tiers, fewer + 1), bisect_left(tiers, min(sequences * each, limit))
        found += [Bucket(sequences, tokens, each, fewer + 1) for tokens in tiers[first : last + 1]]
        fewer, sequences = sequences, sequences * SEQUENCE_STEP
    return sorted(found, key=lambda bucket: (bucket.tokens, bucket.sequences), reverse=True)


class Recorder(Protocol):
    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        """Run a step, more than once maybe, and return what does again whatever it did to memory."""
        ...


class CudaRecorder:
    """All its recordings share one pool of memory, as no two of them ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            step()  # kernels are compiled, and libraries set themselves up, which cannot be recorded
        outside.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph.replay


class Graphs:
    """The recorded steps of one model over one KV cache. `hidden_layers`: whose hidden states are recorded with them.

    Nothing is recorded before `record`. A step that asks for another layer takes the plain way.
    """

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        attention: Recordable,
        buckets: Iterable[Bucket],
        longest: int,
        recorder: Recorder,
        hidden_layers: tuple[int, ...] = (),
    ) -> None:
        """longest: keys of one context, a step's own rows among them."""
        self.buckets = list(buckets)
        self.hidden_layers = hidden_layers
        self._model, self._kv, self._recorder = model, kv, recorder
        self._tiers = sorted({bucket.tokens for bucket in self.buckets})
        self._sizes = sorted({bucket.sequences for bucket in self.buckets})
        self._named = {(bucket.sequences, bucket.tokens): bucket for bucket in self.buckets}
        device = kv.kv.device
        self._index = torch.zeros(3 * self._tiers[-1], dtype=torch.int64, device=device)  # ForwardBatch.index of any bucket
        most = Bucket(self._sizes[-1], self._tiers[-1], max(bucket.rows for bucket in self.buckets))
        self._room = attention.room(most, longest, device)
        self.attention = self._room.name
        self._recorded: dict[Bucket, tuple[Tables, Callable[[], object]]] = {}
        self._hidden: Tensor | None = None  # [most tokens, C]; one for all buckets, as are those of the layers
        self._layers: dict[int, Tensor] = {}

    @torch.inference_mode()
    def record(self, buckets: Iterable[Bucket] | None = None) -> None:
        """Record these, or all. The largest comes first: the others find room in its memory. Only while nobody is served."""
        enabled = gc.isenabled()
        gc.collect()
        gc.disable()  # what is freed while a step is recorded may touch the device, which breaks the recording
        try:
            for bucket in self.buckets if buckets is None else buckets:
                self._record(bucket)
        finally:
            if enabled:
                gc.enable()

    def forward(self, batch: ForwardBatch, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Hidden states [bucket's tokens, C] of the fed rows and of padding, and those after the named layers; None: none fits.

        The first are overwritten by the next call. The KV cache has the rows afterwards.
        """
        bucket = self.bucket_for(batch)
        if bucket is None or not set(hidden_layers) <= set(self.hidden_layers):
            return None
        tables, replay = self._recorded[bucket]
        if not tables.fits(batch):
            return None
        self._write(bucket, batch)
        tables.write(batch)
        replay()
        assert self._hidden is not None, "nothing was recorded"
        return self._hidden[: bucket.tokens], {layer: self._layers[layer][: bucket.tokens].clone() for layer in hidden_layers}

    def bucket_for(self, batch: ForwardBatch) -> Bucket | None:
        """The smallest that holds so many sequences and rows, if it is recorded."""
        sequences, tokens = bisect_left(self._sizes, len(batch.num_rows)), bisect_left(self._tiers, batch.num_tokens)
        if sequences == len(self._sizes) or tokens == len(self._tiers):
            return None
        bucket = self._named.get((self._sizes[sequences], self._tiers[tokens]))
        if bucket not in self._recorded or max(batch.num_rows, default=0) > bucket.rows:
            return None
        # Somebody who works in the scratch block (engine/study.py) would have his rows overwritten by padding.
        return None if batch.index[2, : batch.num_tokens].max(initial=-1) >= self._kv.scratch_slot else bucket

    def tier(self, tokens: int) -> int | None:
        """Rows that a decoding step of so many tokens is run with; None where it is not a recorded one."""
        return self._tiers[bisect_left(self._tiers, tokens)] if 0 < tokens <= self._tiers[-1] else None

    def _write(self, bucket: Bucket, batch: ForwardBatch) -> None:
        index = np.zeros((3, bucket.tokens), dtype=np.int64)
        index[2] = self._kv.scratch_slot
        index[:, : batch.num_tokens] = batch.index[:, : batch.num_tokens]
        self._index_of(bucket).copy_(torch.from_numpy(index), non_blocking=True)

    def _index_of(self, bucket: Bucket) -> Tensor:
        """Token ids, positions and slots [3, tokens]: contiguous, so that they come in one copy."""
        return self._index[: 3 * bucket.tokens].view(3, bucket.tokens)

    def _record(self, bucket: Bucket) -> None:
        token_ids, positions, slots = self._index_of(bucket).zero_()
        slots.fill_(self._kv.scratch_slot)
        tables = self._room.tables(bucket, slots, positions)
        attend = Paged(self._kv.layers, slots, tables.run)

        def step() -> None:
            hidden, kept = self._model.forward(token_ids, positions, attend, self.hidden_layers)
            self._keep(hidden, kept)

        self._recorded[bucket] = tables, self._recorder.record(step)

    def _keep(self, hidden: Tensor, layers: dict[int, Tensor]) -> None:
        """Copy what a step leaves to where all steps leave it."""
        if self._hidden is None:
            most = self._tiers[-1]
            self._hidden = hidden.new_zeros(most, hidden.shape[1])
            self._layers = {layer: rows.new_zeros(most, rows.shape[1]) for layer, rows in layers.items()}
        self._hidden[: len(hidden)].copy_(hidden)
        for layer, rows in layers.items():
            self._layers[layer][: len(rows)].copy_(rows)


def why_not(config: EngineConfig, runner: ModelRunner) -> str | None:
    """Why no step of this model can be recorded here; None where they can."""
    if config.enforce_eager:
        return "--enforce-eager"
    if runner.device.type != "cuda":
        return f"the device is {runner.device.type}"
    if config.tensor_parallel_size > 1:
        return "the ranks of a model that is split talk to each other in every layer"
    if not isinstance(runner.model, Decoder):
        return "only the native decoder is known to do nothing on the host between its layers"
    if not isinstance(runner.attention, Recordable):
        return f"attention_backend {runner.attention.name} plans every step on the host"
    return None


def make_graphs(
    config: EngineConfig,
    shape: ModelConfig,
    runner: ModelRunner,
    hidden_layers: tuple[int, ...] = (),
    recorder: Recorder | None = None,
) -> Graphs | None:
    """For an engine of this configuration, nothing recorded yet; None where no step is recorded (`why_not`).

    `recorder`: of a device that is none (tests).
    """
    reason = why_not(config, runner) if recorder is None else None
    model, attention = runner.model, runner.attention
    if reason is not None or not isinstance(model, Decoder) or not isinstance(attention, Recordable):
        return None
    nodes = _most_nodes(config)
    longest = min(config.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings) + 1 + nodes
    buckets = make_buckets(config.max_num_seqs, config.max_num_batched_tokens, nodes)
    recorder = recorder or CudaRecorder(runner.device)
    return Graphs(model, runner.kv, attention, buckets, longest, recorder, hidden_layers)


def _most_nodes(config: EngineConfig) -> int:
    """Draft nodes that a sequence may have in a step."""
    if config.policy == "off" or not set(config.drafters) - {"none"}:
        return 0
    return config.max_budget if config.policy == "goodput" else config.budget
