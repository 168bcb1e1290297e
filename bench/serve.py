"""A load client for any OpenAI-compatible endpoint: `python -m bench.serve --base-url http://127.0.0.1:8000/v1`.

Every load level (`--concurrency`, or `--rate` for Poisson arrivals) asks real prompts, streaming, and prints one row;
everything goes as one JSON line to bench/out/. Output tokens are those of the server's `usage`, never counted events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench import process
from bench.arithmetic import Answer
from bench.client import Endpoint
from bench.load import Ask, Run, run
from bench.prompts import OWN, Prompt, load, mixed
from bench.summary import Numbers, medians, summarise, table

OUT = Path(__file__).with_name("out")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Level:
    """One load: `concurrency` requests in flight, or arrivals at `rate` per second."""

    concurrency: int = 1
    rate: float | None = None
    requests: int = 8

    @property
    def label(self) -> str:
        return f"{self.concurrency} streams" if self.rate is None else f"{self.rate:g}/s"


def take(prompts: Sequence[Prompt], count: int, skip: int = 0) -> list[Prompt]:
    """`count` prompts from `skip` on, starting over at the end."""
    return [prompts[(skip + i) % len(prompts)] for i in range(count)]


def measure(
    endpoint: Endpoint, ask: Ask, prompts: Sequence[Prompt], level: Level, *, pids: Sequence[int] = (), seed: int = 0,
    limit: float = 600.0,
) -> tuple[Numbers, Run]:  # fmt: skip
    """One run of one level. With `pids`, also the CPU seconds and the peak memory of those processes and their children."""
    cpu = process.cpu_seconds(pids)
    done = synchronously(run(endpoint, ask, prompts, concurrency=level.concurrency, rate=level.rate, seed=seed, limit=limit))
    numbers = summarise(done)
    if pids:
        numbers["server_cpu"] = process.cpu_seconds(pids) - cpu
        numbers["server_peak_mb"] = process.peak_megabytes(pids)
    return numbers, done


def synchronously(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where there is one: it halves the client's share of the processor."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def first_model(endpoint: Endpoint) -> str:
    """The first model that the endpoint lists; raises ConnectionError when it does not answer."""
    name: str = synchronously(endpoint.get("/models"))["data"][0]["id"]
    return name


def save_outputs(path: Path, answers: Sequence[Answer]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for answer in answers:
            record = {"id": answer.prompt_id, "text": answer.text, "tokens": answer.tokens, "finish_reason": answer.finish_reason}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def differing(path: Path, answers: Sequence[Answer]) -> list[str]:
    """The ids of the prompts whose answer is not the saved one; an answer that failed or was not saved differs."""
    with path.open(encoding="utf-8") as file:
        saved = {record["id"]: record["text"] for record in map(json.loads, file)}
    return sorted({answer.prompt_id for answer in answers if answer.error or saved.get(answer.prompt_id) != answer.text})


def append(name: str, record: dict[str, Any], folder: Path = OUT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **process.machine(), **record}) + "\n")
    return path


def _levels(options: argparse.Namespace) -> list[Level]:
    if options.rate:
        return [Level(rate=rate, requests=options.requests or 32) for rate in options.rate]
    return [Level(concurrency=n, requests=options.requests or max(8, 2 * n)) for n in options.concurrency]


def numbers_list(kind: type[T]) -> Any:
    """An argparse type: comma-separated numbers."""

    def parse(text: str) -> list[T]:
        return [kind(part) for part in text.split(",")]  # type: ignore[call-arg]  # int or float: both take a text

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1")
    add("--model", help="default: the first that the endpoint lists")
    add("--api-key")
    add("--concurrency", type=numbers_list(int), default=[1, 4, 16, 32], metavar="N,N", help="closed loop")
    add(
        "--rate", type=numbers_list(float), metavar="R,R", help="open loop: Poisson arrivals per second, instead of --concurrency"
    )
    add("--requests", type=int, help="per run; default twice the concurrency, at least 8 (open loop: 32)")
    add("--max-tokens", type=int, default=128)
    add("--ignore-eos", action="store_true")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0, help="of the arrivals, and of the requests when the temperature is not 0")
    add("--dataset", type=Path, default=OWN, help="JSON lines; default: our own prompts")
    add("--category", action="append", default=[], help="only these; may be repeated")
    add("--prediction", action="store_true", help="send the expected answer along where a prompt has one")
    add("--extra", type=json.loads, default={}, help='JSON merged into every body; "{unique}" becomes fresh per request')
    add("--warmup", type=int, default=2, help="requests before the clock starts")
    add("--repeat", type=int, default=1, help="runs per level; the table shows medians")
    add("--pid", type=numbers_list(int), default=[], metavar="P,P", help="server processes: CPU seconds and peak memory")
    add("--timeout", type=float, default=600.0, help="seconds per request")
    add("--save-outputs", type=Path, help="answers of the last run, for --compare")
    add("--compare", type=Path, help="exit with 1 when an answer differs from these")
    add("--label", default="", help="kept in the record")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    endpoint = Endpoint(options.base_url, options.api_key)
    model = options.model or first_model(endpoint)
    seed = options.seed if options.temperature > 0 else None
    ask = Ask(model, options.max_tokens, options.temperature, seed, options.ignore_eos, options.prediction, options.extra)
    prompts = mixed(load(options.dataset, options.category))
    if options.warmup:
        measure(endpoint, ask, take(prompts, options.warmup), Level(), limit=options.timeout)
    rows: list[tuple[str, Numbers]] = []
    runs: list[dict[str, Any]] = []
    last: Run | None = None
    for level in _levels(options):
        asked = take(prompts, level.requests)
        repeats = []
        for _ in range(options.repeat):
            numbers, last = measure(endpoint, ask, asked, level, pids=options.pid, seed=options.seed, limit=options.timeout)
            repeats.append(numbers)
            _complain(last)
        rows.append((level.label, medians(repeats)))
        runs.append({"level": asdict(level), "runs": repeats})
    print(table(rows))
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items() if key != "api_key"}
    print(f"record: {append('serve', {'settings': settings | {'model': model}, 'levels': runs})}")
    return _outputs(options, last)


def _complain(done: Run) -> None:
    """Say what would make a figure wrong."""
    for error in sorted({answer.error for answer in done.answers if answer.error})[:5]:
        print(f"error: {error}", file=sys.stderr)
    if not all(answer.counted for answer in done.answers):
        print("warning: no usage from this server; its events were counted instead of its tokens", file=sys.stderr)


def _outputs(options: argparse.Namespace, last: Run | None) -> int:
    answers = last.answers if last else []
    if options.save_outputs:
        save_outputs(options.save_outputs, answers)
    different = differing(options.compare, answers) if options.compare else []
    if options.compare:
        print(f"{len(answers) - len(different)} of {len(answers)} answers equal" + (f"; not: {different}" if different else ""))
    return 1 if different or any(answer.error for answer in answers) else 0


if __name__ == "__main__":
    sys.exit(main())
