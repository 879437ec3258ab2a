"""Triton's interpreter, with what it gets wrong put right.

With TRITON_INTERPRET=1 kernels run as NumPy on tensors of any device: slow, and all we need to check numbers without a
GPU. Up to Triton 3.9 its tl.dot multiplies the bits of bfloat16 numbers as if they were integers, and its conversion to
bfloat16 truncates; in Triton 3.6 a number computed in the kernel cannot be the end of a range under NumPy 2.4.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter. It decides that, for good, when it is imported."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


@lru_cache(maxsize=1)
def mend() -> None:
    """Put the interpreter right, once."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, patch_tensor = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, x, dtype)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return handle(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_lang_tensor
