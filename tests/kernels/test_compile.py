"""The cache and attention kernels compile for a Hopper GPU, on any machine: the interpreter is less strict than a compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.commit_kv import _commit_kv
from kernels.copy_blocks import _copy_blocks
from kernels.tree_attention import _attend, _merge, _tile
from kernels.tree_mask import _tree_mask
from kernels.write_kv import _write_kv

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 << 10  # bytes that one program may have
POINTERS = {
    "tables": "*i32",
    "cu_q": "*i32",
    "context_lens": "*i32",
    "roots": "*i32",
    "positions": "*i64",
    "words": "*i32",
    "paths": "*i32",
    "kv_scale": "*fp32",
    "told": "*i32",
    "partial": "*fp32",
    "lse": "*fp32",
    "slots": "*i64",
    "source": "*i64",
    "target": "*i64",
    "parent": "*i32",
    "start": "*i32",
    "depth": "*i32",
    "scale": "fp32",
    "soft_cap": "fp32",
}
STRIDES = ("kv_", "q_", "new_")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int = 4, stages: int = 3) -> Any:
    signature, constexprs, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], constexprs[(index,)] = "constexpr", constants[name]
            continue
        signature[name] = (POINTERS | types).get(name, "i32")
        if signature[name].startswith("*") or name.startswith(STRIDES):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    found = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages})
    assert found.asm["cubin"] and found.metadata.shared <= SHARED
    return found


@pytest.mark.parametrize(
    ("dtype", "size", "per_head", "rows", "flags"),
    [
        ("bf16", 128, 4, 1, {}),
        ("bf16", 64, 3, 17, {"TREE": True}),
        ("bf16", 80, 1, 500, {"TREE": True, "WINDOW": True}),
        ("fp16", 256, 2, 40, {"TREE": True, "CAP": True, "WINDOW": True}),
        ("bf16", 128, 4, 1, {"TREE": True, "FIXED": True}),
        ("bf16", 96, 1, 16, {"SCALED": True, "TREE": True}),
        ("fp32", 64, 3, 20, {"TREE": True}),
        ("bf16", 128, 4, 8, {"TREE": True, "TOLD": True}),
    ],
)
def test_attention(dtype: str, size: int, per_head: int, rows: int, flags: dict[str, bool]) -> None:
    off = dict.fromkeys(("FIXED", "TREE", "WINDOW", "CAP", "SCALED", "WIDE", "TOLD"), False)
    tile = _tile(rows * per_head, per_head, size, dtype == "fp32", "FIXED" in flags)
    block = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "BLOCK_D": triton.next_power_of_2(size)}
    shape = {"H": 2 * per_head, "G": per_head, "S": 16, "D": size, "SPLIT": True}
    types = dict.fromkeys(("q", "kv", "out"), f"*{dtype}") | ({"kv": "*fp8e4nv"} if "SCALED" in flags else {})
    found = compiled(_attend, off | flags | block | shape, types, tile.warps, tile.stages)
    if dtype != "fp32":
        assert ("wgmma.mma_async" if tile.rows >= 64 else "mma.sync") in found.asm["ptx"]
        assert "cp.async" in found.asm["ptx"]  # keys come in while others are worked on


@pytest.mark.parametrize("told", [False, True])
def test_merge(told: bool) -> None:
    compiled(_merge, {"D": 80, "BLOCK_D": 128, "PARTS": 128, "TOLD": told}, {"out": "*bf16"}, warps=1)


@pytest.mark.parametrize(("dtype", "scaled"), [("bf16", False), ("fp8e4nv", True)])
def test_cache_writes(dtype: str, scaled: bool) -> None:
    most = torch.finfo(torch.float8_e4m3fn).max
    constants = {"MOST": most, "K": 3, "S": 16, "D": 80, "HEADS": 8, "BLOCK": 128, "SCALED": scaled}
    compiled(_write_kv, constants, {"kv": f"*{dtype}", "new": "*bf16"})


@pytest.mark.parametrize(("rows", "strip"), [(16, 128), (2048, 8)])
def test_packing_reads_before_it_writes(rows: int, strip: int) -> None:
    constants = {"K": 8, "S": 16, "D": 128, "ROWS": rows, "STRIP": strip}
    lines = compiled(_commit_kv, constants, {"kv": "*bf16"}, warps=8 if rows > 16 else 4).asm["ptx"].splitlines()
    loads, stores, barriers = (
        [at for at, line in enumerate(lines) if what in line] for what in ("ld.global", "st.global", "bar.sync")
    )
    assert any(max(loads) < barrier < min(stores) for barrier in barriers)


def test_copies_and_masks() -> None:
    compiled(_copy_blocks, {"SIZE": 32768, "TILE": 4096}, {"kv": "*bf16"}, warps=8)
    compiled(_tree_mask, {"NODES": 32, "WORDS": 16}, {"words": "*i32"}, warps=1)
