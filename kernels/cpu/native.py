"""The native kernels as Python sees them: tensors in, tensors out. Everything bf16 is torch.bfloat16, on the CPU.

A tensor handed to C must stay alive while C holds its address: `Decoder` keeps what it was built from.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.cpu.build import library

PANEL, MOST_TOP = 32, 64
BLOCK = 32  # inputs that share a scale
NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")
LINEARS = ("qkv", "out", "gate_up", "down")
BIASES = ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")


class Kind(IntEnum):
    """What a packed weight's numbers are: bf16, or the 32-input blocks of GGUF's types of these names.

    Q4_Z is ours: as Q4_1, but with the number that zero is (up to five bits, as a float16) in the place of the offset.
    """

    BF16 = 0
    Q4_0 = 1
    Q4_1 = 2
    Q8_0 = 3
    Q4_Z = 4

    @property
    def block_bytes(self) -> int:
        """Of 32 inputs of one output, in a file."""
        return {Kind.BF16: 64, Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q8_0: 34, Kind.Q4_Z: 20}[self]

    @property
    def packed_bytes(self) -> int:
        """Of 32 inputs of one output, in panels."""
        return 20 if self is Kind.Q4_0 else self.block_bytes


class Sink(IntEnum):
    """What becomes of a product."""

    STORE = 0
    ADD = 1
    SILU_MUL = 2


class _Batch(Structure):
    _fields_ = (
        ("T", c_int),
        ("B", c_int),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("first", c_void_p),
        ("context", c_void_p),
        ("tables", c_void_p),
        ("table_first", c_void_p),
        ("trees", c_void_p),
        ("tree_first", c_void_p),
    )


class _Attention(Structure):
    _fields_ = (
        ("kv", c_void_p),
        ("heads", c_int),
        ("kv_heads", c_int),
        ("size", c_int),
        ("block", c_int),
        ("window", c_int),
        ("scale", c_float),
    )


class _Weight(Structure):
    _fields_ = (("data", c_void_p), ("kind", c_int64))


class _Layer(Structure):
    _fields_ = (
        *((name, c_void_p) for name in NORMS),
        *((name, _Weight) for name in LINEARS),
        *((name, c_void_p) for name in BIASES),
    )


class _Model(Structure):
    _fields_ = (
        ("hidden", c_int),
        ("heads", c_int),
        ("kv_heads", c_int),
        ("size", c_int),
        ("inner", c_int),
        ("vocab", c_int),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("head", _Weight),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("window", c_int),
        ("block", c_int),
        ("scale", c_float),
    )


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [N, K] in panels of 32 outputs. data: bf16 [N padded, K], or uint8 [N padded, bytes of K inputs] (blocks.h)."""

    data: Tensor
    kind: Kind

    def struct(self) -> _Weight:
        return _Weight(self.data.data_ptr(), int(self.kind))


@dataclass(slots=True)
class Rows:
    """One step's rows: T of them, of B sequences, sequence after sequence (engine/models/batch.py says what each field is)."""

    tokens: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    slots: NDArray[np.int64]  # [T]
    first: NDArray[np.int32]  # [B + 1]
    context: NDArray[np.int32]  # [B]
    tables: NDArray[np.int32]  # the block tables, one after the other
    table_first: NDArray[np.int32]  # [B]
    trees: NDArray[np.uint8]  # visibility among one sequence's rows, [rows, rows] each
    tree_first: NDArray[np.int64]  # [B]; -1: causal

    def struct(self) -> _Batch:
        pointers = (
            *(self.tokens, self.positions, self.slots, self.first, self.context),
            *(self.tables, self.table_first, self.trees, self.tree_first),
        )
        return _Batch(len(self.tokens), len(self.context), *(array.ctypes.data for array in pointers))


class Threads:
    """A team of threads and its buffers; one step at a time. Raises MemoryError, or build.Unavailable."""

    def __init__(self, count: int) -> None:
        self.lib = _library()
        self.handle = self.lib.outrider_context(count)
        if not self.handle:
            raise MemoryError("the kernels' threads could not be started")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.lib.outrider_context_free(self.handle)
            self.handle = None

    def linear(self, x: Tensor, weight: Panels, size: int, bias: Tensor | None, sink: Sink, out: Tensor) -> None:
        """x [M, K] times a packed weight of `size` outputs; out float32 [M, N], or bf16 [M, N / 2] for SILU_MUL."""
        sizes, weights = (len(x), size, x.shape[1]), byref(weight.struct())
        if self.lib.outrider_linear(self.handle, x.data_ptr(), weights, _pointer(bias), out.data_ptr(), int(sink), *sizes):
            raise MemoryError(f"no memory for a panel of {x.shape[1]} inputs")

    def attention(self, q: Tensor, kv: Tensor, rows: Rows, scale: float, window: int | None = None) -> Tensor:
        """q [T, H, D] rotated, kv [blocks, 2, K, block size, D] with the rows' own keys in it -> [T, H, D]."""
        _, _, kv_heads, block, size = kv.shape
        out = torch.empty_like(q)
        attention = _Attention(kv.data_ptr(), q.shape[1], kv_heads, size, block, window or 0, scale)
        self.lib.outrider_attention(self.handle, byref(attention), byref(rows.struct()), q.data_ptr(), out.data_ptr())
        return out


