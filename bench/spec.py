"""Spec-Bench's questions through a live server, with speculation and without, side by side: `python -m bench.spec`.

Each question is asked twice on the same server, once with `speculation: "off"`, the two in turns, so that a busy machine
slows both. Only the first turn of a question is asked. The two arms share no cache and no learned drafts, neither with each
other nor with the warm-up or an earlier run (`cache_salt`): every question is asked for the first time.
One table row per category (Spec-Bench's six: MT-bench's eight subjects are one), JSON to bench/out/spec.jsonl, and, where
matplotlib is installed, a picture of acceptance by position.

MAT: tokens of the answers per step of the model, as the server counts its steps: those without a draft are among them.
"""

from __future__ import annotations

import argparse
import math
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import spec_picture
from bench.arithmetic import Answer, decode_rate
from bench.client import Endpoint
from bench.load import Ask, Run, run
from bench.prompts import Prompt, load
from bench.serve import OUT, append, first_model, synchronously
from bench.summary import markdown

FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "spec_bench.jsonl"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
ALL = "all"


@dataclass(slots=True)
class Arm:
    """What one arm came to in one category. `seconds`: while its requests ran, prefill included."""

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, done: Run) -> None:
        self.answers += done.answers
        self.seconds += done.wall

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    @property
    def total_rate(self) -> float:
        return sum(answer.tokens for answer in self.good) / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One category. Rates are tokens per second: of one stream while it decodes, and of everything over the whole run."""

    category: str
    questions: int
    errors: int
    equal: int  # questions with the same text in both arms
    tokens: int
    steps: int
    mat: float
    acceptance: float
    decode_off: float
    decode_on: float
    total_off: float
    total_on: float
    per_position: list[float]  # share of all steps whose draft stood to this depth or further
    drafters: dict[str, int]  # accepted tokens by drafter
    reasons: dict[str, int]  # steps by what limited their budget
    seconds_saved: float  # as the server estimates it


def group(category: str) -> str:
    return "mt_bench" if category in MT_BENCH else category


def subset(prompts: Iterable[Prompt], per_category: int | None) -> dict[str, list[Prompt]]:
    """The questions by Spec-Bench's six categories; of each category of the file the first `per_category`."""
    taken: dict[str, int] = {}
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        taken[prompt.category] = taken.get(prompt.category, 0) + 1
        if per_category is None or taken[prompt.category] <= per_category:
            groups.setdefault(group(prompt.category), []).append(prompt)
    return groups


def measure(endpoint: Endpoint, off: Ask, on: Ask, prompts: Sequence[Prompt], concurrency: int, limit: float) -> tuple[Arm, Arm]:
    """Both arms over the same questions, `concurrency` at a time; who goes first changes with every turn."""
    arms = Arm(), Arm()
    for turn, first in enumerate(range(0, len(prompts), concurrency)):
        asked = prompts[first : first + concurrency]
        pairs = list(zip(arms, (off, on), strict=True))
        for arm, ask in reversed(pairs) if turn % 2 else pairs:
            work = run(endpoint, ask, asked, concurrency=concurrency, rate=None, seed=0, limit=limit)
            arm.add(synchronously(work))
    return arms


def summarise(category: str, off: Arm, on: Arm) -> Row:
    reports = [answer.speculation for answer in on.good]
    steps, tokens = _sum(reports, "num_spec_steps"), sum(answer.tokens for answer in on.good)
    accepted, drafted = _sum(reports, "num_accepted_draft_tokens"), _sum(reports, "num_draft_tokens")
    texts = {answer.prompt_id: answer.text for answer in off.good}
    drafters = [{name: counts["num_accepted_draft_tokens"] for name, counts in r.get("drafters", {}).items()} for r in reports]
    return Row(
        category=category,
        questions=len(on.answers),
        errors=len(off.answers) + len(on.answers) - len(off.good) - len(on.good),
        equal=sum(texts.get(answer.prompt_id) == answer.text for answer in on.good),
        tokens=tokens,
        steps=steps,
        mat=tokens / steps if steps else math.nan,
        acceptance=accepted / drafted if drafted else math.nan,
        decode_off=decode_rate(off.good),
        decode_on=decode_rate(on.good),
        total_off=off.total_rate,
        total_on=on.total_rate,
        per_position=_positions(reports, steps),
        drafters=_merge(drafters),
        reasons=_merge(report.get("budget_reasons", {}) for report in reports),
        seconds_saved=sum(report.get("estimated_seconds_saved", 0.0) for report in reports),
    )


def _sum(reports: Sequence[dict[str, Any]], name: str) -> int:
    return sum(report.get(name, 0) for report in reports)


