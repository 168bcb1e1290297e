"""What several engines get of one machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from server import shares as module
from server.config import ConfigError, parse
from server.shares import shares, visible_gpus


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Eight cores, no GPU, nothing said in the environment."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(module, "DEVICES", tmp_path)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def threads(count: int, **settings: Any) -> list[int | None]:
    return [share.config.num_threads for share in shares(EngineConfig(model="m", **settings), count)]


def gpus(folder: Path, count: int) -> None:
    for name in (*(f"nvidia{i}" for i in range(count)), "nvidiactl", "nvidia-uvm"):
        (folder / name).touch()


def seen(count: int, **settings: Any) -> list[str | None]:
    return [share.environment.get("CUDA_VISIBLE_DEVICES") for share in shares(EngineConfig(model="m", **settings), count)]


def test_threads_are_divided() -> None:
    assert threads(1) == [None]
    assert threads(2) == [4, 4]
    assert threads(3) == [2, 2, 2]
    assert threads(20) == [1] * 20
    assert threads(2, num_threads=7) == [7, 7]


def test_threads_that_the_environment_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(2) == [None, None]


def test_without_gpus_nothing_is_said_of_them() -> None:
    assert seen(3) == [None] * 3
    assert seen(2, device="cpu") == [None] * 2


def test_each_engine_sees_its_own_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(tmp_path, 4)
    assert seen(1, device="cuda") == [None]
    assert seen(2) == ["0", "1"]
    assert seen(4, device="cuda") == ["0", "1", "2", "3"]
    assert seen(2, tensor_parallel_size=2) == ["0,1", "2,3"]
    assert seen(2, device="cpu") == [None, None]
    assert seen(8, distributed_executor_backend="ray") == [None] * 8  # Ray finds them their GPUs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-b, 3,-1,0")
    assert visible_gpus() == ["GPU-b", "3"]
    assert seen(2) == ["GPU-b", "3"]


@pytest.mark.parametrize(("there", "device", "ranks"), [(1, "auto", 1), (0, "cuda", 1), (3, "auto", 2)])
def test_too_few_gpus_are_refused(tmp_path: Path, there: int, device: str, ranks: int) -> None:
    gpus(tmp_path, there)
    with pytest.raises(ValueError, match=f"--data-parallel-size: 2 engines need {2 * ranks} GPUs, and there are {there}"):
        shares(EngineConfig(model="m", device=device, tensor_parallel_size=ranks), 2)


def test_one_gpu_by_name_is_not_for_several_engines() -> None:
    with pytest.raises(ConfigError, match=r"--data-parallel-size: .* not cuda:1"):
        parse(["--device", "cuda:1", "--data-parallel-size", "2"])
    assert parse(["--device", "cuda:1", "--data-parallel-size", "1"]).data_parallel_size == 1
    assert parse(["--device", "cuda", "--data-parallel-size", "2"]).data_parallel_size == 2
    with pytest.raises(ConfigError, match="--data-parallel-size"):
        parse(["--data-parallel-size", "0"])
