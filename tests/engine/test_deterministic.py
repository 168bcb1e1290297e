"""--deterministic: a row's bits whoever shares its forward, and what is refused because it cannot promise that."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
import torch

from engine import deterministic
from engine.attention import choose
from engine.config import EngineConfig
from engine.costs import key
from engine.models.config import ModelConfig
from engine.models.loader import load_config
from engine.models.native import unavailable
from engine.request import Request
from engine.worker import Worker
from tests.engine.real import GarbageDrafter, OracleDrafter, answers, load_worker, make_engine, request
from tests.fakes import fake_info
from tests.kernels.ordered import in_order

BF16, CPU, GPU = torch.bfloat16, torch.device("cpu"), torch.device("cuda")
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        request("greedy", [5, 6, 7, 5, 6], max_tokens=3, temperature=0.0, logprobs=3),
        request("sampled", list(range(3, 35)), max_tokens=3, temperature=0.9, seed=7, logprobs=3),
    ]


def check_bits(worker: Worker, requests: list[Request]) -> None:
    """Logprobs and all: alone and undrafted, against together with branched trees, right and wrong."""
    plain = {name: answer for one in requests for name, answer in answers(make_engine(worker), [one]).items()}
    known = {name: answer.tokens for name, answer in plain.items()}
    for drafter in (OracleDrafter(worker.info.vocab_size, known), GarbageDrafter(worker.info.vocab_size)):
        drafted = answers(make_engine(worker, [drafter], budget=6), requests)
        assert {name: answer.tokens for name, answer in drafted.items()} == known
        assert all(drafted[name].logprobs == plain[name].logprobs for name in plain)


@with_triton
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_speculation_changes_no_bit_on_the_gpus_kernels(
    dtype: str, tiny_llama_dir: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted: attention, matrix products and norms are those that a GPU runs."""
    options = {"attention_backend": "triton", "cpu_kernels": "torch", "block_size": 4, "deterministic": True}
    worker = load_worker(tiny_llama_dir, dtype, **options)
    assert worker.info.backend == "triton"
    in_order(monkeypatch)
    check_bits(worker, requests)


@with_triton
def test_the_answers_are_the_models_own(tiny_llama_dir: Path, requests: list[Request]) -> None:
    """In float32 rounding moves no token."""
    found = [
        answers(make_engine(load_worker(tiny_llama_dir, "float32", cpu_kernels="torch", **options)), requests)
        for options in ({}, {"attention_backend": "triton", "deterministic": True})
    ]
    assert [a.tokens for a in found[0].values()] == [a.tokens for a in found[1].values()]


def test_the_native_kernels_are_so_by_themselves(smollm2_dir: Path, requests: list[Request]) -> None:
    if (why := unavailable(load_config(str(smollm2_dir)), BF16, CPU)) is not None:
        pytest.skip(why)
    worker = load_worker(smollm2_dir, "bfloat16", deterministic=True)
    assert worker.info.backend == "native"
    check_bits(worker, requests)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_speculation_changes_no_bit_on_a_gpu(dtype: str, smollm2_dir: Path, requests: list[Request]) -> None:
    longer = [msgspec.structs.replace(one, params=msgspec.structs.replace(one.params, max_tokens=48)) for one in requests]
    worker = load_worker(smollm2_dir, dtype, deterministic=True)
    assert worker.info.backend == "triton"
    check_bits(worker, longer)


@pytest.fixture
def shape(smollm2_dir: Path) -> ModelConfig:
    return load_config(str(smollm2_dir))


def complaint(shape: ModelConfig, dtype: torch.dtype, device: torch.device, **options: object) -> str:
    with pytest.raises(ValueError, match=r"^deterministic: ") as error:
        deterministic.check(EngineConfig(model="m", deterministic=True, **options), shape, dtype, device)  # type: ignore[arg-type]
    return str(error.value)


def test_on_a_cpu_only_the_native_kernels_can(shape: ModelConfig) -> None:
    assert "cpu_kernels is torch" in complaint(shape, BF16, CPU, cpu_kernels="torch")
    assert "for bfloat16 on the CPU, not float32" in complaint(shape, torch.float32, CPU)
    assert "tensor_parallel_size is more than 1" in complaint(shape, BF16, CPU, tensor_parallel_size=2)


@with_triton
def test_on_a_gpu_only_tritons_kernels_can(shape: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "flashinfer"):
        assert f"attention_backend {name}" in complaint(shape, BF16, GPU, attention_backend=name)
    wide = msgspec.structs.replace(shape, head_dim=512)
    assert "heads of 512" in complaint(wide, BF16, GPU)
    deterministic.check(EngineConfig(model="m", deterministic=True), shape, BF16, GPU)
    monkeypatch.setattr(deterministic, "find_spec", lambda name: None)
    assert "not installed" in complaint(shape, BF16, GPU)


def test_transformers_own_code_cannot(shape: ModelConfig) -> None:
    assert "transformers" in complaint(shape, BF16, CPU, load_format="transformers")
    assert "transformers" in complaint(msgspec.structs.replace(shape, unsupported="something"), BF16, GPU)


def test_it_is_refused_before_the_weights_are_read(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.worker.load_model", lambda *args: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=r"^deterministic: .*cpu_kernels is torch"):
        load_worker(smollm2_dir, "bfloat16", cpu_kernels="torch", deterministic=True)


@with_triton
def test_parts_hold_the_longest_context(tiny_llama_dir: Path) -> None:
    from kernels.tree_attention import FIXED_MULTIPLE, MOST_PARTS

    worker = load_worker(tiny_llama_dir, attention_backend="triton", deterministic=True)
    for length, limit in ((131072, None), (1 << 20, None), (131072, 4096)):
        long = msgspec.structs.replace(worker.model_config, max_position_embeddings=length)
        config = msgspec.structs.replace(worker.config, max_model_len=limit)
        part = deterministic.fix_order(config, long, worker.runner.model)
        assert part % FIXED_MULTIPLE == 0 and part * MOST_PARTS >= (limit or length)
    made = choose.make_attention("auto", GPU, 4, 2, 16, 16, BF16, None, part)
    assert made.name == "triton" and made.fixed_split == deterministic.LEAST_PART  # type: ignore[attr-defined]


def test_its_costs_are_kept_apart_where_other_kernels_run(smollm2_dir: Path) -> None:
    config = EngineConfig(model=str(smollm2_dir))
    slow = msgspec.structs.replace(config, deterministic=True)
    triton, native = fake_info(backend="triton"), fake_info(backend="native")
    assert key(config, triton, {}) != key(slow, triton, {})
    assert key(config, native, {}) == key(slow, native, {})
