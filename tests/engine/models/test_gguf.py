"""GGUF files give the config and, bit for bit, the weights of the Hugging Face model they were made from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
import transformers

from engine.gguf_file import GGUFFile
from engine.models.gguf import gguf_config, hf_name
from engine.models.loader import iter_weights, load_config
from server.tokenizer import Tokenizer
from tests.engine.models import tiny
from tests.hf_export import write_hf

F32 = gguf.GGMLQuantizationType.F32


def read(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return dict(iter_weights(str(path), load_config(str(path)), dtype))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny.write_gguf(tiny.model(tiny.config("Llama")), tmp_path / "tiny.gguf")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_config_and_weights_of_the_original(family: str, tied: bool, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "Llama" else {}
    made = tiny.model(tiny.config(family, tie_word_embeddings=tied, rope_theta=5e4, rms_norm_eps=1e-5, **biases))
    wanted = made.state_dict()
    if tied:
        wanted.pop("lm_head.weight")
        made.state_dict = lambda: wanted
    path = tiny.write_gguf(made, tmp_path / "tiny.gguf")
    found = read(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    original = load_config(str(tiny.save(tiny.model(made.config), tmp_path / "hf")))
    assert load_config(str(path)) == msgspec.structs.replace(original, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "Q5_0"])
def test_quantized_weights(kind: str, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Qwen2"))
    stored = gguf.GGMLQuantizationType[kind]
    found = read(tiny.write_gguf(made, tmp_path / "tiny.gguf", stored), torch.bfloat16)
    for name, weight in made.state_dict().items():
        if weight.dim() == 2:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), stored), stored).reshape(weight.shape)
            weight = torch.from_numpy(rounded.astype(np.float32))
        assert torch.equal(found[name], weight.to(torch.bfloat16))


def test_the_real_model_equals_its_converted_directory(smollm2_gguf: Path, smollm2_dir: Path) -> None:
    config = load_config(str(smollm2_gguf))
    assert config == load_config(str(smollm2_dir))
    converted = dict(iter_weights(str(smollm2_dir), config))
    for name, weight in iter_weights(str(smollm2_gguf), config):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, converted.pop(name)), name
    assert not converted


def test_the_exported_directory_is_the_model(file: Path, tmp_path: Path) -> None:
    """What the other tests compare with; the tiny file gets a vocabulary for it."""
    made = tiny.model(tiny.config("Llama"))
    words = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(96)]
    path = tmp_path / "words.gguf"
    tiny.write_gguf(made, path, tokens=words)
    (tmp_path / "out").mkdir()
    write_hf(path, tmp_path / "out")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert all(torch.equal(weight, made.state_dict()[name].bfloat16()) for name, weight in loaded.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens([0, 27, 53]) == [words[0], words[27], words[53]]


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What llama.cpp's converter stores for Llama 3.1 and 3.2, from transformers' own frequencies."""
    numbers = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaled = tiny.config("Llama", head_dim=head_dim, rope_parameters={"rope_type": "llama3", "rope_theta": theta, **numbers})
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    return (plain / frequencies).float().numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized_by_its_divisors(factor: float, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", head_dim=64, rope_theta=5e5))
    factors = llama3_factors(64, 5e5, factor)
    assert factors.max() == pytest.approx(factor)
    path = tiny.write_gguf(made, tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors})
    assert load_config(str(path)).rope_scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    assert read(path).keys() == made.state_dict().keys()


