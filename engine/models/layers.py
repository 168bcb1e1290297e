"""The decoder's parts. A linear layer knows the fastest form of its weight on its device; nothing above asks which."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.batch import padded_rows
from engine.parallel import Group
from kernels.interpreter import interpreted
from kernels.quant_weight import QuantWeight


class Linear:
    """y = x W^T + b, with an optional addend. On a CPU the weight [out, in] is kept in oneDNN's own blocked layout.

    A 576 x 1536 bf16 weight out of cache costs 76-95 us with F.linear and 37-49 us prepacked; 8 rows cost 1.2-1.5x one row.

    A row's result is bit for bit the same however many rows share the call (oneDNN 3.12, bf16 and float32, 1 to 512 rows), with
    one exception: a single row of more than 1,024 inputs takes another kernel. Such a row is doubled.

    A quantized weight stays as it is, and kernels/quant_linear.py multiplies with it.
    """

    MAX_SINGLE_ROW = 1024  # inputs

    def __init__(self, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.quantized = weight if isinstance(weight, QuantWeight) else None
        self._product: Callable[[Tensor], Tensor] | None = None
        if isinstance(weight, QuantWeight):
            self.out_features, self.in_features = weight.out_features, weight.in_features
            self.packed = self.doubled = False
            self._product = _times(weight, bias)
            return
        self.out_features, self.in_features = weight.shape
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None) if self.packed else weight
        self.doubled = self.in_features > self.MAX_SINGLE_ROW

    def fix_order(self) -> None:
        """From now on Triton multiplies in one order of sums: a row's bits are the same in any company, on a GPU too."""
        from kernels.linear import linear  # imports triton, which a CPU can do without

        if self.quantized is not None:
            self._product = _times(self.quantized, self.bias, fixed=True)
            return
        self.weight, self.packed = self.weight.to_dense() if self.packed else self.weight, False
        self._product = lambda x: linear(x, self.weight, self.bias)

    def warm_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what any number of rows may need of our own kernels."""
        if self._product is None:
            return
        from kernels.quant_linear import LEAST_ROWS, MOST_ROWS

        rows = LEAST_ROWS
        while rows <= MOST_ROWS:
            self(torch.zeros(rows, self.in_features, dtype=dtype, device=device))
            rows *= 2

    def __call__(self, x: Tensor) -> Tensor:
        if self._product is not None:
            with launching(x.device):
                return self._product(x)
        if self.packed:
            if self.doubled and len(x) == 1:
                return torch.ops.mkldnn._linear_pointwise(torch.cat((x, x)), self.weight, self.bias, "none", [], "")[:1]
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def whole(self, x: Tensor) -> Tensor:
        """What `add_to` adds."""
        return self(x)

    def add_to(self, x: Tensor, addend: Tensor) -> Tensor:
        """addend + linear(x); one kernel where the weight is packed."""
        if self.packed:
            if self.doubled and len(x) == 1:
                x, addend = torch.cat((x, x)), torch.cat((addend, addend))
                return torch.ops.mkldnn._linear_pointwise.binary(x, addend, self.weight, self.bias, "add")[:1]
            return torch.ops.mkldnn._linear_pointwise.binary(x, addend, self.weight, self.bias, "add")
        return self(x).add_(addend)


def _times(weight: QuantWeight, bias: Tensor | None, fixed: bool = False) -> Callable[[Tensor], Tensor]:
    from kernels.quant_linear import linear  # imports triton, which a CPU can do without

    return partial(linear, weight=weight, bias=bias, fixed=fixed)


class SplitLinear(Linear):
    """A linear whose inputs are split over the ranks: what it gives is the sum of all of theirs."""

    def __init__(self, weight: Tensor | QuantWeight, bias: Tensor | None, group: Group) -> None:
        super().__init__(weight, bias)
        self._group = group

    def whole(self, x: Tensor) -> Tensor:
        return self._group.reduce(self(x))

    def add_to(self, x: Tensor, addend: Tensor) -> Tensor:
        return self.whole(x).add_(addend)


class QuantEmbedding:
    """Rows of a quantized weight [V, C], of which only those that are looked up are unpacked."""

    def __init__(self, rows: QuantWeight, dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype

    def __len__(self) -> int:
        return self.rows.out_features

    def index_select(self, dim: int, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, C]; dim is 0."""
        return self.rows.rows(token_ids).dequantize(self.dtype)


