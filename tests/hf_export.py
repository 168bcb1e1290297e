"""A GGUF file as a Hugging Face directory: bfloat16 safetensors, config and tokenizer, for tests and peers that read those.

Not a general converter: what the server itself reads from the GGUF file is what is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.gguf_file import GGUFFile
from engine.models.config import ModelConfig
from server import tokenizer_files

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def write_hf(gguf: Path, out: Path) -> None:
    """Fill the existing folder `out`. Raises ValueError when the file is damaged or of another architecture."""
    from safetensors.torch import save_file

    from engine.models.loader import iter_weights, load_config

    config = load_config(str(gguf))
    tokens = _write_tokenizer(gguf, out)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids), **tokens}
    _write(out / "config.json", _hf_config(config) | ids)
    _write(out / "generation_config.json", ids)
    save_file(dict(iter_weights(str(gguf), config)), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes 0600


def _hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "dtype": config.dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias and config.architecture != "qwen2",
        "mlp_bias": config.mlp_bias,
    }


def _write_tokenizer(gguf: Path, out: Path) -> dict[str, int]:
    """tokenizer.json, tokenizer_config.json and the chat template; returns the padding id where the file has one."""
    parts = tokenizer_files.read(gguf)
    parts.tokenizer.save(str(out / "tokenizer.json"))
    if parts.chat_template:
        (out / "chat_template.jinja").write_text(parts.chat_template, encoding="utf-8")
    with GGUFFile(gguf) as file:
        length = file.field(f"{file.fields['general.architecture']}.context_length", int)
        padding = file.field("tokenizer.ggml.padding_token_id", int, -1)
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": length}
    _write(out / "tokenizer_config.json", common | parts.special)
    return {"pad_token_id": padding} if padding >= 0 else {}


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
