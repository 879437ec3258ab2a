"""Where results are put: what a model does with one before it computes with it is done by who makes it.

    o[b, h, i, e]  ->  transpose(1, 2)  ->  reshape(b, n, h * e)          stored at [b, i, 8*h + e] at once
    o[w, i, e]     ->  windows to rows and columns  ->  roll(3, 1)        stored at [4*(w//8) + i//4, (.. + 3) % n, e]

Each operation of such a chain sends every element to one place, and no two to the same: followed forward from a fused
attention, they say where each element of its result belongs, and none of them is left. This is done when all
attentions stand in the graph, for then all who read a result are seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from refocus import simplify as s
from refocus.codegen import plan as plans
from refocus.codegen.operator import parse_region, places
from refocus.codegen.placing import axes_of
from refocus.ir import Const, Expr, Output, Region
from refocus.lift import Index, arguments, is_tensor, op_name
from refocus.lift_views import arguments_of, dimension, reindex
from refocus.sizes import shape_of, size_expr

# Where an operation sends what stands at a position; None where that is not one place.
_Push = Callable[[fx.Node, Index], "Index | None"]


def place_results(gm: fx.GraphModule) -> dict[fx.Node, Region]:
    """Let the attentions of a graph put their results where they are first computed with, where that saves a copy.
    Returns the calls that others took the place of, with the regions of these."""
    found: dict[fx.Node, Region | None] = {}
    for node in list(gm.graph.nodes) if _is_plain(gm.graph) else ():
        if node.target is torch.ops.refocus.attend.default:
            found[node] = _place(gm.graph, node, node)
        elif node.target is torch.ops.refocus.attend_saving.default:
            results = {user.args[1]: user for user in node.users if op_name(user) == "getitem"}
            if len(results) == len(node.users) and 0 in results:
                found[node] = _place(gm.graph, node, results[0])
    return {call: region for call, region in found.items() if region is not None}


def is_call(node: fx.Node) -> bool:
    """Whether an attention is computed here."""
    return node.target in (torch.ops.refocus.attend.default, torch.ops.refocus.attend_saving.default)


def _place(graph: fx.Graph, call: fx.Node, result: fx.Node) -> Region | None:
    """Replace a call by one that puts its result in place; its region, None where it stays."""
    assert callable(call.target) and callable(result.target)
    operands, sizes, text, plan = arguments(call)
    region, syms = parse_region(text)
    if is_traceable_wrapper_subclass(result.meta["val"]):
        return None
    start, engine = axes_of(region), plans.parse(plan).engine
    found: tuple[fx.Node, Region] | None = None
    for node, position in _chain(result, start):
        if node.meta["val"].is_contiguous():
            placed = replace(region, output=Output(shape_of(node), position))
            if _address(node, position) == _address(result, start):
                found = None  # what was not moved is a view of the result, and so is what was moved and came back
            elif places(placed, engine):
                found = node, placed
    if found is None:
        return None
    target, placed = found
    if result is not call and _is_written(target):
        return None  # the backward reads the result as it was; what the model writes into is a copy of it
    if placed.syms != syms:
        return None
    with graph.inserting_before(call):
        new = graph.call_function(call.target, (operands, sizes, repr(placed), plan))
        new.meta.update(call.meta)
        if result is not call:
            new.meta["val"] = (target.meta["val"], *call.meta["val"][1:])
            for other in [user for user in call.users if user is not result]:
                other.replace_input_with(call, new)  # the row sums stay as they are
            new = graph.call_function(result.target, (new, 0))
            new.meta.update(result.meta)
        new.meta["val"] = target.meta["val"]
    target.replace_all_uses_with(new)
    return placed


def _is_plain(graph: fx.Graph) -> bool:
    """Whether values can be nothing but plain tensors: no function makes DTensors of them, whose elements lie elsewhere
    than their shape says (which their fake tensors do not tell)."""
    called = {node.target for node in graph.nodes if node.op.startswith("call_")}
    return all(
        isinstance(f, torch._ops.OpOverload | torch._ops.HigherOrderOperator) or f in vars(operator).values()
        for f in called
    )


def _is_written(node: fx.Node) -> bool:
    """Whether a value, or a view of it, is written in place."""
    seen, stack = {node}, [node]
    while stack:
        below = stack.pop()
        for user in below.users:
            target = user.target
            if user in seen or not isinstance(target, torch._ops.OpOverload):
                continue
            aliases = [a.alias_info for a in target._schema.arguments]
            given = [*user.args, *(user.kwargs.get(a.name) for a in target._schema.arguments[len(user.args) :])]
            for value, alias in zip(given, aliases):
                if value is below and alias is not None and alias.is_write:
                    return True
            if _may_alias(user):
                seen.add(user)
                stack.append(user)
    return False


def _may_alias(node: fx.Node) -> bool:
    returns = node.target._schema.returns  # type: ignore[union-attr]
    return op_name(node) in _PUSHES or any(r.alias_info is not None for r in returns)


def _address(node: fx.Node, position: Index) -> Expr:
    """Where a position lies in memory, if rows follow one another."""
    flat: Expr = Const(0)
    for entry, size in zip(position, shape_of(node)):
        flat = s.add(s.mul(flat, size), entry)
    return flat


def _chain(result: fx.Node, position: Index) -> Iterator[tuple[fx.Node, Index]]:
    """The operations after a result that do nothing but move it, as long as nobody else reads it."""
    node = result
    while len(node.users) == 1:
        (user,) = node.users
        push = _PUSHES.get(op_name(user))
        if push is None or not is_tensor(user) or arguments(user)[0] is not node:
            return
        before, after = node.meta["val"], user.meta["val"]
        if (before.dtype, before.device) != (after.dtype, after.device):
            return
        moved = push(user, position)
        if moved is None:
            return
        node, position = user, moved
        yield node, position


def _reshape(node: fx.Node, at: Index) -> Index:
    return reindex(at, shape_of(_source(node)), shape_of(node))


def _permute(node: fx.Node, at: Index) -> Index:
    dims = arguments_of(node, "self", "dims")[1]
    return tuple(at[dimension(d, len(at))] for d in dims)


def _transpose(node: fx.Node, at: Index) -> Index:
    _, a, b = arguments_of(node, "self", "dim0", "dim1")
    out = list(at)
    if out:
        a, b = dimension(a, len(at)), dimension(b, len(at))
        out[a], out[b] = out[b], out[a]
    return tuple(out)


def _reversed(node: fx.Node, at: Index) -> Index:
    return at[::-1]


def _swap_last(node: fx.Node, at: Index) -> Index:
    return (*at[:-2], at[-1], at[-2])


def _movedim(node: fx.Node, at: Index) -> Index:
    source, target = ([v] if isinstance(v, int) else list(v) for v in arguments(node)[1:3])
    source, target = ([dimension(d, len(at)) for d in dims] for dims in (source, target))
    rest = iter(d for d in range(len(at)) if d not in source)
    return tuple(at[source[target.index(k)] if k in target else next(rest)] for k in range(len(at)))


def _roll(node: fx.Node, at: Index) -> Index | None:
    source, shifts, dims = arguments_of(node, "self", "shifts", "dims", dims=[])
    shifts, dims = ([v] if isinstance(v, int | fx.Node) else list(v) for v in (shifts, dims))
    if not dims:
        return None
    shape, out = shape_of(source), list(at)
    for shift, dim in zip(shifts, dims):
        d = dimension(dim, len(at))
        out[d] = s.mod(s.add(out[d], size_expr(shift)), shape[d])
    return tuple(out)


def _flip(node: fx.Node, at: Index) -> Index:
    source, dims = arguments_of(node, "self", "dims")
    flipped, shape = {dimension(d, len(at)) for d in dims}, shape_of(source)
    return tuple(s.sub(s.sub(shape[k], 1), e) if k in flipped else e for k, e in enumerate(at))


def _same(node: fx.Node, at: Index) -> Index:
    return at


def _source(node: fx.Node) -> fx.Node:
    source: fx.Node = arguments(node)[0]
    return source


_PUSHES: dict[str, _Push] = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "unsqueeze", "squeeze"),
        _reshape,
    ),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("t", "numpy_T"), _reversed), **dict.fromkeys(("mT", "matrix_H", "adjoint"), _swap_last),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim), **dict.fromkeys(("contiguous", "clone"), _same),
    **dict.fromkeys(("to", "_to_copy"), _same), "permute": _permute, "roll": _roll, "flip": _flip,
}  # fmt: skip
