"""The config of an architecture that is not ours, with its numbers under their standard names and its defaults filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

_STANDARD = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

UNEQUAL = "its layers are not of one size"


def hf_config(path: Path) -> PreTrainedConfig:
    """What transformers makes of a model directory. Raises ValueError when it does not know the model; never runs its code."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = str(error).partition("\n")[0]  # then comes advice on the versions of transformers
        if "trust_remote_code" in str(error):  # transformers says to pass it
            why = "it needs the code that comes with it, and such code is never run here"
        raise ValueError(f"{path}: transformers does not know this model: {why}") from error


def unequal_layers(config: PreTrainedConfig) -> bool:
    """Whether sizes are given per layer, as Gemma 4's head size is. Asked for one of them, the config raises RuntimeError."""
    return bool(getattr(config.get_text_config(), "is_heterogeneous", False))


def standard_config(path: Path) -> dict[str, Any]:
    """Like config.json, for ModelConfig.from_hf: GPT-2's `n_embd` is also `hidden_size`, and so on.

    Raises ValueError when transformers does not know the model, it has no attention, or its layers differ in size.
    """
    config = hf_config(path)
    values: dict[str, Any] = config.to_dict()
    if unequal_layers(config):
        raise ValueError(f"{path}: models of type {config.model_type} cannot be served: {UNEQUAL}")
    text = config.get_text_config()
    if getattr(text, "num_attention_heads", None) is None:
        raise ValueError(f"{path}: models of type {config.model_type} cannot be served: they do not work by attention")
    return values | {name: getattr(text, name) for name in _STANDARD if getattr(text, name, None) is not None}
