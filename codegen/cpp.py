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
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refocus.codegen import flex, operator, repair, tiled
from refocus.codegen.heads import Fitted, fit
from refocus.codegen.plan import Plan
from refocus.errors import EngineUnavailable
from refocus.evaluate import size_of
from refocus.inductor import InductorFailed, compiled, compiled_open, replayed
from refocus.ir import TRUE, Const, Dot, Load, Operand, Reduce, Region, Sym
from refocus.masks import BlockLists

# Kernels for all sizes that one kind of operands may have: each holds under its own guards (short or long queries, ..).
_MOST_OPEN = 8


def supports(region: Region) -> str | None:
    """Why this engine cannot run the region on this machine; None where it can."""
    if region.row_sums:
        return "Inductor's CPU attention template returns no log-sum-exp"
    fitted = fit(region)
    if isinstance(fitted, str):
        return fitted
    for part, expr in (("score", fitted.score), ("mask", region.mask), *(("extra logit", x) for x in region.extra)):
        if expr is not None and any(isinstance(n, (Dot, Reduce)) for n in expr.walk()):
            return f"the {part} holds a sum or reduction, and the kernel's functions are pointwise"
    return machine_reason()


def machine_reason() -> str | None:
    """Why Inductor's template does not exist here; None where it does."""
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
    order = [x for x in load.index if not isinstance(x, Const)]
    return load.tensor if order == wanted and not shared else None


