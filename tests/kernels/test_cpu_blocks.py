"""Four- and eight-bit weights in the native kernels: the bits that their dequantized bf16 weights give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.gguf_file import TENSOR_TYPES
from engine.models.quantized import Q4_Z, Blocks
from kernels.cpu.build import Unavailable, library
from kernels.cpu.native import Kind, Panels, Sink, Threads, pack, pack_blocks, pad_bias

try:
    library()
except Unavailable as unavailable:
    pytest.skip(f"no native kernels here: {unavailable}", allow_module_level=True)

KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0, Kind.Q4_Z]
IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()} | {"Q4_Z": Q4_Z}
HALVES = {Kind.Q4_0: 1, Kind.Q4_1: 2, Kind.Q8_0: 1, Kind.Q4_Z: 2}  # float16 at the beginning of a block
# zeros of both signs, the smallest and largest denormals, the smallest normal, 1 / 3, the largest
EXTREMES = np.array([0, -0.0, 2**-24, -(2**-24), 1023 * 2**-24, 2**-14, 1 / 3, -1 / 3, 65504, -65504], dtype=np.float16)


@pytest.fixture(scope="module", params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Threads:
    return Threads(request.param)


def blocks(kind: Kind, size: int, inner: int, scale: str = "usual", seed: int = 0) -> NDArray[np.uint8]:
    """Random numbers under random scales, [N, bytes of a row]."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (size * inner // 32, kind.block_bytes), dtype=np.uint8)
    shape = (len(made), HALVES[kind])
    halves: NDArray[np.generic]
    if scale == "usual":
        halves = (rng.standard_normal(shape) / inner).astype(np.float16)
    elif scale == "extreme":
        halves = rng.choice(EXTREMES, shape)
    else:  # every finite float16
        halves = rng.integers(0, 0x7C00, shape, dtype=np.uint16) | rng.integers(0, 2, shape, dtype=np.uint16) << 15
    if kind is Kind.Q4_Z:
        halves[:, 1] = rng.integers(0, 17, len(made)).astype(np.float16).view(halves.dtype)
    made[:, : 2 * HALVES[kind]] = np.ascontiguousarray(halves).view(np.uint8)
    return made.reshape(size, -1)


def plain(kind: Kind, raw: NDArray[np.uint8]) -> torch.Tensor:
    return Blocks(raw, IDS[kind.name]).dequantize()


def product(threads: Threads, x: torch.Tensor, weight: Panels, size: int, sink: Sink = Sink.STORE) -> torch.Tensor:
    bias = pad_bias(torch.linspace(-1, 1, size))
    out = torch.ones(len(x), size // 2, dtype=torch.bfloat16) if sink is Sink.SILU_MUL else torch.ones(len(x), size)
    threads.linear(x, weight, size, bias, sink, out)
    return out


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    kind = torch.int32 if one.dtype == torch.float32 else torch.int16
    return torch.equal(one.view(kind), other.view(kind))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 12, 13, 25, 40])
@pytest.mark.parametrize(("size", "inner"), [(111, 64), (96, 576), (1, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dequantized_weight(kind: Kind, size: int, inner: int, rows: int, threads: Threads) -> None:
    torch.manual_seed(rows)
    x, raw = torch.randn(rows, inner).to(torch.bfloat16), blocks(kind, size, inner)
    packed, usual = pack_blocks(kind, raw), pack(plain(kind, raw))
    for sink in (Sink.STORE, Sink.ADD):
        assert same_bits(product(threads, x, packed, size, sink), product(threads, x, usual, size, sink))


@pytest.mark.parametrize("rows", [1, 4, 7, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_up_are_those_of_the_dequantized_weights(kind: Kind, rows: int, threads: Threads) -> None:
    torch.manual_seed(rows)
    x, (gate, up) = torch.randn(rows, 64).to(torch.bfloat16), (blocks(kind, 48, 64, seed=seed) for seed in (1, 2))
    packed, usual = pack_blocks(kind, gate, up), pack(plain(kind, gate), plain(kind, up))
    assert same_bits(product(threads, x, packed, 96, Sink.SILU_MUL), product(threads, x, usual, 96, Sink.SILU_MUL))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("scale", ["extreme", "any"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_its_dequantized_self_whatever_the_scale(kind: Kind, scale: str, rows: int) -> None:
    """A unit vector picks one weight out of each output's sum."""
    raw, threads = blocks(kind, 512, 64, scale), Threads(1)
    weight, packed = plain(kind, raw), pack_blocks(kind, raw)
    assert weight.isfinite().all()
    for first in range(0, 64, rows):
        picks = torch.arange(first, first + rows) % 64
        out = torch.empty(rows, 512)
        threads.linear(torch.eye(64, dtype=torch.bfloat16)[picks].contiguous(), packed, 512, None, Sink.STORE, out)
        assert torch.equal(out, weight[:, picks].T.float())


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_scale_is_nan_or_infinite_where_it_is_today(kind: Kind) -> None:
    raw, x = blocks(kind, 64, 64), torch.ones(5, 64, dtype=torch.bfloat16)
    raw[3, :2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    for rows in (1, 5):
        found, usual = (product(Threads(1), x[:rows], weight, 64) for weight in (pack_blocks(kind, raw), pack(plain(kind, raw))))
        torch.testing.assert_close(found, usual, rtol=0, atol=0, equal_nan=True)
        assert not found[:, 3].isfinite().any() and found[:, :3].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_product_is_the_same_bits_in_any_company(kind: Kind, threads: Threads) -> None:
    torch.manual_seed(0)
    x, packed = torch.randn(40, 1536).to(torch.bfloat16), pack_blocks(kind, blocks(kind, 96, 1536))
    whole = product(threads, x, packed, 96)
    for first, count in [(0, 1), (3, 2), (5, 3), (7, 4), (9, 5), (13, 12), (20, 20), (39, 1)]:
        assert same_bits(product(threads, x[first : first + count], packed, 96), whole[first : first + count])


def test_they_are_as_small_as_in_the_file() -> None:
    sizes = {kind: pack_blocks(kind, blocks(kind, 64, 64)).data.nbytes * 8 / 64 / 64 for kind in KINDS}
    assert sizes == {Kind.Q4_0: 5, Kind.Q4_1: 5, Kind.Q8_0: 8.5, Kind.Q4_Z: 5}


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="no Q4_1 blocks"):
        pack_blocks(Kind.Q4_1, np.zeros((32, 18), dtype=np.uint8))
    with pytest.raises(ValueError, match="not as many"):
        pack_blocks(Kind.Q4_1, np.zeros((32, 20), dtype=np.uint8), np.zeros((16, 20), dtype=np.uint8))
