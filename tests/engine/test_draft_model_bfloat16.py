"""A real model in its default type, as a directory and as the GGUF file it was made from: the one drafts for the other.

Their weights and their vocabulary are the same, so every draft stands, greedy and sampled: rows are bit for bit the same in
whatever shape they are computed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from tests.engine.pairs import drafter_of, tokens
from tests.engine.real import answers, request

PROMPT = [1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198, 198, 1604, 3044, 24, 81, 28, 278, 727]
BYTES = 32 << 20


def engine(target: Path, draft: Path | None = None) -> Engine:
    drafting = {"policy": "fixed", "draft_model": str(draft), "drafters": ["draft_model"]} if draft else {"policy": "off"}
    config = EngineConfig(
        model=str(target),
        dtype="bfloat16",
        num_threads=1,
        kv_cache_memory_bytes=BYTES,
        budget=5,
        profile=False,
        **({"drafters": ["none"]} | drafting),  # type: ignore[arg-type]  # values of many types
    )
    return Engine(config)


@pytest.fixture(scope="module")
def pair(smollm2_dir: Path, smollm2_gguf: Path) -> Engine:
    made = engine(smollm2_dir, smollm2_gguf)
    drafter_of(made).branches, drafter_of(made).least = 1, 0.0
    return made


def test_every_draft_stands_and_nothing_changes(pair: Engine, smollm2_dir: Path) -> None:
    requests = [
        request(f"{i}", PROMPT[i:], max_tokens=18, temperature=temperature, seed=i, ignore_eos=True)
        for i, temperature in enumerate([0.0, 1.0, 0.7])
    ]
    found = answers(pair, requests)
    assert tokens(found) == tokens(answers(engine(smollm2_dir), requests))
    stats = pair.stats()
    assert stats.drafter_fallbacks == {}
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0
