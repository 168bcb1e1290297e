"""How many draft nodes a step should verify, and whose: the exact optimum of expected tokens / predicted seconds.

Survival never increases along a path, so the best Q nodes are the Q likeliest, and every prefix of the sorted list is
a set of whole paths. The time depends on Q alone (and on the drafting depth D), so one sort and a scan of every Q finds the
optimum. Every Q, because costs are staircases: stopping at the first decrease missed it in 132 of 300 random cases
(core.md A.1). Within a tier of a staircase more nodes are free, so the optimum lies at a tier's edge by itself.

Goodput as the objective: SmartSpec (arXiv 2406.14066). It is not a controller: it remembers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW = 96  # nodes: up to here a loop is faster than arrays

Double = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Allocation:
    """nodes [B]: draft length of each sequence; depth: the longest of them; tokens, seconds: expected of the step."""

    nodes: Int
    depth: int
    tokens: float
    seconds: float
    speedup: float  # goodput over that of plain decoding


def allocate(
    survival: Double,
    verify: Double,
    draft: Double | None = None,
    caps: Int | None = None,
    limit: float = np.inf,
    others: float = 0.0,
    rate: float | None = None,
) -> Allocation:
    """The best chain length of each sequence, before drafting.

    survival [B, K]: P(at least i + 1 draft tokens stand), rows non-increasing. verify [B * K + 1]: seconds of verifying Q draft
    tokens beside the roots, everything else in the step included. draft [K + 1] or [K + 1, B * K + 1]: seconds of
    drafting to depth D (and Q tokens in all); draft[0] is what not drafting costs. caps [B]: most tokens of each sequence.
    limit: no draft makes the step take longer than this, seconds. others: tokens expected of sequences beside these.
    rate: tokens / second that the time is worth elsewhere: the best tokens - rate * seconds is then looked for, in place of the
    best quotient (`decoding_rate`). Ties go to the shallower and smaller draft.
    """
    count, longest = survival.shape
    gains = np.ascontiguousarray(survival, dtype=np.float64).ravel()
    order = np.argsort(-gains, kind="stable")
    depth = order % longest if longest else order
    if caps is not None:
        inside = depth < caps[order // longest]
        order, depth = order[inside], depth[inside]
    # Row D of every table: the nodes no deeper than D, in the order of their gains.
    taken = depth < np.arange(longest + 1)[:, None]
    total = np.zeros((longest + 1, len(order) + 1), dtype=np.int64)
    np.cumsum(taken, axis=1, out=total[:, 1:])
    tokens = np.zeros(total.shape)
    np.cumsum(taken * gains[order], axis=1, out=tokens[:, 1:])
    tokens += count + others
    seconds = verify[total]
    if draft is not None:
        seconds += draft[:, None] if draft.ndim == 1 else np.take_along_axis(draft, total, axis=1)
    goodput = tokens / seconds if rate is None else tokens - rate * seconds
    if limit < np.inf:
        goodput[(seconds > limit) & (total > 0)] = -np.inf
    best, at = divmod(int(goodput.argmax()), total.shape[1])
    chosen = order[:at][taken[best, :at]]
    nodes = np.bincount(chosen // longest if longest else chosen, minlength=count)
    speedup = _gain(goodput[best, at], goodput[0, 0], count + others, rate)
    return Allocation(nodes, int(nodes.max(initial=0)), float(tokens[best, at]), float(seconds[best, at]), speedup)


@dataclass(frozen=True, slots=True)
class Selection:
    """kept [N]: which nodes are worth verifying; tokens, seconds: expected of the step."""

    kept: list[bool]
    count: int
    tokens: float
    seconds: float
    gain: float  # goodput over that of plain decoding, for the best count that the limit leaves
    loss: float  # share of the best goodput that is lost by keeping every node; infinite where the limit forbids it
    limited: bool  # a larger count would be better, but for the limit


def select(
    survival: Seq[float] | Double,
    verify: Seq[float] | Double,
    roots: int,
    limit: float = np.inf,
    margin: float = 1.0,
    rate: float | None = None,
) -> Selection:
    """The best set of drafted nodes, after drafting; draft trees of any shape.

    survival [N]: P(node stands), never more than its parent's, parents before their children where they are equal; roots
    are not among them. verify [N + 1]: seconds of a step with Q of them. Any draft has to be `margin` times as good as none.
    rate: as for `allocate`.
    """
    if len(survival) <= FEW:
        return _select_few(survival, verify, roots, limit, margin, rate)
    survival, verify = np.asarray(survival), np.asarray(verify)
    order = np.argsort(-survival, kind="stable")
    tokens = np.empty(len(survival) + 1)
    tokens[0] = roots
    np.cumsum(survival[order], out=tokens[1:])
    tokens[1:] += roots
    goodput = tokens / verify if rate is None else tokens - rate * verify
    free = count = int(goodput.argmax())
    if limit < np.inf:
        goodput[1:][verify[1:] > limit] = -np.inf
        count = int(goodput.argmax())
    limited = bool(free > count)
    gain = _gain(goodput[count], goodput[0], roots, rate)
    loss = _loss(float(goodput[count]), float(goodput[-1]), roots, rate)
    if gain < margin:
        count = 0
    kept = np.zeros(len(survival), dtype=bool)
    kept[order[:count]] = True
    return Selection(kept.tolist(), count, float(tokens[count]), float(verify[count]), gain, loss, limited)


def _select_few(
    survival: Seq[float] | Double, verify: Seq[float] | Double, roots: int, limit: float, margin: float, rate: float | None
) -> Selection:
    """The same without arrays: half of the time for a step of one stream."""
    order = sorted(range(len(survival)), key=survival.__getitem__, reverse=True)
    tokens, none = float(roots), _value(roots, verify[0], rate)
    free, free_best, value = 0, none, none
    count, best, expected = 0, none, tokens
    for number, node in enumerate(order, start=1):
        tokens += survival[node]
        value = _value(tokens, verify[number], rate)
        if value > free_best:
            free, free_best = number, value
        if value > best and verify[number] <= limit:
            count, best, expected = number, value, tokens
    limited = bool(free > count)
    gain = _gain(best, none, roots, rate)
    loss = _loss(best, value if verify[-1] <= limit else -np.inf, roots, rate)
    if gain < margin:
        count, expected = 0, float(roots)
    kept = [False] * len(order)
    for node in order[:count]:
        kept[node] = True
    return Selection(kept, count, expected, verify[count], gain, loss, limited)


def _value(tokens: float, seconds: float, rate: float | None) -> float:
    return tokens / seconds if rate is None else tokens - rate * seconds


def decoding_rate(survival: Double, verify: Double, roots: int) -> float:
    """The best goodput, tokens / second, of steps that carry these drafts and nothing else.

    What a step carries beside them (prompt chunks) takes its time whatever is drafted, but its time makes no token dearer: a
    node is worth the decoding that it saves later. So a step with a load looks for the most tokens - rate * seconds, where
    rate is that of a step without; for one without it is the same as the best quotient (Dinkelbach 1967).
    """
    tokens = np.concatenate(([0.0], np.cumsum(-np.sort(-survival)))) + roots
    return float((tokens / verify).max())


def _loss(best: float, every: float, tokens: float, rate: float | None) -> float:
    return 1.0 - every / best if rate is None else (best - every) / max(tokens, 1.0)


def _gain(best: float, none: float, tokens: float, rate: float | None) -> float:
    if not tokens:
        return 1.0
    return float(best / none) if rate is None else 1.0 + float(best - none) / tokens
