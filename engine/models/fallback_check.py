"""Whether paged attention gives a transformers model its own answers. Run once, when the model is loaded.

First by name: what a config says that one flat row of tokens or our attention cannot honour. Then by trial: two short
sequences run packed together through our attention must give the logits that each gives alone through the model's own.
The trial catches what has no name: recurrent state, convolutions, positions counted by the model itself, ALiBi, sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.models.config import ModelConfig
from engine.models.decoder import Attend
from engine.models.foreign import UNEQUAL, hf_config, unequal_layers

# inspect(module, query, key, value, mask, other keyword arguments): sees every attention call of the trial
Inspect = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], None]

_ARGUMENTS = {"softcap": "soft-capped attention scores", "s_aux": "attention sinks", "position_bias": "a position bias"}
_BATCH_ROPE = ("dynamic", "longrope")  # tables that depend on the longest sequence of the batch
_LENGTHS = (7, 5)  # of the two sequences of the trial
# Relative error of the median row of logits. Rounding stays far below, a wrong mask or wrong positions far above.
QUANTIZED = "its weights are quantized"
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


class Fallback(Protocol):
    """What the trial needs of engine/models/fallback.py's FallbackModel."""

    config: ModelConfig
    device: torch.device

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        hidden_layers: tuple[int, ...] = (),
        inspect: Inspect | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]: ...

    def logits(self, x: Tensor) -> Tensor: ...


def check_checkpoint(path: Path, config: ModelConfig) -> None:
    """Refuse by the config alone, before any weight is read. Raises ValueError naming the reason."""
    if not path.is_dir():
        raise ValueError(f"{path}: {config.unsupported or 'only Hugging Face directories run through transformers'}")
    hf = hf_config(path)
    problem = _problem(hf, config)
    if problem == QUANTIZED and config.unsupported is not None:
        problem = f"{problem}, {config.unsupported}"
    if problem:
        raise ValueError(f"{path}: models of type {hf.model_type} cannot be served: {problem}")


def _problem(hf: PreTrainedConfig, config: ModelConfig) -> str | None:
    if type(hf) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(hf, "is_encoder_decoder", False):
        return "not a causal language model"
    if hf.get_text_config() is not hf:
        return "more than a language model (text is only one of its parts)"
    if unequal_layers(hf):
        return UNEQUAL
    if getattr(hf, "quantization_config", None):
        return QUANTIZED
    kinds = sorted(set(getattr(hf, "layer_types", None) or ()))
    if len(kinds) > 1 or (kinds and kinds[0] not in ("full_attention", "sliding_attention")):
        return "layers of different kinds: " + ", ".join(kinds)
    if kinds == ["sliding_attention"] and config.sliding_window is None:
        # Some models (SmolLM3) then have the window in their masks alone, and the texts of the trial are shorter than any window.
        return "layers with a sliding window that its config switches off"
    rope = getattr(hf, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    used = {str(r.get("rope_type", r.get("type", "default"))) for r in nested or [rope]}
    if used & set(_BATCH_ROPE):
        return f"rotary scaling of type {min(used & set(_BATCH_ROPE))!r}, which depends on what else is in the batch"
    return None


def check_model(fallback: Fallback, model: PreTrainedModel, attention: str) -> None:
    """The trial. Raises ValueError when our attention does not give the model's own logits."""
    config, name = fallback.config, type(model).__name__
    seen: set[int] = set()

    def inspect(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, other: dict[str, Any]) -> None:
        problem = _call_problem(config, module, query, key, value, mask, other)
        if problem:
            raise ValueError(problem)
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module annotates attributes as tensors
        if layer in seen:
            raise ValueError(f"layer {layer} attends twice")
        seen.add(layer)

    rows = [torch.arange(1, n + 1, device=fallback.device) * (3 + n) % config.vocab_size for n in _LENGTHS]
    positions = torch.cat([torch.arange(n, device=fallback.device) for n in _LENGTHS])
    try:
        hidden, _ = fallback.forward(torch.cat(rows), positions, _packed(config), inspect=inspect)
        if len(seen) != config.num_layers:
            raise ValueError(f"only {len(seen)} of {config.num_layers} layers attend through transformers' attention interface")
        ours = fallback.logits(hidden)
        theirs = _own_logits(model, rows, attention)
    except ValueError as error:
        raise ValueError(f"{name} cannot be served: {error}") from error
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{name} cannot be served: its trial run failed: {error!r}") from error
    if ours.shape != (sum(_LENGTHS), config.vocab_size):
        raise ValueError(f"{name} cannot be served: its logits have shape {tuple(ours.shape)}, not one per vocabulary entry")
    worst = max(_median_error(a, b) for a, b in zip(ours.split(_LENGTHS), theirs, strict=True))
    if not worst <= _TOLERANCE[hidden.dtype]:
        raise ValueError(f"{name} cannot be served: with paged attention its logits differ by {worst:.2g} from its own")


def _call_problem(
    config: ModelConfig, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, other: dict[str, Any]
) -> str | None:
    if not isinstance(getattr(module, "layer_idx", None), int):
        return "its attention does not know its layer"
    shapes = (query.shape[1], key.shape[1], query.shape[3], key.shape[3], value.shape[3])
    if shapes != (config.num_heads, config.num_kv_heads, *[config.head_dim] * 3):
        return f"its queries, keys and values {tuple(query.shape)} {tuple(key.shape)} {tuple(value.shape)} do not fit its config"
    if mask is not None:
        return "it makes its own attention mask"
    window = other.get("sliding_window")
    if window != config.sliding_window:
        return f"layer {module.layer_idx} has a sliding window of {window}, the config says {config.sliding_window}"
    odd = next((why for key, why in _ARGUMENTS.items() if other.get(key) is not None), None)
    if odd or other.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        return odd or "its attention is not causal"
    return None


def _packed(config: ModelConfig) -> Attend:
    """Dense attention over the packed sequences of the trial, in float32."""
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(_LENGTHS)])
    place = torch.arange(len(owner))
    sees = (owner[:, None] == owner[None]) & (place[:, None] >= place[None])
    if config.sliding_window is not None:
        sees &= place[:, None] - place[None] < config.sliding_window

    def attend(layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
        group = q.shape[1] // new.shape[2]
        keys, values = new.float().repeat_interleave(group, dim=2).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * scale
        weights = scores.masked_fill(~sees.to(q.device), float("-inf")).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype).flatten(1)

    return attend


@torch.no_grad()
def _own_logits(model: PreTrainedModel, rows: list[Tensor], attention: str) -> list[Tensor]:
    """Logits [n, V] of each sequence alone, through the model's own attention."""
    model.set_attn_implementation("eager")
    try:
        return [model(input_ids=row.unsqueeze(0), use_cache=False).logits[0] for row in rows]
    finally:
        model.set_attn_implementation(attention)


def _median_error(ours: Tensor, theirs: Tensor) -> float:
    """Relative error of the median row: one expert chosen differently by rounding is no reason to refuse a model."""
    difference = (ours.double() - theirs.double()).norm(dim=-1)
    return float((difference / theirs.double().norm(dim=-1).clamp_min(1e-9)).median())
