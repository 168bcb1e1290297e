"""A request that wants no speculation gets the model's own tokens, whatever verifier the server runs."""

from __future__ import annotations

import pytest
import torch

from engine.config import EngineConfig
from engine.request import Request, SamplingParams, Speculation
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.verification import Verification
from engine.verifiers.match import MatchVerifier


def sequence(seq_id: int, speculation: Speculation) -> Sequence:
    params = SamplingParams(max_tokens=99, temperature=1.0, seed=seq_id)
    return Sequence(seq_id, Request(request_id=str(seq_id), prompt_ids=[1], params=params, speculation=speculation))


@pytest.mark.parametrize("verifier", ["typical", "lenient", "single_coin", "match"])
def test_off_is_plain_decoding(verifier: str) -> None:
    verification = Verification(EngineConfig(model="", verifier=verifier, lossy=True), [])
    seqs = [sequence(i, Speculation(off=i % 2 == 0)) for i in range(40)]
    forest = DraftForest.roots([1] * len(seqs))
    scores = torch.randn(len(seqs), 50, generator=torch.Generator().manual_seed(1))
    plain = MatchVerifier().verify(forest, scores, seqs).tokens
    found = verification.verify(forest, scores, seqs).tokens
    assert found[::2] == plain[::2]
    if verifier == "typical":  # or the test could not fail
        assert found[1::2] != plain[1::2]
