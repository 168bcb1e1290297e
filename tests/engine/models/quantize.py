"""Tiny models quantized as public checkpoint formats lie on disk, each beside a plain checkpoint of the values it stands for.

Every packing is written down from its format's definition, number by number, and knows nothing of kernels/quant_weight.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.models import tiny

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns lies in half-byte 0, 1, ... of a word
Quantized = tuple[dict[str, Tensor], Tensor]  # tensors by the end of their names; the weight [N, K] they stand for


class Checkpoints(NamedTuple):
    quantized: Path
    plain: Path  # float32


def shape(**changes: Any) -> Any:
    return tiny.config("Llama", **{"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, **changes})


def words(numbers: Tensor, bits: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """[rows, n] of unsigned numbers -> int32 [rows, n * bits / 32]; `columns`: whose turn it is in a word, else 0, 1, ..."""
    count = 32 // bits
    found = np.zeros((len(numbers), numbers.shape[1] // count), dtype=np.uint32)
    for place, column in enumerate(columns or range(count)):
        found |= numbers[:, column::count].numpy().astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32))


def round_to(weight: Tensor, group: int, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned numbers [N, K], zeros [N, groups], scales [N, groups]: weight is about (numbers - zeros) * scales."""
    most, parts = 2**bits - 1, weight.view(len(weight), -1, group)
    low, high = parts.amin(-1), parts.amax(-1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).to(dtype)
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.float()).round().clamp(0, most)
    numbers = (parts / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    return numbers.clamp(0, most).view_as(weight).int(), zeros.int(), scales


def values(numbers: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    group = numbers.shape[1] // scales.shape[1]
    spread = [part.float().repeat_interleave(group, 1) for part in (zeros, scales)]
    return (numbers.float() - spread[0]) * spread[1]


def awq(group: int) -> Callable[[Tensor], Quantized]:
    def make(weight: Tensor) -> Quantized:
        made = round_to(weight, group, 4, False, torch.float16)
        numbers, zeros, scales = (part.t().contiguous() for part in made)
        tensors = {"qweight": words(numbers, 4, AWQ_COLUMNS), "qzeros": words(zeros, 4, AWQ_COLUMNS), "scales": scales}
        return tensors, values(*made)

    return make


def gptq(group: int, symmetric: bool = False, less: int = 1, act_order: bool = False) -> Callable[[Tensor], Quantized]:
    def make(weight: Tensor) -> Quantized:
        inputs = weight.shape[1]
        order = torch.randperm(inputs) if act_order else torch.arange(inputs)
        made = round_to(weight[:, order], group, 4, symmetric, torch.float16)
        back = order.argsort()
        numbers, (_, zeros, scales) = made[0][:, back], made
        tensors = {
            "qweight": words(numbers, 4).t().contiguous(),  # input k in half-byte k % 8 of word k / 8
            "qzeros": words(zeros.t().contiguous() - less & 15, 4),
            "scales": scales.t().contiguous(),
            "g_idx": (back // group).int(),
        }
        return tensors, values(*made)[:, back]

    return make


def packed(
    group: int, bits: int = 4, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Callable[[Tensor], Quantized]:
    """compressed-tensors. group 0: a scale of each output."""

    def make(weight: Tensor) -> Quantized:
        numbers, zeros, scales = made = round_to(weight, group or weight.shape[1], bits, symmetric, dtype)
        tensors = {"weight_packed": words(numbers, bits), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.t().contiguous(), bits).t().contiguous()
        return tensors, values(*made)

    return make


def int8(weight: Tensor) -> Quantized:
    """compressed-tensors "int-quantized": signed bytes and a scale of each output."""
    numbers, zeros, scales = made = round_to(weight, weight.shape[1], 8, True, torch.bfloat16)
    return {"weight": (numbers - zeros).to(torch.int8), "weight_scale": scales}, values(*made)


def float8(scale: str, block: tuple[int, int] = (64, 32)) -> Callable[[Tensor], Quantized]:
    """scale: tensor | channel | block."""

    def make(weight: Tensor) -> Quantized:
        rows, columns = weight.shape
        high, wide = {"tensor": (rows, columns), "channel": (1, columns), "block": block}[scale]
        most = torch.stack([part.abs().amax() for strip in weight.split(high) for part in strip.split(wide, 1)])
        scales = (most / 448).view(-(-rows // high), -1)
        spread = scales.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        numbers = (weight / spread).to(torch.float8_e4m3fn)
        name = "weight_scale_inv" if scale == "block" else "weight_scale"
        tensors = {"weight": numbers, name: scales[0, 0] if scale == "tensor" else scales}
        if scale == "tensor":
            tensors["input_scale"] = torch.tensor(0.5)
        return tensors, numbers.float() * spread

    return make


def compressed(layout: str, *, ignore: tuple[str, ...] = ("lm_head",), **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}, "input_activations": None}
    common = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed"}
    return {**common, "config_groups": {"group_0": group}, "ignore": list(ignore), "kv_cache_scheme": None}


AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "checkpoint_format": "gptq"}
FLOAT8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4: dict[str, Any] = {"num_bits": 4, "strategy": "group"}
# name -> what a layer becomes, config.json's quantization_config, and the blocks the native kernels multiply with (None: bf16)
FORMATS: dict[str, tuple[Callable[[Tensor], Quantized], dict[str, Any], str | None]] = {
    "AWQ 32": (awq(32), {**AWQ, "group_size": 32}, "Q4_Z"),
    "AWQ 64": (awq(64), {**AWQ, "group_size": 64}, "Q4_Z"),
    "AWQ 128": (awq(128), {**AWQ, "group_size": 128}, "Q4_Z"),
    "GPTQ": (gptq(64), {**GPTQ, "group_size": 64}, "Q4_Z"),
    "GPTQ symmetric": (gptq(128, symmetric=True), {**GPTQ, "group_size": 128, "sym": True}, "Q4_0"),
    "GPTQ v2": (gptq(32, less=0), {**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2"}, "Q4_Z"),
    "GPTQ act-order": (gptq(32, act_order=True), {**GPTQ, "group_size": 32, "desc_act": True}, None),
    "packed int4": (packed(128), compressed("pack-quantized", **INT4, group_size=128), "Q4_0"),
    "packed int4, zeros": (
        packed(32, symmetric=False),
        compressed("pack-quantized", **{**INT4, "symmetric": False}, group_size=32),
        "Q4_Z",
    ),
    "packed int4, row": (packed(0), compressed("pack-quantized", num_bits=4, strategy="channel"), "Q4_0"),
    "packed int8": (packed(0, bits=8), compressed("pack-quantized", num_bits=8, strategy="channel"), "Q8_0"),
    "packed float32 scales": (
        packed(64, dtype=torch.float32),
        compressed("pack-quantized", **INT4, group_size=64),
        None,
    ),
    "int8": (int8, compressed("int-quantized", num_bits=8, strategy="channel"), "Q8_0"),
    "float8": (float8("tensor"), {**FLOAT8, "activation_scheme": "static", "ignored_layers": ["lm_head"]}, None),
    "float8 row": (float8("channel"), {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, None),
    "float8 blocks": (float8("block"), {**FLOAT8, "weight_block_size": [64, 32]}, None),
    "float8 compressed": (
        float8("channel"),
        compressed("float-quantized", type="float", num_bits=8, strategy="channel"),
        None,
    ),
}  # fmt: skip


def write(
    made: Any, folder: Path, make: Callable[[Tensor], Quantized], config: dict[str, Any], skipped: tuple[str, ...] = ()
) -> Checkpoints:
    """`made` with its layers' linears quantized, but for those whose names hold one of `skipped`; what else it has as it is."""
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    if made.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, weight in list(state.items()):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not module.endswith("_proj") or any(part in module for part in skipped):
            tensors[name] = weight
            continue
        parts, state[name] = make(weight)
        tensors |= {f"{module}.{end}": part for end, part in parts.items()}
    made.load_state_dict(state, strict=False)
    plain = tiny.save(made, folder / "plain")
    quantized = folder / "quantized"
    quantized.mkdir()
    written = json.loads((plain / "config.json").read_text()) | {"quantization_config": config}
    (quantized / "config.json").write_text(json.dumps(written))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, quantized / "model.safetensors")
    return Checkpoints(quantized, plain)


def checkpoints(name: str, folder: Path, **changes: Any) -> Checkpoints:
    make, config, _ = FORMATS[name]
    return write(tiny.model(shape(**changes)), folder, make, config)
