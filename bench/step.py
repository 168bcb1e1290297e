"""Where the time of a step goes, in one process without HTTP: `python -m bench.step MODEL`.

For every batch size, context and number of draft nodes: the median milliseconds of draft, forward, target law, verify and
commit, and of the loop around them (schedule, commit to the sequences, token deltas). The drafts are wrong on purpose
(`--drafters filler`): a step has the same shape each time. `all/none accepted` bound what real drafts of that length give.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import msgspec
import torch

from bench.arithmetic import median
from bench.prompts import load
from bench.serve import append, numbers_list
from bench.summary import markdown
from engine import registry
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.local import LocalExecutor
from engine.plan import StepPlan, StepResult, StepTimes
from engine.protocols import Executor, Policy
from engine.request import Request, SamplingParams
from server.tokenizer import Tokenizer

PARTS = [part.name for part in msgspec.structs.fields(StepTimes)]
WARMUP = 3  # decoding steps before the clock counts


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    context: int
    nodes: int


@dataclass(slots=True)
class Timing:
    """Seconds of every counted step of one shape, by part; `loop` is what a step takes beside them."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in [*PARTS, "loop", "step"]})
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    tokens: int = 0
    draft_nodes: int = 0
    accepted: int = 0

    def count(self, times: StepTimes, wall: float) -> None:
        spent = msgspec.structs.asdict(times)
        for name, seconds in spent.items():
            self.parts[name].append(seconds)
        self.parts["loop"].append(wall - sum(spent.values()))
        self.parts["step"].append(wall)

    def medians(self) -> dict[str, float]:
        return {name: median(seconds) for name, seconds in self.parts.items()}


class Watched:
    """An executor that remembers the last plan and result, for whoever steps the engine."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.info = executor.info
        self.last: tuple[StepPlan, StepResult] | None = None

    def guide(self, policy: Policy) -> None:
        self._executor.guide(policy)

    def execute(self, plan: StepPlan) -> StepResult:
        result = self._executor.execute(plan)
        self.last = plan, result
        return result

    def close(self) -> None:
        self._executor.close()


def measure(
    engine: Engine, executor: Watched, prompts: Sequence[list[int]], steps: int, begin: Callable[[], None] | None = None
) -> Timing:
    """Feed the prompts, then time `steps` decoding steps with all of them in the batch; drop the requests afterwards.

    `begin` is called before the first step that counts.
    """
    info = executor.info
    room = min(info.max_model_len, info.num_blocks * info.block_size) - max(map(len, prompts))
    params = SamplingParams(max_tokens=room, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(Request(request_id=str(i), prompt_ids=prompt, params=params))
    timing = Timing()
    decoding = 0
    while decoding < steps + WARMUP:
        if begin is not None and decoding == WARMUP:
            begin()
        started = time.perf_counter()
        deltas = engine.step()
        wall = time.perf_counter() - started
        if executor.last is None or not engine.has_work():
            raise ValueError("the sequences ended early: the context and the steps do not fit into the model's length")
        plan, result = executor.last
        if len(plan.rows) < len(prompts) or any(row.num_new > 1 for row in plan.rows):
            timing.prefill_tokens += sum(row.num_new for row in plan.rows)
            timing.prefill_seconds += wall
            continue
        decoding += 1
        if decoding > WARMUP:
            timing.count(result.times, wall)
            timing.tokens += sum(len(delta.token_ids) for delta in deltas)
            timing.draft_nodes += sum(row.num_draft for row in result.rows)
            timing.accepted += sum(row.num_accepted for row in result.rows)
    for i in range(len(prompts)):
        engine.abort(str(i))
    return timing


def texts(tokenizer: Tokenizer, batch: int, length: int) -> list[list[int]]:
    """`batch` different prompts of exactly `length` tokens, cut from our own prompts laid end to end."""
    words = "\n\n".join(message["content"] for prompt in load() for message in prompt.messages)
    ids = tokenizer.encode(words)
    ids *= -(-(length + 97 * batch) // len(ids))
    return [ids[97 * i : 97 * i + length] for i in range(batch)]


def row(shape: Shape, timing: Timing) -> list[str]:
    medians = timing.medians()
    wall = medians["step"]
    outside = wall - medians["forward"]
    steps = len(timing.parts["step"])
    nodes = timing.draft_nodes / (steps * shape.batch)
    return [
        str(shape.batch),
        str(shape.context),
        f"{nodes:.1f}",
        *(f"{medians[name] * 1000:.2f}" for name in [*PARTS, "loop", "step"]),
        f"{outside * 1000:.2f}",
        f"{100 * medians['forward'] / wall:.0f}",
        f"{timing.tokens / sum(timing.parts['step']):.0f}",
        f"{shape.batch * (1 + nodes) / wall:.0f}",
        f"{timing.prefill_tokens / timing.prefill_seconds:.0f}" if timing.prefill_seconds else "-",
    ]


HEADING = [
    *("batch", "context", "nodes"),
    *(f"{name.replace('_', ' ')} ms" for name in [*PARTS, "loop", "step"]),
    *("not forward ms", "forward %", "tok/s", "if all accepted", "prefill tok/s"),
]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", help="Hugging Face directory or GGUF file")
    add("--batch", type=numbers_list(int), default=[1, 4, 16, 32], metavar="N,N", help="sequences per step")
    add("--nodes", type=numbers_list(int), default=[0, 4, 8], metavar="N,N", help="draft nodes per sequence")
    add("--context", type=numbers_list(int), default=[128, 512], metavar="N,N", help="prompt tokens")
    add("--steps", type=int, default=40, help="decoding steps counted per shape")
    add("--drafters", default="filler", help="filler (always wrong, always full), or a comma list of the server's own")
    add("--dtype", default="auto")
    add("--threads", type=int, help="default: all cores")
    add("--load-format", default="auto", choices=["auto", "native", "transformers"])
    add("--profile", action="store_true", help="torch's profiler on the last shape of each number of nodes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    tokenizer = Tokenizer.load(options.model)
    rows, records = [HEADING], []
    for nodes in options.nodes:
        with registry.lent("drafter", "filler", "bench.filler:FillerDrafter"):
            executor, engine = _engine(options, nodes)
        for context, batch in itertools.product(options.context, options.batch):
            shape = Shape(batch, context, nodes)
            prompts = texts(tokenizer, batch, context)
            timing = measure(engine, executor, prompts, options.steps)
            rows.append(row(shape, timing))
            records.append(asdict(shape) | timing.medians())
        if options.profile:
            print(profile(engine, executor, prompts, options.steps))
        engine.close()
    print(markdown(rows))
    print(f"record: {append('step', {'settings': vars(options), 'model': executor.info.model, 'shapes': records})}")
    return 0


def profile(engine: Engine, executor: Watched, prompts: Sequence[list[int]], steps: int) -> str:
    """The operators of `steps` decoding steps, by their own time. The profiler slows a step: read shares, not seconds."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    measure(engine, executor, prompts, steps, profiler.start)
    profiler.stop()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def _engine(options: argparse.Namespace, nodes: int) -> tuple[Watched, Engine]:
    config = EngineConfig(
        model=options.model, dtype=options.dtype, num_threads=options.threads, drafters=options.drafters.split(","),
        policy="fixed", budget=nodes, enable_prefix_caching=False, load_format=options.load_format,
    )  # fmt: skip
    executor = Watched(LocalExecutor(config))
    return executor, Engine(config, executor)


if __name__ == "__main__":
    sys.exit(main())
