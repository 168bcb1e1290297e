"""Pictures and tables of a cost model, for people. Needs matplotlib (the extra `plots`) for the pictures alone."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np

from engine.cost import CostModel

BATCHES = (1, 4, 16, 32)
MOST_NODES = 32


def table(cost: CostModel) -> str:
    """Milliseconds of a step by tokens and context, one sequence; then what drafting costs, by drafter."""
    tables = cost.tables()
    xs, ys = tables.verify.xs, tables.verify.ys
    head = ["tokens", *(f"context {y:.0f}" for y in ys), "tokens/s if all stand"]
    rows = [head]
    for x in xs:
        seconds = [cost.verify_seconds(int(x), int(y), 1) for y in ys]
        rows.append([f"{x:.0f}", *(f"{1000 * s:.2f}" for s in seconds), f"{x / seconds[0]:.0f}"])
    lines = [*_aligned(rows), ""]
    each, context = 1000 * tables.per_sequence, 1e6 * tables.per_sequence_context
    lines.append(f"each further sequence: {each:.3f} ms, and {context:.3f} us per token of its context")
    for name in tables.drafts:
        cells = (f"{n} x {d}: {1000 * cost.draft_seconds(name, n, d):.2f}" for n in (1, 8, 32) for d in (1, 8))
        lines.append(f"drafting with {name}, ms for sequences x depth: {', '.join(cells)}")
    return "\n".join(lines)


def draw(cost: CostModel, title: str, file: Path) -> None:
    """A PNG of two panels: what steps cost, and which share of draft nodes has to stand for drafting to pay.

    Raises ImportError without matplotlib and OSError when the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    tables = cost.tables()
    counts = np.arange(1, int(tables.verify.xs[-1]) + 1)
    for context in tables.verify.ys:
        left.plot(counts, 1000 * cost.verify_seconds(counts, int(context), 1), label=f"context {context:.0f}")
    measured = np.array(tables.verify.xs)
    left.plot(measured, 1000 * cost.verify_seconds(measured.astype(np.int64), 0, 1), "k.", markersize=4)
    left.set(xscale="log", yscale="log", xlabel="tokens in the step", ylabel="milliseconds", title="one sequence")
    left.legend(fontsize=8)
    nodes = np.arange(1, MOST_NODES + 1)
    for batch in BATCHES:
        right.plot(nodes, break_even(cost, batch, nodes), label=f"{batch} sequences")
    right.set(xlabel="draft nodes of each sequence", ylabel="share of nodes", ylim=(0, 1), title="must stand to pay, at least")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(file, format="png", dpi=110)


def break_even(cost: CostModel, batch: int, nodes: np.ndarray) -> np.ndarray:
    """Share of k draft nodes per sequence that has to stand for a step with them to commit as much per second as without."""
    plain = cost.verify_seconds(batch, 0, batch)
    return (cost.verify_seconds(batch * (1 + nodes), 0, batch) / plain - 1) / nodes


def _aligned(rows: Seq[Seq[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
