"""The decoder with Triton's kernels between its matrix products, interpreted: it is the decoder without them, up to roundings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models import factory
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.loader import iter_weights, load_config
from engine.models.runner import ModelRunner
from engine.plan import Row
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from tests.engine.models import tiny

pytest.importorskip("triton")

BLOCK = 4


@pytest.fixture(scope="module", params=["Llama", "Qwen3", "Qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model(tiny.config(request.param)), tmp_path_factory.mktemp(request.param))


def outcome(model: Decoder, shape: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of a prompt, then of a tree behind it: logits, hidden states after the first layer; and what lies in the cache."""
    kv = KVCache(shape.num_layers, 9, shape.num_kv_heads, BLOCK, shape.head_dim, dtype, device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    runner = ModelRunner(model, kv, ReferenceAttention(*heads, BLOCK, dtype, shape.sliding_window))
    seq = Sequence(0, Request(request_id="a", prompt_ids=[5, 9, 7, 3, 8, 5], params=SamplingParams(max_tokens=4)))
    seq.block_ids = [6, 2, 4]
    found = []
    for row, forest in (
        (Row(0, 0, 5, 0, [], False), DraftForest.from_parents([([8], [-1])])),
        (Row(0, 5, 1, 3, [], False), DraftForest.from_parents([([5, 4, 6, 7], [-1, 0, 0, 1])])),
    ):
        batch = ForwardBatch.build([seq], [row], forest, [0], BLOCK, device, runner.scratch_slot)
        hidden, layers = runner.forward(batch, (0, 1))
        assert torch.equal(layers[1], hidden)  # of two
        found += [runner.node_logits(hidden, batch), layers[0][: batch.num_tokens].float()]
    return [*found, kv.kv[:, :-1].float()]


def check(folder: Path, dtype: torch.dtype, device: torch.device, tolerance: float) -> None:
    shape = load_config(str(folder))
    made = [Decoder(shape, iter_weights(str(folder), shape), dtype, device) for _ in range(2)]
    made[1].fuse()
    plain, fused = (outcome(model, shape, dtype, device) for model in made)
    assert not torch.equal(plain[0], fused[0])  # other kernels, other roundings
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
    written = [cache[-1].any(-1) for cache in (plain, fused)]
    assert torch.equal(*written) and not written[0].all()  # nothing is stored elsewhere


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_it_does_the_same(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    check(folder, dtype, torch.device("cpu"), tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_it_does_the_same_on_a_gpu(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    check(folder, dtype, torch.device("cuda"), tolerance)


@pytest.mark.parametrize(("kernels", "deterministic", "fused"), [(True, False, True), (True, True, False), (False, False, False)])
def test_it_is_used_where_there_are_kernels_and_any_order_will_do(
    folder: Path, kernels: bool, deterministic: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Decoder] = []
    monkeypatch.setattr(factory, "has_kernels", lambda device: kernels)
    monkeypatch.setattr(Decoder, "fuse", lambda model: calls.append(model))
    config = EngineConfig(model=str(folder), deterministic=deterministic, cpu_kernels="torch")
    model = factory.load_model(config, load_config(str(folder)), torch.float32, torch.device("cpu"))
    assert calls == ([model] if fused else [])
