"""What bench.step counts, on a toy model that speaks plans; and on a real tiny model, that its parts make up the step."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.filler import FillerDrafter
from bench.shaped_worker import Direct, ShapedWorker, wait_for_device
from bench.shapes import SHAPES, random_weights
from bench.step import HEADING, PARTS, Shape, Timing, Watched, made_up, main, measure, row, texts
from engine import registry
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.shapes import expected_shapes
from engine.plan import StepTimes
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from server.tokenizer import Tokenizer
from tests.fakes import FakeExecutor, fake_info, garbage


def toy(budget: int, **info: object) -> tuple[Engine, Watched]:
    executor = Watched(FakeExecutor(fake_info(**info), guess=garbage))
    return Engine(EngineConfig(model="toy", policy="fixed", budget=budget, enable_prefix_caching=False), executor), executor


def test_only_decoding_steps_with_everyone_in_the_batch_are_counted() -> None:
    engine, executor = toy(budget=2, max_num_batched_tokens=16)
    begun: list[int] = []
    timing = measure(engine, executor, [[3] * 20, [4] * 20], steps=6, begin=lambda: begun.append(len(engine.stats().draft_nodes)))
    assert all(len(seconds) == 6 for seconds in timing.parts.values())
    assert begun == [begun[0]]
    assert timing.prefill_tokens >= 38
    assert timing.draft_nodes == 6 * 2 * 2
    assert timing.tokens == 12 + timing.accepted
    assert not engine.has_work()
    assert engine.stats().blocks_used == 0


def test_a_context_that_does_not_fit_says_so() -> None:
    engine, executor = toy(budget=0, max_model_len=24)
    with pytest.raises(ValueError, match="do not fit"):
        measure(engine, executor, [[3] * 20], steps=50)


def test_the_loop_is_what_the_parts_leave_over() -> None:
    timing = Timing()
    timing.count(StepTimes(draft=0.001, forward=0.010, target_law=0.002, verify=0.003, commit=0.004), wall=0.025)
    timing.tokens, timing.draft_nodes = 2, 8
    assert timing.medians()["loop"] == pytest.approx(0.005)
    cells = dict(zip(HEADING, row(Shape(2, 64, 4), timing), strict=True))
    assert cells["step ms"] == "25.00"
    assert cells["not forward ms"] == "15.00"
    assert cells["forward %"] == "40"
    assert cells["nodes"] == "4.0"
    assert cells["tok/s"] == f"{2 / 0.025:.0f}"
    assert cells["if all accepted"] == f"{2 * 5 / 0.025:.0f}"


def test_the_filler_uses_its_whole_budget() -> None:
    request = Request(request_id="r", prompt_ids=[5, 6], params=SamplingParams(max_tokens=4))
    forest = FillerDrafter().draft([Sequence(0, request), Sequence(1, request)], [3, 0])
    assert (forest.size(0), forest.size(1)) == (4, 1)
    assert forest.drafter == ["filler", ""]
    assert forest.is_chains


def test_a_real_model(
    smollm2_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.step.append", lambda name, record: tmp_path / name)
    prompts = texts(Tokenizer.load(smollm2_dir), batch=3, length=40)
    assert [len(prompt) for prompt in prompts] == [40, 40, 40]
    assert prompts[0] != prompts[1]
    flags = ["--batch", "1,3", "--nodes", "0,2", "--context", "40", "--steps", "4", "--threads", "1"]
    known = dict(registry.DRAFTERS)
    assert main([str(smollm2_dir), *flags]) == 0
    assert known == registry.DRAFTERS
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[1:4] for line in lines[2:]] and len(lines) == 6
    for line in lines[2:]:
        values = [float(cell) for cell in line[4 : 4 + len(PARTS) + 2]]
        assert values[-1] == pytest.approx(sum(values[:-1]), rel=0.5)
        assert values[1] > 0


def test_a_shape_needs_no_files(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records: list[dict[str, object]] = []
    monkeypatch.setattr("bench.step.append", lambda name, record: records.append(record) or tmp_path / name)
    flags = ["--batch", "1,3,70", "--nodes", "0,2", "--context", "40,600", "--steps", "3", "--threads", "1"]
    assert main(["--shape", "tiny", *flags]) == 0
    out = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("|")]
    assert [line[1:4] for line in lines[2:]] == [
        [batch, "40", f"{nodes}.0"] for nodes in (0, 2) for batch in ("1", "3", "70")
    ]  # more sequences than a server takes by itself
    assert all(line[-2] == "-" for line in lines[2:])  # no prompt was fed
    assert out.count("not measured: ") == 6 and "context 600" in out  # longer than the model's own limit
    (record,) = records
    assert record["model"] == "tiny" and len(record["shapes"]) == 6  # type: ignore[arg-type]


def test_a_made_up_context_is_as_long_as_a_real_one() -> None:
    """The same steps are run: only what the prompt left in the cache differs."""
    config = EngineConfig(model="tiny", policy="fixed", budget=2, drafters=["none"], enable_prefix_caching=False, num_threads=1)
    prompts = made_up(128, 2, 33)
    assert prompts == made_up(128, 2, 33) and [len(prompt) for prompt in prompts] == [33, 33]
    shapes = {}
    for prefill in (True, False):
        worker = ShapedWorker(config, prefill)
        executor = Watched(Direct(worker))
        timing = measure(Engine(config, executor), executor, prompts, 3)
        assert executor.last is not None
        shapes[prefill] = [(row.num_computed, row.num_new, len(row.block_ids)) for row in executor.last[0].rows]
        assert timing.tokens == 6 and timing.prefill_tokens >= 64
    assert shapes[True] == shapes[False]


def test_random_weights_are_those_of_the_shape() -> None:
    shape = SHAPES["tiny"]
    weights = dict(random_weights(shape, torch.bfloat16, torch.device("cpu")))
    assert weights["model.embed_tokens.weight"].shape == (128, 64) and "lm_head.weight" not in weights
    assert all(torch.equal(weight, weights[name]) for name, weight in random_weights(shape, torch.bfloat16, torch.device("cpu")))
    parameters = {"llama-3.1-8b": 8.03e9, "llama-3.2-1b": 1.236e9}
    for name, count in parameters.items():
        assert sum(map(math.prod, expected_shapes(SHAPES[name]).values())) == pytest.approx(count, rel=1e-3)


def test_either_a_model_or_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["model", "--shape", "tiny"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "one of MODEL and --shape" in capsys.readouterr().err


def test_on_a_cpu_nothing_is_waited_for() -> None:
    worker = ShapedWorker(EngineConfig(model="tiny", drafters=["none"], num_threads=1))
    before = worker.target_law
    wait_for_device(worker)
    assert worker.target_law is before