class SplitEmbedding:
    """A rank's range of the embedding's rows; the row of a token comes from the one rank that has it, the others add zeros."""

    def __init__(self, rows: Tensor | QuantEmbedding, first: int, group: Group) -> None:
        """rows [own vocabulary, C], the first of them token `first`'s."""
        self.rows, self.first, self._group = rows, first, group

    def index_select(self, dim: int, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, C]; dim is 0."""
        own = token_ids - self.first
        foreign = (own < 0) | (own >= len(self.rows))
        found = self.rows.index_select(dim, own.masked_fill(foreign, 0)).masked_fill_(foreign.unsqueeze(1), 0)
        return self._group.reduce(found)


class Head:
    """The LM head: hidden states [R, C] -> float32 logits [R, V].

    A bf16 product leaves 8 bits: near 25 the logits lie 0.125 apart, and the best two often coincide. Rounding keeps the
    order, so only exact ties at the top are undecided; those few are computed again in float32 from `rows`, the weight
    [V, C] as it was before packing (the embedding, where the two are tied). Without it ties go to the lowest id.
    """

    LEAST_TIED = 2  # best tokens that are computed again

    def __init__(self, linear: Linear, rows: Tensor | None) -> None:
        self.linear = linear
        self.rows = rows if linear.packed and rows is not None and rows.dtype != torch.float32 else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if padding := padded_rows(rows) - rows:
            x = F.pad(x, (0, 0, 0, padding))
        logits = self.linear(x)[:rows].float()
        if self.rows is not None:
            self._settle(logits, x, self.rows)
        return logits

    def _settle(self, logits: Tensor, x: Tensor, weight: Tensor) -> None:
        # Row by row in numpy: torch's own maximum and comparison over a vocabulary are many times slower on a CPU.
        values = logits.numpy()
        for row in range(len(values)):
            tied = np.flatnonzero(values[row] == values[row].max())
            if len(tied) >= self.LEAST_TIED:
                ids = torch.from_numpy(tied)
                logits[row, ids] = weight.index_select(0, ids).float() @ x[row].float()


class SplitHead(Head):
    """A rank's range of the vocabulary; rank 0 gets everybody's logits [R, V], the others keep to their own columns.

    A rank does not know whether the others reach its best tokens, so these are always computed again.
    """

    LEAST_TIED = 1

    def __init__(self, linear: Linear, rows: Tensor | None, widths: list[int], group: Group) -> None:
        super().__init__(linear, rows)
        self._widths, self._group = widths, group

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.gather(super().__call__(x), self._widths)


class RMSNorm:
    """kernels.reference.rms_norm in fewer, smaller operators, its constants prepared once: x sqrt(C) / sqrt(|x|^2 + C eps).

    8 us for one bf16 row of 576 where F.rms_norm takes 10-17. Only operators that round exactly act on the norms, so that
    a row's result does not depend on how many rows there are (a vectorised hypot would).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight.float() * math.sqrt(size)
        self.floor = size * eps
        self._given = weight, eps
        self._fixed: Callable[[Tensor, Tensor, float], Tensor] | None = None

    @property
    def given(self) -> tuple[Tensor, float]:
        """Weight [C] and eps, as kernels.reference.rms_norm takes them."""
        return self._given

    def fix_order(self) -> None:
        """From now on kernels/norm.py sums: on a GPU torch's own sums depend on the number of rows."""
        from kernels.norm import rms_norm  # imports triton, which a CPU can do without

        self._fixed = rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C] in x's dtype."""
        if self._fixed is not None:
            with launching(x.device):
                return self._fixed(x, *self._given)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, 2, -1, True).square_().add_(self.floor).sqrt_()
        if wide is x:
            return torch.div(x, norm).mul_(self.weight)
        return wide.div_(norm).mul_(self.weight).to(x.dtype)


def launching(device: torch.device) -> AbstractContextManager[None]:
    """Where a Triton kernel is launched: on a CPU it is interpreted, which is for tests."""
    return interpreted() if device.type == "cpu" else nullcontext()


class RotaryTable:
    """cos and sin of every position [P, 1, D] in the model's dtype, rotate-half's sign folded into sin.

    Source: RoFormer (arXiv 2104.09864); frequency scaling as the checkpoint's `rope_scaling` says.
    """

    def __init__(
        self, inv_freq: Tensor, attention_scaling: float, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inv_freq.float())
        cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
        self.cos = torch.cat((cos, cos), -1).unsqueeze(1).to(device=device, dtype=dtype)
        self.sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(device=device, dtype=dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)
