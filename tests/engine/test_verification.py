"""Which verifier judges what, and which configurations do not start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.protocols import NO_SIGNALS, Siblings
from engine.registry import VERIFIERS, make_verifier
from engine.request import Request, SamplingParams, Speculation
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.verification import Verification
from tests.engine.real import GarbageDrafter

LOSSY = {"typical", "lenient"}
LOSSLESS = set(VERIFIERS) - LOSSY


class Drafter(GarbageDrafter):
    needs = NO_SIGNALS

    def __init__(self, kind: Siblings) -> None:
        super().__init__(10)
        self.siblings = kind
        self.name = kind.value


def verification(*kinds: Siblings, **config: object) -> Verification:
    return Verification(EngineConfig(model="", **config), [Drafter(kind) for kind in kinds])  # type: ignore[arg-type]


def seq(b: int, verifier: str | None = None) -> Sequence:
    params = SamplingParams(max_tokens=99, temperature=1.0, seed=b)
    return Sequence(
        b, Request(request_id=str(b), prompt_ids=[1], params=params, speculation=Speculation(verifier=verifier)), 0, frozenset()
    )


@pytest.mark.parametrize(
    ("kinds", "refused"),
    [
        ([], set()),
        ([Siblings.POINT], set()),
        ([Siblings.COUPLED], LOSSLESS - {"match", "single_coin"}),
        ([Siblings.POINT, Siblings.COUPLED], LOSSLESS - {"match", "single_coin"}),
        ([Siblings.IID], {"optimal"}),
        ([Siblings.DISTINCT], {"optimal", "spectr"}),
        ([Siblings.GREEDY], set()),
        ([Siblings.IID, Siblings.DISTINCT], {"optimal", "spectr"}),
    ],
)
def test_a_request_may_choose_what_is_lossless_and_exact_for_every_drafter(kinds: list[Siblings], refused: set[str]) -> None:
    assert verification(*kinds).names == sorted(LOSSLESS - refused)
    for name in refused:
        with pytest.raises(ValueError, match=r"drafter '\w+' with verifier '\w+' would change the answers"):
            verification(*kinds, verifier=name)
    for name in LOSSLESS - refused:
        assert verification(*kinds, verifier=name).default.name == name


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_a_lossy_verifier_runs_only_where_the_configuration_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="not lossless"):
        verification(Siblings.POINT, verifier=name)
    lossy = verification(Siblings.POINT, verifier=name, lossy=True)
    assert not lossy.default.lossless and name not in lossy.names
    assert lossy.of(seq(0, "match")).lossless, "a request may still ask for an exact one"
    assert verification(Siblings.POINT, lossy=True).of(seq(0, name)).name == "match", "and never for a lossy one"


def test_an_unknown_verifier_does_not_start() -> None:
    with pytest.raises(ValueError, match="did you mean 'rejection'"):
        verification(verifier="rejecton")


def test_each_tree_is_judged_by_its_requests_verifier() -> None:
    names = ["rejection", None, "traversal", "rejection", "recursive", "match"]
    seqs = [seq(b, name) for b, name in enumerate(names)]
    rng = np.random.default_rng(1)
    tokens = [[1, *map(int, rng.integers(0, 6, 3))] for _ in names]
    forest = DraftForest.from_parents([(t, [-1, 0, 0, 1][: len(t)]) for t in tokens], ["iid"] * len(names))
    forest.law = torch.full((1, 6), 1 / 6)
    forest.law_row = np.tile(np.array([0, 0, -1, -1], dtype=np.int32), len(names))
    forest.confidence = np.full(forest.num_nodes, 0.5, dtype=np.float32)
    scores = torch.randn(forest.num_nodes, 6, generator=torch.Generator().manual_seed(0))
    found = verification(Siblings.IID).verify(forest, scores, seqs)
    for b, name in enumerate(names):
        own = make_verifier(name or "match", {"siblings": {"iid": Siblings.IID}})
        alone = own.verify(forest.select([b]), scores[forest.nodes(b)], [seqs[b]])
        assert (found.nodes[b], found.tokens[b]) == (alone.nodes[0], alone.tokens[0]), name


def test_sampled_nodes_may_be_dropped_if_every_verifier_of_the_step_allows_it() -> None:
    several = verification(Siblings.IID, verifier="rejection")
    assert several.anticipates([seq(0, "match"), seq(1, "single_coin")])
    assert not several.anticipates([seq(0, "match"), seq(1)])
    assert several.anticipates([])
