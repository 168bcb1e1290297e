"""The Llama family (Llama, Mistral, Qwen2, Qwen3, SmolLM, ...) as one decoder with flags: a flat list of layers.

It is not a torch.nn.Module: weights are packed while they stream in, so that one copy is resident at a time. Attention is
passed in, so the same model runs with any backend, and two models run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.layers import Head, Linear, QuantEmbedding, RMSNorm, RotaryTable, SplitEmbedding, SplitHead, SplitLinear
from engine.models.sharding import Sharding, vocab_parts
from engine.parallel import ALONE, Group
from kernels.quant_weight import QuantWeight, joined
from kernels.reference import rope_, silu_mul

# attend(layer, q [T, H, D], new [T, 2, K, D], scale) -> [T, H * D]: stores the keys and values, then attends.
Attend = Callable[[int, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class Paged:
    """An Attend over a paged cache that says where it stores: whoever does that himself calls `run` with None for `new`."""

    layers: Sequence[Tensor]  # kv [N, 2, K, S, D] of each
    slots: Tensor  # [T]
    run: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]  # AttentionBackend.run

    def __call__(self, layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
        return self.run(self.layers[layer], q, new, scale)


class Fused(Protocol):
    """Decoder.forward, in another way."""

    def __call__(
        self, decoder: Decoder, token_ids: Tensor, positions: Tensor, attend: Paged, hidden_layers: tuple[int, ...]
    ) -> tuple[Tensor, dict[int, Tensor]]: ...


Weight = Tensor | QuantWeight
T = TypeVar("T")  # a layer in whatever form a decoder keeps it
W = TypeVar("W")  # a tensor, or what stands for one


class DecoderLayer:
    """One block: norm, fused QKV, rotary, attention, output; norm, fused gate and up, down.

    Of several ranks each has a smaller one, and what `out` and `down` add is the sum of all of theirs.
    """

    def __init__(self, index: int, config: ModelConfig, weights: dict[str, Weight], group: Group = ALONE) -> None:
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = config.head_dim**-0.5
        self.input_norm = RMSNorm(plain(weights["input_layernorm.weight"]), config.rms_norm_eps)
        self.post_norm = RMSNorm(plain(weights["post_attention_layernorm.weight"]), config.rms_norm_eps)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(plain(weights["self_attn.q_norm.weight"]), config.rms_norm_eps)
            self.k_norm = RMSNorm(plain(weights["self_attn.k_norm.weight"]), config.rms_norm_eps)
        self.qkv = _fused(weights, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
        self.out = _fused(weights, ["self_attn.o_proj"], group)
        self.gate_up = _fused(weights, ["mlp.gate_proj", "mlp.up_proj"])
        self.down = _fused(weights, ["mlp.down_proj"], group)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def fix_order(self) -> None:
        """See Decoder.fix_order."""
        for linear in self.linears:
            linear.fix_order()
        for norm in (self.input_norm, self.post_norm, self.q_norm, self.k_norm):
            if norm is not None:
                norm.fix_order()

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [T, C] -> [T, C]; cos, sin [T, 1, D]."""
        rows, size = x.shape[0], self.head_dim
        heads = self.num_heads + self.num_kv_heads
        qkv = self.qkv(self.input_norm(x))
        qk = qkv[:, : heads * size].view(rows, heads, size)
        if self.q_norm is not None and self.k_norm is not None:
            qk[:, : self.num_heads] = self.q_norm(qk[:, : self.num_heads])
            qk[:, self.num_heads :] = self.k_norm(qk[:, self.num_heads :])
        rope_(qk, cos, sin)
        new = qkv[:, self.num_heads * size :].view(rows, 2, self.num_kv_heads, size)
        x = self.out.add_to(attend(self.index, qk[:, : self.num_heads], new, self.scale), x)
        return self.down.add_to(silu_mul(self.gate_up(self.post_norm(x))), x)


