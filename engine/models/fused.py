"""The decoder's layers with what lies between their products in four launches: Triton's kernels, where torch takes some twenty.

A sublayer's output is not added to the stream at once, but by the norm that follows; QK norm, rotation and cache write are one.
The same sums as DecoderLayer's, rounded at the same places or not at all. Not for deterministic mode, whose products are others.
Never yet run on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.decoder import Decoder, DecoderLayer, Paged
from engine.models.layers import RotaryTable, launching
from kernels.act import silu_mul
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope import rope_write_kv_


def run_layers(
    decoder: Decoder, token_ids: Tensor, positions: Tensor, attend: Paged, hidden_layers: tuple[int, ...]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Decoder.forward: last hidden states [T, C], and those after the named layers."""
    x: Tensor = decoder.embedding.index_select(0, token_ids)
    delta: Tensor | None = None  # what the last sublayer adds to x
    hidden: dict[int, Tensor] = {}
    with launching(x.device):
        for layer in decoder.layers:
            x, delta = _run_layer(layer, x, delta, decoder.rotary, positions, attend)
            if layer.index in hidden_layers:
                hidden[layer.index] = torch.add(x, delta)
    return x if delta is None else torch.add(x, delta), hidden


def _run_layer(
    layer: DecoderLayer, x: Tensor, delta: Tensor | None, rotary: RotaryTable, positions: Tensor, attend: Paged
) -> tuple[Tensor, Tensor]:
    """The stream [T, C] before the layer's last sublayer, and what that one adds to it [T, C]."""
    if delta is None:
        normed = rms_norm(x, *layer.input_norm.given)
    else:
        normed, x = add_rms_norm(delta, x, *layer.input_norm.given)
    q_weight = k_weight = None
    eps = 0.0
    if layer.q_norm is not None and layer.k_norm is not None:
        (q_weight, eps), (k_weight, _) = layer.q_norm.given, layer.k_norm.given
    kv = attend.layers[layer.index]
    table = (rotary.cos, rotary.sin, positions, kv, attend.slots, layer.num_heads)
    q = rope_write_kv_(layer.qkv(normed), *table, q_weight, k_weight, eps)
    normed, x = add_rms_norm(layer.out.whole(attend.run(kv, q, None, layer.scale)), x, *layer.post_norm.given)
    return x, layer.down.whole(silu_mul(layer.gate_up(normed)))
