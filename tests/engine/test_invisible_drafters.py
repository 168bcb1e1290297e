"""Every registered drafter is invisible, alone and all together: the token ids are those of each request alone, undrafted.

float32 on a tiny random model; the same on SmolLM2 is marked long. Asked for twice on one engine, so that prefix hits and what
drafters kept of the first time (whole answers, drafted many tokens at a time) come into it.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from engine import datastore
from engine.engine import Engine
from engine.protocols import Drafter
from engine.registry import DRAFTERS, make_drafter
from engine.request import Request
from engine.worker import Worker
from tests.engine import pairs
from tests.engine.models import tiny
from tests.engine.pairs import alternate, make_requests, tokens
from tests.engine.real import answers, load_worker, make_engine
from tests.engine.test_invisible import make_requests as real_requests

Tokens = dict[tuple[str, int], list[int]]

# A draft model has weights and KV of its own, made by the worker: tests/engine/test_draft_model.py.
NAMES = sorted(set(DRAFTERS) - {"draft_model", "none"})
SETS = {name: [name] for name in NAMES} | {"all": NAMES}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    made = tiny.save(tiny.model(tiny.config("Llama")), tmp_path_factory.mktemp("tiny") / "target")
    return load_worker(made, block_size=8)


@pytest.fixture(scope="module")
def alone(worker: Worker) -> Tokens:
    out: Tokens = {}
    for one in make_requests(max_tokens=40):
        out |= tokens(answers(make_engine(worker), [one]))
    return out


@pytest.fixture(scope="module")
def requests(alone: Tokens) -> list[Request]:
    """With a prediction that is right but for one token."""
    made = []
    for one in make_requests(max_tokens=40):
        guess = list(alone[one.request_id, 0])
        guess[20] = 2
        made.append(msgspec.structs.replace(one, prediction_ids=guess))
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, worker: Worker, alone: Tokens) -> Path:
    """A datastore that knows half of the answers, and noise."""
    path = tmp_path_factory.mktemp("store") / "texts"
    rng = random.Random(0)
    noise = [[rng.randrange(worker.info.vocab_size) for _ in range(40)] for _ in range(5)]
    datastore.build(path, [*list(alone.values())[::2], *noise], worker.info.vocab_size, b"f" * 32)
    return path


def drafters(names: list[str], worker: Worker, store: Path) -> list[str | Drafter]:
    offers = {"vocab_size": worker.info.vocab_size, "eos_ids": frozenset(worker.info.eos_ids), "datastore": str(store)}
    return [make_drafter(name, offers) for name in names]


def again(requests: list[Request]) -> list[Request]:
    return [msgspec.structs.replace(one, request_id=one.request_id + " again") for one in requests]


def assert_same(found: Tokens, alone: Tokens) -> None:
    for (name, sample), ids in found.items():
        assert ids == alone[name.removesuffix(" again"), sample], name


def accepted(engine: Engine) -> int:
    stats = engine.stats()
    assert not stats.drafter_fallbacks
    return stats.num_accepted_tokens


@pytest.mark.parametrize("name", SETS)
def test_alone_and_asked_again(name: str, worker: Worker, requests: list[Request], alone: Tokens, store: Path) -> None:
    engine = make_engine(worker, drafters(SETS[name], worker, store), budget=7)
    for one in [*requests, *again(requests)]:
        assert_same(tokens(answers(engine, [one])), alone)
    assert accepted(engine) > 0


@pytest.mark.parametrize("name", SETS)
def test_in_a_batch_of_eight(name: str, worker: Worker, requests: list[Request], alone: Tokens, store: Path) -> None:
    engine = make_engine(worker, drafters(SETS[name], worker, store), budget=7, max_num_batched_tokens=64)
    for asked in (requests, again(requests)):
        found = tokens(answers(engine, asked))
        assert len(found) == len(requests) == 8
        assert_same(found, alone)
    assert accepted(engine) > 0


@pytest.mark.parametrize("name", SETS)
def test_after_preemption_and_with_budgets_that_change_at_random(
    name: str, worker: Worker, requests: list[Request], alone: Tokens, store: Path
) -> None:
    engine = make_engine(worker, drafters(SETS[name], worker, store), budget=7, num_blocks=24, enable_prefix_caching=False)
    alternate(engine, seed=3, most=7)
    found = tokens(answers(engine, requests))
    assert len(found) == 8 and engine.stats().preemptions > 0
    assert_same(found, alone)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SETS)
def test_on_a_real_model(name: str, smollm2_dir: Path, tmp_path: Path) -> None:
    worker = load_worker(smollm2_dir, block_size=8)
    asked = real_requests(smollm2_dir)
    alone: Tokens = {}
    for one in asked:
        alone |= tokens(answers(make_engine(worker), [one]))
    path = tmp_path / "texts"
    datastore.build(path, list(alone.values())[::2], worker.info.vocab_size, b"f" * 32)
    single = make_engine(worker, drafters(SETS[name], worker, path), budget=8)
    for one in asked:
        assert_same(tokens(answers(single, [one])), alone)
    batched: dict[str, Any] = {"prefix hits": {}, "preemption": {"num_blocks": 30, "enable_prefix_caching": False}}
    for options in batched.values():
        engine = make_engine(worker, drafters(SETS[name], worker, path), budget=8, **options)
        for part in np.array_split(np.arange(len(asked)), 3):
            assert_same(tokens(answers(engine, [asked[i] for i in part])), alone)
        assert_same(tokens(answers(engine, again(asked[:8]))), alone)
    engine = make_engine(worker, drafters(SETS[name], worker, path), budget=8, num_blocks=40)
    alternate(engine, seed=4, most=8)  # budgets that change at random, beside preemption and prefix hits
    for part in np.array_split(np.arange(len(asked)), 3):
        assert_same(tokens(answers(engine, [asked[i] for i in part])), alone)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_draft_model_on_a_real_model(smollm2_dir: Path, tmp_path: Path) -> None:
    """SmolLM2 without its last two layers drafts for SmolLM2: right now and then."""
    draft = fewer_layers(smollm2_dir, tmp_path / "draft", 28)
    asked = real_requests(smollm2_dir)
    config = pairs.engine_config(smollm2_dir, kv_cache_memory_bytes=256 << 20)
    engine = Engine(config)
    alone: Tokens = {}
    for one in asked:
        alone |= tokens(answers(engine, [one]))
    engine.close()
    for options in ({}, {"enable_prefix_caching": False}):
        pool = (24 if options else 256) << 20
        engine = Engine(pairs.engine_config(smollm2_dir, draft, kv_cache_memory_bytes=pool, **options))
        if not options:
            for one in asked:
                assert_same(tokens(answers(engine, [one])), alone)
            alternate(engine, seed=5)
        for part in np.array_split(np.arange(len(asked)), 3):
            assert_same(tokens(answers(engine, [asked[i] for i in part])), alone)
        stats = engine.stats()
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        assert set(stats.drafter_fallbacks) <= {"slow"}  # a busy machine
        assert not options or stats.preemptions > 0
        engine.close()


def fewer_layers(model: Path, made: Path, layers: int) -> Path:
    """The same model up to a layer, in a directory of its own."""
    made.mkdir()
    config = json.loads((model / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, made / name)
    weights = load_file(model / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not (found := re.search(r"layers\.(\d+)\.", n)) or int(found[1]) < layers}
    save_file(kept, made / "model.safetensors", {"format": "pt"})
    return made
