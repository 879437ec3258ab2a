"""The `cpp` engine: a region as the FlexAttention operator, which Inductor lowers to its C++ flash template on CPU.

Each region is compiled by itself, for each layout of its operands, and kept: equal layers share one kernel. It is not
spliced into the user's graph as an operator of its own, because there the template cannot be trusted with its
neighbours (torch 2.11 to 2.13): a pointwise operation after it is fused and then refused ("Unsupported for
`epilogue_nodes`"), a query or key that is a view of a buffer of other than four dimensions fails to unpack, and
tensors that score_mod reads must not be views. Between inputs and outputs of a graph none of this can happen.

Inference only: the template has no backward and returns no log-sum-exp. A query without any key gets zeros; where the
eager code gives something else, `refocus.codegen.repair` runs afterwards.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from refocus.codegen import flex, operator, repair
from refocus.codegen.heads import Fitted, fit
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.evaluate import size_of
from refocus.ir import TRUE, Dot, Load, Operand, Reduce, Region, Sym
from refocus.masks import BlockLists

# Kernels for all sizes that one kind of operands may have: each holds under its own guards (short or long queries, ..).
_MOST_OPEN = 8


def supports(region: Region) -> str | None:
    """Why this engine cannot run the region on this machine; None where it can."""
    fitted = fit(region)
    if isinstance(fitted, str):
        return fitted
    for part, expr in (("score", fitted.score), ("mask", region.mask), *(("extra logit", x) for x in region.extra)):
        if expr is not None and any(isinstance(n, (Dot, Reduce)) for n in expr.walk()):
            return f"the {part} holds a sum or reduction, and the kernel's functions are pointwise"
    if sys.platform == "darwin":
        return "Inductor's CPU attention template does not exist on macOS"
    if os.getenv("ATEN_CPU_CAPABILITY") == "default" or not torch.cpu._is_avx2_supported():
        return "Inductor's CPU attention template needs AVX2"
    if torch.xpu.is_available():
        return "Inductor's CPU attention template is switched off beside an XPU"
    return None


def attend(region: Region, plan: Plan, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The call of the operator, as it stands in a graph; to be traced.

    The query is asked for in the kernel's order, so that whatever computes it there can write it so.
    """
    fitted = fit(region)
    ordered = _query_operand(fitted) if isinstance(fitted, Fitted) else None
    operands = [t.contiguous() if o.name == ordered else t for o, t in zip(region.operands, tensors, strict=True)]
    return operator.call(region, plan, operands, sizes)


def _query_operand(fitted: Fitted) -> str | None:
    """The operand that is the query alone, its dimensions in the kernel's order."""
    region = fitted.region
    sides = [fitted.values, *(p.key for p in fitted.products)]
    if len(fitted.products) != 1 or not isinstance(fitted.products[0].query, Load):
        return None
    load = fitted.products[0].query
    wanted = [a for a in (*region.batch, region.query, *fitted.products[0].over) if a in load.axes]
    shared = any(load.tensor == other.tensor for e in sides for other in e.loads)
    return load.tensor if list(load.index) == wanted and not shared else None


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result (*batch, query, *value), contiguous, dtype `region.out_dtype`.

    Compiles on the first call for each layout (seconds), and once more, for all sizes, when a region with symbolic
    sizes comes with other ones. Raises `EngineUnavailable` for what `supports` refuses or Inductor cannot compile.
    """
    return _program(region, plan)(operands, sizes)


def warm(region: Region, plan: Plan, like: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Compile now what `run` will need for operands like these, which may be fake. Raises as `run` does."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        operands = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like]
        _program(region, plan).kernel(operands, sizes)


@lru_cache(maxsize=256)
def _program(region: Region, plan: Plan) -> _Program:
    reason, fitted = supports(region), fit(region)
    if reason is not None or isinstance(fitted, str):
        raise EngineUnavailable("the cpp engine cannot run this region", got=reason, todo="use engine='tiled'")
    return _Program(fitted, plan)


class _Program:
    """The compiled kernels of one region and plan."""

    def __init__(self, fitted: Fitted, plan: Plan) -> None:
        self.fitted, self.region, self.plan = fitted, fitted.region, plan
        self.pairs = flex.pairs_of(fitted)
        self.syms = self.region.syms
        self.names = tuple(dict.fromkeys((*flex.loaded(self.pairs.scored), *flex.loaded(self.pairs.kept))))
        self.repairs = self.region.empty_row == "logits" and self.region.mask != TRUE
        self.fixed: dict[Any, _Kernel] = {}
        self.open: dict[Any, list[_Kernel]] = {}  # for all sizes that meet their guards
        self.lock = threading.Lock()

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        out = self.kernel(operands, sizes)(operands, sizes)
        if self.repairs:
            repair.run(self.region, out, operands, sizes)
        return out

    def kernel(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> _Kernel:
        # The template's buffers are made for so many threads, and are overrun by more.
        threads = torch.get_num_threads()
        layout = tuple((tuple(t.shape), t.stride()) for t in operands)
        found = self.fixed.get((threads, layout, tuple(sizes)))
        if found is not None:
            return found
        with self.lock:
            # A size of 0 or 1 is special to PyTorch, and so never stands for others.
            kind = (threads, tuple(_order(t) for t in operands), tuple(n if n < 2 else None for n in sizes))
            several = self.open.setdefault(kind, [])
            found = next((k for k in several if k.fits(sizes)), None)
            if found is not None:
                return found
            if self.fixed and any(n > 1 for n in sizes) and len(several) < _MOST_OPEN:
                several.append(_compile_open(self, operands, sizes))
                return several[-1]
            found = self.fixed[threads, layout, tuple(sizes)] = _compile_fixed(self, operands, sizes)
            return found

    def inputs(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the kernel: views of the operands, for almost every region."""
        named = dict(zip((o.name for o in self.region.operands), operands, strict=True))
        numbers = dict(zip(self.syms, sizes, strict=True))
        parts = (self.fitted.query, self.fitted.key, self.fitted.value)
        query, key, value = (part(named, numbers) for part in parts)
        return query.contiguous(), key, value  # the result has the query's strides

    def compute(self, inputs: Sequence[Tensor], reads: Sequence[Tensor], sizes: Sequence[int], lists: Any) -> Tensor:
        """The kernel's graph: nothing in it but the operator, and what it makes for itself."""
        named, numbers = dict(zip(self.names, reads, strict=True)), dict(zip(self.syms, sizes, strict=True))
        query, key, value = inputs
        return flex.call(self.pairs, self.plan, query, key, value, named, numbers, lists)


