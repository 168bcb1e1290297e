"""Attention of plain decoding and of draft trees over a paged cache, beside torch's own and flashinfer's, on the same numbers.

torch's attention gets dense keys, which a server does not have, and its query heads folded into rows, which is its fastest form
for grouped heads. flashinfer reads the very same pages; its plan is made beforehand, as ours is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device_clock import Arm
from bench.kernel_case import FIXED, OWN, Case, Maker, Sizes
from engine.deterministic import part_keys
from kernels import reference
from kernels.tree_attention import tree_attention

MOST_MASK = 1 << 30  # bytes of one flashinfer mask
WORKSPACE = 256 << 20  # bytes, flashinfer's


class Pool:
    """Pages of random keys and values [N, 2, K, S, D], as many as the largest case needs; made once it is asked for."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self._kv: Tensor | None = None

    def pages(self, batch: int, length: int) -> int:
        return batch * -(-length // self.sizes.block_size)

    def kv(self) -> Tensor:
        if self._kv is None:
            model, size = self.sizes.model, self.sizes.block_size
            most = max(self.pages(batch, context + 1 + nodes) for batch, context, nodes in _shapes(self.sizes))
            shape = (most, 2, model.num_kv_heads, size, model.head_dim)
            self._kv = torch.empty(shape, dtype=self.sizes.dtype, device=self.device).normal_()
        return self._kv


def _shapes(sizes: Sizes) -> Iterator[tuple[int, int, int]]:
    for context, batch, nodes in itertools.product(sizes.contexts, sizes.batches, sizes.nodes):
        if batch * (context + 1 + nodes) <= sizes.most_tokens:
            yield batch, context, nodes


def makers(sizes: Sizes, device: torch.device) -> Iterator[Maker]:
    pool = Pool(sizes, device)
    for batch, context, nodes in _shapes(sizes):
        yield partial(attention, pool, batch, context, nodes)


def attention(pool: Pool, batch: int, context: int, nodes: int) -> Case:
    """`batch` sequences of `context` committed tokens, each with a root and `nodes` drafts below it, two children to a node."""
    sizes, device = pool.sizes, pool.device
    model, rows = sizes.model, 1 + nodes
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim
    length, kv = context + rows, pool.kv()
    pages = -(-length // sizes.block_size)
    q = torch.randn(batch * rows, heads, size, device=device).to(sizes.dtype)
    tables = torch.randperm(batch * pages, device=device).int().view(batch, pages)
    tree = _tree(rows)
    depth = tree.sum(1) - 1
    told = {
        "block_tables": tables,
        "cu_q": torch.arange(batch + 1, dtype=torch.int32, device=device) * rows,
        "context_lens": torch.full((batch,), context, dtype=torch.int32, device=device),
        "ancestors": reference.pack_words(tree).repeat(batch, 1).to(device) if nodes else None,
        "roots": torch.zeros(batch, dtype=torch.int32, device=device) if nodes else None,
        "positions": (context + depth).repeat(batch).to(device),
        "max_rows": rows,
        "max_keys": length,
    }
    scale = size**-0.5
    fixed = {"fixed_split": part_keys(model.max_position_embeddings), "paths": _paths(tree).repeat(batch, 1).to(device)}
    arms = {
        OWN: Arm(lambda: tree_attention(q, kv, scale=scale, **told)),  # type: ignore[arg-type]  # one dict of many types
        FIXED: Arm(lambda: tree_attention(q, kv, scale=scale, **told, **fixed)),  # type: ignore[arg-type]
        "sdpa": _sdpa(q, kv, batch, length, tree if nodes else None, scale),
    }
    if find_spec("flashinfer") is not None and batch * rows * length <= MOST_MASK:
        arms["flashinfer"] = _flashinfer(q, kv, tables, length, tree if nodes else None, scale)
    moved = batch * length * 2 * kv_heads * size + 2 * q.numel()
    return Case(
        kernel="tree_attention",
        shape={"model": sizes.name, "batch": batch, "context": context, "nodes": nodes},
        bytes=moved * q.element_size(),
        flops=4 * heads * size * batch * int(rows * context + tree.sum()),
        arms=arms,
    )


def _tree(rows: int) -> Tensor:
    """Who sees whom [rows, rows] bool: node i hangs below node (i - 1) // 2."""
    seen = torch.eye(rows, dtype=torch.bool)
    for node in range(1, rows):
        seen[node] |= seen[(node - 1) // 2]
    return seen


def _paths(tree: Tensor) -> Tensor:
    """[rows, depth] int32: the nodes that each one sees, in order; behind itself anything."""
    deepest = int(tree.sum(1).max())
    return (~tree).int().argsort(dim=1, stable=True)[:, :deepest].int()


def _sdpa(q: Tensor, kv: Tensor, batch: int, length: int, tree: Tensor | None, scale: float) -> Arm:
    """As many dense keys and values as the pages hold, cut out of the same memory."""
    _, _, kv_heads, _, size = kv.shape
    count = batch * kv_heads * length * size
    flat = kv.view(-1)
    k, v = (flat[i * count : (i + 1) * count].view(batch, kv_heads, length, size) for i in range(2))
    rows, per_head = len(q) // batch, q.shape[1] // kv_heads
    folded = q.view(batch, rows, kv_heads, per_head, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    mask = None
    if tree is not None:
        seen = torch.cat((torch.ones(rows, length - rows, dtype=torch.bool), tree), 1).repeat(per_head, 1)
        # Added to the scores, as torch would have it in the end, in rows that begin at 16 bytes: it then makes no copy of it.
        hidden = F.pad(~seen, (0, -length % 16), value=True)
        added = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf")).to(q.device)
        mask = added[:, :length].expand(batch, kv_heads, -1, -1)
    return Arm(lambda: F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale))


def _flashinfer(q: Tensor, kv: Tensor, tables: Tensor, length: int, tree: Tensor | None, scale: float) -> Arm:
    import flashinfer

    batch, pages = tables.shape
    _, _, kv_heads, block_size, size = kv.shape
    rows, device = len(q) // batch, q.device
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    last = torch.full((batch,), (length - 1) % block_size + 1, dtype=torch.int32, device=device)
    where = (starts * pages, tables.flatten(), last, q.shape[1], kv_heads, size, block_size)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    kinds = {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": kv.dtype}
    if tree is None:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*where, **kinds)
    else:
        seen = torch.cat((torch.ones(rows, length - rows, dtype=torch.bool), tree), 1).flatten().repeat(batch).to(device)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(starts * rows, *where, custom_mask=seen, **kinds)
    return Arm(lambda: wrapper.run(q, kv))
