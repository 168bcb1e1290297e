"""Every kernel compiles for a Hopper GPU, on a machine that has none: launches are compiled and not run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import act, law, linear, ngram_match, norm, quant_linear, reject, rope, sample, truncate, verify
from kernels.quant_weight import QuantWeight

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
BF16 = torch.bfloat16
ONE = 1


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The kernels compiled so far in this test. A launch compiles its kernel as it would be compiled for these arguments."""
    compiled: list[str] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = kernel.arg_names
        bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k in names}).arguments
        # As a launch does: 1 is compiled in, and so is that a number or an address can be divided by 16.
        fixed = {p.name for p in kernel.params if p.do_not_specialize}
        constant = {p.name for p in kernel.params if p.is_constexpr or (bound[p.name] is ONE and p.name not in fixed)}
        signature = {name: "constexpr" if name in constant else signed(value) for name, value in bound.items()}
        even = [i for i, name in enumerate(names) if name not in constant | fixed and divides(bound[name])]
        attributes = {(i,): [["tt.divisibility", 16]] for i in even}
        source = ASTSource(kernel, signature, {(names.index(name),): bound[name] for name in constant}, attributes)
        options = {k: v for k, v in kwargs.items() if k not in names}
        assert triton.compile(source, target=HOPPER, options=options).metadata.shared <= 227 << 10
        compiled.append(kernel.fn.__name__)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return compiled


def divides(value: object) -> bool:
    return isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)


def signed(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def doubles(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def layer() -> None:
    x, weight = torch.zeros(2, 80, dtype=BF16), torch.zeros(80, dtype=BF16)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)
    act.silu_mul(x)
    table = torch.zeros(2, 1, 20, dtype=BF16)
    rope.rope_(x.view(2, 4, 20), table, table)
    kv = torch.zeros(1, 2, 1, 16, 20, dtype=BF16)
    rope.rope_write_kv_(x, table, table, ints(2).long(), kv, ints(2).long(), 2)
    rope.rope_write_kv_(x, table, table, ints(2).long(), kv, ints(2).long(), 2, weight[:20], weight[:20], 1e-6)


def sampling() -> None:
    for dtype in (torch.float32, BF16):
        scores = torch.zeros(2, 5000, dtype=dtype)
        for splits in (1, 3):
            sample.gumbel_argmax(scores, ints(2), ints(2).bool(), ints(2).long(), ints(2), ints(2), ints(2), splits=splits)


def shaping() -> None:
    scores, penalty = torch.zeros(2, 5000), torch.zeros(2)
    law.edit_(scores, ints(3), ints(3), torch.zeros(3), torch.zeros(3), penalty, penalty, penalty)
    law.shape_scores(scores.to(BF16), penalty)
    law.shape_scores(scores, penalty, ints(1, 157), ints(2))
    for splits in (1, 2):
        truncate.truncate_(scores, ints(2), doubles(2), doubles(2), use_k=splits > 1, splits=splits)


def verifying() -> None:
    scores, seeds, start = torch.zeros(4, 5000), ints(4).long(), torch.tensor([0, 2, 4], dtype=torch.int32)
    for depth in (1, 2):
        verify.match_verify(scores, ints(4).bool(), seeds, ints(4), ints(4), ints(4), ints(4), start, 2, depth)
    trees = (ints(2), seeds[:2], ints(2), ints(2))
    kind = torch.zeros(4, dtype=torch.int8)
    for most in (1, 9):
        reject.recursive_verify(scores, scores, ints(4), kind, ints(4), ints(4), start, *trees, 2, 2, most_sampled=most)


def matching() -> None:
    for min_n, splits in ((1, 1), (2, 2)):
        ngram_match.ngram_draft(ints(2, 5000), ints(2), ints(2), 8, min_n, splits=splits)


def quantized() -> None:
    half, bias = torch.ones(64, 8, dtype=torch.float16), torch.zeros(64, dtype=BF16)
    weights = [
        QuantWeight(torch.zeros(64, 128, dtype=torch.uint8), half, 32, half),
        QuantWeight(torch.zeros(64, 128, dtype=torch.uint8), half, 32, None, 8),
        QuantWeight(torch.zeros(64, 256, dtype=torch.int8), half, 32),
        QuantWeight(torch.zeros(64, 256, dtype=torch.float8_e4m3fn), half[:, :1].contiguous(), 256),
    ]
    for weight in weights:
        quant_linear.linear(torch.zeros(2, 256, dtype=BF16), weight, bias, splits=2)
    quant_linear.linear(torch.zeros(64, 256, dtype=BF16), weights[0], bias)


def multiplying() -> None:
    for dtype, inputs in ((BF16, 256), (torch.float16, 200), (torch.float32, 256)):
        x, weight = torch.zeros(2, inputs, dtype=dtype), torch.zeros(64, inputs, dtype=dtype)
        for splits in (1, 2):
            linear.linear(x, weight, weight[:, 0].contiguous(), splits)


@pytest.mark.parametrize("use", [layer, multiplying, sampling, shaping, verifying, matching, quantized])
def test_it_compiles(use: Callable[[], None], launches: list[str]) -> None:
    use()
    assert launches
