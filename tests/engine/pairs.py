"""A tiny target with draft models of the same vocabulary, on disk, and engines over them."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.config import EngineConfig
from engine.engine import Engine
from engine.protocols import Load
from engine.request import Request
from engine.sequence import Sequence
from tests.engine.models import tiny
from tests.engine.real import Answer, answers, request

BLOCK = 8
# Greedy and sampled, with everything that shapes a law.
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "logit_bias": {5: 4.0, 7: -100.0}},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.3, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"temperature": 1.0, "allowed_token_ids": list(range(10, 60))},
    {"temperature": 0.0, "min_tokens": 20},
    {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": [30, 31]},
]


class Pair(NamedTuple):
    target: Path
    draft: Path  # the target without its second layer: right now and then


def write_pair(folder: Path) -> Pair:
    """Both models have the same random embeddings."""
    made = tiny.model(tiny.config("Llama"))
    target = tiny.save(made, folder / "target")
    made.model.layers = made.model.layers[:1]
    made.config.num_hidden_layers = 1
    return Pair(target, tiny.save(made, folder / "draft"))


def engine_config(target: Path, draft: Path | None = None, **options: Any) -> EngineConfig:
    settings: dict[str, Any] = {"policy": "fixed" if draft else "off", "budget": 5, "kv_cache_memory_bytes": 1 << 20}
    settings |= {"drafters": ["draft_model"] if draft else ["none"], "profile": False} | options
    return EngineConfig(
        model=str(target),
        dtype="float32",
        num_threads=1,
        block_size=BLOCK,
        check_integrity=True,
        draft_model=None if draft is None else str(draft),
        **settings,
    )


def drafter_of(engine: Engine) -> Any:
    return engine.executor._worker.drafting.drafters[0]  # type: ignore[attr-defined]  # a LocalExecutor


def make_engine(target: Path, draft: Path | None = None, drafting: dict[str, Any] | None = None, **options: Any) -> Engine:
    """`drafting` are attributes of the drafter to be set."""
    engine = Engine(engine_config(target, draft, **options))
    for name, value in (drafting or {}).items():
        assert hasattr(drafter_of(engine), name)
        setattr(drafter_of(engine), name, value)
    return engine


def make_requests(seed: int = 0, max_tokens: int = 24, length: int = 40, **extra: Any) -> list[Request]:
    """One request per set of parameters; two of them begin alike."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, 96) for _ in range(rng.randrange(3, length))] for _ in PARAMETERS]
    prompts[-1] = prompts[0] + prompts[-1]
    return [
        request(f"r{i}", prompt[:length], max_tokens=max_tokens, seed=seed + i, ignore_eos=True, **params, **extra)
        for i, (prompt, params) in enumerate(zip(prompts, PARAMETERS, strict=True))
    ]


def tokens(found: dict[tuple[str, int], Answer]) -> dict[tuple[str, int], list[int]]:
    return {key: answer.tokens for key, answer in found.items()}


def alone(target: Path, requests: Seq[Request]) -> dict[tuple[str, int], list[int]]:
    """Each request by itself, undrafted."""
    engine = make_engine(target)
    out: dict[tuple[str, int], list[int]] = {}
    for one in requests:
        out |= tokens(answers(engine, [one]))
    return out


def plan_budgets(engine: Engine, budgets: Any) -> None:
    """Let budgets(step, seqs) -> list of ints decide instead of the policy."""
    step = 0

    def decide(seqs: Seq[Sequence], load: Load) -> list[int]:
        nonlocal step
        step += 1
        return list(budgets(step, seqs))

    engine.scheduler.policy.budgets = decide  # type: ignore[method-assign]


def alternate(engine: Engine, seed: int = 0, most: int = 5) -> None:
    """Long times without drafts and short ones with, at random, for each sequence on its own."""
    rng = np.random.default_rng(seed)
    plan_budgets(
        engine,
        lambda step, seqs: [
            int(rng.integers(1, most + 1)) if (step // 4 + seq.seq_id) % 2 and rng.random() < 0.8 else 0 for seq in seqs
        ],
    )
