"""GGUF files as models: metadata -> ModelConfig, tensors -> the names and layout of a Hugging Face checkpoint.

Not the container (engine/gguf_file.py), not the arithmetic of quantized blocks (engine/models/dequant.py), not the
tokenizer. Llama, Mistral (which GGUF calls llama), Qwen2 and Qwen3 files are read; others are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from engine.gguf_file import GGUFFile, GGUFTensor, end_token_ids
from engine.models.config import MAX_LAYERS, ModelConfig, check_shape
from engine.models.dequant import dequantize
from engine.models.quantized import BLOCK_TYPES, Blocks
from engine.models.shapes import expected_shapes

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# factor, low_freq_factor, high_freq_factor, original_max_position_embeddings of every Llama 3 release that scales
_LLAMA3 = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))
# Numbers that change the result and that the decoder does not apply: anything but the neutral value is refused.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def hf_name(name: str) -> str | None:
    """A GGUF tensor's name in a Hugging Face checkpoint, or None for a foreign name."""
    parts = name.split(".")
    if len(parts) == 2 and parts[1] == "weight" and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.weight"
    if re.fullmatch(r"blk\.\d{1,5}\.[a-z_]+\.(weight|bias)", name) and parts[2] in _BLOCK:
        return f"model.layers.{int(parts[1])}.{_BLOCK[parts[2]]}.{parts[3]}"
    return None


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Read the shape and flags from a GGUF file's metadata and tensor names. Raises ValueError naming what is wrong."""
    architecture = file.field("general.architecture", str)
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"{file.path.name}: the GGUF architecture {architecture!r} is not supported (only {known})")
    get = _Metadata(file, architecture)
    get.refuse_unapplied()
    names = {tensor.name for tensor in file.tensors}
    heads, hidden = get.integer("attention.head_count"), get.integer("embedding_length")
    head_dim = get.integer("attention.key_length", hidden // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get.integer(key, head_dim) != head_dim:
            raise ValueError(f"{file.path.name}: {architecture}.{key} differs from the head size {head_dim}")
    theta = get.number("rope.freq_base", 10000.0)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=get.vocab_size(),
        hidden_size=hidden,
        intermediate_size=get.integer("feed_forward_length"),
        num_layers=get.integer("block_count", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=get.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        # Stored as float32: its shortest decimal form is the number that was written (1e-05, not 9.99999975e-06).
        rms_norm_eps=float(str(np.float32(get.number("attention.layer_norm_rms_epsilon")))),
        rope_theta=theta,
        rope_scaling=_rope_factors(file, head_dim, theta) or get.rope_scaling(),
        max_position_embeddings=get.integer("context_length"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        attention_out_bias="blk.0.attn_output.bias" in names,
        mlp_bias="blk.0.ffn_gate.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        eos_token_ids=get.tokens(end_token_ids(file)),
        bos_token_id=next(iter(get.tokens([file.field("tokenizer.ggml.bos_token_id", int, -1)])), None),
        dtype="bfloat16",
    )
    problem = check_shape(config)
    if problem:
        raise ValueError(f"{file.path.name}: {problem}")
    return config


def iter_gguf(file: GGUFFile, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Tensor]]:
    """Dequantize tensor after tensor, as `dtype`, under Hugging Face names and with rotary pairs in halves.

    All names and shapes are checked before the first tensor is read. Raises ValueError naming file and tensor.
    """
    for name, tensor, heads in _wanted(file, config):
        weight = _dequantized(file, tensor, dtype)
        yield name, weight if heads is None else _to_halves(weight, heads)


def iter_gguf_blocks(
    file: GGUFFile, config: ModelConfig, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor | Blocks]]:
    """As `iter_gguf`, but matrices of BLOCK_TYPES as they are stored: views of the file, or permuted copies."""
    for name, tensor, heads in _wanted(file, config):
        if tensor.type_name not in BLOCK_TYPES or len(tensor.shape) != 2:
            weight = _dequantized(file, tensor, dtype)
            yield name, weight if heads is None else _to_halves(weight, heads)
            continue
        raw = file.data(tensor).reshape(tensor.shape[0], -1)
        if heads is not None:
            raw = raw.reshape(heads, len(raw) // heads // 2, 2, -1).swapaxes(1, 2).reshape(raw.shape)
        yield name, Blocks(raw, tensor.type)


def _wanted(file: GGUFFile, config: ModelConfig) -> list[tuple[str, GGUFTensor, int | None]]:
    """Every tensor with its Hugging Face name and, where its rows are rotary pairs, the number of heads.

    Raises ValueError when one is foreign, missing or of the wrong shape.
    """
    found: list[tuple[str, GGUFTensor]] = []
    missing = expected_shapes(config)
    for tensor in file.tensors:
        if tensor.name == _ROPE_FACTORS:  # part of the config
            continue
        name = hf_name(tensor.name)
        shape = missing.pop(name, None) if name else None
        if name is None or shape is None:
            raise ValueError(f"{file.path.name}: unexpected tensor {tensor.name}")
        if tensor.shape != shape:
            raise ValueError(f"{file.path.name}: tensor {tensor.name} has shape {tensor.shape}, the model needs {shape}")
        found.append((name, tensor))
    if missing:
        raise ValueError(f"{file.path.name}: tensor {next(iter(missing))} is missing ({len(missing)} in all)")
    rotary = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if config.architecture == "llama" else {}
    return [(name, tensor, rotary.get(name.split(".")[-2])) for name, tensor in found]


def _dequantized(file: GGUFFile, tensor: GGUFTensor, dtype: torch.dtype) -> Tensor:
    try:
        return dequantize(file.data(tensor), tensor.type, tensor.shape, dtype)
    except ValueError as error:
        raise ValueError(f"{file.path.name}: tensor {tensor.name}: {error}") from None


def _to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring rotary pairs (llama.cpp's order) to two halves (Hugging Face's)."""
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _rope_factors(file: GGUFFile, head_dim: int, theta: float) -> dict[str, object] | None:
    """Llama 3's scaling, which GGUF stores as a divisor per frequency instead of the numbers it came from."""
    tensor = next((t for t in file.tensors if t.name == _ROPE_FACTORS), None)
    if tensor is None:
        return None
    if tensor.type_name != "F32" or tensor.shape != (head_dim // 2,):
        raise ValueError(f"{file.path.name}: {_ROPE_FACTORS} must be {head_dim // 2} float32 numbers")
    stored = np.frombuffer(file.data(tensor).tobytes(), dtype="<f4")
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    for factor, low, high, original in _LLAMA3:
        smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
        if np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            numbers = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return {"rope_type": "llama3", **numbers, "original_max_position_embeddings": original}
    raise ValueError(f"{file.path.name}: {_ROPE_FACTORS} holds a rotary scaling other than Llama 3's; it is not supported")


class _Metadata:
    """Typed access to the keys of one architecture."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.prefix = file, architecture

    def integer(self, key: str, default: int | None = None, high: int = 2**31 - 1) -> int:
        value = self.file.field(f"{self.prefix}.{key}", int, default)
        if not 0 < value <= high:
            raise ValueError(f"{self.file.path.name}: {self.prefix}.{key} is {value}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.file.field(f"{self.prefix}.{key}", (int, float), default)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{self.file.path.name}: {self.prefix}.{key} is {value}")
        return float(value)

    def vocab_size(self) -> int:
        listed = self.file.fields.get("tokenizer.ggml.tokens")
        count = len(listed) if isinstance(listed, list) and listed else None
        return self.integer("vocab_size", count)

    def tokens(self, ids: list[int]) -> tuple[int, ...]:
        """Special token ids; those outside the vocabulary are dropped, the model can never emit them."""
        return tuple(i for i in ids if 0 <= i < self.vocab_size())

    def rope_scaling(self) -> dict[str, object] | None:
        kind = self.file.field(f"{self.prefix}.rope.scaling.type", str, "none")
        legacy = self.file.field(f"{self.prefix}.rope.scale_linear", (int, float), 1.0)
        if kind == "none" and legacy in (0, 1):
            return None
        if kind == "none":
            return {"rope_type": "linear", "factor": self.number("rope.scale_linear")}
        factor = self.number("rope.scaling.factor")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self.integer("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": float(original)}
        raise ValueError(f"{self.file.path.name}: rotary scaling of type {kind!r} is not supported")

    def refuse_unapplied(self) -> None:
        for key, neutral in _NEUTRAL.items():
            value = self.file.fields.get(f"{self.prefix}.{key}")
            if value is not None and value not in neutral:
                raise ValueError(f"{self.file.path.name}: {self.prefix}.{key} = {value} is not supported")
