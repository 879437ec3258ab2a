"""Indices that a model gives are checked, once no operation that would check them is left.

    picked = gather(k, 1, chosen)        ->      assert ((chosen >= 0) & (chosen < n)).all()
    out = softmax(q @ picked.mT) @ v             out = attend(q, k, chosen, v)

A region reads keys, values and biases where an index tensor says, and the operation that read them before, with the
error that it raises for an index out of range, is gone. A kernel would read some other memory. The assertion is one of
PyTorch's, which the graph may hold anywhere: on a GPU it does not wait for the device. Where it fails at once, the
error is of the type that the operation raises. Indices that are seen to be in range need none: those that `topk` or
`argsort` return, positions, constants, and arithmetic of these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refocus import simplify as s
from refocus.chosen import chosen_among, moved_from
from refocus.dead_code import live_nodes
from refocus.facts import Facts
from refocus.ir import Axis, Expr, Load
from refocus.lift import Lifter, dtype_of, is_tensor, op_name
from refocus.lift_views import arguments_of, dimension
from refocus.sizes import shape_of

_OPS = torch.ops.aten
Compiled = Callable[..., Any]


@dataclass(frozen=True)
class _Read:
    """A tensor is read along a dimension at `indices`; negative ones may count from its end."""

    source: fx.Node
    dim: int
    indices: fx.Node
    from_end: bool


def check_indices(gm: fx.GraphModule, facts: Facts, mode: Any) -> None:
    """Put assertions in place of the reads by index of a graph that was rewritten, and that nobody needs any more.
    `facts` are those of the graph before; dead code is still in the graph."""
    live = live_nodes(gm.graph)
    seen: set[tuple[fx.Node, bool, Expr]] = set()
    for node in list(gm.graph.nodes):
        if node in live:
            continue
        for read in _reads(node):
            size = shape_of(read.source)[read.dim]
            indices = moved_from(read.indices)
            if (indices, read.from_end, size) in seen or _empty(node):
                continue
            seen.add((indices, read.from_end, size))
            if not _known(indices, read.from_end, size, facts):
                _insert(gm, mode, read, indices, node)


def with_index_errors(gm: fx.GraphModule, compiled: Compiled) -> Compiled:
    """A compiled graph that raises `IndexError` for an index out of range, as the operations do that it checks for:
    an assertion knows `RuntimeError` alone."""
    asserted = gm.graph.find_nodes(op="call_function", target=_OPS._assert_async.msg)
    messages = [str(node.args[1]) for node in asserted if _is_index_error(str(node.args[1]))]
    if not messages:
        return compiled

    def run(*inputs: Any) -> Any:
        try:
            return compiled(*inputs)
        except RuntimeError as problem:
            found = next((m for m in messages if m in str(problem)), None)
            if found is None:
                raise
            raise IndexError(found) from None

    return run


def _is_index_error(message: str) -> bool:
    """On a CPU `gather` raises a `RuntimeError`, and `index_select` does but for the first dimension."""
    return message.startswith(("`index`", "`embedding`")) or (
        message.startswith("`index_select`") and "dimension 0" in message
    )


def _reads(node: fx.Node) -> Iterator[_Read]:
    match op_name(node):
        case "gather" | "index_select":
            source, dim, indices = arguments_of(node, "self", "dim", "index")
            if shape_of(source):
                yield _Read(source, dimension(dim, len(shape_of(source))), indices, False)
        case "embedding":
            table, indices = arguments_of(node, "weight", "indices")
            yield _Read(table, 0, indices, False)
        case "index":
            source, indices = arguments_of(node, "self", "indices")
            if not any(is_tensor(e) and dtype_of(e) in ("bool", "uint8") for e in indices):
                yield from (_Read(source, dim, e, True) for dim, e in enumerate(indices) if is_tensor(e))


def _empty(node: fx.Node) -> bool:
    return any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape)


def _known(indices: fx.Node, from_end: bool, size: Expr, facts: Facts) -> bool:
    """Whether indices are seen to be in range."""
    axes = tuple(Axis(f"dim{k}", length) for k, length in enumerate(shape_of(indices)))
    value = Lifter(facts, far=True).at(indices, axes)
    loads = (value,) if isinstance(value, Load) else value.loads
    chosen: dict[Expr, Expr] = {}
    for k, load in enumerate(loads):
        among = chosen_among(facts.nodes[load.tensor]) if load.tensor in facts.nodes else None
        if among is not None:
            chosen[load] = Axis(f"chosen{k}", among)
    value = s.substitute(value, chosen)
    low = s.add(value, size) if from_end else value
    return s.is_nonneg(low) and s.is_nonneg(s.sub(s.sub(size, value), 1))


def _insert(gm: fx.GraphModule, mode: Any, read: _Read, indices: fx.Node, place: fx.Node) -> None:
    """The assertion that `indices` are in range, where `place` stands."""

    def call(target: Any, *args: Any) -> fx.Node:
        with mode:
            value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        new = gm.graph.call_function(target, args)
        new.meta["val"] = value
        if "stack_trace" in place.meta:
            new.meta["stack_trace"] = place.meta["stack_trace"]
        return new

    with gm.graph.inserting_before(place):
        size: Any = read.source.meta["val"].shape[read.dim]
        if isinstance(size, torch.SymInt):
            size = call(_OPS.sym_size.int, read.source, read.dim)
        least = 0 if not read.from_end else call(operator.neg, size) if isinstance(size, fx.Node) else -size
        inside = call(
            _OPS.bitwise_and.Tensor, call(_OPS.ge.Scalar, indices, least), call(_OPS.lt.Scalar, indices, size)
        )
        message = f"`{op_name(place)}`: an index is out of bounds for dimension {read.dim}"
        if isinstance(size, int):
            message += f" with size {size}"
        call(_OPS._assert_async.msg, call(_OPS.all.default, inside), message)
