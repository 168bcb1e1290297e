"""Acceptance by position as a picture, where matplotlib is installed (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path


def draw(path: Path, curves: Mapping[str, Sequence[float]]) -> str:
    """One curve per category: the share of steps whose draft stood to a depth or further. Says what was done."""
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        return "no picture: matplotlib is not installed"
    matplotlib.use("Agg")
    plot = import_module("matplotlib.pyplot")
    figure, axes = plot.subplots(figsize=(8, 5))
    for name, shares in curves.items():
        if shares:
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name, linewidth=3 if name == "all" else 1.2)
    axes.set_xlabel("depth in the draft")
    axes.set_ylabel("share of steps that accepted this far")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plot.close(figure)
    return f"picture: {path}"
