"""The decoder on native kernels: the same model as the torch decoder, and rows that know nothing of their company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.models.factory import load_model
from engine.models.loader import load_config
from engine.models.native import NativeDecoder
from engine.models.runner import ModelRunner
from engine.plan import Row
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from kernels.cpu.build import Unavailable, library
from tests.engine.models import tiny

try:
    library()
except Unavailable as unavailable:
    pytest.skip(f"no native kernels here: {unavailable}", allow_module_level=True)

CPU = torch.device("cpu")
BLOCK = 4
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 32}),
    "llama, tied, odd vocabulary": ("Llama", {"head_dim": 32, "tie_word_embeddings": True, "vocab_size": 101}),
    "llama, every bias": ("Llama", {"head_dim": 64, "attention_bias": True, "mlp_bias": True}),
    "mistral, window": ("Mistral", {"head_dim": 32}),
    "qwen2, biases": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen3, normed heads": ("Qwen3", {}),
}


def runner(
    folder: Path, kernels: str, dtype: torch.dtype = torch.bfloat16, weights: str = "auto", blocks: int = 64
) -> ModelRunner:
    config = load_config(str(folder))
    options: Any = {"cpu_kernels": kernels, "cpu_weights": weights, "block_size": BLOCK}
    model = load_model(EngineConfig(model=str(folder), **options), config, dtype, CPU)
    kv = KVCache(config.num_layers, blocks, config.num_kv_heads, BLOCK, config.head_dim, dtype, CPU)
    shape = (config.num_heads, config.num_kv_heads, config.head_dim, BLOCK, dtype, config.sliding_window)
    return ModelRunner(model, kv, ReferenceAttention(*shape))


def sequence(number: int, length: int, vocab: int) -> Sequence:
    prompt = [(number * 31 + i * 17) % vocab for i in range(length)]
    seq = Sequence(number, Request(request_id=str(number), prompt_ids=prompt, params=SamplingParams(max_tokens=8)))
    seq.block_ids = list(range(number * 16, number * 16 + 16))
    return seq


@torch.inference_mode()
def logits(made: ModelRunner, parts: list[tuple[Sequence, int, int]], forest: DraftForest) -> torch.Tensor:
    """Feed rows [computed, computed + new) of each sequence and the tree below each; logits of all nodes."""
    rows = [Row(seq.seq_id, computed, new, 0, [], False) for seq, computed, new in parts]
    seqs = [seq for seq, _, _ in parts]
    batch = ForwardBatch.build(seqs, rows, forest, list(range(len(parts))), BLOCK, CPU, made.scratch_slot)
    return made.node_logits(made.forward(batch)[0], batch).clone()


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, changes = MODELS[request.param]
    made = tiny.model(tiny.config(family, **changes))
    return tiny.save(made.to(torch.bfloat16), tmp_path_factory.mktemp("native"))


TREE = [-1, 0, 0, 1, 2, 2, 3]


def test_it_is_the_model_that_torch_runs(folder: Path) -> None:
    """Nearer to float32 on the same weights than torch's bf16 is, or as near: it rounds less often."""
    exact, native, plain = runner(folder, "torch", torch.float32), runner(folder, "native"), runner(folder, "torch")
    assert isinstance(native.model, NativeDecoder)
    vocab = load_config(str(folder)).vocab_size
    seqs = [sequence(0, 23, vocab), sequence(1, 6, vocab), sequence(2, 1, vocab)]
    trees = [([seq.tokens[-1], 5, 6, 7, 8, 9, 10], TREE) for seq in seqs]
    parts = [(seq, 0, seq.num_tokens) for seq in seqs]
    found = [logits(made, parts, DraftForest.from_parents(trees)) for made in (exact, native, plain)]
    error, usual = ((one - found[0]).abs().mean() for one in found[1:])
    assert error <= 1.3 * usual and error < 0.05 * found[0].std(), (error, usual, found[0].std())


def test_a_step_is_the_same_bits_alone_in_a_batch_and_in_a_tree(folder: Path) -> None:
    native = runner(folder, "native")
    vocab = load_config(str(folder)).vocab_size
    seq, other = sequence(0, 21, vocab), sequence(1, 9, vocab)
    logits(native, [(seq, 0, 21), (other, 0, 9)], DraftForest.roots([seq.tokens[-1], other.tokens[-1]]))
    tokens = [seq.tokens[-1], 5, 6, 7, 8, 9, 10]
    forest = DraftForest.from_parents([(tokens, TREE), ([other.tokens[-1]], [-1])])
    together = logits(native, [(seq, 20, 1), (other, 8, 1)], forest)
    for node in range(7):  # plain decoding along each path, one row a step
        path = forest.path(0, node)
        along = sequence(0, 21, vocab)
        last = logits(native, [(along, 0, 21)], DraftForest.roots([along.tokens[-1]]))
        for token in path:
            along.tokens.append(token)
            last = logits(native, [(along, along.num_tokens - 1, 1)], DraftForest.roots([token]))
        assert torch.equal(last[0], together[node])


def test_layers_can_be_listened_to(folder: Path) -> None:
    native, vocab = runner(folder, "native"), load_config(str(folder)).vocab_size
    seq = sequence(0, 10, vocab)
    batch = ForwardBatch.build([seq], [Row(0, 0, 10, 0, [], False)], DraftForest.roots([seq.tokens[-1]]), [0], BLOCK, CPU)
    plain, none = native.forward(batch)
    listened, hidden = native.forward(batch, (0, 1))
    assert not none and sorted(hidden) == [0, 1]
    assert torch.equal(plain, listened)
    assert torch.equal(hidden[1], plain.to(torch.bfloat16)) and not torch.equal(hidden[0], hidden[1])


def test_what_the_kernels_cannot_run_goes_to_torch_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.save(tiny.model(tiny.config("Llama", head_dim=16)).to(torch.bfloat16), tmp_path)
    assert not isinstance(runner(folder, "auto").model, NativeDecoder)
    assert "heads of 16" in caplog.text
    with pytest.raises(ValueError, match=r"cpu_kernels: .*heads of 16"):
        runner(folder, "native")


def test_incomplete_layers_are_an_error(folder: Path) -> None:
    config = load_config(str(folder))
    some = {"model.embed_tokens.weight": torch.zeros(config.vocab_size, config.hidden_size)}
    with pytest.raises(ValueError, match="incomplete"):
        NativeDecoder(config, some.items(), BLOCK)
