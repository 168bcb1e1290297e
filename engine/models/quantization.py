"""How a Hugging Face checkpoint's linear layers are quantized: config.json's `quantization_config`. A leaf, as config.py is.

Read are AWQ ("gemm", 4 bits), GPTQ (4 bits), compressed-tensors' "pack-quantized", "int-quantized", "naive-quantized" and
"float-quantized" of 4 or 8 bits, and float8 as transformers, AutoFP8 and FBGEMM write it. Where a checkpoint would have
activations quantized too these stay as they are: weights alone are what this is about.
"""

from __future__ import annotations

import re
from math import gcd
from typing import Any, Literal

import msgspec

Layout = Literal["awq", "gptq", "packed", "int8", "float8"]


class Quantization(msgspec.Struct, frozen=True, kw_only=True):
    """group: inputs that share a scale, 0 for all of a row; block: outputs and inputs that do, instead. skipped: modules that are
    not quantized, each some whole components of a name, or "re:" and an expression for its beginning; only: the ends of the names
    of those that are, if not empty."""

    layout: Layout
    name: str  # for people
    bits: int
    group: int = 0
    block: tuple[int, int] | None = None
    zeros: bool = False  # numbers are counted from zeros that lie beside them
    stored_less: int = 1  # GPTQ: what its zeros are stored less by
    head: bool = False  # whether the LM head is quantized
    skipped: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: "AWQ, 4 bits, groups of 128"."""
        how = f", groups of {self.group}" if self.group else ""
        how = ", blocks of {} x {}".format(*self.block) if self.block else how
        return f"{self.name}, {self.bits} bits{how}"

    def packed_bytes(self, columns: int, blocks: bool) -> float | None:
        """Of one weight of a row of so many that is kept as it is, with its share of scales; None where it cannot be kept.

        blocks: in the native CPU kernels' blocks of 32 (engine/models/quantized.py), taking for granted that scales fit; else as
        kernels/quant_linear.py has it, with scales of 16 bits, float8's of 32.
        """
        if blocks:
            return 20 / 32 if self.bits == 4 else None if self.layout == "float8" or self.zeros else 34 / 32
        group = gcd(self.block[1], columns) if self.block else self.group or columns
        scale = (4 if self.layout == "float8" else 2) + (4 if self.zeros else 0)
        return self.bits / 8 + scale / group

    def covers(self, module: str) -> bool:
        """Whether the linear layer of this Hugging Face name is quantized."""
        if not (self.head if module == "lm_head" else re.search(r"\.(self_attn|mlp)\.[a-z]+_proj$", module)):
            return False
        if self.only and not module.endswith(self.only):
            return False
        return not any(_names(skipped, module) for skipped in self.skipped)


def read_quantization(config: dict[str, Any]) -> tuple[Quantization | None, str | None]:
    """What config.json says, and what of it cannot be read: the field and its value, in words."""
    given = config.get("quantization_config")
    if not given:
        return None, None
    if not isinstance(given, dict):
        return None, f"quantization_config: {given!r} is no object"
    method = given.get("quant_method")
    readers = {
        "awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "fp8": _float8, "fbgemm_fp8": _float8,
    }  # fmt: skip
    read = readers.get(method) if isinstance(method, str) else None
    if read is None:
        return None, f"quantization_config.quant_method: {method!r} weights are not read (only {', '.join(readers)})"
    try:
        return read(_Fields(given, "quantization_config")), None
    except Unreadable as error:
        return None, str(error)


class Unreadable(Exception):
    """A field that says what is not supported."""


class _Fields:
    """Checked access to an object within config.json; null counts as absent."""

    def __init__(self, values: Any, path: str) -> None:
        self.path = path
        if not isinstance(values, dict):
            raise Unreadable(f"{path}: {values!r} is no object")
        self.values: dict[str, Any] = values

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.get(key, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            known = ", ".join(repr(one) for one in allowed)
            raise Unreadable(f"{self.path}.{key}: {value!r} is not supported (only {known})")
        return value

    def group(self, key: str = "group_size") -> int:
        """Inputs in a group; 0 for all (-1 there)."""
        value = self.get(key)
        if value == -1:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value % 32:
            raise Unreadable(f"{self.path}.{key}: groups of {value!r} are not supported (only multiples of 32, and -1)")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.get(key, [])
        flat = (
            [name for part in value for name in (part if isinstance(part, list) else [part])] if isinstance(value, list) else None
        )
        if flat is None or any(not isinstance(name, str) or not name for name in flat):
            raise Unreadable(f"{self.path}.{key}: {value!r} is no list of names")
        return tuple(flat)

    def pair(self, key: str) -> tuple[int, int] | None:
        value = self.get(key)
        if value is None:
            return None
        sizes = value if isinstance(value, list) and len(value) == 2 else []
        if not sizes or any(not isinstance(n, int) or isinstance(n, bool) or n <= 0 for n in sizes) or sizes[1] % 32:
            raise Unreadable(f"{self.path}.{key}: blocks of {value!r} are not supported (only [outputs, a multiple of 32])")
        return sizes[0], sizes[1]

    def neither(self, *keys: str) -> None:
        for key in keys:
            if self.values.get(key):
                raise Unreadable(f"{self.path}.{key}: {self.values[key]!r} is not supported")


def _awq(fields: _Fields) -> Quantization:
    fields.one_of("bits", (4,))
    fields.one_of("zero_point", (True,), True)
    layout = fields.get("version", fields.get("format", "gemm"))
    if not isinstance(layout, str) or layout.lower() != "gemm":
        raise Unreadable(f"{fields.path}.version: {layout!r} is not supported (only 'gemm')")
    skipped = fields.names("modules_to_not_convert")
    return Quantization(layout="awq", name="AWQ", bits=4, group=fields.group(), zeros=True, skipped=skipped)


def _gptq(fields: _Fields) -> Quantization:
    fields.one_of("bits", (4,))
    fields.one_of("desc_act", (True, False), False)
    fields.neither("dynamic", "is_marlin_format")
    key = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
    stored = fields.one_of(key, ("gptq", "gptq_v2"), "gptq")
    only = fields.names("modules_in_block_to_quantize")
    head = fields.one_of("lm_head", (True, False), False)
    return Quantization(
        layout="gptq", name="GPTQ", bits=4, group=fields.group(), zeros=True,
        stored_less=int(stored == "gptq"), head=head, only=(*only, "lm_head") if only else (),
    )  # fmt: skip


def _float8(fields: _Fields) -> Quantization:
    fields.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    fields.one_of("scale_fmt", ("float",), "float")
    fields.one_of("fmt", ("e4m3",), "e4m3")
    fields.neither("modules_to_convert")
    skipped = fields.names("modules_to_not_convert") + fields.names("ignored_layers")
    return Quantization(layout="float8", name="float8", bits=8, block=fields.pair("weight_block_size"), skipped=skipped)


def _compressed(fields: _Fields) -> Quantization:
    sparsity = fields.get("sparsity_config")
    if sparsity and _Fields(sparsity, f"{fields.path}.sparsity_config").get("format", "dense") != "dense":
        raise Unreadable(f"{fields.path}.sparsity_config: sparse weights are not supported")
    fields.neither("transform_config")
    groups = _Fields(fields.get("config_groups"), f"{fields.path}.config_groups")
    if len(groups.values) != 1:
        raise Unreadable(f"{groups.path}: {len(groups.values)} groups are not supported (only one)")
    key, group = next(iter(groups.values.items()))
    scheme = _Fields(group, f"{groups.path}.{key}")
    scheme.one_of("targets", (["Linear"],))
    scheme.neither("output_activations")
    weights = _Fields(scheme.get("weights"), f"{scheme.path}.weights")
    layout = scheme.get("format") or fields.get("format")
    kind = weights.one_of("type", ("int", "float"), "int")
    skipped = fields.names("ignore")
    for name in skipped:
        _check_expression(name, fields)
    common: dict[str, Any] = {"name": f"compressed-tensors {kind}", "skipped": skipped, "head": True}
    if kind == "float":
        _only(layout, ("float-quantized", "naive-quantized"), fields)
        weights.one_of("num_bits", (8,))
        strategy = weights.one_of("strategy", ("tensor", "channel", "block"), "tensor")
        block = weights.pair("block_structure") if strategy == "block" else None
        return Quantization(layout="float8", bits=8, block=block, **common)
    _only(layout, ("pack-quantized", "int-quantized", "naive-quantized"), fields)
    packed = layout == "pack-quantized"
    bits = weights.one_of("num_bits", (4, 8) if packed else (8,))
    weights.one_of("actorder", ("weight", "static", False), False)
    zeros = not weights.one_of("symmetric", (True, False), True)
    given = weights.get("group_size")
    usual = "tensor" if given is None else "channel" if given == -1 else "group"
    strategy = weights.one_of("strategy", ("channel", "group") if zeros else ("tensor", "channel", "group"), usual)
    size = weights.group() if strategy == "group" else 0
    return Quantization(layout="packed" if packed else "int8", bits=bits, group=size, zeros=zeros, **common)


def _only(layout: Any, allowed: tuple[str, ...], fields: _Fields) -> None:
    if layout not in allowed:
        raise Unreadable(f"{fields.path}.format: {layout!r} is not supported (only {', '.join(allowed)})")


def _check_expression(name: str, fields: _Fields) -> None:
    try:
        re.compile(name.removeprefix("re:"))
    except re.error as error:
        raise Unreadable(f"{fields.path}.ignore: {name!r} is no regular expression: {error}") from None


def _names(skipped: str, module: str) -> bool:
    if skipped.startswith("re:"):
        return re.match(skipped.removeprefix("re:"), module) is not None
    return f".{skipped}." in f".{module}."
