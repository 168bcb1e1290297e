"""bench.kernels without a GPU: its arithmetic under a clock of our own, and every call that it would time, interpreted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bench import kernels
from bench.device_clock import Arm, Ceilings, DeviceClock, ceilings, describe
from bench.kernel_case import FIXED, OWN, Case, Measured, Sizes, table
from bench.kernels import Report, cases, measure, sizes_of
from bench.shapes import SHAPES

MOST = Ceilings(copy=4e12, matrix=8e14, launch=2e-6)
CPU = torch.device("cpu")


@dataclass
class Told:
    """A clock that says what it was told, by the call."""

    seconds_of: dict[Callable[[], object], float]

    def seconds(self, arm: Arm) -> float:
        return self.seconds_of[arm.call]


def nothing() -> None:
    pass


def slow() -> None:
    pass


def broken() -> None:
    raise RuntimeError("no such kernel\nat all")


@dataclass
class Calling:
    """A clock that runs each call once, and keeps what came out."""

    results: list[object] = field(default_factory=list)

    def seconds(self, arm: Arm) -> float:
        if arm.prepare is not None:
            arm.prepare()
        self.results.append(arm.call())
        return 1e-3


def case(shape: dict[str, int | str], arms: dict[str, Arm], flops: int = 0) -> Case:
    return Case("thing", shape, 2_000_000_000, flops, arms)


def test_shares_are_of_this_devices_own_ceilings() -> None:
    one = case({"rows": 4}, {}, flops=100_000_000_000)
    assert one.floor(MOST) == pytest.approx(5e-4)
    rows = table([Measured(one, {OWN: 1e-3, "torch": 2e-3}), Measured(case({"rows": 8}, {}), {OWN: 2e-3})], MOST)
    first, second = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    assert first == {
        "rows": "4", "us": "1000.0", "TB/s": "2.000", "% of copy": "50", "TFLOP/s": "100.0", "% of matrix": "12",
        "% of floor": "50", "torch us": "2000.0", "x torch": "2.00",
    }  # fmt: skip
    assert (second["TFLOP/s"], second["% of copy"], second["x torch"]) == ("-", "25", "-")
    bound = case({}, {}, flops=8 * 10**12)
    assert bound.floor(MOST) == pytest.approx(1e-2)  # here the arithmetic takes longer than the bytes


def test_ceilings_count_what_is_read_and_what_is_written() -> None:
    class Second:
        def seconds(self, arm: Arm) -> float:
            arm.call()
            return 2.0

    found = ceilings(Second(), CPU, torch.float32, copied=1 << 10, side=8)
    assert (found.copy, found.matrix, found.launch) == (1 << 10, 8**3, 2.0)


def test_what_fails_is_said_and_the_others_go_on() -> None:
    def unmakeable() -> Case:
        raise RuntimeError("out of memory")

    made = [
        unmakeable,
        lambda: case({"rows": 1}, {OWN: Arm(broken)}),
        lambda: case({"rows": 2}, {OWN: Arm(nothing), "peer": Arm(broken)}),
    ]

    class Clock(Told):
        def seconds(self, arm: Arm) -> float:
            arm.call()
            return 1e-3

    report = measure(made, Clock({}), MOST, math.inf)
    assert report.failures == [
        "unmakeable(): RuntimeError: out of memory",
        "triton, thing (rows 1): RuntimeError: no such kernel",
    ]
    assert report.refused == ["peer, thing (rows 2): RuntimeError: no such kernel"]
    (kept,) = report.measured
    assert kept.seconds[OWN] == 1e-3 and math.isnan(kept.seconds["peer"])
    assert json.loads(json.dumps(kept.record()))["seconds"] == {OWN: 1e-3, "peer": None}
    assert "could not run: peer" in report.text() and "### thing" in report.text()


def test_nothing_is_begun_after_the_time_is_over() -> None:
    ticks = iter([0.0, 5.0, 11.0])

    def last() -> Case:
        raise AssertionError("too late")

    made = [lambda: case({"rows": 1}, {OWN: Arm(nothing)})] * 2
    report = measure([*made, last], Told({nothing: 1.0}), MOST, 10.0, lambda: next(ticks))
    assert len(report.measured) == 2 and report.left_out == ["last()"]
    assert "not measured, the time was over: last()" in report.text()


def test_without_a_gpu_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kernels.main(["--quick"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and len(told.err.splitlines()) == 1 and "no CUDA device" in told.err


def test_what_the_quick_run_leaves_out() -> None:
    quick, full = (sizes_of(kernels._parser().parse_args(flags)) for flags in (["--quick"], []))
    assert [one.name for one in quick] == ["llama-3.1-8b"]
    assert [one.name for one in full] == ["llama-3.1-8b", "llama-3.2-1b"]
    assert set(quick[0].batches) < set(full[0].batches) and max(full[0].contexts) == 32768
    assert {0, 16} <= set(quick[0].nodes) and 32 in quick[0].batches and 4096 in quick[0].contexts  # the goals' shapes


def sizes(**asked: list[int]) -> Sizes:
    default = {"batches": [1, 3], "contexts": [5], "nodes": [0, 4], "rows": [1, 3]}
    return Sizes("tiny", SHAPES["tiny"], **(default | asked), most_tokens=1000, dtype=torch.float32)  # type: ignore[arg-type]


@pytest.fixture
def interpreter() -> object:
    pytest.importorskip("triton")
    from kernels.interpreter import interpreted

    with interpreted():
        yield


@pytest.mark.usefixtures("interpreter")
def test_every_attention_call_runs_and_a_fixed_order_gives_the_same() -> None:
    clock = Calling()
    report = measure(cases([sizes()], ["attention"], CPU), clock, MOST, math.inf)
    assert report.failures == report.refused == []
    assert [dict(one.case.shape) for one in report.measured] == [
        {"model": "tiny", "batch": batch, "context": 5, "nodes": nodes} for batch in (1, 3) for nodes in (0, 4)
    ]
    for i, one in enumerate(report.measured):
        assert list(one.seconds) == [OWN, FIXED, "sdpa"]
        own, fixed, sdpa = clock.results[3 * i : 3 * i + 3]
        assert isinstance(own, torch.Tensor) and isinstance(fixed, torch.Tensor) and isinstance(sdpa, torch.Tensor)
        torch.testing.assert_close(own, fixed)
        assert sdpa.shape == (one.case.shape["batch"], 2, 2 * (1 + int(one.case.shape["nodes"])), 16)
    last = report.measured[-1].case
    # 3 sequences of 10 keys; 5 rows that see 5 keys each, and 1 + 2 + 2 + 3 + 3 of the tree.
    assert last.bytes == 4 * (3 * 10 * 2 * 2 * 16 + 2 * 15 * 4 * 16)
    assert last.flops == 4 * 4 * 16 * 3 * (25 + 11)


def test_contexts_that_would_not_fit_are_not_made() -> None:
    pytest.importorskip("triton")
    assert len(list(cases([sizes(contexts=[100, 400])], ["attention"], CPU))) == 2 * 2 + 2


@pytest.mark.usefixtures("interpreter")
def test_every_other_call_runs_beside_torchs() -> None:
    clock = Calling()
    report = measure(cases([sizes()], ["others"], CPU), clock, MOST, math.inf)
    assert report.failures == report.refused == []
    assert {one.case.kernel for one in report.measured} == {
        "write_kv", "rope_write_kv", "rms_norm", "add_rms_norm", "silu_mul", "commit_kv", "linear", "quant_linear",
        "gumbel_argmax", "truncate", "match_verify",
    }  # fmt: skip
    assert all(one.case.bytes > 0 for one in report.measured)
    for i, one in enumerate(report.measured):
        own, other = clock.results[2 * i : 2 * i + 2]
        if one.case.kernel in ("linear", "rms_norm", "silu_mul"):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    linear = next(one.case for one in report.measured if one.case.kernel == "linear")
    assert dict(linear.shape) == {"model": "tiny", "rows": 1, "outputs": 128, "inputs": 64}
    assert (linear.bytes, linear.flops) == (4 * (64 + 128 * 64 + 128), 2 * 128 * 64)


def test_a_run_leaves_its_tables_and_one_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels, "DeviceClock", lambda device, budget: Told({nothing: 1e-3, slow: 3e-3}))
    monkeypatch.setattr(kernels, "ceilings", lambda *args: MOST)
    monkeypatch.setattr(kernels, "describe", lambda device: {"gpu": "none"})
    made = [lambda: case({"rows": 1}, {OWN: Arm(nothing), "torch": Arm(slow)})]
    monkeypatch.setattr(kernels, "cases", lambda sizes, kinds, device: made)
    assert kernels.main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "### thing" in out and " 3.00 |" in out and "4.00 TB/s" in out
    (line,) = (tmp_path / "kernels.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["gpu"] == "none" and record["ceilings"]["copy"] == 4e12
    assert record["cases"][0]["seconds"] == {OWN: 1e-3, "torch": 3e-3}


def test_an_empty_report_is_no_success() -> None:
    assert Report(MOST).text().startswith("copy 4.00 TB/s")


@pytest.mark.gpu
def test_the_clock_of_a_real_device() -> None:
    device = torch.device("cuda")
    clock = DeviceClock(device, budget=0.02)
    most = ceilings(clock, device, copied=1 << 28, side=2048)
    assert 0 < most.launch < 1e-4 and most.copy > 1e11 and most.matrix > 1e12
    small, large = (torch.randn(size, device=device) for size in (1 << 20, 1 << 27))
    assert clock.seconds(Arm(lambda: large.mul_(1.0))) > 5 * clock.seconds(Arm(lambda: small.mul_(1.0)))
    assert clock.seconds(Arm(lambda: float(small.sum()))) > 0  # cannot be captured
    assert "multiprocessors" in describe(device)["gpu"]


def test_torchs_attention_is_given_the_same_question() -> None:
    """Dense keys in pages that lie in order, one sequence: the same answer as the definition's."""
    pytest.importorskip("triton")
    from bench.attention_cases import _paths, _sdpa, _tree
    from kernels.reference import tree_attention

    torch.manual_seed(0)
    heads, kv_heads, size, rows, length = 6, 2, 8, 5, 14
    tree, q = _tree(rows), torch.randn(rows, heads, size)
    dense = torch.randn(2, kv_heads, length, size)
    flat = torch.zeros(1, 2, kv_heads, 16, size)
    flat.view(-1)[: dense.numel()] = dense.flatten()
    found = _sdpa(q, flat, 1, length, tree, 0.3).call()
    pool = torch.zeros(1, 2, kv_heads, 16, size)
    pool[0, :, :, :length] = dense
    start, context = torch.tensor([0, rows]), torch.tensor([length - rows])
    expected = tree_attention(q, pool, torch.tensor([[0]]), start, context, tree, 0.3)
    folded = expected.view(rows, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, size)
    torch.testing.assert_close(found, folded)
    assert [row[: int(seen.sum())].tolist() for row, seen in zip(_paths(tree), tree, strict=True)] == [
        [0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4],
    ]  # fmt: skip
