"""Recursive rejection over a batch of draft trees: every tree walks down in one program, and one launch draws all last tokens.

    r = target law;  for each child: accept with probability min(1, r(x) / d(x)), else r = norm(max(r - d, 0))

with d the law of the child given its siblings before it (engine/recursion.py; core.md B.1, B.3, B.4): speculative sampling of
chains (arXiv 2211.17192), SpecInfer's multi-round rule (2305.09781), draws without replacement (2402.14160), deterministic
children. Coins are addressed by (seed, sample, position of the root, node). r lies in a scratch row per tree; between a pass
that writes it and one that reads it stands a barrier. Nothing waits for the device.

It is not split over programs: a visited node costs some passes over its row by one multiprocessor.
Twin: kernels.reference_sampling.recursive_verify.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox import coin
from kernels.sample import gumbel_argmax
from kernels.verify import tables

TILE = 4096
ONE_HOT, IID, DISTINCT, GREEDY = range(4)  # how a node was chosen: see engine.protocols.Siblings


@triton.jit
def _target(row, rest, vocab, TILE: tl.constexpr):
    """The target law of a row into rest [V]; False where the row is unusable."""
    peak = tl.full([], float("-inf"), tl.float32)
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        score = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.where(score != score, float("inf"), score), axis=0))
    usable = tl.abs(peak) < float("inf")
    if usable:
        total = tl.zeros([], tl.float32)
        for first in range(0, vocab, TILE):
            ids = first + tl.arange(0, TILE)
            score = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            total += tl.sum(tl.exp(score - peak), axis=0)
        for first in range(0, vocab, TILE):
            ids = first + tl.arange(0, TILE)
            score = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
            tl.store(rest + ids, tl.exp(score - peak) / total, mask=ids < vocab)
    tl.debug_barrier()
    return usable


@triton.jit
def _copy(source, target, vocab, TILE: tl.constexpr):
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        tl.store(target + ids, tl.load(source + ids, mask=ids < vocab, other=0.0), mask=ids < vocab)
    tl.debug_barrier()


@triton.jit
def _odds(q, left, ids, held, token, drawn, without):
    """The law of a child at some tokens: one-hot, or q, or without replacement what is left of it."""
    from_q = tl.load(q + ids, mask=held & drawn & (without == 0), other=0.0)
    from_left = tl.load(left + ids, mask=held & drawn & without, other=0.0)
    return tl.where(drawn, from_q + from_left, tl.where(ids == token, 1.0, 0.0))


@triton.jit
def _residual(rest, q, left, vocab, token, drawn, without, scale, TILE: tl.constexpr):
    """rest = norm(max(rest - scale * law of the child, 0)), or rest as it is where nothing would be left."""
    mass = tl.zeros([], tl.float32)
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        held = ids < vocab
        over = tl.load(rest + ids, mask=held, other=0.0) - scale * _odds(q, left, ids, held, token, drawn, without)
        mass += tl.sum(tl.where(over > 0, over, 0.0), axis=0)
    tl.debug_barrier()
    if mass > 1e-12:
        for first in range(0, vocab, TILE):
            ids = first + tl.arange(0, TILE)
            held = ids < vocab
            over = tl.load(rest + ids, mask=held, other=0.0) - scale * _odds(q, left, ids, held, token, drawn, without)
            tl.store(rest + ids, tl.where(over > 0, over, 0.0) / mass, mask=held)
    tl.debug_barrier()


@triton.jit
def _without(law, vocab, token, TILE: tl.constexpr):
    """Take a drawn token out of law [V] and normalise what is left; False where that is nothing."""
    mass = tl.zeros([], tl.float32)
    for first in range(0, vocab, TILE):
        ids = first + tl.arange(0, TILE)
        mass += tl.sum(tl.load(law + ids, mask=(ids < vocab) & (ids != token), other=0.0), axis=0)
    tl.debug_barrier()
    some = mass > 1e-12
    if some:
        for first in range(0, vocab, TILE):
            ids = first + tl.arange(0, TILE)
            left = tl.load(law + ids, mask=(ids < vocab) & (ids != token), other=0.0)
            tl.store(law + ids, left / mass, mask=ids < vocab)
    tl.debug_barrier()
    return some


@triton.jit(do_not_specialize=["depth", "most_sampled"])
def _recurse(
    scores,  # [M, V]
    laws,  # [K, V] float32
    law_row,  # [M]
    kind,  # [M]
    token,  # [M]
    parent,  # [M]
    start,  # [B + 1]
    trees,  # [R]
    seeds,  # [R]
    samples,
    positions,
    rests,  # [R, V] float32 scratch, in the end the scores that the last token is drawn from
    lefts,  # [R, V] float32 scratch: the law of the next sibling drawn without replacement
    nodes,  # [R, depth]
    tokens,  # [R, depth + 1]
    counts,  # [R]: accepted nodes
    last_positions,  # [R]
    stride,
    law_stride,
    vocab,
    depth,
    most_sampled,
    lenience,
    NODES: tl.constexpr,
    TILE: tl.constexpr,
):
    r = tl.program_id(0)
    tree = tl.load(trees + r)
    first = tl.load(start + tree)
    ids = tl.arange(0, NODES)
    held = ids < tl.load(start + tree + 1) - first
    carried = tl.load(token + first + ids, mask=held, other=-1)
    above = tl.load(parent + first + ids, mask=held, other=-2)
    seed, sample, position = tl.load(seeds + r), tl.load(samples + r), tl.load(positions + r)
    rest, left = rests + r.to(tl.int64) * vocab, lefts + r.to(tl.int64) * vocab
    none = NODES * NODES
    # Children of the nodes with the path so far, by when they are judged: those of the first such node, then its twins'.
    order = tl.where(above == 0, ids, none)
    leader = tl.zeros([], tl.int32)
    level = tl.zeros([], tl.int32)
    rejected = tl.zeros([], tl.int32)
    going = tl.full([], 1, tl.int32)
    while going != 0:
        rejected = tl.zeros([], tl.int32)
        accepted = tl.full([], -1, tl.int32)
        pending = order
        if not _target(scores + (first + leader).to(tl.int64) * stride, rest, vocab, TILE):
            pending = tl.where(ids >= 0, none, pending)
        sampled = tl.zeros([], tl.int32)
        parent_seen = tl.full([], -1, tl.int32)
        some_left = tl.full([], 1, tl.int32)
        key = tl.min(pending, axis=0)
        while key < none:
            child = key % NODES
            pending = tl.where(ids == child, none, pending)
            node = tl.load(parent + first + child)
            drawn = tl.load(token + first + child)
            q_row = tl.load(law_row + first + node)
            how = tl.load(kind + first + child).to(tl.int32)
            q = laws + tl.maximum(q_row, 0).to(tl.int64) * law_stride
            if node != parent_seen:
                parent_seen = node
                some_left = (q_row >= 0).to(tl.int32)
                if (q_row >= 0) & (how == 2):
                    _copy(q, left, vocab, TILE)
            own = (q_row >= 0) & (how != 0) & (some_left != 0)
            if how == 3:
                own = own & (tl.load(q + drawn) > 0)
            sampled += own.to(tl.int32)
            if (sampled <= most_sampled) | (own == 0):
                odds = _odds(q, left, drawn, drawn >= 0, drawn, own, how == 2)
                bar = coin(seed, sample, position, child) * (lenience * odds).to(tl.float64)
                if bar < tl.load(rest + drawn).to(tl.float64):
                    accepted = child
                else:
                    tl.debug_barrier()
                    _residual(rest, q, left, vocab, drawn, own, how == 2, lenience, TILE)
                    rejected = tl.full([], 1, tl.int32)
                    if own & (how == 2):
                        some_left = _without(left, vocab, drawn, TILE).to(tl.int32)
            key = tl.where(accepted >= 0, none, tl.min(pending, axis=0))
        going = (accepted >= 0).to(tl.int32)
        if accepted >= 0:
            drawn = tl.load(token + first + accepted)
            tl.store(tokens + r * (depth + 1) + level, drawn)
            level += 1
            leader = accepted
            twins = tl.where((carried == drawn) & (ids != accepted), order, none)
            order = tl.where(above == accepted, ids, none)
            twin = tl.min(twins, axis=0)
            ordinal = tl.full([], 1, tl.int32)
            while twin < none:
                same = twin % NODES
                order = tl.where(above == same, ordinal * NODES + ids, order)
                twins = tl.where(ids == same, none, twins)
                ordinal += 1
                twin = tl.min(twins, axis=0)
        else:
            row = scores + (first + leader).to(tl.int64) * stride
            tl.debug_barrier()
            for at in range(0, vocab, TILE):
                v = at + tl.arange(0, TILE)
                if rejected != 0:
                    last = tl.log(tl.load(rest + v, mask=v < vocab, other=0.0))
                else:
                    last = tl.load(row + v, mask=v < vocab, other=0.0).to(tl.float32)
                tl.store(rest + v, last, mask=v < vocab)
    # The path is the last node's own: above it a twin may stand where another was accepted.
    for i in range(level):
        tl.store(nodes + r * depth + level - 1 - i, leader)
        leader = tl.load(parent + first + leader)
    tl.store(counts + r, level)
    tl.store(last_positions + r, position + level)


@triton.jit(do_not_specialize=["depth"])
def _finish(drawn, nodes, tokens, counts, depth):
    """The last token behind each path; where its row is unusable, the path ends before the node of that row."""
    r = tl.program_id(0)
    count = tl.load(counts + r)
    last = tl.load(drawn + r)
    tl.store(tokens + r * (depth + 1) + count, last)
    tl.store(nodes + r * depth + count - 1, -1, mask=(last < 0) & (count > 0))
    tl.store(counts + r, count + (last >= 0).to(tl.int32))


def recursive_verify(
    scores: Tensor,
    law: Tensor,
    law_row: Tensor,
    kind: Tensor,
    token: Tensor,
    parent: Tensor,
    start: Tensor,
    trees: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
    max_nodes: int,
    max_depth: int,
    *,
    most_sampled: int = 1 << 30,
    lenience: float = 1.0,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nodes [R, max_depth], tokens [R, max_depth + 1], counts [R]) of R of the trees, as kernels.verify.match_verify gives them.

    scores [M, V] fp32, bf16 or fp16; law [K, V] float32, rows of any stride: children of node i were drawn from law[law_row[i]]
    (-1: they were chosen); kind [M] int8: how each node was chosen, ONE_HOT, IID, DISTINCT or GREEDY; token, parent [M] int32
    (-1: root), start [B + 1] int32. trees [R] int32: which; seeds [R] int64, samples, positions [R] int32 of their roots.
    most_sampled: judge only so many sampled children of a node; lenience < 1 judges a child by so much of its law, and is not
    exact; stream: of the last draws' noise (engine/noise.py).
    """
    count, vocab, device = len(trees), scores.shape[1], scores.device
    nodes, tokens, counts = tables(count, max_depth, device)
    if not count:
        return nodes, tokens, counts
    nodes.fill_(-1)
    tokens.fill_(-1)
    rests, lefts = (torch.empty(count, vocab, dtype=torch.float32, device=device) for _ in range(2))
    last_positions = torch.empty(count, dtype=torch.int32, device=device)
    _recurse[(count,)](
        *(scores, law, law_row, kind, token, parent, start, trees, seeds, samples, positions),
        *(rests, lefts, nodes, tokens, counts, last_positions),
        *(scores.stride(0), law.stride(0), vocab, max_depth, most_sampled, lenience),
        NODES=max(16, triton.next_power_of_2(max_nodes)),
        TILE=TILE,
        num_warps=16,
    )
    rows = torch.arange(count, dtype=torch.int32, device=device)
    streams = torch.full_like(rows, stream)
    drawn = gumbel_argmax(rests, rows, torch.ones_like(rows, dtype=torch.bool), seeds, samples, last_positions, streams)
    _finish[(count,)](drawn, nodes, tokens, counts, max_depth, num_warps=1)
    return nodes, tokens, counts
