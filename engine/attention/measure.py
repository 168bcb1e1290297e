"""Which of several attention backends is the fastest here: each one runs the same few steps, and the times decide."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.models.batch import ForwardBatch
from engine.models.runner import AttentionBackend

logger = logging.getLogger("outrider.engine")

LAYERS = 16  # of a step: what is planned once is run so often
REPEATS, ROUNDS = 5, 3
MARGIN = 1.05  # a later backend has to be so much better: chance should not pick another one at the next start

Clock = Callable[[Callable[[], None]], float]  # seconds of a step


@dataclass(frozen=True, slots=True)
class Trial:
    """Sequences of `context` tokens, each with so many rows: a chunk, or a root with a tree of two children to a node."""

    name: str
    sequences: int
    rows: int
    context: int
    tree: bool = False


TRIALS = (Trial("decode", 16, 1, 1024), Trial("trees", 8, 9, 1024, tree=True), Trial("prompt", 1, 512, 0))


def measure(
    backends: Mapping[str, AttentionBackend], heads: tuple[int, int, int], kv: Tensor, clock: Clock
) -> dict[str, dict[str, float]]:
    """Seconds of each trial by backend; one that fails is left out, with a warning. heads: query heads, key heads, head size.

    kv [N, 2, K, S, D] of one layer, of at least `blocks_needed`.
    """
    figures: dict[str, dict[str, float]] = {}
    for name, backend in backends.items():
        try:
            figures[name] = {trial.name: clock(_step(backend, trial, heads, kv)) for trial in TRIALS}
        except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError) as error:
            logger.warning("attention: %s is not used: %s: %s", name, type(error).__name__, (str(error).splitlines() or [""])[0])
    return figures


def fastest(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The one whose trials together take the least, each in shares of the best time there is for it; the first of the like.

    Raises ValueError when there is none.
    """
    if not figures:
        raise ValueError("attention_backend: none of the installed backends runs on this GPU")
    best = {trial.name: min(times[trial.name] for times in figures.values()) for trial in TRIALS}
    score = {name: sum(times[trial] / best[trial] for trial in best) for name, times in figures.items()}
    found = next(iter(score))
    for name in score:
        if score[name] * MARGIN < score[found]:
            found = name
    return found


def told(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The times in words, microseconds of a layer."""
    parts = []
    for name, times in figures.items():
        parts.append(f"{name} " + ", ".join(f"{trial} {seconds / LAYERS * 1e6:.0f}" for trial, seconds in times.items()))
    return f"us a layer: {'; '.join(parts)}"


def blocks_needed(block_size: int) -> int:
    return max(trial.sequences * -(-(trial.context + trial.rows) // block_size) for trial in TRIALS)


def device_clock(device: torch.device) -> Clock:
    """Wall seconds, the device waited for: planning on the host counts."""

    def clock(step: Callable[[], None]) -> float:
        def once() -> float:
            torch.cuda.synchronize(device)
            started = time.perf_counter()
            for _ in range(REPEATS):
                step()
            torch.cuda.synchronize(device)
            return (time.perf_counter() - started) / REPEATS

        once()  # compiles
        return min(once() for _ in range(ROUNDS))

    return clock


def _step(backend: AttentionBackend, trial: Trial, heads: tuple[int, int, int], kv: Tensor) -> Callable[[], None]:
    num_heads, kv_heads, size = heads
    batch = trial_batch(trial, kv.shape[3], kv.device)
    rows = len(batch.slots)
    qkv = torch.zeros(rows, num_heads + 2 * kv_heads, size, dtype=kv.dtype, device=kv.device)
    q, new = qkv[:, :num_heads], qkv[:, num_heads:].view(rows, 2, kv_heads, size)

    def step() -> None:
        backend.plan(batch)
        for _ in range(LAYERS):
            backend.run(kv, q, new, size**-0.5)

    return step


def trial_batch(trial: Trial, block_size: int, device: torch.device) -> ForwardBatch:
    """Every sequence has blocks of its own, as in life: what one reads does not lie in a cache for the next."""
    each = -(-(trial.context + trial.rows) // block_size)
    tables = np.arange(trial.sequences * each).reshape(trial.sequences, each)
    own = trial.context + np.arange(trial.rows)
    slots = tables[:, own // block_size] * block_size + own % block_size
    tree, positions = None, own
    if trial.tree:
        tree = np.eye(trial.rows, dtype=bool)
        for node in range(1, trial.rows):
            tree[node] |= tree[(node - 1) // 2]
        positions = trial.context + tree.sum(1) - 1
    index = np.stack((np.zeros(slots.size, np.int64), np.tile(positions, trial.sequences), slots.reshape(-1)))
    token_ids, position, slot = torch.from_numpy(index).to(device)
    return ForwardBatch(
        index=index,
        token_ids=token_ids,
        positions=position,
        slots=slot,
        node_rows=torch.arange(slots.size, device=device),
        num_rows=[trial.rows] * trial.sequences,
        context_lens=[trial.context] * trial.sequences,
        block_tables=tables.tolist(),
        ancestors=[tree] * trial.sequences,
        first_rows=list(range(0, slots.size, trial.rows)),
    )
