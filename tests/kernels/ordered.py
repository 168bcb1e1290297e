"""Interpreted matrix products whose sums are in one order for every element of a tile, as a GPU's are.

numpy's come from a BLAS that takes another order for another column, and a test of bits would see that.
"""

from __future__ import annotations

from typing import Any

import pytest


def in_order(patch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    def dot(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        product = a.data.astype(d.data.dtype)[:, :, None] * b.data.astype(d.data.dtype)[None]
        return interpreter.TensorHandle(product.sum(1) + d.data, d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
