"""Inductor as a plain compiler of functions over tensors, without Dynamo.

    replayed(function, tensors)         the function's operations, without its Python
    compiled(function, tensors)         machine code for tensors of these very sizes and strides
    compiled_open(function, sizes, ..)  machine code for all sizes that meet the guards which Inductor asked for

Nothing here differentiates: functions are traced, compiled and meant to be run without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

Code = Callable[..., Any]


class InductorFailed(Exception):
    """Inductor could not compile a function; its own error is the cause."""


@dataclass(frozen=True)
class OpenCode:
    """Machine code for all sizes (of those above 1 when it was made) under `guards`. Called with sizes and tensors."""

    code: Code
    free: tuple[bool, ...]
    guards: str
    env: ShapeEnv

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether the code is right for these sizes."""
        if any((n > 1) != free for n, free in zip(sizes, self.free)):
            return False
        return not self.guards or bool(self.env.evaluate_guards_expression(self.guards, self._free(sizes)))

    def __call__(self, sizes: Sequence[int], tensors: Sequence[Tensor]) -> Any:
        return self.code(*self._free(sizes), *tensors)

    def _free(self, sizes: Sequence[int]) -> list[int]:
        return [n for n, free in zip(sizes, self.free) if free]


def replayed(function: Code, tensors: Sequence[Tensor]) -> Code:
    """The function as the operations that it runs on such tensors, one after another."""
    with torch.no_grad(), tracing(None):
        graph: Code = make_fx(function, tracing_mode="fake")(*tensors)
        return graph


def compiled(function: Code, tensors: Sequence[Tensor]) -> Code:
    """Raises `InductorFailed`."""
    with torch.no_grad(), tracing(None):
        return _inductor(make_fx(function, tracing_mode="fake")(*tensors), tensors)


def compiled_open(
    function: Callable[[Sequence[int], Sequence[Tensor]], Any],
    sizes: Sequence[int],
    tensors: Callable[[Sequence[int]], Sequence[Tensor]],
) -> OpenCode:
    """`function(sizes, tensors(sizes))` for all sizes. Sizes of 0 and 1 are special to PyTorch and stay as they are.

    `tensors` makes (fake) tensors of given, symbolic, sizes. Raises `InductorFailed`.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    free = tuple(n > 1 for n in sizes)
    traced: list[Any] = list(sizes)
    for k, size in enumerate(sizes):
        if free[k]:
            source = LocalSource(f"s{k}")
            symbol = env.create_symbol(size, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            traced[k] = env.create_symintnode(symbol, hint=size, source=source)
    symbols = [n for n, is_free in zip(traced, free) if is_free]

    def flat(*args: Any) -> Any:
        numbers = iter(args[: len(symbols)])
        return function([next(numbers) if is_free else n for n, is_free in zip(sizes, free)], args[len(symbols) :])

    with torch.no_grad(), mode, tracing(TracingContext(mode)):
        given = [*symbols, *tensors(traced)]
        code = _inductor(make_fx(flat)(*given), given)
        return OpenCode(code, free, env.produce_guards_expression(symbols) or "", env)


def _inductor(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Code:
    try:
        code: Code = compile_fx(graph, given)  # type: ignore[assignment]
        return code
    except Exception as problem:
        raise InductorFailed(str(problem)) from problem
