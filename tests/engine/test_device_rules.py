"""A step's rules as a GPU computes them, under Triton's interpreter: the verdicts and laws of the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from engine.device_rules import draw, has_kernels, how_chosen, match_verdict, truncate_rows, warm_up
from engine.gumbel_max import Address, gumbel_argmax
from engine.noise import draft_stream
from engine.protocols import Siblings
from engine.request import SamplingParams
from engine.target_law import TargetLaw
from engine.tree import DraftForest
from engine.verifiers.match import MatchVerifier
from engine.verifiers.recursive import RecursiveVerifier
from engine.verifiers.rejection import RejectionVerifier
from tests.kernels.forests import NAMES, sampled_forest, sequences
from tests.toy import sequence

pytest.importorskip("triton")

from kernels.interpreter import interpreted

V = 150
ASKED = [
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 3, "repetition_penalty": 1.2},
    {"min_p": 0.05, "presence_penalty": 0.5},
    {},
    {"temperature": 1.1, "logit_bias": {3: 4.0}, "top_p": 0.95},
]
USERS = ["engine.verifiers.match", "engine.verifiers.recursive", "engine.verifiers.rejection", "engine.target_law"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    device = torch.device(request.param)
    if device.type == "cpu":
        for module in USERS:
            monkeypatch.setattr(f"{module}.has_kernels", lambda device: True)
    with interpreted() if device.type == "cpu" else nullcontext():
        yield device


def case(seed: int) -> tuple[DraftForest, list, torch.Tensor]:
    """Trees of several sizes below sequences that ask for different things; children often carry the likeliest token."""
    rng = np.random.default_rng(seed)
    seqs = [sequence([1, 2, 3 + b], b, seed=2**64 - 1 - b, **asked) for b, asked in enumerate(ASKED)]
    for b, seq in enumerate(seqs):
        seq.tokens += [5] * b
    trees, first = [], 0
    sizes = [7, 5, 1, 9, 4]
    logits = rng.normal(size=(sum(sizes), V)).astype(np.float32) * 1.5
    for seq, size in zip(seqs, sizes, strict=True):
        parents = [-1, *(int(rng.integers(max(0, i - 2), i)) for i in range(1, size))]
        tokens = [seq.tokens[-1]]
        best = logits.argmax(1)
        tokens += [int(best[first + up]) if rng.random() < 0.8 else int(rng.integers(V)) for up in parents[1:]]
        trees.append((tokens, parents))
        first += size
    logits[np.arange(len(logits)), logits.argmax(1)] += 3
    return DraftForest.from_parents(trees), seqs, torch.from_numpy(logits)


@pytest.mark.parametrize("seed", range(3))
def test_law_and_verdict_are_those_of_the_cpu(seed: int, device: torch.device) -> None:
    forest, seqs, logits = case(seed)
    law = TargetLaw(V, frozenset({0}), device)(logits.to(device), seqs, forest)
    with pytest.MonkeyPatch.context() as patch:
        for module in USERS:
            patch.setattr(f"{module}.has_kernels", lambda device: False)
        expected_law = TargetLaw(V, frozenset({0}), "cpu")(logits, seqs, forest)
        expected = MatchVerifier().verify(forest, expected_law, seqs)
    found = MatchVerifier().verify(forest, law, seqs)
    assert found == expected and sum(map(len, found.nodes)) > 0
    roots = forest.start[:-1].tolist()  # rows that nothing can reach may be left untruncated on the CPU
    assert torch.equal(law[roots].cpu().isneginf(), expected_law[roots].isneginf())


@pytest.mark.parametrize("verifier", [RecursiveVerifier, RejectionVerifier])
def test_a_rejection_rules_verdict_is_the_cpus(verifier: type, device: torch.device) -> None:
    forest, scores = sampled_forest(["iid", "point", "distinct", "greedy"], 60, np.random.default_rng(3))
    seqs = sequences(4, [False, False, True, False])
    found = verifier(NAMES).verify(forest, torch.from_numpy(scores).to(device), seqs)
    with pytest.MonkeyPatch.context() as patch:
        for module in USERS:
            patch.setattr(f"{module}.has_kernels", lambda device: False)
        assert found == verifier(NAMES).verify(forest, torch.from_numpy(scores), seqs)
    assert sum(map(len, found.nodes)) > 0


def test_a_node_of_an_unknown_drafter_is_not_judged() -> None:
    forest, _ = sampled_forest(["iid"], 60, np.random.default_rng(3))
    with pytest.raises(KeyError):
        how_chosen(forest, {"point": Siblings.POINT})


def test_draws_are_those_of_the_cpu(device: torch.device) -> None:
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(1)) * 3
    scores[1, 4] = torch.nan
    addresses = [Address(2**64 - 1 - i, i, 7 * i, draft_stream(2**20 + i, 200)) for i in range(5)]
    rows = [0, 2, 1, 2, 0]
    numbers = [(a.seed, a.sample, a.position, a.stream) for a in addresses]
    assert draw(scores.to(device).t().contiguous().t(), rows, numbers) == gumbel_argmax(scores, rows, addresses)


def test_an_unusable_root_has_no_tokens(device: torch.device) -> None:
    forest, seqs, logits = case(0)
    logits[forest.start[3], 4] = torch.nan
    found = match_verdict(forest, logits.to(device), seqs)
    assert found.tokens[3] == [] and found.nodes[3] == [] and all(found.tokens[b] for b in (0, 1, 2, 4))


def test_nothing_to_judge(device: torch.device) -> None:
    verdict = match_verdict(DraftForest.roots([]), torch.zeros(0, V, device=device), [])
    assert verdict.nodes == [] and verdict.tokens == []


def test_rows_of_which_nobody_asks_anything_are_not_touched(device: torch.device) -> None:
    scores = torch.randn(3, V, device=device)
    kept = scores.clone()
    truncate_rows(scores, [SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, temperature=0.0, top_k=1)], [1, 2])
    assert torch.equal(scores, kept)


def specialised(kernel: Any, args: tuple, options: dict) -> tuple:
    """What a launch is compiled for: constants, types, ones, and what can be divided by 16."""
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names}).arguments
    key: list[object] = [kernel.fn.__name__, options.get("num_warps")]
    for parameter in kernel.params:
        value = bound[parameter.name]
        if isinstance(value, torch.Tensor):
            key.append((value.dtype, value.data_ptr() % 16 == 0))
        elif parameter.is_constexpr or isinstance(value, float) or not parameter.do_not_specialize:
            key.append(value if parameter.is_constexpr else (type(value), value == 1, value % 16 == 0))
    return tuple(key)


def test_after_the_warm_up_no_step_compiles_anything(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    compiled: set[tuple] = set()
    run = JITFunction.run

    def record(kernel: Any, *args: Any, **options: Any) -> Any:
        compiled.add(specialised(kernel, args, options))
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", record)
    warm_up(V, device, 12)
    known = set(compiled)
    for seed in range(2):
        forest, seqs, logits = case(seed)
        MatchVerifier().verify(forest, TargetLaw(V, frozenset({0}), device)(logits.to(device), seqs, forest), seqs)
    for verifier, kinds in ((RecursiveVerifier, ["iid", "distinct", "greedy"]), (RejectionVerifier, ["iid"])):
        forest, scores = sampled_forest(kinds, V, np.random.default_rng(0))
        verifier(NAMES).verify(forest, torch.from_numpy(scores).to(device), sequences(len(kinds), [False] * len(kinds)))
    draw(torch.zeros(2, V, device=device), [1], [(1, 0, 0, 0)])
    assert compiled == known and len(known) > 8


def test_there_are_no_kernels_on_a_cpu() -> None:
    assert not has_kernels(torch.device("cpu"))
