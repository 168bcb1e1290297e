"""Pictures of the controller's simulation. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.simulation import Outcome

WINDOW = 25  # steps that a line averages
EMPHASISED = ("goodput", "oracle", "off", "uniform")


def draw_goodput(curves: Mapping[str, Mapping[str, Sequence[float]]], loads: Sequence[int], file: Path) -> Path:
    """One panel per machine: tokens per second against requests at a time, as a multiple of off."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 4.2), layout="constrained")
    figure.suptitle("simulated: committed tokens per second, as a multiple of no speculation", fontsize=10)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (machine, lines) in zip(panels, curves.items(), strict=True):
        plain = np.array(lines["off"])
        for name, rates in lines.items():
            strong = name in EMPHASISED
            axes.plot(
                loads, np.array(rates) / plain, "o-" if strong else ":", linewidth=2 if strong else 1, label=name, markersize=3
            )
        axes.set(title=machine, xlabel="requests at a time", xscale="log")
        axes.set_xticks(loads, [str(load) for load in loads])
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=6)
    return _save(figure, file)


def draw_budget(outcomes: Mapping[str, Outcome], file: Path) -> Path:
    """One panel per machine: draft nodes per sequence, and sequences, over the time of one run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5 * len(outcomes)), layout="constrained")
    for axes, (machine, outcome) in zip(figure.subplots(len(outcomes), squeeze=False)[:, 0], outcomes.items(), strict=True):
        steps = [step for step in outcome.steps if step.sequences]
        seconds = np.array([step.time for step in steps])
        batch = np.array([step.sequences for step in steps], dtype=float)
        drafts = np.array([step.drafts for step in steps], dtype=float)
        committed = np.array([step.committed for step in steps])
        axes.plot(seconds, _smooth(drafts) / _smooth(batch), label="draft nodes per sequence (chosen)")
        axes.plot(seconds, _smooth(committed) / _smooth(batch), label="tokens per sequence and step")
        axes.set(xlabel="seconds (simulated)", ylabel="per sequence and step", title=f"goodput over time, {machine}")
        other = axes.twinx()
        other.fill_between(seconds, batch, step="post", alpha=0.15, color="gray")
        other.set_ylabel("sequences")
        axes.legend(fontsize=8)
    return _save(figure, file)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = min(WINDOW, max(len(values), 1))
    return np.convolve(values, np.ones(width) / width, mode="same")


def _save(figure: object, file: Path) -> Path:
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=100)
    return file