def run(region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """The region's result (*batch, query, *value), contiguous, dtype `region.out_dtype`.

    Compiles on the first call for each layout (seconds), and once more, for all sizes, when a region with symbolic
    sizes comes with other ones. Where Inductor fails, the tiled engine runs instead, after a warning. Raises
    `EngineUnavailable` for what `supports` refuses.
    """
    program = _program(region, plan)
    if program.problem is None:
        try:
            return program(operands, sizes)
        except InductorFailed as problem:
            program.problem = problem
            text = f"Inductor could not compile an attention; the tiled engine runs it instead, slowly.\n{problem}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return tiled.run(region, plan, operands, sizes)


def warm(region: Region, plan: Plan, like: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """Compile now what `run` will need for operands like these, which may be fake. Raises as `run` does."""
    problems: list[InductorFailed] = []

    def work() -> None:
        operands = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like]
        try:
            _program(region, plan).kernel(operands, sizes)
        except InductorFailed as problem:
            problems.append(problem)

    # A thread of its own has none of the modes under which graphs are traced.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if problems:
        raise EngineUnavailable(
            "Inductor cannot compile this region", got=problems[0], todo="use engine='tiled'"
        ) from problems[0]


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
        self.fixed: dict[Any, _Fixed] = {}
        self.open: dict[Any, list[_Open]] = {}  # for all sizes that meet their guards
        self.lock = threading.Lock()
        self.problem: InductorFailed | None = None  # once there was one

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        with torch.no_grad():
            out = self.kernel(operands, sizes)(operands, sizes)
            out = out[0] if isinstance(out, (tuple, list)) else out
            result = self.fitted.result(out, self.named(operands), dict(zip(self.syms, sizes)))
            if self.repairs:
                repair.run(self.region, result, operands, sizes)
        return result

    def named(self, operands: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip((o.name for o in self.region.operands), operands, strict=True))

    def reads(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """What score and mask load."""
        named = self.named(operands)
        return [named[name] for name in self.names]

    def kernel(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> _Fixed | _Open:
        # The template's buffers are made for so many threads, and are overrun by more.
        threads = torch.get_num_threads()
        key = (threads, tuple((tuple(t.shape), t.stride()) for t in operands), tuple(sizes))
        found = self.fixed.get(key)
        if found is not None:
            return found
        with self.lock:
            several = self.open.setdefault((threads, tuple(_order(t) for t in operands)), [])
            fitting = next((k for k in several if k.code.fits(sizes)), None)
            if fitting is not None:
                return fitting
            if self.fixed and any(n > 1 for n in sizes) and len(several) < _MOST_OPEN:
                several.append(_Open(self, operands, sizes))
                return several[-1]
            return self.fixed.setdefault(key, _Fixed(self, operands, sizes))

    def inputs(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the kernel: views of the operands, for almost every region."""
        named, numbers = self.named(operands), dict(zip(self.syms, sizes, strict=True))
        parts = (self.fitted.query, self.fitted.key, self.fitted.value)
        query, key, value = (part(named, numbers) for part in parts)
        return query.contiguous(), key, value  # the result has the query's strides

    def lists(self, operands: Sequence[Tensor], sizes: Sequence[int], traced: bool = False) -> tuple[Tensor, ...]:
        """The lists of tiles of one call."""
        tensors = self.named(operands) if self.region.mask.loads else {}
        numbers = dict(zip(self.syms, sizes))
        return tuple(flex.lists_of(self.pairs, self.plan, tensors, numbers, operands[0].device, traced))

    def compute(self, given: Sequence[Tensor], sizes: Sequence[int], listed: bool) -> Tensor:
        """The kernel's graph, of `inputs`, `reads` and, if `listed`, `lists`: nothing in it but the operator and what
        it makes for itself."""
        lists = BlockLists(*given[-4:]) if listed else None
        query, key, value, *reads = given[:-4] if listed else given
        named, numbers = dict(zip(self.names, reads, strict=True)), dict(zip(self.syms, sizes, strict=True))
        return flex.call(self.pairs, self.plan, query, key, value, named, numbers, lists)


class _Fixed:
    """Code for operands of these very layouts. The lists of tiles are constants if nothing is loaded to make them. They
    are made outside of the code from dense masks, for which they are remembered as long as the mask stays as it is, and
    where a look at pairs may empty more tiles.
    """

    def __init__(self, program: _Program, operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self.program, self.sizes = program, tuple(sizes)
        given = [*program.inputs(operands, sizes), *program.reads(operands)]
        region = program.region
        dense = any({region.query, region.key} <= load.axes for load in region.mask.loads)
        loaded = bool(region.mask.loads)
        self.anew = loaded and (dense or flex.may_look(program.pairs, program.plan, dict(zip(program.syms, sizes))))
        self.lists = program.lists(operands, sizes) if self.anew or not loaded else ()
        listed = bool(self.lists)
        self.code = compiled(lambda *t: program.compute(t, sizes, listed), [*given, *self.lists])
        self.views = replayed(lambda *t: program.inputs(t, sizes), operands)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Any:
        lists = self.program.lists(operands, self.sizes) if self.anew else self.lists
        return self.code(*self.views(*operands), *self.program.reads(operands), *lists)


class _Open:
    """Code for all sizes that fit it, and operands whose dimensions lie in memory in the same order."""

    def __init__(self, program: _Program, operands: Sequence[Tensor], sizes: Sequence[int]) -> None:
        self.program = program
        self.listed = flex.may_look(program.pairs, program.plan, dict(zip(program.syms, sizes)))

        def make(traced: Sequence[int]) -> list[Tensor]:
            numbers = dict(zip(program.syms, traced))
            fakes = [_like(t, o, numbers) for t, o in zip(operands, program.region.operands)]
            lists = program.lists(fakes, traced, traced=True) if self.listed else ()
            return [*program.inputs(fakes, traced), *program.reads(fakes), *lists]

        self.code = compiled_open(lambda numbers, args: program.compute(args, numbers, self.listed), sizes, make)

    def __call__(self, operands: Sequence[Tensor], sizes: Sequence[int]) -> Any:
        whole = [t if _order(t) is not None else t.contiguous() for t in operands]
        lists = self.program.lists(whole, sizes) if self.listed else ()
        return self.code(sizes, [*self.program.inputs(whole, sizes), *self.program.reads(whole), *lists])


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
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))
    step = 1
    for dim in reversed(order):
        if tensor.shape[dim] != 1 and strides[dim] != step:
            return None
        step *= tensor.shape[dim]
    return tuple(order)