def pack(weight: Tensor, other: Tensor | None = None) -> Panels:
    """weight [N, K] bf16 in panels of 32 outputs; with `other` [N, K]: panels of 16 rows of each (gate and up). K even."""
    size, inner = weight.shape
    height = 2 * size if other is not None else size
    panels = torch.empty(-(-height // PANEL) * PANEL, inner, dtype=torch.bfloat16)
    weight = weight.contiguous()
    other = other.contiguous() if other is not None else None
    _library().outrider_pack(weight.data_ptr(), _pointer(other), panels.data_ptr(), size, inner)
    return Panels(panels, Kind.BF16)


def pack_blocks(kind: Kind, weight: NDArray[np.uint8], other: NDArray[np.uint8] | None = None) -> Panels:
    """As `pack`, of a file's blocks: weight [N, K / 32 * block bytes], C-contiguous.

    Raises ValueError for rows that are not whole blocks, or two weights of unequal shapes.
    """
    size, width = weight.shape
    inner, rest = divmod(width, kind.block_bytes)
    if kind is Kind.BF16 or rest or (other is not None and other.shape != weight.shape):
        raise ValueError(f"rows of {width} bytes are no {kind.name} blocks, or not as many as the other weight's")
    weight, other = np.ascontiguousarray(weight), None if other is None else np.ascontiguousarray(other)
    height = 2 * size if other is not None else size
    panels = torch.empty(-(-height // PANEL) * PANEL, inner * kind.packed_bytes, dtype=torch.uint8)
    beside = None if other is None else other.ctypes.data
    _library().outrider_pack_blocks(weight.ctypes.data, beside, panels.data_ptr(), int(kind), size, inner * BLOCK)
    return Panels(panels, kind)


def pad_bias(bias: Tensor) -> Tensor:
    """bias [N] as float32, to whole panels."""
    padded = torch.zeros(-(-len(bias) // PANEL) * PANEL)
    padded[: len(bias)] = bias.float()
    return padded


@dataclass(slots=True)
class LayerWeights:
    """One layer: packed linears, float32 norms and biases (`pad_bias`)."""

    input_norm: Tensor
    post_norm: Tensor
    qkv: Panels
    out: Panels
    gate_up: Panels
    down: Panels
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    qkv_bias: Tensor | None = None
    out_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def struct(self) -> _Layer:
        return _Layer(
            *(_pointer(getattr(self, name)) for name in NORMS),
            *(getattr(self, name).struct() for name in LINEARS),
            *(_pointer(getattr(self, name)) for name in BIASES),
        )

    @property
    def nbytes(self) -> int:
        vectors = (getattr(self, name) for name in (*NORMS, *BIASES))
        linears = sum(getattr(self, name).data.nbytes for name in LINEARS)
        return linears + sum(vector.nbytes for vector in vectors if vector is not None)


@dataclass(slots=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    size: int  # of a head
    inner: int
    vocab: int
    eps: float
    window: int  # 0: none
    block: int  # tokens in a KV block
    scale: float

    @property
    def unsupported(self) -> str | None:
        """Why the kernels cannot run this shape; None when they can."""
        if self.size % 32 or self.size > 256:
            return f"heads of {self.size}"
        if self.hidden % 16 or self.inner % 16:
            return f"sizes of {self.hidden} and {self.inner}"
        if self.heads // self.kv_heads > 32:
            return f"{self.heads // self.kv_heads} query heads to a key head"
        return None


@dataclass(slots=True)
class Decoder:
    """A whole model in one call. cos, sin [positions, D / 2] float32; head packed [V, C]; embedding [V, C] unless tied."""

    threads: Threads
    shape: Shape
    layers: list[LayerWeights]
    norm: Tensor
    head: Panels
    embedding: Tensor | None
    cos: Tensor
    sin: Tensor
    _layers: ctypes.Array[_Layer] = field(init=False)
    _model: _Model = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        self._layers = (_Layer * len(self.layers))(*(layer.struct() for layer in self.layers))
        pointers = (_pointer(self.cos), _pointer(self.sin), self.head.struct(), _pointer(self.embedding), _pointer(self.norm))
        sizes = (s.hidden, s.heads, s.kv_heads, s.size, s.inner, s.vocab)
        self._model = _Model(*sizes, s.eps, *pointers, s.window, s.block, s.scale)

    @property
    def nbytes(self) -> int:
        """Of all weights as they are held."""
        rest = self.head.data.nbytes + self.norm.nbytes + (0 if self.embedding is None else self.embedding.nbytes)
        return rest + sum(layer.nbytes for layer in self.layers)

    def forward(self, rows: Rows, kv: Tensor, x: Tensor | None = None, begin: int = 0, end: int | None = None) -> Tensor:
        """Layers begin ... end of a step; kv [layers, blocks, 2, K, block size, D] is written.

        x [T, C] float32 is changed in place and returned; None: the rows' tokens are embedded first.
        """
        embed = x is None
        if x is None:
            x = torch.empty(len(rows.tokens), self.shape.hidden)
        last = len(self.layers) if end is None else end
        arguments = (byref(self._model), self._layers, byref(rows.struct()), x.data_ptr(), kv.data_ptr(), kv.stride(0))
        if self.threads.lib.outrider_forward(self.threads.handle, *arguments, begin, last, int(embed)):
            raise MemoryError(f"no memory for the buffers of {len(rows.tokens)} rows")
        return x

    def logits(self, x: Tensor, rows: NDArray[np.int64], out: Tensor, peaks: Tensor) -> Tensor:
        """out [R, V] float32: the logits of rows [R] of the hidden states x [T, C]; peaks [R, panels]: for `top`."""
        handle, count = self.threads.handle, len(rows)
        arguments = (byref(self._model), x.data_ptr(), rows.ctypes.data, count, out.data_ptr(), peaks.data_ptr())
        if count and self.threads.lib.outrider_logits(handle, *arguments):
            raise MemoryError(f"no memory for the buffers of {count} rows")
        return out


def move(kv: Tensor, pairs: list[tuple[int, int]]) -> None:
    """Copy slots of kv [layers, blocks, 2, K, block size, D], 16 bits each: (from, to), one after the other."""
    _, _, _, heads, block, size = kv.shape
    flat = np.array(pairs, dtype=np.int64)
    _library().outrider_move(kv.data_ptr(), len(kv), kv.stride(0), heads, block, size, flat.ctypes.data, len(pairs))


def panels(size: int) -> int:
    return -(-size // PANEL)


def top(logits: Tensor, peaks: Tensor, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """ids and values [R, k] of the k largest of each row of logits [R, V] float32, of equals the lower id first.

    peaks [R, panels]: the largest of each 32, as `Decoder.logits` leaves them. A row that holds NaN has NaN for values.
    Raises ValueError for a k that is not among 1 ... min(V, MOST_TOP).
    """
    count, size = logits.shape
    if not 1 <= k <= min(size, MOST_TOP):
        raise ValueError(f"the {k} largest of {size} logits: between 1 and {min(size, MOST_TOP)} can be found")
    ids, values = np.empty((count, k), dtype=np.int32), np.empty((count, k), dtype=np.float32)
    _library().outrider_top(logits.data_ptr(), peaks.data_ptr(), count, size, k, ids.ctypes.data, values.ctypes.data)
    return ids, values


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _library() -> ctypes.CDLL:
    lib = library()
    if lib.outrider_context.restype is not c_void_p:
        lib.outrider_context.restype = c_void_p
        lib.outrider_context.argtypes = [c_int]
        lib.outrider_context_free.argtypes = [c_void_p]
        model, layer, batch = POINTER(_Model), POINTER(_Layer), POINTER(_Batch)
        lib.outrider_forward.argtypes = [c_void_p, model, layer, batch, c_void_p, c_void_p, c_int64, c_int, c_int, c_int]
        lib.outrider_logits.argtypes = [c_void_p, model, c_void_p, c_void_p, c_int, c_void_p, c_void_p]
        lib.outrider_top.argtypes = [c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p]
        lib.outrider_top.restype = None
        lib.outrider_move.argtypes = [c_void_p, c_int, c_int64, c_int, c_int, c_int, c_void_p, c_int]
        lib.outrider_move.restype = None
        lib.outrider_pack.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int]
        lib.outrider_pack_blocks.argtypes = [c_void_p, c_void_p, c_void_p, c_int, c_int, c_int]
        lib.outrider_pack_blocks.restype = None
        lib.outrider_linear.argtypes = [c_void_p, c_void_p, POINTER(_Weight), c_void_p, c_void_p, c_int, c_int, c_int, c_int]
        lib.outrider_attention.argtypes = [c_void_p, POINTER(_Attention), batch, c_void_p, c_void_p]
        lib.outrider_pack.restype = None
        lib.outrider_attention.restype = None
        lib.outrider_context_free.restype = None
    return lib
