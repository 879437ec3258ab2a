"""The operators that stand in a graph for one linear attention.

    refocus::linear(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? erase, Tensor? initial, Tensor? lookup,
                    str form, str plan) -> (Tensor out, Tensor sums, Tensor final)
    refocus::linear_backward(the same, Tensor? out, Tensor? sums, Tensor? final, bool[] needs) -> Tensor[]

The tensors are those of `linear_form`; `form` and `plan` are the `repr` of a `LinearForm` and a `Plan`. A result that
the form does not ask for is an empty tensor. Gradients come for the tensors that require one, and only for those.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from refocus.codegen import plan as plans
from refocus.codegen.linear_form import LinearForm, state_dtype
from refocus.codegen.plan import Plan
from refocus.codegen.second_order import refuse_second_order
from refocus.errors import BadRegion, EngineUnavailable

NAMES = ("q", "k", "v", "gate", "erase", "initial", "lookup")

# engine -> module with `forward` and `backward` as `linear_form` describes them
ENGINES: dict[str, str] = {"tiled": "refocus.codegen.chunked", "triton": "refocus.codegen.linear_triton"}

_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? erase, Tensor? initial, Tensor? lookup"
_TENSORS = f"{_OPERANDS}, str form, str plan"


@lru_cache(maxsize=512)
def parse_form(text: str) -> LinearForm:
    """Rebuild a form from its `repr`. The text only ever comes from `repr` of our own values."""
    form = eval(text, {"LinearForm": LinearForm, "__builtins__": {}})
    assert isinstance(form, LinearForm)
    return form


def engine_named(name: str) -> ModuleType:
    """The engine's module. Raises `EngineUnavailable` where there is none."""
    if name not in ENGINES:
        raise EngineUnavailable(
            f"the engine {name!r} has no linear attention",
            expected=", ".join(ENGINES),
            got=name,
            todo="name one of these engines",
        )
    return importlib.import_module(ENGINES[name])


def call(form: LinearForm, plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Run by the operator, as a graph would. `tensors`: q, k, v, gate, erase, initial, lookup, of which the last
    may be left out."""
    given = (*tensors, *(None,) * (len(NAMES) - len(tensors)))
    result: tuple[Tensor, Tensor, Tensor] = linear(*given, repr(form), repr(plan))
    return result


@torch.library.custom_op("refocus::linear", mutates_args=(), schema=f"({_TENSORS}) -> (Tensor, Tensor, Tensor)")
def linear(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None, initial: Tensor | None,
    lookup: Tensor | None, form: str, plan: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dispatch to the plan's engine. Raises `BadRegion` for tensors that the form does not describe."""
    what, how = parse_form(form), plans.parse(plan)
    tensors = (q, k, v, gate, erase, initial, lookup)
    _check(what, *tensors)
    with torch.autocast(q.device.type, enabled=False):  # a region that the caller is in says nothing of the engine
        out, sums, final = engine_named(how.engine).forward(what, how.block_k, *tensors)
    return out, _none(q) if sums is None else sums, _none(q) if final is None or not what.final else final


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


@linear.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None, initial: Tensor | None,
    lookup: Tensor | None, form: str, plan: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    what, wide = parse_form(form), state_dtype(q, k, v)
    out = v.new_empty(q.shape[0], q.shape[1], v.shape[2])
    sums = q.new_empty(q.shape[0], q.shape[1], dtype=wide) if what.sums else _none(q)
    final = q.new_empty(k.shape[0], k.shape[2], v.shape[2], dtype=wide) if what.final else _none(q)
    return out, sums, final


@torch.library.custom_op(
    "refocus::linear_backward",
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? out, Tensor? sums, Tensor? final, bool[] needs) -> Tensor[]",
)
def linear_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None, initial: Tensor | None,
    lookup: Tensor | None, form: str, plan: str, out: Tensor | None, sums: Tensor | None, final: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of the operands for which `needs` holds."""
    what, how = parse_form(form), plans.parse(plan)
    tensors = (q, k, v, gate, erase, initial, lookup)
    with torch.autocast(q.device.type, enabled=False):
        found = engine_named(how.engine).backward(what, how.block_k, *tensors, (out, sums, final))
    return [g for g, need in zip(found, needs, strict=True) if need]


@linear_backward.register_fake
def _fake_backward(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, erase: Tensor | None, initial: Tensor | None,
    lookup: Tensor | None, form: str, plan: str, out: Tensor | None, sums: Tensor | None, final: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = (q, k, v, gate, erase, initial, lookup)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need and t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, form, plan = inputs
    what = parse_form(form)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(x for x, asked in zip(output[1:], (what.sums, what.final)) if not asked))
    ctx.save_for_backward(*tensors)
    ctx.form, ctx.plan = form, plan
    ctx.needs = [t is not None and bool(t.requires_grad) for t in tensors]


def _backward(ctx: Any, out: Tensor | None, sums: Tensor | None, final: Tensor | None) -> tuple[Tensor | None, ...]:
    what = parse_form(ctx.form)
    grads = (out, sums if what.sums else None, final if what.final else None)
    if all(g is None for g in grads):
        return (None,) * (len(NAMES) + 2)
    found = iter(linear_backward(*ctx.saved_tensors, ctx.form, ctx.plan, *grads, ctx.needs))
    return (*(next(found) if need else None for need in ctx.needs), None, None)


linear.register_autograd(_backward, setup_context=_save)
refuse_second_order(linear_backward)


def _check(form: LinearForm, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> None:
    gate, erase, initial, lookup = rest
    heads, length, width = k.shape
    steps = (heads, length, width) if form.lookup else (heads, length)
    wanted = {
        "q": (q, (q.shape[0], length if form.causal else q.shape[1], width)),
        "v": (v, (heads, length, v.shape[2])),
        "gate": (gate, {"none": None, "head": (heads, length), "channel": (heads, length, width)}[form.gate]),
        "erase": (erase, steps if form.erase else None),
        "lookup": (lookup, steps if form.lookup else None),
        "initial": (initial, (heads, width, v.shape[2]) if form.initial else None),
    }
    for name, (tensor, shape) in wanted.items():
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape or (name == "q" and q.shape[0] % heads):
            raise BadRegion(
                f"operand {name!r} does not fit its form",
                expected=str(shape),
                got=str(got),
                todo="pass tensors as linear_form describes them",
            )
