"""What bench.step counts, on a toy model that speaks plans; and on a real tiny model, that its parts make up the step."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.filler import FillerDrafter
from bench.step import HEADING, PARTS, Shape, Timing, Watched, main, measure, row, texts
from engine import registry
from engine.config import EngineConfig
from engine.engine import Engine
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
