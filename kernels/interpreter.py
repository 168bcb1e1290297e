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

    patch_tensor, set_attribute = interpreter._patch_lang_tensor, interpreter._LangPatchScope.set_attr
    originals: dict[tuple[int, str], tuple[Any, Any]] = {}
    missing = object()

    def remember(scope: Any, owner: Any, name: str, value: Any) -> None:
        # A device function's patches are never undone (Triton 3.6): the compiler would meet them in the same process.
        originals.setdefault((id(owner), name), (owner, getattr(owner, name, missing)))
        set_attribute(scope, owner, name, value)

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Scalars are arrays of one element there; numpy >= 2.4 makes no int of those, and no loop could have a bound that is one.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    compiled = JITFunction.run, JITFunction.__call__
    JITFunction.run, JITFunction.__call__ = run, call
    interpreter._patch_lang_tensor, interpreter._LangPatchScope.set_attr = patch, remember
    try:
        with np.errstate(all="ignore"):  # it computes with numpy, which warns of infinities that a kernel means
            yield
    finally:
        JITFunction.run, JITFunction.__call__ = compiled
        interpreter._patch_lang_tensor, interpreter._LangPatchScope.set_attr = patch_tensor, set_attribute
        for (_, name), (owner, value) in originals.items():
            if value is missing:
                if hasattr(owner, name):
                    delattr(owner, name)
            else:
                setattr(owner, name, value)
