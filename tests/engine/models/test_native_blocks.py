"""A GGUF file's four- and eight-bit weights kept as they are: the model that its dequantized weights are, bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from engine.gguf_file import GGUFFile
from engine.models.loader import iter_blocks, iter_weights, load_config
from engine.models.native import NativeDecoder
from engine.models.quantized import Blocks
from engine.models.runner import ModelRunner
from engine.tree import DraftForest
from kernels.cpu.build import Unavailable, library
from tests.engine.models import tiny
from tests.engine.models.test_native import logits, runner, sequence

try:
    library()
except Unavailable as unavailable:
    pytest.skip(f"no native kernels here: {unavailable}", allow_module_level=True)

FAMILIES = [("Llama", {"head_dim": 32}), ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}), ("Qwen3", {})]


def decoder(made: ModelRunner) -> NativeDecoder:
    assert isinstance(made.model, NativeDecoder)
    return made.model


def kinds(made: ModelRunner) -> set[str]:
    kernels = decoder(made).kernels
    linears = [weight for layer in kernels.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    return {weight.kind.name for weight in (*linears, kernels.head)}


def pair(path: Path, blocks: int = 64) -> tuple[ModelRunner, ModelRunner]:
    return runner(path, "native", blocks=blocks), runner(path, "native", weights="bfloat16", blocks=blocks)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "changes"), FAMILIES)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_logits_are_those_of_the_dequantized_model(
    kind: str, family: str, changes: dict[str, int], tied: bool, tmp_path: Path
) -> None:
    made = tiny.model(tiny.config(family, tie_word_embeddings=tied, **changes))
    if tied:
        kept = made.state_dict()
        kept.pop("lm_head.weight")
        made.state_dict = lambda: kept
    path = tiny.write_gguf(made, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    packed, plain = pair(path)
    assert kinds(packed) == {kind} and kinds(plain) == {"BF16"}
    vocab = load_config(str(path)).vocab_size
    parts = [(seq, 0, seq.num_tokens) for seq in (sequence(0, 23, vocab), sequence(1, 6, vocab), sequence(2, 1, vocab))]
    forest = DraftForest.from_parents([([seq.tokens[-1], 5, 6, 7, 8], [-1, 0, 0, 1, 2]) for seq, _, _ in parts])
    assert torch.equal(logits(packed, parts, forest), logits(plain, parts, forest))


@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40])
def test_the_real_model_gives_the_same_logits(rows: int, real: tuple[ModelRunner, ModelRunner]) -> None:
    seq = sequence(0, 1, 49152)
    forest = DraftForest.from_chains([504], [[(i * 7919) % 49152 for i in range(1, rows)]])
    first, second = (logits(made, [(seq, 0, 1)], forest) for made in real)
    assert first.shape == (rows, 49152) and torch.equal(first, second)


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> tuple[ModelRunner, ModelRunner]:
    return pair(smollm2_gguf, blocks=32)


def test_the_real_model_takes_little_more_memory_than_its_file(real: tuple[ModelRunner, ModelRunner], smollm2_gguf: Path) -> None:
    packed, plain = (decoder(made).weight_bytes for made in real)
    with GGUFFile(smollm2_gguf) as file:
        stored = sum(tensor.nbytes for tensor in file.tensors)
    assert packed == pytest.approx(stored, rel=0.01)
    assert plain > 2.7 * packed


def test_a_concatenation_of_two_types_is_bfloat16(tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", head_dim=32))
    paths = {kind: tiny.write_gguf(made, tmp_path / f"{kind}.gguf", gguf.GGMLQuantizationType[kind]) for kind in ("Q4_1", "Q8_0")}
    config = load_config(str(paths["Q4_1"]))
    mixed = dict(iter_blocks(str(paths["Q4_1"]), config))
    other = dict(iter_blocks(str(paths["Q8_0"]), config))
    name = "model.layers.0.self_attn.v_proj.weight"
    mixed[name] = other[name]
    layers = NativeDecoder(config, mixed.items(), 4).kernels.layers
    assert [layer.qkv.kind.name for layer in layers] == ["BF16", "Q4_1"]
    assert layers[0].out.kind.name == "Q4_1"
    plain = {name: weight.dequantize() if isinstance(weight, Blocks) else weight for name, weight in mixed.items()}
    wanted = NativeDecoder(config, plain.items(), 4).kernels.layers[0].qkv
    assert torch.equal(layers[0].qkv.data, wanted.data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_0", "F16"])
def test_blocks_hold_what_the_weights_are(kind: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.model(tiny.config("Llama", head_dim=32)), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    config = load_config(str(path))
    found = dict(iter_blocks(str(path), config))
    wanted = dict(iter_weights(str(path), config))
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert isinstance(weight, Blocks) == (kind in ("Q4_0", "Q4_1", "Q8_0") and wanted[name].dim() == 2)
        assert torch.equal(weight.dequantize() if isinstance(weight, Blocks) else weight, wanted[name])


def test_a_directory_has_no_blocks(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(tiny.config("Llama", head_dim=32)).to(torch.bfloat16), tmp_path)
    assert kinds(runner(folder, "native")) == {"BF16"}
