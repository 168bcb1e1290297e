"""Every preset in configs/ starts in a dry run: each field is known, shapes divide, and the memory adds up."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path

import msgspec
import pytest
import torch

from bench.shapes import SHAPES, random_weights
from engine.config import EngineConfig
from engine.dry_run import DryRun, dry_run
from engine.footprint import step_bytes, weight_bytes
from engine.models.decoder import Decoder
from engine.models.loader import load_config
from engine.models.shapes import expected_shapes
from engine.worker import Worker
from engine.workspace import run_largest
from server.config import parse
from tests import models
from tests.live_bytes import LiveBytes

CONFIGS = models.ROOT / "configs"
HUB = Path(__file__).parent / "hub"  # config.json of public models, without their weights
GIB = 1 << 30
# Published numbers of parameters; of Qwen3-0.6B with its embedding counted once.
PARAMETERS = {
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-0.6B": 596_049_920,
}
SMALLEST = {"llama-3.1-8b": 22, "qwen3-32b-tp4-draft": 40, "llama-3.3-70b-tp8": 40}  # GiB of each GPU


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OUTRIDER_") and name != "OUTRIDER_TEST_MODELS":
            monkeypatch.delenv(name)


def preset(name: str) -> EngineConfig:
    """As the engine gets it, its models where their config.json lies."""
    config = parse(["--config", str(CONFIGS / f"{name}.yaml")])
    engine = config.engine_config(str(HUB / str(config.model)))
    return msgspec.structs.replace(engine, draft_model=engine.draft_model and str(HUB / engine.draft_model))


def plan(name: str, gib: float, **changes: object) -> DryRun:
    return dry_run(msgspec.structs.replace(preset(name), **changes), int(gib * GIB))


def test_every_preset_is_tested() -> None:
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == {*SMALLEST, "cpu-default"}


@pytest.mark.parametrize("name", sorted(SMALLEST))
@pytest.mark.parametrize("gib", [None, 80, 141])
def test_a_preset_starts_and_its_memory_adds_up(name: str, gib: int | None) -> None:
    config = preset(name)
    found = plan(name, gib or SMALLEST[name])
    assert found.memory.max_model_len == config.max_model_len
    assert sum(found.parts.values()) + found.left_bytes == found.total_bytes
    # All that the share allows, less than a block, and nothing of the rest; unless that is more than can be used.
    allowed = (1 - config.gpu_memory_utilization) * found.total_bytes
    block = found.token_bytes * config.block_size
    useful = config.max_num_seqs * -(-found.memory.max_model_len // config.block_size)
    assert allowed <= found.left_bytes + 1
    assert found.left_bytes < allowed + block or found.memory.num_blocks == useful
    assert found.parts["KV cache"] == found.memory.num_blocks * block


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_shapes_are_those_of_the_published_models(name: str) -> None:
    config = load_config(str(HUB / name))
    assert sum(prod(shape) for shape in expected_shapes(config).values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["qwen3-32b-tp4-draft", "llama-3.3-70b-tp8"])
def test_shapes_divide_and_the_ranks_hold_the_model_once_and_its_norms_each(name: str) -> None:
    config, found = preset(name), plan(name, 80)
    ranks = config.tensor_parallel_size
    assert {(s.config.num_heads, s.config.num_kv_heads, s.config.intermediate_size) for s in found.shards} == {
        (64 // ranks, 8 // ranks, found.model.intermediate_size // ranks)
    }
    assert {s.vocab[1] - s.vocab[0] for s in found.shards} == {found.model.vocab_size // ranks}
    whole = expected_shapes(found.model)
    norms = sum(prod(shape) for shape in whole.values() if len(shape) == 1)
    held = sum(weight_bytes(config, "", found.model, found.dtype, found.device, shard) for shard in found.shards)
    assert held == 2 * (sum(prod(shape) for shape in whole.values()) + (ranks - 1) * norms)
    assert found.parts["weights"] == held // ranks


def test_key_value_heads_are_replicated_where_there_are_fewer() -> None:
    shards = plan("llama-3.3-70b-tp8", 80, tensor_parallel_size=16).shards
    assert {(s.config.num_heads, s.config.num_kv_heads) for s in shards} == {(4, 1)}


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tensor_parallel_size: 12 ranks cannot share 64 attention heads"):
        plan("llama-3.3-70b-tp8", 80, tensor_parallel_size=12)


def test_a_draft_model_stands_whole_on_the_first_rank() -> None:
    found = plan("qwen3-32b-tp4-draft", 80)
    assert found.parts["draft model"] == 2 * PARAMETERS["Qwen/Qwen3-0.6B"]
    assert found.token_bytes == 2 * 2 * 128 * (64 * 2 + 28 * 8)  # keys and values, bytes, head size, layers x heads


def test_what_does_not_fit_is_refused_with_the_field() -> None:
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization: "):
        plan("llama-3.1-8b", 16)
    with pytest.raises(ValueError, match=r"^max_model_len: 131072 "):
        plan("llama-3.1-8b", 24, max_model_len=131072)
    with pytest.raises(ValueError, match=r"^max_model_len: 200000 is more than the model's own limit"):
        plan("llama-3.1-8b", 80, max_model_len=200000)
    with pytest.raises(ValueError, match=r"^draft_model: .* add draft_model"):
        plan("qwen3-32b-tp4-draft", 80, drafters=["suffix"])
    with pytest.raises(ValueError, match=r"^draft_model: .* has a vocabulary of 151936 tokens, the model has 128256"):
        plan("llama-3.1-8b", 80, drafters=["draft_model"], draft_model=str(HUB / "Qwen/Qwen3-0.6B"))
    with pytest.raises(ValueError, match="there is no drafter 'ngramm'"):
        plan("llama-3.1-8b", 80, drafters=["ngramm"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpus_that_are_not_here_have_to_be_described() -> None:
    with pytest.raises(ValueError, match=r"^device: .*--device-memory"):
        dry_run(preset("llama-3.1-8b"))
    with pytest.raises(ValueError, match=r"^tensor_parallel_size: it takes 8 GPUs and there are 0 here"):
        dry_run(preset("llama-3.3-70b-tp8"))
    with pytest.raises(ValueError, match=r"^data_parallel_size: it takes 2 GPUs"):
        dry_run(preset("llama-3.1-8b"), engines=2)
    with pytest.raises(ValueError, match=r"^device: it takes 1 GPUs"):
        dry_run(msgspec.structs.replace(preset("llama-3.3-70b-tp8"), distributed_executor_backend="ray"))


def test_on_a_cpu_the_dry_run_says_what_the_server_then_does(tiny_llama_dir: Path) -> None:
    config = msgspec.structs.replace(
        preset("cpu-default"), model=str(tiny_llama_dir), dtype="float32", profile=False, num_threads=1
    )
    worker = Worker(config)
    found = dry_run(config)
    assert found.memory == worker.memory
    assert found.parts == {"weights": worker.memory.weight_bytes, "KV cache": worker.memory.kv_bytes}
    assert found.drafters == worker.info.drafters
    need = sum(found.parts.values())
    assert dry_run(config, 3 * need).left_bytes == 2 * need
    assert dry_run(config, 3 * need, engines=2).left_bytes == need
    with pytest.raises(ValueError, match=r"^kv_cache_memory_bytes: 4 x .* do not fit into the machine's"):
        dry_run(config, 3 * need, engines=4)


def test_a_gguf_file_is_counted_as_it_will_be_held(smollm2_gguf: Path) -> None:
    found = dry_run(EngineConfig(model=str(smollm2_gguf), device="cpu", cpu_kernels="torch"))
    whole = expected_shapes(found.model)
    assert found.parts["weights"] == 2 * sum(prod(shape) for shape in whole.values())


def test_the_estimate_of_a_step_is_near_what_the_largest_one_holds() -> None:
    """With short contexts: what the CPU's attention copies of long ones no GPU does."""
    shape = msgspec.structs.replace(SHAPES["tiny"], vocab_size=8000, max_position_embeddings=16)
    cpu, dtype = torch.device("cpu"), torch.float32
    decoder = Decoder(shape, random_weights(shape, dtype, cpu), dtype, cpu)
    for rows in (64, 256):
        config = EngineConfig(model="m", max_num_batched_tokens=rows)
        with LiveBytes() as live:
            run_largest(config, decoder, shape, dtype, cpu)
        assert 0.8 < step_bytes(config, shape, dtype) / live.peak < 1.25
