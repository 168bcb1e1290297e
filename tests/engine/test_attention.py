"""The planned, batched CPU attention against the definition in kernels/reference.py, on ragged batches of chunks and trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.reference import SPAN, ReferenceAttention
from engine.models.batch import ForwardBatch
from engine.plan import Row
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from kernels import reference

HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 8, 4
CPU = torch.device("cpu")

trees = st.lists(st.integers(0, 10**6), max_size=7)  # entry i picks the parent of node i + 1
members = st.tuples(st.integers(0, SPAN + 20), st.integers(1, SPAN // 2), st.none() | trees)


def build(shapes: list[tuple[int, int, list[int] | None]], rng: np.random.Generator) -> tuple[ForwardBatch, list[list[int]], int]:
    """Sequences of (context, uncomputed tokens, tree or None for a chunk that is not judged), over shuffled blocks."""
    seqs, rows, parents, indices = [], [], [], []
    needed = [-(-(context + new + len(tree or [])) // BLOCK) for context, new, tree in shapes]
    blocks = rng.permutation(sum(needed) + 3).tolist()
    for i, (context, new, tree) in enumerate(shapes):
        prompt = rng.integers(0, 50, context + new + (tree is None)).tolist()
        seq = Sequence(i, Request(request_id=str(i), prompt_ids=prompt, params=SamplingParams(max_tokens=4)))
        seq.block_ids = [blocks.pop() for _ in range(needed[i])]
        seqs.append(seq)
        rows.append(Row(i, context, new, len(tree or []), [], False))
        if tree is None:
            indices.append(-1)
            continue
        indices.append(len(parents))
        tokens = [prompt[-1], *rng.integers(0, 50, len(tree)).tolist()]
        parents.append((tokens, [-1, *(pick % (node + 1) for node, pick in enumerate(tree))]))
    forest = DraftForest.from_parents(parents)
    batch = ForwardBatch.build(seqs, rows, forest, indices, BLOCK, CPU)
    return batch, [seq.block_ids for seq in seqs], sum(needed) + 3


def definition(batch: ForwardBatch, kv: torch.Tensor, q: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    reference.write_kv(kv, new, batch.slots)
    tables = torch.zeros(len(batch.num_rows), max(map(len, batch.block_tables)), dtype=torch.int64)
    for i, table in enumerate(batch.block_tables):
        tables[i, : len(table)] = torch.tensor(table)
    seen = torch.zeros(batch.num_tokens, max(batch.num_rows), dtype=torch.bool)
    for first, count, tree in zip(batch.first_rows, batch.num_rows, batch.ancestors, strict=True):
        own = torch.ones(count, count, dtype=torch.bool).tril() if tree is None else torch.from_numpy(tree)
        seen[first : first + count, :count] = own
    cu_q = torch.tensor([*batch.first_rows, batch.num_tokens])
    return reference.tree_attention(q, kv, tables, cu_q, torch.tensor(batch.context_lens), seen, SIZE**-0.5)


def run(batch: ForwardBatch, num_blocks: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    kv = torch.randn(num_blocks, 2, KV_HEADS, BLOCK, SIZE).to(dtype)
    q = torch.randn(batch.num_tokens, HEADS, SIZE).to(dtype)
    new = torch.randn(batch.num_tokens, 2, KV_HEADS, SIZE).to(dtype)
    expected = definition(batch, kv.clone(), q, new)
    attention = ReferenceAttention(HEADS, KV_HEADS, SIZE, BLOCK, dtype, None)
    attention.plan(batch)
    return attention.run(kv, q, new, SIZE**-0.5).view_as(q), expected


@settings(max_examples=60, deadline=None)
@given(st.lists(members, min_size=1, max_size=6), st.integers(0, 2**31))
def test_every_batch_equals_the_definition(shapes: list[tuple[int, int, list[int] | None]], seed: int) -> None:
    batch, _, num_blocks = build(shapes, np.random.default_rng(seed))
    out, expected = run(batch, num_blocks)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 16])
def test_bfloat16_stays_near_the_definition(count: int) -> None:
    """One sequence, and sixteen of which some need another span of keys."""
    batch, _, num_blocks = build([(100 + i, 1, [0, 0, 1]) for i in range(count)], np.random.default_rng(0))
    out, expected = run(batch, num_blocks, torch.bfloat16)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_sequence_reads_a_block_of_another(dtype: torch.dtype) -> None:
    """What shares the step and every block that nobody holds are NaN; keys are rounded up to more than a short table has."""
    batch, tables, num_blocks = build([(20, 3, None), (6, 1, [0, 0]), (3, 1, []), (140, 2, [0])], np.random.default_rng(2))
    attention = ReferenceAttention(HEADS, KV_HEADS, SIZE, BLOCK, dtype, None)
    torch.manual_seed(0)
    q = torch.randn(batch.num_tokens, HEADS, SIZE).to(dtype)
    new = torch.randn(batch.num_tokens, 2, KV_HEADS, SIZE).to(dtype)
    for own, first, count in zip(tables, batch.first_rows, batch.num_rows, strict=True):
        kv = torch.full((num_blocks, 2, KV_HEADS, BLOCK, SIZE), torch.nan, dtype=dtype)
        kv[own] = 0.5
        attention.plan(batch)
        assert attention.run(kv, q, new, SIZE**-0.5)[first : first + count].isfinite().all()


def test_a_sliding_window_hides_older_keys() -> None:
    batch, _, num_blocks = build([(30, 5, None), (3, 1, [0, 1])], np.random.default_rng(1))
    torch.manual_seed(0)
    kv = torch.randn(num_blocks, 2, KV_HEADS, BLOCK, SIZE)
    q, new = torch.randn(batch.num_tokens, HEADS, SIZE), torch.randn(batch.num_tokens, 2, KV_HEADS, SIZE)
    windowed = ReferenceAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, 8)
    windowed.plan(batch)
    out = windowed.run(kv, q, new, 1.0)
    for row in range(5):  # position 30 + row sees positions 23 + row ... 30 + row
        table = torch.tensor(batch.block_tables[0])
        dense = kv[table].permute(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, SIZE)[:, :, 23 + row : 31 + row]
        keys, values = (part.repeat_interleave(HEADS // KV_HEADS, 0) for part in dense)
        expected = torch.nn.functional.scaled_dot_product_attention(q[row][:, None], keys, values, scale=1.0)
        torch.testing.assert_close(out[row].view(HEADS, 1, SIZE), expected, rtol=1e-5, atol=1e-5)


def test_positions_count_depth_and_slots_count_nodes() -> None:
    batch, tables, _ = build([(6, 2, [0, 0, 2])], np.random.default_rng(2))  # root at position 7; children 1, 2; 3 below 2
    assert batch.positions.tolist() == [6, 7, 8, 8, 9]
    assert batch.slots.tolist() == [tables[0][p // BLOCK] * BLOCK + p % BLOCK for p in range(6, 11)]
    assert batch.node_rows.tolist() == [1, 2, 3, 4]
