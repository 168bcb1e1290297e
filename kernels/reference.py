"""The plain-torch twin of every kernel: the definition of "correct", and what the CPU backend runs.

Legend of shape suffixes: T fed rows of a step (all sequences together), B sequences, H query heads, K key/value heads,
G = H / K, D head size, L keys, N blocks in the pool, S tokens per block, W blocks in a block table, M moved tokens.

The KV pool of one layer is `kv [N, 2, K, S, D]` (keys, then values), which is FlashInfer's combined HND layout: one
head's keys of one block are contiguous, so a context is gathered in whole pieces of S * D elements. A slot is
`block * S + offset`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] / sqrt(mean(x^2) + eps) * weight [C]; computed in float32, rounded once, to x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of x, residual [T, C]; the sum is rounded to their dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate qk [T, heads, D] in place. cos, sin [T, 1, D]; sin carries the sign of rotate-half: its first half is negated."""
    rows, heads, size = qk.shape
    swapped = qk.view(rows, heads, 2, size // 2).flip(2).view(rows, heads, size)
    return qk.mul_(cos).addcmul_(swapped, sin)


def rope_write_kv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv: Tensor,
    slots: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """QK norm, rotation and cache write of one layer's qkv [T, (H + 2 K) * D]; rotates its queries in place, returns [T, H, D].

    cos, sin [P, 1, D] of all positions; positions, slots [T]; kv [N, 2, K, S, D]. A row with a negative slot is not stored.
    """
    num_kv_heads, _, size = kv.shape[2:]
    heads = num_heads + num_kv_heads
    qk = qkv[:, : heads * size].reshape(-1, heads, size).clone()
    if q_weight is not None and k_weight is not None:
        qk[:, :num_heads] = rms_norm(qk[:, :num_heads], q_weight, eps)
        qk[:, num_heads:] = rms_norm(qk[:, num_heads:], k_weight, eps)
    rope_(qk, cos[positions], sin[positions])
    new = torch.cat((qk[:, num_heads:], qkv[:, heads * size :].reshape(-1, num_kv_heads, size)), 1)
    stored = slots >= 0
    write_kv(kv, new[stored].unflatten(1, (2, num_kv_heads)).to(kv.dtype), slots[stored])
    queries = qkv[:, : num_heads * size].unflatten(1, (num_heads, size))
    return queries.copy_(qk[:, :num_heads])


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[:, :I]) * x[:, I:] for x [T, 2 * I]: the gate's half first."""
    half = x.shape[-1] // 2
    return F.silu(x[:, :half]).mul_(x[:, half:])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N]; summed in float32, rounded once, to x's dtype."""
    out = F.linear(x.float(), weight.float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def kv_rows(slots: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """Rows of `kv.view(-1, D)` that hold the given slots [T]: [T, 2, K], in the order of `k` and `v` heads."""
    block, offset = slots // block_size, slots % block_size
    heads = torch.arange(2 * num_kv_heads, device=slots.device)
    rows = (block[:, None] * (2 * num_kv_heads) + heads) * block_size + offset[:, None]
    return rows.view(-1, 2, num_kv_heads)


def write_kv(kv: Tensor, new: Tensor, slots: Tensor, kv_scale: Tensor | None = None) -> None:
    """Store new [T, 2, K, D] (keys and values of the fed rows) at slots [T] of kv [N, 2, K, S, D]; a negative slot: nowhere.

    kv_scale [2, K] float32, where kv is float8: what is stored is new / kv_scale, within the type's range.
    """
    if kv_scale is not None:
        most = torch.finfo(kv.dtype).max
        new = (new.float() / kv_scale[..., None]).clamp(-most, most)
    stored = slots >= 0
    rows = kv_rows(slots[stored], kv.shape[2], kv.shape[3])
    bits = _bits(kv)
    fresh = _bits(new[stored].to(kv.dtype))
    bits.view(-1, kv.shape[-1]).index_copy_(0, rows.view(-1), fresh.reshape(-1, kv.shape[-1]))


def commit_kv(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Pack accepted paths: copy slots source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D].

    All rows are read before any is written; source and target may overlap (a parallel copy in place would race).
    """
    block_size, kv = kv.shape[4], _bits(kv)
    moved = kv[:, source // block_size, :, :, source % block_size]
    kv[:, target // block_size, :, :, target % block_size] = moved


def copy_blocks(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D]; no block is in both."""
    _bits(kv)[:, target] = _bits(kv)[:, source]


def _bits(kv: Tensor) -> Tensor:
    """The same memory as bytes where it is float8, which few operators know."""
    return kv.view(torch.uint8) if kv.dtype.itemsize == 1 else kv


def pack_words(mask: Tensor) -> Tensor:
    """bool [..., n] -> int32 words [..., ceil(n / 32)]: bit j % 32 of word j // 32 is mask[..., j]."""
    bits = F.pad(mask, (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return (bits.long() << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """int32 words [..., W] -> bool [..., 32 * W]."""
    return (words[..., None] >> torch.arange(32, device=words.device, dtype=torch.int32) & 1).bool().flatten(-2)


def tree_mask(parent: Tensor, start: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Depth [N] and ancestors (itself among them) as words [N, num_words] of every tree node, int32 both.

    parent [N] int32: index inside the own tree, -1 for a root; tree b owns nodes start[b] : start[b + 1] (int32 [B + 1]), parents
    before children, at most 32 * num_words of them.
    """
    depth = torch.zeros(len(parent), dtype=torch.int32, device=parent.device)
    seen = torch.zeros(len(parent), 32 * num_words, dtype=torch.bool, device=parent.device)
    for begin, end in pairwise(start.tolist()):
        for node in range(begin, end):
            above = int(parent[node])
            if above >= 0:
                depth[node] = depth[begin + above] + 1
                seen[node] = seen[begin + above]
            seen[node, node - begin] = True
    return depth, pack_words(seen)


def tree_attention(
    q: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    cu_q: Tensor,
    context_lens: Tensor,
    ancestors: Tensor | None,
    scale: float,
    *,
    roots: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Paged attention of prompt chunks and draft trees; returns [T, H, D]. Rows that belong to no sequence come back as zeros.

    q [T, H, D]; kv [N, 2, K, S, D]; block_tables [B, W]; cu_q [B + 1]: sequence b owns rows cu_q[b] : cu_q[b + 1]; context_lens
    [B]: committed tokens before this step's rows, which every row sees. Row j of sequence b lies at position context_lens[b] + j
    of its block table. Its rows before roots[b] (int [B]; None: 0) are a causal chunk, and the others, its tree, see that chunk
    and of the tree what ancestors says: int32 words [T, words], bit i of row t: it sees row roots[b] + i (`tree_mask`, or bool
    [T, rows]). A prompt chunk without a tree has roots[b] = its number of rows; ancestors None: all are.

    window: a row sees the keys whose positions lie less than that many behind its own; positions [T] of the rows, by depth.
    soft_cap: scores become cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118). kv_scale [2, K] float32: of a float8 kv, which
    holds keys and values divided by it. One loop turn per sequence: this is the definition, not the fast path.
    """
    out = torch.zeros_like(q)
    num_kv_heads, block_size, size = kv.shape[2:]
    groups = q.shape[1] // num_kv_heads
    seen_nodes = unpack_words(ancestors) if ancestors is not None and ancestors.dtype == torch.int32 else ancestors
    for b in range(len(context_lens)):
        first, last, context = int(cu_q[b]), int(cu_q[b + 1]), int(context_lens[b])
        rows, length = last - first, context + last - first
        blocks = block_tables[b, : -(-length // block_size)].long()
        pages = _bits(kv)[blocks].view(kv.dtype).float()
        if kv_scale is not None:
            pages = pages * kv_scale[:, :, None, None]
        keys, values = pages.permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, size)[:, :, :length]
        seen = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(context)
        if seen_nodes is not None:
            root = 0 if roots is None else int(roots[b])
            seen[root:, context + root :] &= seen_nodes[first + root : last, : rows - root]
        if window is not None and positions is not None:
            own = positions[first:last].long()
            at = torch.cat((torch.arange(context, device=q.device), own))
            seen &= at > own[:, None] - window
        scores = q[first:last].transpose(0, 1).float() @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        out[first:last] = (weights @ values.repeat_interleave(groups, 0)).transpose(0, 1).to(q.dtype)
    return out
