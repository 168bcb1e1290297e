"""Triton's kernels without a GPU: inside `interpreted()` they run under Triton's own interpreter, on CPU tensors.

Slow, and exact enough to test every kernel anywhere. The environment variable TRITON_INTERPRET does the same for a whole process,
provided that it is set before Triton is imported; this needs no order and ends where the `with` ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def interpreted() -> Iterator[None]:
    """Launches and device functions of `@triton.jit` are interpreted. Not for several threads at once; may be nested."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        InterpretedFunction(kernel.fn).run(*args, **kwargs)

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return InterpretedFunction(function.fn)(*args, **kwargs)

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Scalars are arrays of one element there; numpy >= 2.4 makes no int of those, and no loop could have a bound that is one.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    compiled = JITFunction.run, JITFunction.__call__
    JITFunction.run, JITFunction.__call__ = run, call
    interpreter._patch_lang_tensor = patch
    try:
        with np.errstate(all="ignore"):  # it computes with numpy, which warns of infinities that a kernel means
            yield
    finally:
        JITFunction.run, JITFunction.__call__ = compiled
        interpreter._patch_lang_tensor = patch_tensor