class Decoder:
    """Token ids -> hidden states -> logits. Raises ValueError when a weight is missing."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Iterable[tuple[str, Weight]],
        dtype: torch.dtype,
        device: torch.device,
        part: Sharding | None = None,
        group: Group = ALONE,
    ) -> None:
        """Of a rank of several: `part` says what it holds, `config` is that part's shape, `weights` are its weights.

        What comes quantized stays so: as many bytes, and every value the one it dequantizes to."""
        self.config, self.dtype, self.device = config, dtype, device
        self._part, self._group = part, group
        self._fused: Fused | None = None
        self.weight_bytes = 0
        self.layers: list[DecoderLayer] = []
        self._load(weights)
        inv_freq, attention_scaling = rotary_frequencies(config)
        self.rotary = RotaryTable(inv_freq, attention_scaling, config.max_position_embeddings, dtype, device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, hidden_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """token_ids, positions [T] -> last hidden states [T, C] (before the final norm), and those after the named layers."""
        if self._fused is not None and isinstance(attend, Paged):
            return self._fused(self, token_ids, positions, attend, hidden_layers)
        cos, sin = self.rotary.at(positions)
        x = self.embedding.index_select(0, token_ids)
        hidden: dict[int, Tensor] = {}
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
            if layer.index in hidden_layers:
                hidden[layer.index] = x
        return x, hidden

    def fuse(self) -> None:
        """From now on what lies between the products takes four launches a layer (engine/models/fused.py)."""
        from engine.models.fused import run_layers  # imports triton, which a CPU can do without

        self._fused = run_layers
        self.norm.fix_order()

    def fix_order(self) -> None:
        """From now on no row's bits depend on how many rows share a call: products and norms in Triton, in one order of sums.

        The rest works element by element; attention is the caller's.
        """
        for layer in self.layers:
            layer.fix_order()
        self.norm.fix_order()
        self.head.linear.fix_order()

    @property
    def linears(self) -> list[Linear]:
        return [*(linear for layer in self.layers for linear in layer.linears), self.head.linear]

    def warm_up(self) -> None:
        """Compile what any number of rows may need of our own products."""
        for linear in self.linears:
            linear.warm_up(self.dtype, self.device)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [R, C] -> float32 logits [R, V]."""
        return self.head(self.norm(x))

    def _load(self, weights: Iterable[tuple[str, Weight]]) -> None:
        self.layers, rest = gather_layers(self.config, self._cast(weights), partial(DecoderLayer, group=self._group))
        found = rest["model.embed_tokens.weight"]
        embedding = QuantEmbedding(found, self.dtype) if isinstance(found, QuantWeight) else found
        self.norm = RMSNorm(plain(rest["model.norm.weight"]), self.config.rms_norm_eps)
        head = rest.get("lm_head.weight", found)
        linear, rows = Linear(head), found if head is found and isinstance(found, Tensor) else None
        self.embedding: Tensor | QuantEmbedding | SplitEmbedding = embedding
        self.head = Head(linear, rows)
        if self._part is not None:
            self.embedding = SplitEmbedding(embedding, self._part.vocab[0], self._group)
            self.head = SplitHead(linear, rows, vocab_parts(self.config, self._group.size), self._group)

    def _cast(self, weights: Iterable[tuple[str, Weight]]) -> Iterable[tuple[str, Weight]]:
        for name, found in weights:
            weight = found.to(self.device) if isinstance(found, QuantWeight) else found.to(device=self.device, dtype=self.dtype)
            self.weight_bytes += weight.nbytes
            yield name, weight


def plain(weight: Weight) -> Tensor:
    """Of what is never quantized: norms and biases."""
    if isinstance(weight, QuantWeight):
        raise ValueError("a vector is quantized")
    return weight


def gather_layers(
    config: ModelConfig, weights: Iterable[tuple[str, W]], make: Callable[[int, ModelConfig, dict[str, W]], T]
) -> tuple[list[T], dict[str, W]]:
    """The layers, each made as soon as its last tensor has arrived, so that one plain copy is resident at a time; and the rest.

    Raises ValueError when a layer is incomplete.
    """
    pending: dict[int, dict[str, W]] = {}
    layers: dict[int, T] = {}
    rest: dict[str, W] = {}
    expected = _layer_tensors(config)
    for name, weight in weights:
        if not name.startswith("model.layers."):
            rest[name] = weight
            continue
        index, part = name.removeprefix("model.layers.").split(".", 1)
        parts = pending.setdefault(int(index), {})
        parts[part] = weight
        if len(parts) == expected:
            layers[int(index)] = make(int(index), config, pending.pop(int(index)))
    if pending or len(layers) != config.num_layers:
        raise ValueError(f"the checkpoint's layers are incomplete: {sorted(set(range(config.num_layers)) - set(layers))}")
    return [layers[i] for i in range(config.num_layers)], rest


def _fused(weights: dict[str, Weight], names: list[str], group: Group = ALONE) -> Linear:
    """One linear whose output is the concatenation of several; their plain weights are dropped from `weights`.

    With a group, one whose inputs are split over its ranks. Weights quantized in different ways are dequantized.
    """
    parts = [weights.pop(f"{name}.weight") for name in names]
    biases = [plain(weights.pop(f"{name}.bias")) for name in names if f"{name}.bias" in weights]
    if biases and len(biases) != len(names):
        raise ValueError(f"only some of {names} have a bias")
    weight, bias = _joined(parts, plain(weights["input_layernorm.weight"]).dtype), torch.cat(biases) if biases else None
    return Linear(weight, bias) if group.size == 1 else SplitLinear(weight, bias, group)


def _joined(parts: list[Weight], dtype: torch.dtype) -> Weight:
    """One weight whose outputs are those of all."""
    if len(parts) == 1:
        return parts[0]
    quantized = [part for part in parts if isinstance(part, QuantWeight)]
    if len(quantized) == len(parts) and (whole := joined(quantized)) is not None:
        return whole
    return torch.cat([part.dequantize(dtype) if isinstance(part, QuantWeight) else part for part in parts])


def _layer_tensors(config: ModelConfig) -> int:
    """Tensors per layer: 7 linears, 2 norms, and what the flags add."""
    return 9 + 3 * config.attention_bias + config.attention_out_bias + 3 * config.mlp_bias + 2 * config.qk_norm


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [D / 2] and the attention scaling; scaled variants come from transformers' own functions."""
    scaling = config.rope_scaling
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (config.rope_theta**exponents), 1.0
    # Imported here: transformers costs most of a second and only scaled rotary embeddings need it.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = LlamaConfig(
        hidden_size=config.num_heads * config.head_dim,  # only head_dim counts, but the class wants them to agree
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        rope_scaling={**(scaling or {}), "rope_theta": config.rope_theta},
    )
    inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return inv_freq, float(attention_scaling)