class _Kernel:
    """Inductor's code for one program, and what prepares its inputs."""

    def __init__(self, program: _Program, code: Callable[..., Any], env: ShapeEnv | None = None, guards: str = "") -> None:
        self.program, self.code, self.env, self.guards = program, code, env, guards
        self.views: Callable[..., Any] | None = None
        self.lists: tuple[Tensor, ...] = ()

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether code for all sizes was compiled under assumptions that hold for these."""
        assert self.env is not None
        return not self.guards or bool(self.env.evaluate_guards_expression(self.guards, [n for n in sizes if n > 1]))

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        program = self.program
        named = dict(zip((o.name for o in program.region.operands), operands))
        with torch.no_grad():
            if self.env is not None:
                named = {name: t if _order(t) is not None else t.contiguous() for name, t in named.items()}
            plain = list(named.values())
            inputs = self.views(*plain) if self.views is not None else program.inputs(plain, sizes)
            reads = [named[n] for n in program.names]
            numbers = [n for n in sizes if n > 1] if self.env is not None else []
            out = self.code(*numbers, *inputs, *reads, *self.lists)
            out = out[0] if isinstance(out, (tuple, list)) else out
            return program.fitted.result(out, named, dict(zip(program.syms, sizes)))


def _compile_fixed(program: _Program, operands: Sequence[Tensor], sizes: Sequence[int]) -> _Kernel:
    """For these very layouts; the lists of tiles are constants if nothing is loaded to make them."""
    region = program.region
    with torch.no_grad(), tracing(None):
        inputs = program.inputs(operands, sizes)
        named = dict(zip((o.name for o in region.operands), operands))
        reads = [named[n] for n in program.names]
        numbers = dict(zip(program.syms, sizes))
        lists: tuple[Tensor, ...] = ()
        if not region.mask.loads:
            lists = tuple(flex.lists_of(program.pairs, program.plan, named, numbers, operands[0].device))

        def compute(*args: Tensor) -> Tensor:
            rest = args[3 + len(reads) :]
            return program.compute(args[:3], args[3 : 3 + len(reads)], sizes, BlockLists(*rest) if rest else None)

        given = [*inputs, *reads, *lists]
        kernel = _Kernel(program, _inductor(make_fx(compute, tracing_mode="fake")(*given), given))
        kernel.lists = lists
        kernel.views = make_fx(lambda *t: program.inputs(t, sizes), tracing_mode="fake")(*operands)
    return kernel


def _compile_open(program: _Program, operands: Sequence[Tensor], sizes: Sequence[int]) -> _Kernel:
    """For all sizes but those of 0 and 1, under guards that Inductor may add."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    traced: list[Any] = list(sizes)
    for k, (sym, size) in enumerate(zip(program.syms, sizes)):
        if size > 1:
            source = LocalSource(sym.name)
            symbol = env.create_symbol(size, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            traced[k] = env.create_symintnode(symbol, hint=size, source=source)
    free = [n for n, size in zip(traced, sizes) if size > 1]
    with torch.no_grad(), mode, tracing(TracingContext(mode)):
        fakes = [_like(t, o, dict(zip(program.syms, traced))) for t, o in zip(operands, program.region.operands)]
        named = dict(zip((o.name for o in program.region.operands), fakes))
        count = len(free)

        def compute(*args: Any) -> Tensor:
            numbers = iter(args[:count])
            sizes_in = [next(numbers) if size > 1 else size for size in sizes]
            return program.compute(args[count : count + 3], args[count + 3 :], sizes_in, None)

        given = [*free, *program.inputs(fakes, traced), *(named[n] for n in program.names)]
        code = _inductor(make_fx(compute)(*given), given)
        return _Kernel(program, code, env, env.produce_guards_expression(free) or "")


def _inductor(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
    try:
        return compile_fx(graph, given)  # type: ignore[return-value]
    except Exception as problem:
        raise EngineUnavailable(
            "Inductor could not compile this region", got=problem, todo="use engine='tiled'"
        ) from problem


def _like(tensor: Tensor, operand: Operand, sizes: dict[Sym, Any]) -> Tensor:
    """A fake tensor of symbolic sizes, its dimensions in memory in the same order as the given one's."""
    shape = [size_of(s, sizes) for s in operand.shape]
    order = _order(tensor) or tuple(range(tensor.dim()))
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * shape[dim]
    return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)


def _order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions from the slowest to the fastest, where the tensor has no gaps."""
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    step = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != step:
            return None
        step *= tensor.shape[dim]
    return tuple(order)
