"""Tiny random models of the Llama family, written to disk as transformers and as llama.cpp's converter write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}


def config(family: str, **changes: Any) -> Any:
    """transformers' config of a family; sizes that the family does not know are left out."""
    kind = getattr(transformers, f"{family}Config")
    known = set(kind().to_dict()) | set(kind.attribute_map)
    shape = {key: value for key, value in SHAPE.items() if key in known}
    return kind(**{**shape, **FAMILIES.get(family, {}), **changes})


def model(config: Any, seed: int = 0) -> Any:
    """A model whose every weight is random, the norms and biases too, so that none can be left out unnoticed."""
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.dim() == 1:
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if "norm" in name or "ln" in name else 0.0))
        else:
            weight.mul_(8.0)  # transformers starts at 0.02: logits that differ by nothing would hide mistakes
    return made


def save(made: Any, folder: Path, **options: Any) -> Path:
    made.save_pretrained(folder, **options)
    return folder


_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key rows of a Llama: halves to neighbouring pairs."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    made: Any,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
    tokens: list[str] | None = None,
    special: Sequence[int] = (),
    eos: int = 2,
) -> Path:
    """The model as a GGUF file: matrices as `kind`, vectors as float32. `fields` are further keys of the architecture.

    With `tokens` it has a byte-level vocabulary of these, without merges, those of `special` as control tokens.
    """
    hf = made.config
    architecture = "llama" if hf.model_type == "mistral" else hf.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(hf.num_hidden_layers)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_feed_forward_length(hf.intermediate_size)
    writer.add_head_count(hf.num_attention_heads)
    writer.add_head_count_kv(hf.num_key_value_heads)
    writer.add_key_length(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    writer.add_rope_freq_base(hf.rope_parameters["rope_theta"])
    writer.add_vocab_size(hf.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        types = gguf.TokenType
        writer.add_token_types([types.CONTROL if i in special else types.NORMAL for i in range(len(tokens))])
        writer.add_token_merges(["a a"])
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}", value)
    heads = {"q_proj": hf.num_attention_heads, "k_proj": hf.num_key_value_heads} if architecture == "llama" else {}
    for name, tensor in made.state_dict().items():
        weight = tensor.float().numpy()
        part = name.split(".")[-2]
        weight = np.ascontiguousarray(pairs(weight, heads[part]) if part in heads else weight)
        stored = gguf.GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, stored), raw_dtype=stored)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
