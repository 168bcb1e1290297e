"""Where the time of a step goes, in one process without HTTP: `python -m bench.step MODEL`.

For every batch size, context and number of draft nodes: the median milliseconds of draft, forward, target law, verify and
commit, and of the loop around them (schedule, commit to the sequences, token deltas). The drafts are wrong on purpose
(`--drafters filler`): a step has the same shape each time. `all/none accepted` bound what real drafts of that length give.

`--shape llama-3.1-8b` instead of MODEL takes that shape with random weights and made-up contexts, for a machine without files:
`python -m bench.step --shape llama-3.1-8b --batch 1,8,32,256 --nodes 0,4,8,16,64 --context 128,4096,32768 --seconds 540`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import msgspec
import numpy as np
import torch

from bench.arithmetic import median
from bench.device_clock import describe
from bench.prompts import load
from bench.serve import append, numbers_list
from bench.shaped_worker import Direct, ShapedWorker, wait_for_device
from bench.shapes import SHAPES
from bench.summary import markdown
from engine import registry
from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import EngineInfo
from engine.plan import StepPlan, StepResult, StepTimes
from engine.protocols import Executor, Policy
from engine.request import Request, SamplingParams
from engine.worker import Worker
from server.tokenizer import Tokenizer

PARTS = [part.name for part in msgspec.structs.fields(StepTimes)]
SPARE = 64  # tokens of a sequence behind the steps that are counted
WARMUP = 3  # decoding steps before the clock counts


@dataclass(frozen=True, slots=True)
class Shape:
    batch: int
    context: int
    nodes: int

    def fits(self, info: EngineInfo, steps: int) -> bool:
        """Whether all sequences keep their blocks through `steps` steps that mostly accept nothing."""
        longest = self.context + 1 + steps + WARMUP + self.nodes
        blocks = self.batch * (-(-longest // info.block_size) + 1)
        return longest < info.max_model_len and blocks <= info.num_blocks and self.batch <= info.max_num_seqs


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


def made_up(vocab_size: int, batch: int, length: int) -> list[list[int]]:
    """`batch` prompts of `length` random tokens; the same ones each time."""
    return np.random.default_rng(0).integers(vocab_size, size=(batch, length)).tolist()


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
    add("model", nargs="?", help="Hugging Face directory or GGUF file")
    add("--shape", choices=sorted(SHAPES), help="instead of a model: random weights of this shape")
    add("--prefill", action="store_true", help="with --shape: really feed the prompts")
    add("--batch", type=numbers_list(int), default=[1, 4, 16, 32], metavar="N,N", help="sequences per step")
    add("--nodes", type=numbers_list(int), default=[0, 4, 8], metavar="N,N", help="draft nodes per sequence")
    add("--context", type=numbers_list(int), default=[128, 512], metavar="N,N", help="prompt tokens")
    add("--steps", type=int, default=40, help="decoding steps counted per shape")
    add("--drafters", default="filler", help="filler (always wrong, always full), or a comma list of the server's own")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--deterministic", action="store_true", help="as the server's flag: what it costs")
    add("--enforce-eager", action="store_true", help="as the server's flag: no CUDA graphs")
    add("--attention-backend", default="auto", choices=["auto", "triton", "flashinfer", "reference"], help="as the server's flag")
    add("--synchronize", action="store_true", help="wait for the GPU after each part, which gives each its own time")
    add("--threads", type=int, help="default: all cores")
    add("--load-format", default="auto", choices=["auto", "native", "transformers"])
    add("--profile", action="store_true", help="torch's profiler on the last shape of each number of nodes")
    add("--seconds", type=float, help="no shape is begun after so many")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.model is None) == (options.shape is None):
        parser.error("one of MODEL and --shape is needed")
    prompts_of = _prompts(options)
    rows, records, left_out = [HEADING], [], []
    for nodes in options.nodes:
        with registry.lent("drafter", "filler", "bench.filler:FillerDrafter"):
            executor, engine = _engine(options, nodes)
        info, prompts = executor.info, []
        for context, batch in itertools.product(options.context, options.batch):
            shape = Shape(batch, context, nodes)
            if not shape.fits(info, options.steps) or (options.seconds and time.monotonic() - started > options.seconds):
                left_out.append(shape)
                continue
            prompts = prompts_of(batch, context)
            timing = measure(engine, executor, prompts, options.steps)
            if options.shape and not options.prefill:
                timing.prefill_seconds = 0.0  # nothing was fed
            rows.append(row(shape, timing))
            records.append(asdict(shape) | timing.medians())
        if options.profile and prompts:
            print(profile(engine, executor, prompts, options.steps))
        engine.close()
        del engine, executor
        _release()
    print(markdown(rows))
    for shape in left_out:
        print(
            f"not measured: batch {shape.batch}, context {shape.context}, nodes {shape.nodes} (no room in the cache, or no time)"
        )
    about = describe(torch.device(info.device)) if info.device.startswith("cuda") else {}
    print(f"{info.model} in {info.dtype} on {info.device}, {info.backend}" + "".join(f", {value}" for value in about.values()))
    record = {"settings": vars(options), "model": info.model, "backend": info.backend, **about, "shapes": records}
    print(f"record: {append('step', record)}")
    return 0


def _prompts(options: argparse.Namespace) -> Callable[[int, int], list[list[int]]]:
    """`batch` prompts of so many tokens."""
    if options.shape:
        return lambda batch, length: made_up(SHAPES[options.shape].vocab_size, batch, length)
    tokenizer = Tokenizer.load(options.model)
    return lambda batch, length: texts(tokenizer, batch, length)


def profile(engine: Engine, executor: Watched, prompts: Sequence[list[int]], steps: int) -> str:
    """The operators of `steps` decoding steps, by their own time. The profiler slows a step: read shares, not seconds."""
    profiler = torch.profiler.profile(activities=sorted(torch.profiler.supported_activities(), key=str))
    measure(engine, executor, prompts, steps, profiler.start)
    profiler.stop()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def _engine(options: argparse.Namespace, nodes: int) -> tuple[Watched, Engine]:
    """The limits are the server's own, or wider where the largest shape asks for it."""
    usual, most, made_up_contexts = EngineConfig(model=""), max(options.batch), options.shape and not options.prefill
    longest = None
    if options.shape:
        longest = min(max(options.context) + options.steps + nodes + SPARE, SHAPES[options.shape].max_position_embeddings)
    config = EngineConfig(
        model=options.model or options.shape, dtype=options.dtype, num_threads=options.threads, device=options.device,
        drafters=options.drafters.split(","), policy="fixed", budget=nodes, enable_prefix_caching=False,
        load_format=options.load_format, deterministic=options.deterministic, profile=options.shape is None,
        enforce_eager=options.enforce_eager, attention_backend=options.attention_backend,
        max_model_len=longest, max_num_seqs=max(usual.max_num_seqs, most),
        max_num_batched_tokens=max(usual.max_num_batched_tokens, most * (1 + nodes)),
    )  # fmt: skip
    worker = ShapedWorker(config, options.prefill) if options.shape else Worker(config)
    if options.synchronize:
        wait_for_device(worker)
    # A made-up context comes in one step, which costs nothing however long it is.
    executor = Watched(Direct(worker, most * max(options.context) if made_up_contexts else 0))
    return executor, Engine(config, executor)


def _release() -> None:
    """The next engine plans its memory by what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