@pytest.mark.parametrize("factors", [np.full(8, 2.0, np.float32), np.ones(9, np.float32), np.ones(8, np.float16)])
def test_other_divisors_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.model(tiny.config("Llama")), tmp_path / "tiny.gguf", extra={"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32.0},
        ),
    ],
)
def test_rotary_scaling_in_the_metadata(fields: dict[str, Any], scaling: Any, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.model(tiny.config("Qwen2")), tmp_path / "tiny.gguf", fields=fields)
    assert load_config(str(path)).rope_scaling == scaling


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"expert_count": 8}, r"llama\.expert_count = 8 is not supported"),
        ({"logit_scale": 2.0}, r"llama\.logit_scale = 2\.0 is not supported"),
        ({"attention.sliding_window": 7}, r"llama\.attention\.sliding_window = 7 is not supported"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "longrope"),
        ({"rope.dimension_count": 8}, "differs from the head size 16"),
        ({"attention.value_length": 8}, "differs from the head size 16"),
    ],
)
def test_what_the_decoder_would_not_apply_is_refused(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tiny.write_gguf(tiny.model(tiny.config("Llama")), tmp_path / "tiny.gguf", fields=fields)
    with pytest.raises(ValueError, match=words):
        load_config(str(path))


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma2")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"gemma\.gguf: the GGUF architecture 'gemma2' is not supported"):
        load_config(str(tmp_path / "gemma.gguf"))


@pytest.mark.parametrize("extra", ["blk.2.attn_q.weight", "blk.0.attn_q.bias2", "blk.0.attn_sinks.weight", "mm.0.weight"])
def test_an_unexpected_tensor_is_named(extra: str, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama"))
    path = tiny.write_gguf(made, tmp_path / "tiny.gguf", extra={extra: np.ones((2, 32), np.float32)})
    with pytest.raises(ValueError, match=rf"tiny\.gguf: unexpected tensor {extra}"):
        read(path)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama"))
    whole = made.state_dict()
    made.state_dict = lambda: {k: v for k, v in whole.items() if "layers.1.mlp.up_proj" not in k}
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing \(1 in all\)"):
        read(tiny.write_gguf(made, tmp_path / "a.gguf"))
    made.state_dict = lambda: {k: v[:32] if "layers.1.mlp.up_proj" in k else v for k, v in whole.items()}
    with pytest.raises(ValueError, match=r"tensor blk\.1\.ffn_up\.weight has shape \(32, 64\), the model needs \(96, 64\)"):
        read(tiny.write_gguf(made, tmp_path / "b.gguf"))


def test_both_processes_end_answers_where_the_model_does(tmp_path: Path) -> None:
    """As in Qwen2.5's files: eos_token_id names <|im_end|>, generation_config.json, which they lack, <|endoftext|> too."""
    words = [*(chr(ord("a") + i % 26) * (1 + i // 26) for i in range(90)), "<|im_end|>", "<|endoftext|>", *"ABCD"]
    made, path = tiny.model(tiny.config("Qwen2")), tmp_path / "model.gguf"
    tiny.write_gguf(made, path, tokens=words, special=[90, 91], eos=90)
    assert load_config(str(path)).eos_token_ids == (90, 91)
    assert Tokenizer.load(path).eos_ids == {90, 91}
    tiny.write_gguf(made, path, eos=96)
    assert load_config(str(path)).eos_token_ids == ()  # the model cannot emit it


@pytest.mark.parametrize("name", ["blk.0.attn_q", "blk.x.attn_q.weight", "token_embd.bias", "blk.0.0.weight", "", "blk.1.2"])
def test_foreign_names(name: str) -> None:
    assert hf_name(name) is None


def test_truncated_at_any_point(file: Path) -> None:
    whole = file.read_bytes()
    for cut in [0, 3, 23, *random.Random(0).sample(range(24, len(whole)), 20), len(whole) - 1]:
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"tiny\.gguf"):
            read(file)


def test_damaged_headers_never_crash(file: Path) -> None:
    """Flipped bytes in counts, lengths, types, shapes and numbers: a ValueError that names the file, or a readable model."""
    whole = file.read_bytes()
    with GGUFFile(file) as opened:
        end = min(tensor.offset for tensor in opened.tensors)
        assert gguf_config(opened).supported
    rng = random.Random(1)
    messages = []
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            broken[rng.randrange(end)] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            read(file)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all("tiny.gguf" in message for message in messages)
