"""FlashInfer's backend without FlashInfer: its wrapper's place is taken by one that attends to what its arrays say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.flashinfer import FlashInferAttention, unavailable
from engine.attention.reference import ReferenceAttention
from tests.engine.test_attention import BLOCK, CPU, HEADS, KV_HEADS, SIZE, build, definition

members = st.tuples(st.integers(0, 70), st.integers(1, 20), st.none() | st.lists(st.integers(0, 10**6), max_size=7))


class Wrapper:
    """What FlashInfer's documentation says of BatchPrefillWithPagedKVCacheWrapper, in loops. HND pages [N, 2, K, S, D]."""

    def __init__(self, workspace: Tensor, layout: str, backend: str = "auto") -> None:
        assert layout == "HND" and workspace.dtype == torch.uint8
        self.backend = backend

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, *, sm_scale: float, q_data_type: torch.dtype,
        kv_data_type: torch.dtype, custom_mask: Tensor | None = None, causal: bool = False, window_left: int = -1,
    ) -> None:  # fmt: skip
        batch = len(qo_indptr) - 1
        assert all(part.dtype == torch.int32 for part in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len))
        assert len(paged_kv_indptr) == batch + 1 and len(paged_kv_last_page_len) == batch
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert (custom_mask is None) == causal and (custom_mask is None or (window_left == -1 and self.backend == "fa2"))
        self.causal, self.window, self.scale, self.heads = causal, window_left, sm_scale, (num_qo_heads, num_kv_heads)
        self.indptr, self.kv_indptr, self.indices = qo_indptr.tolist(), paged_kv_indptr.tolist(), paged_kv_indices.long()
        self.last, self.page_size = paged_kv_last_page_len.tolist(), page_size
        assert all(1 <= last <= page_size for last in self.last)
        self.bits: list[np.ndarray] = []
        if custom_mask is not None:
            assert custom_mask.dtype == torch.bool and custom_mask.device == qo_indptr.device
            begins = np.cumsum([0, *((self._rows(b)) * self._keys(b) for b in range(batch))])
            assert len(custom_mask) == begins[-1]
            flat = custom_mask.numpy()
            # One packed segment a sequence, its bits from the lowest: as FlashInfer packs it.
            self.bits = [np.packbits(flat[a:b], bitorder="little") for a, b in pairwise(begins)]

    def run(self, q: Tensor, pages: Tensor) -> Tensor:
        assert len(q) == self.indptr[-1]
        out = torch.empty_like(q)
        for b in range(len(self.last)):
            rows, keys = self._rows(b), self._keys(b)
            own = pages[self.indices[self.kv_indptr[b] : self.kv_indptr[b + 1]]]
            k, v = own.permute(1, 2, 0, 3, 4).reshape(2, self.heads[1], -1, q.shape[2])[:, :, :keys]
            k, v = (part.repeat_interleave(self.heads[0] // self.heads[1], 0) for part in (k, v))
            seen = torch.tensor([[self._sees(b, row, key, rows, keys) for key in range(keys)] for row in range(rows)])
            queries = q[self.indptr[b] : self.indptr[b + 1]].transpose(0, 1)
            scores = (queries @ k.transpose(1, 2) * self.scale).masked_fill(~seen, -torch.inf)
            out[self.indptr[b] : self.indptr[b + 1]] = (scores.softmax(-1) @ v).transpose(0, 1)
        return out

    def _rows(self, b: int) -> int:
        return self.indptr[b + 1] - self.indptr[b]

    def _keys(self, b: int) -> int:
        return (self.kv_indptr[b + 1] - self.kv_indptr[b] - 1) * self.page_size + self.last[b]

    def _sees(self, b: int, row: int, key: int, rows: int, keys: int) -> bool:
        if self.bits:
            bit = row * keys + key
            return bool(self.bits[b][bit // 8] >> bit % 8 & 1)
        place = keys - rows + row
        return key <= place and (self.window < 0 or key >= place - self.window)


def backend(window: int | None = None) -> FlashInferAttention:
    return FlashInferAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, window, CPU, Wrapper)


def inputs(batch: Any, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = len(batch.slots)
    return torch.randn(num_blocks, 2, KV_HEADS, BLOCK, SIZE), torch.randn(rows, HEADS, SIZE), torch.randn(rows, 2, KV_HEADS, SIZE)


@settings(max_examples=25, deadline=None)
@given(st.lists(members, min_size=1, max_size=4), st.integers(0, 2**31))
def test_every_batch_equals_the_definition(shapes: list[tuple[int, int, list[int] | None]], seed: int) -> None:
    batch, _, num_blocks = build(shapes, np.random.default_rng(seed))
    kv, q, new = inputs(batch, num_blocks)
    expected_kv = kv.clone()
    expected = definition(batch, expected_kv, q, new)
    attention = backend()
    attention.plan(batch)
    found = attention.run(kv, q, new, SIZE**-0.5)
    torch.testing.assert_close(found.view_as(q), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kv, expected_kv)


@pytest.mark.parametrize("shapes", [[(30, 5, None)], [(30, 5, None), (33, 1, [0, 1, 0, 2]), (2, 1, [])]])
def test_a_window_is_the_reference_backends(shapes: list[tuple[int, int, list[int] | None]]) -> None:
    """FlashInfer's own for chains; in the mask where trees branch, as it counts from a row's depth."""
    batch, _, num_blocks = build(shapes, np.random.default_rng(1))
    results = []
    for attention in (backend(8), ReferenceAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, 8)):
        kv, q, new = inputs(batch, num_blocks)
        attention.plan(batch)
        results.append(attention.run(kv, q, new, 0.3))  # not the scale that was planned with
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_padding_rows_come_back_as_zeros() -> None:
    batch, _, num_blocks = build([(9, 1, [0, 0, 1])], np.random.default_rng(2))
    for name in ("token_ids", "positions", "slots"):
        setattr(batch, name, torch.cat((getattr(batch, name), torch.zeros(3, dtype=torch.int64))))
    batch.slots[-3:] = (num_blocks - 1) * BLOCK
    attention = backend()
    attention.plan(batch)
    out = attention.run(*inputs(batch, num_blocks), SIZE**-0.5)
    assert out.shape == (7, HEADS * SIZE) and not out[4:].any() and out[:4].all()


def test_both_kinds_of_kernels_are_made_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run = Wrapper.run
    monkeypatch.setattr(Wrapper, "run", lambda self, q, pages: (ran.append(self.backend), run(self, q, pages))[1])
    kv = torch.ones(3, 2, KV_HEADS, BLOCK, SIZE)
    backend().warm_up(kv)
    assert ran == ["auto", "fa2"]
    assert kv[1:].all()


def test_where_it_cannot_be_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.attention.flashinfer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^attention_backend: flashinfer is not installed"):
        FlashInferAttention(HEADS, KV_HEADS, 64, BLOCK, torch.bfloat16, None, torch.device("cuda"))
    monkeypatch.setattr("engine.attention.flashinfer.find_spec", lambda name: name)
    cuda = torch.device("cuda")
    assert unavailable(64, torch.bfloat16, CPU) == "runs on GPUs only"
    assert unavailable(64, torch.float32, cuda) == "has no form for heads of 64 in float32"
    assert unavailable(80, torch.float16, cuda) == "has no form for heads of 80 in float16"
    assert unavailable(128, torch.float16, cuda) is None


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 200])
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (8, 4, 256)])
def test_a_gpu_gives_what_the_reference_backend_does(heads: tuple[int, int, int], window: int | None) -> None:
    pytest.importorskip("flashinfer")
    num_heads, kv_heads, size = heads
    device, dtype = torch.device("cuda"), torch.bfloat16
    shape = (num_heads, kv_heads, size, BLOCK, dtype, window)
    backends = (FlashInferAttention(*shape, device), ReferenceAttention(*shape))
    kinds: list[list[tuple[int, int, list[int] | None]]] = [
        [(1000, 1, [0, 0, 1, 1, 3]), (5, 300, None), (77, 1, [])],
        [(4000, 1, [])] * 9,
        [(0, 512, None)],
    ]
    for shapes in kinds:
        batch, _, num_blocks = build(shapes, np.random.default_rng(0))
        for name in ("token_ids", "positions", "slots"):
            setattr(batch, name, getattr(batch, name).to(device))
        torch.manual_seed(0)
        pool = torch.randn(num_blocks, 2, kv_heads, BLOCK, size, device=device).to(dtype)
        qkv = torch.randn(batch.num_tokens, num_heads + 2 * kv_heads, size, device=device).to(dtype)
        new = qkv[:, num_heads:].view(-1, 2, kv_heads, size)
        results = []
        for attention in backends:
            kv = pool.clone()
            attention.plan(batch)
            results.append((attention.run(kv, qkv[:, :num_heads], new, size**-0.5).float(), kv))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0.05, atol=0.05)
        assert torch.equal(results[0][1], results[1][1])