def _merge(tables: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for name, count in table.items():
            total[name] = total.get(name, 0) + count
    return total


def _positions(reports: Sequence[dict[str, Any]], steps: int) -> list[float]:
    lists = [report.get("num_accepted_tokens_per_pos", []) for report in reports]
    longest = max(map(len, lists), default=0)
    return [sum(counts[d] for counts in lists if d < len(counts)) / steps for d in range(longest)] if steps else []


def table(rows: Sequence[Row]) -> str:
    heading = ["category", "questions", "equal", "MAT", "accepted %", "off tok/s", "on tok/s", "speed-up"]
    cells = [[*heading, "off total tok/s", "on total tok/s", "total speed-up", "accepted by drafter"]]
    for row in rows:
        shares = [f"{name} {100 * count / max(sum(row.drafters.values()), 1):.0f} %" for name, count in row.drafters.items()]
        numbers = [
            _number(row.mat),
            _number(100 * row.acceptance, ".0f"),
            *_pair(row.decode_off, row.decode_on),
            *_pair(row.total_off, row.total_on),
        ]
        cells.append([row.category, str(row.questions), str(row.equal), *numbers, ", ".join(shares) or "-"])
    return markdown(cells)


def _pair(off: float, on: float) -> list[str]:
    return [_number(off, ".1f"), _number(on, ".1f"), _number(on / off if off else math.nan)]


def _number(value: float, form: str = ".2f") -> str:
    return "-" if math.isnan(value) else format(value, form)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.spec", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1")
    add("--model", help="default: the first that the endpoint lists")
    add("--api-key")
    add("--file", type=Path, default=FILE, help="questions as JSON lines; default: %(default)s")
    add("--category", action="append", default=[], help="only these categories of the file; may be repeated")
    add("--per-category", type=int, metavar="N", help="the first N questions of each category of the file; default: all")
    add("--max-tokens", type=int, default=128)
    add("--temperature", type=float, default=0.0)
    add("--concurrency", type=int, default=1, help="questions asked at once")
    add("--drafter", help="comma list; default: the server's policy chooses")
    add("--max-nodes", type=int, help="most draft nodes per step; default: the server's policy chooses")
    add("--verifier", help="default: the server's")
    add("--warmup", type=int, default=2, help="questions asked before the clock starts")
    add("--timeout", type=float, default=600.0, help="seconds per request")
    add("--picture", type=Path, default=OUT / "spec.png", help="acceptance by position; default: %(default)s")
    add("--label", default="", help="kept in the record")
    return parser


def asks(options: argparse.Namespace, model: str, run_id: str) -> tuple[Ask, Ask]:
    """How the arm without speculation and the arm with it ask."""
    chosen: dict[str, Any] = {"max_nodes": options.max_nodes, "verifier": options.verifier}
    if options.drafter:
        chosen["drafter"] = options.drafter.split(",")
    seed = 0 if options.temperature > 0 else None

    def ask(speculation: object, arm: str) -> Ask:
        extra = {"speculation": speculation, "include_speculation": True, "cache_salt": f"spec-{run_id}-{arm}"}
        return Ask(model, options.max_tokens, options.temperature, seed, extra=extra)

    return ask("off", "off"), ask({name: value for name, value in chosen.items() if value is not None}, "on")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    endpoint = Endpoint(options.base_url, options.api_key)
    model = options.model or first_model(endpoint)
    off, on = asks(options, model, uuid.uuid4().hex)
    groups = subset(load(options.file, options.category), options.per_category)
    asked = [prompt for prompts in groups.values() for prompt in prompts]
    measure(endpoint, *asks(options, model, "{unique}"), asked[: options.warmup], 1, options.timeout)
    everything = Arm(), Arm()
    rows = []
    for name, prompts in groups.items():
        arms = measure(endpoint, off, on, prompts, options.concurrency, options.timeout)
        for whole, part in zip(everything, arms, strict=True):
            whole.answers += part.answers
            whole.seconds += part.seconds
        rows.append(summarise(name, *arms))
        print(f"{name}: {rows[-1].questions} questions, MAT {_number(rows[-1].mat)}", file=sys.stderr, flush=True)
    rows.append(summarise(ALL, *everything))
    print(table(rows))
    for error in sorted({answer.error for arm in everything for answer in arm.answers if answer.error})[:5]:
        print(f"error: {error}", file=sys.stderr)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "api_key"}
    record = {"settings": settings | {"model": model}, "rows": [asdict(row) for row in rows]}
    print(f"record: {append('spec', record)}")
    print(spec_picture.draw(options.picture, {row.category: row.per_position for row in rows}))
    return 1 if rows[-1].errors else 0


if __name__ == "__main__":
    sys.exit(main())
