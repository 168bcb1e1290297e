"""The other kernels of a step: the cache, a layer's small operations, linear layers, sampling and verification.

Each beside what torch offers for the same work, where it offers anything; tensors are random, and of the model's own sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device_clock import Arm
from bench.kernel_case import OWN, Case, Maker, Sizes
from kernels import act, commit_kv, linear, norm, quant_linear, reference, rope, sample, truncate, verify, write_kv
from kernels.quant_weight import QuantWeight

FORMATS = ("Q4_1", "Q8_0", "float8")
TOP_K, TOP_P, MIN_P = 50, 0.95, 0.02
MOST_JUDGED = 1024  # rows of logits: half a gigabyte of Llama 3's vocabulary


def makers(sizes: Sizes, device: torch.device) -> Iterator[Maker]:
    made = Made(sizes, device)
    for make in (made.write_kv, made.rope_write_kv, made.rms_norm, made.add_rms_norm, made.silu_mul):
        yield from (partial(make, rows) for rows in sizes.rows)
    yield from (partial(made.commit_kv, moved) for moved in sizes.rows)
    for outputs, inputs in made.weights():
        yield from (partial(made.linear, rows, outputs, inputs) for rows in sizes.rows)
        for name, rows in itertools.product(FORMATS, sizes.rows):
            if rows <= 64:
                yield partial(made.quant_linear, rows, name, outputs, inputs)
    for make in (made.gumbel_argmax, made.truncate):
        yield from (partial(make, rows) for rows in sizes.rows)
    for batch, nodes in itertools.product(sizes.batches, sizes.nodes):
        if nodes and batch * (1 + nodes) <= MOST_JUDGED:
            yield partial(made.match_verify, batch, nodes)


class Made:
    """Makes the cases of one model on one device."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.model, self.device, self.dtype = sizes, sizes.model, device, sizes.dtype

    def weights(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's matrices, fused as they are, and of the head."""
        m = self.model
        queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
        layer = [(queries + 2 * keys, m.hidden_size), (m.hidden_size, queries), (2 * m.intermediate_size, m.hidden_size)]
        return list(dict.fromkeys([*layer, (m.hidden_size, m.intermediate_size), (m.vocab_size, m.hidden_size)]))

    def write_kv(self, rows: int) -> Case:
        kv, slots = self._pool(rows), self._slots(rows)
        new = self._random(rows, 2, self.model.num_kv_heads, self.model.head_dim)
        arms = self._arms(lambda: write_kv.write_kv(kv, new, slots), lambda: self._put(kv, new, slots))
        return self._case("write_kv", {"rows": rows}, 2 * self._bytes(new) + self._bytes(slots), arms)

    def rope_write_kv(self, rows: int) -> Case:
        m = self.model
        kv, slots = self._pool(rows), self._slots(rows)
        qkv = self._random(rows, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim)
        cos, sin = (self._random(4096, 1, m.head_dim) for _ in range(2))
        positions = torch.randint(0, 4096, (rows,), device=self.device)
        args = (qkv, cos, sin, positions, kv, slots, m.num_heads)
        heads, split = m.num_heads + m.num_kv_heads, m.num_heads * m.head_dim

        def twin() -> None:
            qk = qkv[:, : heads * m.head_dim].view(rows, heads, m.head_dim)
            reference.rope_(qk, cos.index_select(0, positions), sin.index_select(0, positions))
            self._put(kv, qkv[:, split:].view(rows, 2, m.num_kv_heads, m.head_dim), slots)

        arms = self._arms(lambda: rope.rope_write_kv_(*args), twin)
        least = 2 * self._bytes(qkv) + 2 * rows * m.head_dim * qkv.element_size() + self._bytes(slots, positions)
        return self._case("rope_write_kv", {"rows": rows}, least, arms)

    def commit_kv(self, moved: int) -> Case:
        m = self.model
        kv = self._random(m.num_layers, *self._pool_shape(2 * moved))
        places = torch.randperm(2 * moved, device=self.device).int()
        source, target = places[:moved], places[moved:]
        wide = source.long(), target.long()
        arms = self._arms(lambda: commit_kv.commit_kv(kv, source, target), lambda: reference.commit_kv(kv, *wide))
        least = 4 * m.num_layers * moved * m.num_kv_heads * m.head_dim * kv.element_size()
        return self._case("commit_kv", {"layers": m.num_layers, "moved": moved}, least, arms)

    def rms_norm(self, rows: int) -> Case:
        x, weight = self._random(rows, self.model.hidden_size), self._random(self.model.hidden_size)
        arms = self._arms(lambda: norm.rms_norm(x, weight, 1e-5), lambda: F.rms_norm(x, weight.shape, weight, 1e-5))
        return self._case("rms_norm", {"rows": rows, "columns": x.shape[1]}, 2 * self._bytes(x) + self._bytes(weight), arms)

    def add_rms_norm(self, rows: int) -> Case:
        x, residual = (self._random(rows, self.model.hidden_size) for _ in range(2))
        weight = self._random(self.model.hidden_size)

        def twin() -> Tensor:
            return F.rms_norm(x + residual, weight.shape, weight, 1e-5)

        arms = self._arms(lambda: norm.add_rms_norm(x, residual, weight, 1e-5), twin)
        least = 4 * self._bytes(x) + self._bytes(weight)
        return self._case("add_rms_norm", {"rows": rows, "columns": x.shape[1]}, least, arms)

    def silu_mul(self, rows: int) -> Case:
        x = self._random(rows, 2 * self.model.intermediate_size)
        arms = self._arms(lambda: act.silu_mul(x), lambda: reference.silu_mul(x))
        return self._case("silu_mul", {"rows": rows, "columns": x.shape[1]}, self._bytes(x) * 3 // 2, arms)

    def linear(self, rows: int, outputs: int, inputs: int) -> Case:
        x, weight = self._random(rows, inputs), self._random(outputs, inputs)
        arms = self._arms(lambda: linear.linear(x, weight), lambda: F.linear(x, weight))
        least = self._bytes(x, weight) + rows * outputs * x.element_size()
        return self._case("linear", self._layer(rows, outputs, inputs), least, arms, 2 * rows * outputs * inputs)

    def quant_linear(self, rows: int, name: str, outputs: int, inputs: int) -> Case:
        """Beside the dense product in the activations' type: what quantizing saves, not the same bytes."""
        weight, x, dense = self._quantized(name, outputs, inputs), self._random(rows, inputs), self._random(outputs, inputs)
        arms = self._arms(lambda: quant_linear.linear(x, weight), lambda: F.linear(x, dense))
        parts = [part for part in (weight.packed, weight.scales, weight.offsets, x) if part is not None]
        least = self._bytes(*parts) + rows * outputs * x.element_size()
        shape = {"format": name, **self._layer(rows, outputs, inputs)}
        return self._case("quant_linear", shape, least, arms, 2 * rows * outputs * inputs)

    def gumbel_argmax(self, rows: int) -> Case:
        scores, address = torch.randn(rows, self.model.vocab_size, device=self.device), self._address(rows)
        every, noisy = self._ints(range(rows)), torch.ones(rows, dtype=torch.bool, device=self.device)
        arms = self._arms(lambda: sample.gumbel_argmax(scores, every, noisy, *address), lambda: scores.argmax(-1))
        return self._case("gumbel_argmax", {"rows": rows, "vocabulary": scores.shape[1]}, self._bytes(scores), arms)

    def truncate(self, rows: int) -> Case:
        source = torch.randn(rows, self.model.vocab_size, device=self.device) * 3
        scores = source.clone()
        top_k = torch.full((rows,), TOP_K, dtype=torch.int32, device=self.device)
        top_p, min_p = (torch.full((rows,), value, dtype=torch.float64, device=self.device) for value in (TOP_P, MIN_P))

        def sorting() -> Tensor:
            """top-k and top-p by torch's sort, min-p left out."""
            values, ids = scores.sort(-1, descending=True)
            law = values.softmax(-1)
            gone = law.cumsum(-1) - law > TOP_P
            gone[:, TOP_K:] = True
            return scores.scatter_(1, ids, values.masked_fill_(gone, float("-inf")))

        def prepare() -> Tensor:
            return scores.copy_(source)

        arms = {
            OWN: Arm(lambda: truncate.truncate_(scores, top_k, top_p, min_p), prepare),
            "torch": Arm(sorting, prepare),
        }
        return self._case("truncate", {"rows": rows, "vocabulary": scores.shape[1]}, 2 * self._bytes(scores), arms)

    def match_verify(self, batch: int, nodes: int) -> Case:
        """Chains of `nodes` drafts. torch's argmax alone stands beside it: the least that verifying takes there."""
        rows, each = batch * (1 + nodes), 1 + nodes
        scores, (seeds, samples, positions, _) = torch.randn(rows, self.model.vocab_size, device=self.device), self._address(rows)
        token = torch.randint(0, self.model.vocab_size, (rows,), device=self.device).int()
        parent = self._ints([node - 1 for node in range(each)] * batch)
        start = self._ints(range(0, rows + 1, each))
        noisy = torch.ones(rows, dtype=torch.bool, device=self.device)
        args = (scores, noisy, seeds, samples, positions, token, parent, start, each, nodes)
        arms = self._arms(lambda: verify.match_verify(*args), lambda: scores.argmax(-1))
        return self._case("match_verify", {"batch": batch, "nodes": nodes}, self._bytes(scores), arms)

    def _case(self, kernel: str, shape: dict[str, int | str], least: int, arms: dict[str, Arm], flops: int = 0) -> Case:
        return Case(kernel, {"model": self.sizes.name, **shape}, least, flops, arms)

    @staticmethod
    def _arms(own: Callable[[], object], other: Callable[[], object]) -> dict[str, Arm]:
        return {OWN: Arm(own), "torch": Arm(other)}

    @staticmethod
    def _layer(rows: int, outputs: int, inputs: int) -> dict[str, int | str]:
        return {"rows": rows, "outputs": outputs, "inputs": inputs}

    @staticmethod
    def _bytes(*tensors: Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_()

    def _ints(self, values: range | list[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.device)

    def _pool_shape(self, slots: int) -> tuple[int, ...]:
        size = self.sizes.block_size
        return -(-slots // size), 2, self.model.num_kv_heads, size, self.model.head_dim

    def _pool(self, slots: int) -> Tensor:
        return self._random(*self._pool_shape(slots))

    def _put(self, kv: Tensor, new: Tensor, slots: Tensor) -> None:
        kv[slots // self.sizes.block_size, :, :, slots % self.sizes.block_size] = new

    def _slots(self, rows: int) -> Tensor:
        return torch.randperm(rows, device=self.device)

    def _address(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """seeds, samples, positions, streams"""
        seeds = torch.randint(0, 1 << 62, (rows,), device=self.device)
        samples, positions, streams = (torch.zeros(rows, dtype=torch.int32, device=self.device) for _ in range(3))
        return seeds, samples, positions + 7, streams

    def _quantized(self, name: str, outputs: int, inputs: int) -> QuantWeight:
        """Random bytes in one of the layouts; as small as real weights."""
        if name == "float8":
            packed = (self._random(outputs, inputs).float() * 0.02).to(torch.float8_e4m3fn)
            return QuantWeight(packed, torch.ones(outputs, 1, device=self.device), inputs)
        scales = torch.rand(outputs, inputs // 32, device=self.device).half() * 1e-3
        if name == "Q8_0":
            return QuantWeight(torch.randint(-127, 128, (outputs, inputs), device=self.device).to(torch.int8), scales, 32)
        packed = torch.randint(0, 256, (outputs, inputs // 2), device=self.device).to(torch.uint8)
        return QuantWeight(packed, scales, 32, -8 * scales)
