"""Any causal language model that transformers can run, with our paged attention in the place of its own.

transformers hands unknown keyword arguments of a forward down to its attention function; ours takes `attend` from there,
so there is no global state and two models run side by side. All sequences of a step travel as one row of T tokens; what
keeps them apart is `attend` alone. A model in which anything else mixes tokens is refused when it is loaded
(engine/models/fallback_check.py). This is the slow path: the Llama family has its own decoder.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from engine.models.config import ModelConfig
from engine.models.decoder import Attend
from engine.models.fallback_check import Inspect, check_checkpoint, check_model

ATTENTION = "outrider_paged"


class FallbackModel:
    """Same interface as `Decoder`, for any other architecture. `dtype` and `device` are what the weights are cast to.

    Raises ValueError when the checkpoint is damaged or incomplete, or when its architecture would not give the right
    answers with paged attention. Never runs code that comes with a checkpoint.
    """

    def __init__(self, path: str, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        check_checkpoint(Path(path), config)
        self.config, self.dtype, self.device = config, dtype, device
        self.model = _load(path, dtype).to(device).eval().requires_grad_(False)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())  # tied ones count once
        self.body: nn.Module = self.model.get_decoder()
        self.head = _without_body(self.model, self.body)
        self.layers = next((m for m in self.body.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_layers), None)
        check_model(self, self.model, ATTENTION)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        hidden_layers: tuple[int, ...] = (),
        inspect: Inspect | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """token_ids, positions [T] -> last hidden states [T, C] (the final norm included), those after the named layers."""
        hidden: dict[int, Tensor] = {}
        hooks = [self._layer(index).register_forward_hook(_keep(hidden, index)) for index in hidden_layers]
        try:
            out = self.body(
                input_ids=token_ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                attend=attend,
                inspect=inspect,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return out.last_hidden_state[0], hidden

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [R, C] -> logits [R, V], through the model's own head with its scaling and caps."""
        return self.head(inputs_embeds=x.unsqueeze(0), use_cache=False).logits[0]

    def _layer(self, index: int) -> nn.Module:
        if self.layers is None:
            raise ValueError(f"the layers of {type(self.model).__name__} have no list; their hidden states cannot be had")
        return self.layers[index]


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attend: Attend | None = None,
    inspect: Inspect | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    if attend is None:
        raise ValueError("it does not hand keyword arguments down to its attention")
    if inspect is not None:
        inspect(module, query, key, value, attention_mask, kwargs)
    rows, size = query.shape[2], query.shape[3]
    new = torch.stack((key[0].transpose(0, 1), value[0].transpose(0, 1)), dim=1)
    scale = size**-0.5 if scaling is None else float(scaling)
    layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module annotates attributes as tensors
    out = attend(layer, query[0].transpose(0, 1).to(new.dtype), new, scale)
    return out.view(1, rows, -1, size), None


# A name that transformers' mask functions do not know: they then build no T x T mask at all.
AttentionInterface.register(ATTENTION, paged_attention)


def _load(path: str, dtype: torch.dtype) -> PreTrainedModel:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True, **options
        )
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        why: object = error
        if isinstance(error, KeyError) and error.args == (ATTENTION,):  # looked up in a table of the model's own
            why = "its code has no interface for another attention than its own"
        raise ValueError(f"{path}: transformers cannot load this model: {why}") from error
    broken = sorted(map(str, report.get("missing_keys") or ())) or sorted(map(str, report.get("mismatched_keys") or ()))
    if broken:  # transformers would go on with random numbers in their place
        raise ValueError(f"{path}: tensor {broken[0]} is missing or has the wrong shape ({len(broken)} in all)")
    return model


class _Hand(nn.Module):
    """Stands in for a model's body: hands back the hidden states it is given."""

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


class _Hidden:
    """A body's output in which everything but the hidden states (router logits, cross attentions, ...) is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _without_body(model: PreTrainedModel, body: nn.Module) -> nn.Module:
    """A view of `model`, weights shared, whose body is skipped: what remains is the way from hidden states to logits."""
    path = next((name for name, module in model.named_modules() if module is body), "")
    if not path:
        raise ValueError(f"{type(model).__name__} has no body apart from its head")
    *parents, last = path.split(".")
    head = parent = _shallow(model)
    for name in parents:
        child = _shallow(parent._modules[name])
        parent._modules[name] = child
        parent = child
    parent._modules[last] = _Hand()
    return head


def _shallow(module: nn.Module | None) -> nn.Module:
    twin = copy.copy(module)
    assert twin is not None
    twin._modules = dict(twin._modules)
    return twin


def _keep(hidden: dict[int, Tensor], index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden[index] = (output[0] if isinstance(output, tuple) else output)[0]

    return hook
