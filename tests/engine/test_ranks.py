"""Ranks as processes: what they hold besides the target, how many there may be, and what becomes of an engine that loses one."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from engine.engine import Engine
from engine.executors.multiproc import MultiprocExecutor
from engine.executors.ranks import RankLostError
from engine.request import Request
from tests.engine import pairs
from tests.engine.pairs import engine_config, make_requests, tokens
from tests.engine.real import answers, request

Tokens = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    return pairs.write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(max_tokens=20)


@pytest.fixture(scope="module")
def alone(pair: pairs.Pair, requests: list[Request]) -> Tokens:
    """One rank, each request by itself, undrafted."""
    return pairs.alone(pair.target, requests)


def test_a_draft_model_lies_on_rank_0(pair: pairs.Pair, requests: list[Request], alone: Tokens) -> None:
    engine = pairs.make_engine(pair.target, pair.draft, tensor_parallel_size=2)
    try:
        found = answers(engine, requests)
        assert engine.stats().num_accepted_tokens > 0
    finally:
        engine.close()
    assert tokens(found) == alone


def test_a_draft_model_after_preemption(pair: pairs.Pair, requests: list[Request], alone: Tokens) -> None:
    roomy = pairs.make_engine(pair.target, pair.draft, tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20)
    block = (1 << 20) // roomy.info.num_blocks
    roomy.close()
    engine = pairs.make_engine(
        pair.target, pair.draft, tensor_parallel_size=2, kv_cache_memory_bytes=20 * block, max_model_len=80
    )
    try:
        found = answers(engine, requests)
        stats = engine.stats()
        assert stats.preemptions > 0 and stats.num_accepted_tokens > 0
    finally:
        engine.close()
    assert tokens(found) == alone


def test_the_bigrams_are_read_over_all_ranks(pair: pairs.Pair, tmp_path: Path) -> None:
    tables = []
    for size in (1, 2):
        options: dict[str, Any] = {"drafters": ["token_recycling"], "profile": True, "cache_dir": str(tmp_path / str(size))}
        engine = Engine(engine_config(pair.target, tensor_parallel_size=size, **options))
        while engine.study():
            pass
        executor: Any = engine.executor
        tables.append(executor.successors.ids.copy())
        engine.close()
    assert np.array_equal(*tables)


@pytest.mark.long
def test_more_ranks_than_key_value_heads(pair: pairs.Pair, requests: list[Request], alone: Tokens) -> None:
    engine = Engine(engine_config(pair.target, tensor_parallel_size=4, drafters=["suffix"], policy="fixed"))
    try:
        assert tokens(answers(engine, requests)) == alone
    finally:
        engine.close()


def test_a_slow_rank_changes_nothing(pair: pairs.Pair, requests: list[Request], alone: Tokens) -> None:
    """0 to 200 ms late with whatever it hears, it makes everybody wait and nobody err."""
    config = engine_config(pair.target, tensor_parallel_size=2, drafters=["suffix", "token_recycling"], policy="fixed")
    executor = MultiprocExecutor(config, (sys.executable, "-P", "-m", "tests.engine.slow_rank"))
    try:
        found = tokens(answers(Engine(config, executor), requests))
    finally:
        executor.close()
    assert found == alone


# ---- losing a rank


def step_on(engine: Engine) -> None:
    """For ever, as the loop does."""
    while True:
        if engine.has_work():
            engine.step()
        engine.check()


@pytest.fixture
def start(pair: pairs.Pair) -> Iterator[Callable[..., tuple[Engine, MultiprocExecutor, list[psutil.Process]]]]:
    """Starts an engine of two ranks, and sees to it that nothing of it is left."""
    made: list[Engine] = []
    seen: list[psutil.Process] = []

    def make(module: str = "engine.executors.rank_process", size: int = 2, **options: Any) -> Any:
        config = engine_config(pair.target, tensor_parallel_size=size, **options)
        executor = MultiprocExecutor(config, (sys.executable, "-P", "-m", module))
        made.append(Engine(config, executor))
        seen.extend(psutil.Process(pid) for pid in executor.pids)
        return made[-1], executor, seen

    yield make
    for engine in made:
        engine.close()
    assert not [process for process in seen if process.is_running()]


def endless(count: int = 16) -> list[Request]:
    return [request(f"r{i}", [3 + i, 4, 5], max_tokens=100, ignore_eos=True) for i in range(count)]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_killed_rank(size: int, start: Any) -> None:
    engine, _, processes = start(size=size, kv_cache_memory_bytes=16 << 20)
    for one in endless():
        engine.add(one)
    engine.step()
    processes[-1].kill()
    with pytest.raises(RankLostError, match=f"rank {size - 1} was killed by SIGKILL"):
        step_on(engine)


def test_a_rank_that_dies_while_nobody_asks_anything(start: Any) -> None:
    engine, _, [process] = start()
    process.kill()
    with pytest.raises(RankLostError, match="rank 1 was killed by SIGKILL"):
        step_on(engine)


def test_a_frozen_rank(start: Any) -> None:
    """It is given up after the time that the configuration says, and ended."""
    engine, _, [process] = start(rank_timeout=1.0, kv_cache_memory_bytes=16 << 20)
    for one in endless():
        engine.add(one)
    engine.step()
    process.suspend()
    started = time.perf_counter()
    with pytest.raises(RankLostError, match="a rank kept the others waiting for 1 s"):
        step_on(engine)
    assert time.perf_counter() - started >= 1.0


def test_a_rank_that_differs(start: Any) -> None:
    engine, *_ = start("tests.engine.wrong_rank")
    engine.add(request("odd", [3, 4, 5], max_tokens=40, ignore_eos=True))
    with pytest.raises(RankLostError, match="rank 1: this rank's sequences differ from rank 0's at step"):
        step_on(engine)


def test_ranks_do_not_outlive_the_engine(pair: pairs.Pair, tmp_path: Path) -> None:
    """Not even when it is killed, and not even a frozen one."""
    config = tmp_path / "config"
    config.write_bytes(msgspec.msgpack.encode(engine_config(pair.target, tensor_parallel_size=2)))
    lines = [
        "import sys, time, msgspec",
        "from engine.config import EngineConfig",
        "from engine.executors.multiproc import MultiprocExecutor",
        f"executor = MultiprocExecutor(msgspec.msgpack.decode(open({str(config)!r}, 'rb').read(), type=EngineConfig))",
        "print(*executor.pids, flush=True)",
        "time.sleep(600)",
    ]
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", "\n".join(lines)]
    with psutil.Popen(command, stdout=-1, text=True, env=os.environ | {"PYTHONPATH": root}) as engine:
        assert engine.stdout is not None
        rank = psutil.Process(int(engine.stdout.readline()))
        rank.suspend()
        engine.kill()
    _, alive = psutil.wait_procs([rank], 10)
    assert not alive


def test_a_rank_that_cannot_start_is_told_as_it_tells_it(pair: pairs.Pair) -> None:
    """Settings are refused in the words of the rank that minds them; a rank that just dies is named."""
    with pytest.raises(ValueError, match="load_format is transformers"):
        MultiprocExecutor(engine_config(pair.target, tensor_parallel_size=2, load_format="transformers"))
    with pytest.raises(RankLostError, match="rank 1 ended with exit code 3"):
        MultiprocExecutor(engine_config(pair.target, tensor_parallel_size=2), (sys.executable, "-c", "raise SystemExit(3)"))


def test_ranks_leave_when_they_are_told(start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine, executor, _ = start()
    assert not list(tmp_path.iterdir())  # they have met
    engine.close()
    assert [process.returncode for process in executor._ranks._processes] == [0]
    engine.check()


def test_an_engine_in_one_process_has_nothing_to_lose(pair: pairs.Pair) -> None:
    engine = Engine(engine_config(pair.target))
    engine.check()
    engine.close()
