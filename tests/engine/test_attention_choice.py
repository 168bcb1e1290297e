"""`--attention-backend auto` on a GPU: what it measures, what it makes of that, what it says. The clock is the test's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import choose, measure
from engine.attention.measure import LAYERS, TRIALS, Trial, blocks_needed, fastest, trial_batch
from engine.attention.reference import ReferenceAttention
from engine.models.batch import ForwardBatch
from engine.models.runner import Recordable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = (4, 2, 16, 8, torch.float32, None)


class Backend:
    """Remembers what it was asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.planned, self.ran = name, [], 0

    def plan(self, batch: ForwardBatch) -> None:
        self.planned.append(batch)

    def run(self, kv: Tensor, q: Tensor, new: Tensor, scale: float) -> Tensor:
        self.ran += 1
        return q.flatten(1)


class Records(Backend):
    def room(self, *limits: Any) -> Any:
        return limits


class Broken(Backend):
    def plan(self, batch: ForwardBatch) -> None:
        if batch.ancestors[0] is not None:
            raise RuntimeError("no kernel for masks\nat line 7")


def told_clock(seconds: dict[str, list[float]], backends: list[Backend]) -> measure.Clock:
    """Runs every step once, and says of it what the test wants to hear."""
    left = {name: list(times) for name, times in seconds.items()}

    def clock(step: Callable[[], None]) -> float:
        before = [len(backend.planned) for backend in backends]
        step()
        ran = next(b for b, count in zip(backends, before, strict=True) if len(b.planned) > count)
        return left[ran.name].pop(0)

    return clock


@pytest.mark.parametrize(
    ("triton", "other", "winner"),
    [
        ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5], "flashinfer"),
        ([1.0, 1.0, 1.0], [2.0, 0.9, 0.9], "triton"),  # each trial counts alike, however long it takes
        ([1.0, 1.0, 100.0], [1.3, 1.3, 99.0], "triton"),
        ([1.0, 1.0, 1.0], [0.97, 0.97, 0.97], "triton"),  # by chance: the next start might find the opposite
        ([1.0, 1.0, 1.0], [0.94, 0.94, 0.94], "flashinfer"),
    ],
)
def test_the_fastest_is_picked_and_told(
    triton: list[float], other: list[float], winner: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backends = [Backend("triton"), Backend("flashinfer")]
    monkeypatch.setattr(choose, "_usable", lambda shape, device: ({b.name: b for b in backends}, []))
    seconds = {"triton": [t * LAYERS * 1e-5 for t in triton], "flashinfer": [t * LAYERS * 1e-5 for t in other]}
    with caplog.at_level(logging.INFO, "outrider.engine"):
        assert choose.pick(SHAPE, CPU, told_clock(seconds, backends)) == winner
    assert f"attention: {winner} of triton, flashinfer (us a layer: triton decode {triton[0] * 10:.0f}, " in caplog.text
    assert f"; flashinfer decode {other[0] * 10:.0f}, trees" in caplog.text
    for backend in backends:
        assert backend.ran == LAYERS * len(TRIALS) and len(backend.planned) == len(TRIALS)


def test_one_that_cannot_do_all_of_it_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backends = [Backend("triton"), Broken("flashinfer")]
    monkeypatch.setattr(choose, "_usable", lambda shape, device: ({b.name: b for b in backends}, []))
    seconds = iter(range(1, 99))
    with caplog.at_level(logging.INFO, "outrider.engine"):
        found = choose.pick(SHAPE, CPU, lambda step: (step(), float(next(seconds)))[1])
    assert found == "triton"
    assert "flashinfer is not used: RuntimeError: no kernel for masks\n" in caplog.text + "\n"
    with pytest.raises(ValueError, match=r"^attention_backend: none of the installed"):
        fastest({})


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
@pytest.mark.parametrize("block_size", [8, 16])
def test_what_is_measured_is_a_step_like_others(trial: Trial, block_size: int) -> None:
    """A real backend takes it; nobody writes where another one does, and the cache is large enough."""
    batch = trial_batch(trial, block_size, CPU)
    assert len(set(batch.slots.tolist())) == trial.sequences * trial.rows
    assert max(max(table) for table in batch.block_tables) < blocks_needed(block_size)
    assert (batch.ancestors[0] is not None) == trial.tree
    attention = ReferenceAttention(4, 2, 16, block_size, torch.float32, None)
    attention.plan(batch)
    rows = len(batch.slots)
    kv = torch.zeros(blocks_needed(block_size), 2, 2, block_size, 16)
    assert attention.run(kv, torch.ones(rows, 4, 16), torch.ones(rows, 2, 2, 16), 0.25).shape == (rows, 64)
    written = kv[:, 0, 0, :, 0].reshape(-1).nonzero().flatten()
    assert written.tolist() == sorted(batch.slots.tolist())


def test_what_is_recorded_stays_with_the_one_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": Records("triton"), "flashinfer": Backend("flashinfer")}
    monkeypatch.setattr(choose, "_usable", lambda shape, device: (found, []))
    monkeypatch.setattr(choose, "_fastest", lambda shape, device: "flashinfer")
    mixed: Any = choose.make_attention("auto", CUDA, *SHAPE)
    assert mixed.name == "flashinfer" and isinstance(mixed, Recordable)
    assert mixed.room(1, 2, 3) == (1, 2, 3)
    mixed.run(torch.zeros(1), torch.zeros(1, 1, 1), torch.zeros(1), 1.0)
    assert (found["flashinfer"].ran, found["triton"].ran) == (1, 0)
    monkeypatch.setattr(choose, "_fastest", lambda shape, device: "triton")
    assert choose.make_attention("auto", CUDA, *SHAPE) is found["triton"]


def test_a_library_that_is_broken_is_done_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr("engine.attention.flashinfer.unavailable", lambda *args: None)
    monkeypatch.setitem(__import__("sys").modules, "flashinfer", None)  # importing it raises
    half = (*SHAPE[:4], torch.bfloat16, None)
    with caplog.at_level(logging.WARNING, "outrider.engine"):
        assert choose.make_attention("auto", CUDA, *half).name == "triton"
    assert "flashinfer: ModuleNotFoundError" in caplog.text
    monkeypatch.setattr("engine.attention.flashinfer.unavailable", lambda *args: "is not there")
    with pytest.raises(ValueError, match=r"^attention_backend: flashinfer is not there"):
        choose.make_attention("flashinfer", CUDA, *half)


@pytest.mark.gpu
def test_a_gpu_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("flashinfer")
    with caplog.at_level(logging.INFO, "outrider.engine"):
        found = choose.pick((32, 8, 128, 16, torch.bfloat16, None), CUDA, measure.device_clock(CUDA))
    assert found in ("triton", "flashinfer") and "of triton, flashinfer (us a layer" in caplog.text
