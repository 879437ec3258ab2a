"""Triton's interpreter, with what it gets wrong put right.

With TRITON_INTERPRET=1 kernels run as NumPy on tensors of any device: slow, and all we need to check numbers without a
GPU. Up to Triton 3.9 its tl.dot multiplies the bits of bfloat16 numbers as if they were integers, and its conversion to
bfloat16 truncates; in Triton 3.6 a number computed in the kernel cannot be the end of a range under NumPy 2.4.

More than half of its time goes into what changes no number, and is left out: overflow checks that it computes and then
does not assert, types that it makes anew for every value, operations that it puts in place again for every function
called inside a kernel, scans that it makes element by element.
"""

from __future__ import annotations

import dataclasses
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
    _mend_numbers()
    _leave_out_checks()
    _keep_types()
    _patch_once()
    _scan_slices()


def _mend_numbers() -> None:
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


def _leave_out_checks() -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # where overflow would be asserted
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _keep_types() -> None:
    """Types of blocks and the shapes of tensors are made once, and NumPy's types looked up by name."""
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_type, make_block, make_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    numpy_types: dict[str, Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def get_np_dtype(of: Any) -> Any:
        name = "pointer" if of.scalar.is_ptr() else of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of.scalar)
        return numpy_types[name]

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([n.value if isinstance(n, tl.constexpr) else n for n in shape])
        known = None if element_ty.is_ptr() else blocks.get(key)  # a pointer's name is not all that it is
        if known is None:
            make_block(self, element_ty, shape)
            blocks[key] = self.__dict__
        else:
            self.__dict__.update(known)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            make_tensor(self, handle, type)
            type._of_tensors = {name: x for name, x in self.__dict__.items() if name not in ("handle", "type")}
        else:
            self.__dict__.update(known, handle=handle, type=type)

    interpreter._get_np_dtype = get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor


def _patch_once() -> None:
    """A kernel starts by putting the interpreted operations in place of the language's, in each module that it names;
    the functions that it calls need not."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, start = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_lang(fn: Any) -> Any:
        modules = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if modules and modules <= patched:
            return Nothing()
        patched.update(modules)
        return patch(fn)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return start(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, run


def _scan_slices() -> None:
    """A scan combines whole slices: what combines two numbers combines two tensors of them."""
    import numpy as np
    from triton.runtime import interpreter

    def generic_scan(self: Any, inputs: Any) -> list[Any]:
        given = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        out = [np.empty_like(data) for data in given]
        so_far: tuple[Any, ...] = ()
        for step in range(len(given[0])):
            now = tuple(self.to_tensor(data[step], x.dtype) for data, x in zip(given, inputs))
            both = self.combine_fn.fn(*so_far, *now) if so_far else now
            so_far = tuple(both) if isinstance(both, tuple) else (both,)
            for place, value in zip(out, so_far):
                place[step] = value.handle.data.reshape(place[step].shape)
        return [self.to_tensor(np.moveaxis(data, 0, self.axis), x.dtype) for data, x in zip(out, inputs)]

    interpreter.ScanOps.generic_scan = generic_scan
