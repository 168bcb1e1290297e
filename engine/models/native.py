"""The decoder on the CPU's own kernels: a whole step is one call into C (kernels/cpu), attention included.

For bf16 models of the Llama family. Each row's result is the same bits whatever else is in the step, so speculation is invisible
bit for bit, branched trees included. The residual stream is float32; hidden states are handed out in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from engine.block_table import arrays, joined
from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.decoder import gather_layers, rotary_frequencies
from engine.models.quantized import Blocks
from engine.peaks import attach
from kernels.cpu import native
from kernels.cpu.build import Unavailable, library

NO_TREES = np.zeros(1, dtype=np.uint8)
KEPT_ROWS = 64  # logits of up to as many rows live in one buffer that every step uses again


def shape_of(config: ModelConfig, block_size: int) -> native.Shape:
    return native.Shape(
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        size=config.head_dim,
        inner=config.intermediate_size,
        vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        window=config.sliding_window or 0,
        block=block_size,
        scale=config.head_dim**-0.5,
    )


def unavailable(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the native kernels cannot run this model here; None when they can."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"they are for bfloat16 on the CPU, not {str(dtype).removeprefix('torch.')} on {device.type}"
    if (reason := shape_of(config, 16).unsupported) is not None:
        return f"they have no form for {reason}"
    try:
        library()
    except Unavailable as error:
        return str(error)
    return None


class NativeDecoder:
    """Same checkpoints as `Decoder`. Raises ValueError when a weight is missing.

    What comes as blocks stays four or eight bits wide, and gives the bits that its bf16 values give.
    """

    def __init__(self, config: ModelConfig, weights: Iterable[tuple[str, Tensor | Blocks]], block_size: int) -> None:
        self.config = config
        layers, rest = gather_layers(config, weights, _pack_layer)
        embedding, head = rest["model.embed_tokens.weight"], rest.get("lm_head.weight")
        inv_freq, scaling = rotary_frequencies(config)
        angles = torch.outer(torch.arange(config.max_position_embeddings, dtype=torch.float32), inv_freq.float())
        self.kernels = native.Decoder(
            threads=native.Threads(torch.get_num_threads()),
            shape=shape_of(config, block_size),
            layers=layers,
            norm=_vector(rest["model.norm.weight"]),
            # A tied embedding is read out of the head's panels: one copy.
            head=_pack([embedding if head is None else head]),
            embedding=None if head is None else _plain(embedding).contiguous(),
            cos=angles.cos().mul_(scaling),
            sin=angles.sin().mul_(scaling),
        )
        self.weight_bytes = self.kernels.nbytes
        self._kept = self._kept_peaks = torch.empty(0, config.vocab_size)

    @property
    def kinds(self) -> set[str]:
        """What its linear layers' numbers are, by name."""
        linears = [weight for layer in self.kernels.layers for weight in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return {weight.kind.name for weight in (*linears, self.kernels.head)}

    def step(self, batch: ForwardBatch, kv: KVCache, hidden_layers: tuple[int, ...] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Last hidden states [T, C] float32 (before the final norm), and those after the named layers, in bfloat16."""
        rows = _rows(batch)
        x: Tensor | None = None
        begin, hidden = 0, {}
        for layer in sorted(set(hidden_layers)):
            x = self.kernels.forward(rows, kv.kv, x, begin, layer + 1)
            begin, hidden[layer] = layer + 1, x.to(torch.bfloat16)
        return self.kernels.forward(rows, kv.kv, x, begin), hidden

    def step_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """float32 logits [R, V] of rows [R] of the hidden states; a buffer that the next call may use again."""
        logits, peaks = self._buffers(len(rows))
        self.kernels.logits(hidden, rows.numpy(), logits, peaks)
        return attach(logits, peaks)

    def move(self, kv: Tensor, moves: list[tuple[int, int]]) -> None:
        """Copy slots (from, to) of every layer, one after the other."""
        native.move(kv, moves)

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """For logits and their peaks."""
        # A fresh tensor of some megabytes is all page faults.
        if rows > KEPT_ROWS:
            return self._empty(rows)
        if rows > len(self._kept):
            self._kept, self._kept_peaks = self._empty(min(KEPT_ROWS, 2 * rows))
        return self._kept[:rows], self._kept_peaks[:rows]

    def _empty(self, rows: int) -> tuple[Tensor, Tensor]:
        vocab = self.config.vocab_size
        return torch.empty(rows, vocab), torch.empty(rows, native.panels(vocab))


def _pack_layer(index: int, config: ModelConfig, weights: dict[str, Tensor | Blocks]) -> native.LayerWeights:
    def optional(name: str) -> Tensor | None:
        return _vector(weights[name]) if name in weights else None

    def biases(*names: str) -> Tensor | None:
        found = [_vector(weights[f"{name}.bias"]) for name in names if f"{name}.bias" in weights]
        if found and len(found) != len(names):
            raise ValueError(f"only some of {names} have a bias")
        return native.pad_bias(torch.cat(found)) if found else None

    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    gate_up_bias = biases("mlp.gate_proj", "mlp.up_proj")
    if gate_up_bias is not None:  # in the panels' order: 16 gates, their 16 ups
        gate_up_bias = gate_up_bias.view(2, -1, 16).transpose(0, 1).reshape(-1).contiguous()
    return native.LayerWeights(
        input_norm=_vector(weights["input_layernorm.weight"]),
        post_norm=_vector(weights["post_attention_layernorm.weight"]),
        q_norm=optional("self_attn.q_norm.weight"),
        k_norm=optional("self_attn.k_norm.weight"),
        qkv=_pack([weights[f"{name}.weight"] for name in qkv]),
        out=_pack([weights["self_attn.o_proj.weight"]]),
        gate_up=_pack([weights["mlp.gate_proj.weight"]], weights["mlp.up_proj.weight"]),
        down=_pack([weights["mlp.down_proj.weight"]]),
        qkv_bias=biases(*qkv),
        out_bias=biases("self_attn.o_proj"),
        gate_up_bias=gate_up_bias,
        down_bias=biases("mlp.down_proj"),
    )


def _pack(parts: list[Tensor | Blocks], beside: Tensor | Blocks | None = None) -> native.Panels:
    """The rows of all parts, and every 16 of them beside 16 of another's; in blocks where all are of one type."""
    blocks = [part for part in (*parts, beside) if isinstance(part, Blocks)]
    if len(blocks) == len(parts) + (beside is not None) and len({part.type for part in blocks}) == 1:
        main = np.concatenate([part.raw for part in blocks[: len(parts)]]) if len(parts) > 1 else blocks[0].raw
        return native.pack_blocks(native.Kind[blocks[0].type_name], main, None if beside is None else blocks[-1].raw)
    return native.pack(torch.cat([_plain(part) for part in parts]), None if beside is None else _plain(beside))


def _plain(weight: Tensor | Blocks) -> Tensor:
    return weight.dequantize() if isinstance(weight, Blocks) else weight.to(torch.bfloat16)


def _vector(weight: Tensor | Blocks) -> Tensor:
    return _plain(weight).float()


def _rows(batch: ForwardBatch) -> native.Rows:
    index = batch.index[:, : batch.num_tokens]
    tables, masks = batch.block_tables, []
    table_first, tree_first = [0], []
    offset = 0
    for table, mask in zip(tables, batch.ancestors, strict=True):
        table_first.append(table_first[-1] + len(table))
        tree_first.append(-1 if mask is None else offset)
        if mask is not None:
            masks.append(mask.reshape(-1))
            offset += mask.size
    narrow = index[:2].astype(np.int32)
    return native.Rows(
        tokens=narrow[0],
        positions=narrow[1],
        slots=index[2],
        first=np.array([*batch.first_rows, batch.num_tokens], dtype=np.int32),
        context=np.array(batch.context_lens, dtype=np.int32),
        tables=joined(arrays(tables)),
        table_first=np.array(table_first[:-1], dtype=np.int32),
        trees=np.concatenate(masks).view(np.uint8) if masks else NO_TREES,
        tree_first=np.array(tree_first, dtype=np.int64),
    )
