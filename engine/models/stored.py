"""Which tensors lie in a Llama-family checkpoint's files, quantized or not: names, shapes and types, the table files are checked
against. And what becomes of a quantized module's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.quantization import Quantization
from engine.models.shapes import expected_shapes
from kernels.quant_rows import from_float8, from_int8, from_packed
from kernels.quant_weight import RUN, QuantWeight, from_awq, from_gptq, gptq_values

FLOATS = ("BF16", "F16", "F32")
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: any of `shapes`, any of `types` (safetensors' names for them)."""

    shapes: tuple[Shape, ...]
    types: tuple[str, ...] = FLOATS
    optional: bool = False


def stored_tensors(config: ModelConfig) -> dict[str, Stored]:
    """By Hugging Face name, the scale of float8 always as `weight_scale`. Raises ValueError for what cannot be quantized so."""
    found: dict[str, Stored] = {}
    for name, shape in expected_shapes(config).items():
        module, _, kind = name.rpartition(".")
        if config.quantization is None or kind != "weight" or not config.quantization.covers(module):
            found[name] = Stored((shape,))
            continue
        rows, columns = shape
        for suffix, stored in _parts(config.quantization, module, rows, columns).items():
            found[f"{module}.{suffix}"] = stored
    return found


def stored_name(name: str, quantization: Quantization | None) -> str | None:
    """A file's name for a tensor as `stored_tensors` has it; None for what says how activations or caches are to be quantized."""
    if quantization is None:
        return name
    module, _, kind = name.rpartition(".")
    if kind in ("input_scale", "input_zero_point", "k_scale", "v_scale", "q_scale", "input_scale_ub"):
        return None
    return f"{module}.weight_scale" if kind == "weight_scale_inv" else name


def _parts(quantization: Quantization, module: str, rows: int, columns: int) -> dict[str, Stored]:
    group = quantization.group or columns
    if columns % group or columns % RUN or rows % 8:
        raise ValueError(f"quantization_config: {module}'s {rows} x {columns} weights are not whole groups of {group}")
    groups = columns // group
    words, scales = ("I32",), Stored(((groups, rows),))
    if quantization.layout == "awq":
        zeros = Stored(((groups, rows // 8),), words)
        return {"qweight": Stored(((columns, rows // 8),), words), "qzeros": zeros, "scales": scales}
    if quantization.layout == "gptq":
        zeros, order = Stored(((groups, rows // 8),), words), Stored(((columns,),), words, optional=True)
        return {"qweight": Stored(((columns // 8, rows),), words), "qzeros": zeros, "scales": scales, "g_idx": order}
    count = 32 // quantization.bits
    of_row: tuple[Shape, ...] = ((rows, groups),) if quantization.group else ((rows, 1), (rows,), (1,), (), (1, 1))
    optional = not quantization.zeros
    if quantization.layout == "packed":
        return {
            "weight_packed": Stored(((rows, columns // count),), words),
            "weight_scale": Stored(of_row),
            "weight_shape": Stored(((2,),), ("I64", "I32"), optional=True),
            "weight_zero_point": Stored(((rows // count, groups),), words, optional),
        }
    if quantization.layout == "int8":
        zeros = Stored(of_row, ("I8", "I32", "I64"), optional)
        return {"weight": Stored(((rows, columns),), ("I8",)), "weight_scale": Stored(of_row), "weight_zero_point": zeros}
    if quantization.block is not None:
        high, wide = quantization.block
        of_row = ((-(-rows // high), -(-columns // wide)),)
    return {"weight": Stored(((rows, columns),), ("F8_E4M3",)), "weight_scale": Stored(of_row)}


def assemble(quantization: Quantization, parts: dict[str, Tensor], dtype: torch.dtype) -> QuantWeight | Tensor:
    """A module's weight from its tensors, by what their names end with. A plain tensor of `dtype` where a GPTQ checkpoint's
    groups are out of order. Raises ValueError for numbers that are damaged."""
    for name, part in parts.items():
        if part.is_floating_point() and not bool(part.float().isfinite().all()):
            raise ValueError(f"{name} holds numbers that are not finite")
    if quantization.layout == "awq":
        return from_awq(parts["qweight"], parts["qzeros"], parts["scales"])
    if quantization.layout == "gptq":
        return _gptq(quantization, parts, dtype)
    scales, zeros = parts["weight_scale"], parts.get("weight_zero_point")
    if quantization.layout == "float8":
        return from_float8(parts["weight"], scales, quantization.block)
    if quantization.layout == "int8":
        return from_int8(parts["weight"], scales, zeros)
    words = parts["weight_packed"]
    shape = [len(words), words.shape[1] * 32 // quantization.bits]
    if (said := parts.get("weight_shape")) is not None and said.tolist() != shape:
        raise ValueError(f"weight_shape says {said.tolist()}, the config {shape}")
    return from_packed(words, scales, quantization.bits, zeros)


def _gptq(quantization: Quantization, parts: dict[str, Tensor], dtype: torch.dtype) -> QuantWeight | Tensor:
    tensors, order, less = (parts["qweight"], parts["qzeros"], parts["scales"]), parts.get("g_idx"), quantization.stored_less
    if order is None or torch.equal(
        order.long(), torch.arange(len(order), device=order.device) // (quantization.group or len(order))
    ):
        return from_gptq(*tensors, None, less)
    try:
        return gptq_values(*tensors, order, less).to(dtype)
    except ValueError as error:
        raise ValueError(f"g_idx names {error}") from None
