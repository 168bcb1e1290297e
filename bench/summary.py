"""What the runs of one load level come to: one record of numbers per run, medians over repeats, a table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.arithmetic import Answer, decode_rate, median, percentile
from bench.load import Run

Numbers = dict[str, float]


def summarise(run: Run) -> Numbers:
    """Seconds and tokens per second of one run. Latencies are of the answers that came; `errors` counts the others.

    total_rate: output tokens over the whole run, prefill included. decode_rate: of one stream while it decodes.
    """
    good = [answer for answer in run.answers if answer.error is None]
    tokens = sum(answer.tokens for answer in good)
    numbers: Numbers = {
        "requests": len(good),
        "errors": len(run.answers) - len(good),
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "cached_tokens": sum(answer.cached_tokens for answer in good),
        "output_tokens": tokens,
        "accepted_prediction_tokens": sum(answer.accepted_prediction_tokens for answer in good),
        "wall": run.wall,
        "total_rate": tokens / run.wall if run.wall > 0 else math.nan,
        "decode_rate": decode_rate(good),
        "client_cpu_share": run.client_cpu / run.wall if run.wall > 0 else math.nan,
        "lag": run.lag,
    }
    for name, values in _latencies(good).items():
        numbers |= {f"{name}_p{p}": percentile(values, p) for p in (50, 90, 99)}
    return numbers


def _latencies(answers: Sequence[Answer]) -> dict[str, list[float]]:
    return {
        "ttft": [answer.ttft for answer in answers],
        "itl": [gap for answer in answers for gap in answer.itl],
        "tpot": [answer.tpot for answer in answers if not math.isnan(answer.tpot)],
        "e2e": [answer.e2e for answer in answers],
    }


def medians(runs: Sequence[Numbers]) -> Numbers:
    """The median of each number over the repeats, and how far total_rate spread: (max - min) / median."""
    result = {name: median([run[name] for run in runs if not math.isnan(run.get(name, math.nan))]) for name in runs[0]}
    rates = [run["total_rate"] for run in runs]
    result["spread"] = (max(rates) - min(rates)) / result["total_rate"] if len(rates) > 1 else 0.0
    return result


COLUMNS: list[tuple[str, str, float, str]] = [  # heading, number, factor, format
    ("ok", "requests", 1, ".0f"),
    ("err", "errors", 1, ".0f"),
    ("out tok", "output_tokens", 1, ".0f"),
    ("total tok/s", "total_rate", 1, ".1f"),
    ("spread %", "spread", 100, ".0f"),
    ("decode tok/s", "decode_rate", 1, ".1f"),
    *((f"{name} p{p} ms", f"{name}_p{p}", 1000, ".1f") for name in ("ttft", "itl", "tpot", "e2e") for p in (50, 90, 99)),
    ("server CPU s", "server_cpu", 1, ".2f"),
    ("peak MB", "server_peak_mb", 1, ".0f"),
    ("client CPU %", "client_cpu_share", 100, ".1f"),
]


def table(rows: Sequence[tuple[str, Numbers]]) -> str:
    """A Markdown table, one row per load level; columns that no row has are left out."""
    columns = [column for column in COLUMNS if any(column[1] in numbers for _, numbers in rows)]
    cells = [["load", *(heading for heading, *_ in columns)]]
    for label, numbers in rows:
        cells.append([label, *(_cell(numbers.get(name), factor, form) for _, name, factor, form in columns)])
    return markdown(cells)


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """Rows of text as an aligned Markdown table; the first row is the heading."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value * factor, form)
