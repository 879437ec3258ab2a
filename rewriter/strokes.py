"""A tensor that is filled part by part becomes one operation that joins the parts.

    out = zeros(b, n, d); out[:, 0] = x0; out[:, 1] = x1; ..; use(out)     ->     out = stack([x0, x1, ..], 1); use(out)

That is what a loop over steps or chunks often does with its results. Every element must be written, and once, before
anything is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import make_contiguous_strides_for

from refocus import simplify as s
from refocus.ir import Const
from refocus.sizes import hint, shape_of, size_expr

_ATEN = torch.ops.aten
_CREATED = frozenset(
    ("zeros", "empty", "ones", "full", "zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty",
     "new_ones", "new_full")
)  # fmt: skip


def join_strokes(gm: fx.GraphModule, mode: Any) -> None:
    """Rewrite every tensor of a graph that is filled like this."""
    for base in [n for n in gm.graph.nodes if _name(n) in _CREATED and isinstance(n.meta.get("val"), torch.Tensor)]:
        order = {n: k for k, n in enumerate(gm.graph.nodes)}
        filled = _filled(base, order)
        if filled is not None:
            filled.join(gm, mode, order)


@dataclass(frozen=True)
class _Stroke:
    """One write: of `value`, from `start` to `end` along `dim`; `selects` where that is one position, and no dimension
    of the value. `views` lead from the base to what is written."""

    write: fx.Node
    views: tuple[fx.Node, ...]
    value: fx.Node
    dim: int
    start: int
    end: int
    selects: bool


@dataclass(frozen=True)
class _Filled:
    base: fx.Node
    strokes: tuple[_Stroke, ...]  # in the order of the parts

    def join(self, gm: fx.GraphModule, mode: Any, order: dict[fx.Node, int]) -> None:
        last = max((x.write for x in self.strokes), key=order.__getitem__)
        wanted = self.base.meta["val"]
        graph = gm.graph
        position = order[last]
        parts = []

        def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
            with graph.inserting_before(last):
                new = graph.call_function(target, args, kwargs)
            new.meta.update(last.meta)
            with mode:
                values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
                new.meta["val"] = target(*values, **options)
            return new

        for stroke in self.strokes:
            part = stroke.value
            if part.meta["val"].dtype != wanted.dtype:
                part = insert(_ATEN._to_copy.default, (part,), {"dtype": wanted.dtype})
            parts.append(part)
        operation = _ATEN.stack.default if self.strokes[0].selects else _ATEN.cat.default
        joined = insert(operation, (parts, self.strokes[0].dim), {})
        order_of = _layout(wanted)
        if order_of is not None and order_of != list(range(wanted.dim())):
            # As the tensor that was filled lies in memory: what follows may be a view of it.
            back = sorted(range(wanted.dim()), key=order_of.__getitem__)
            moved = insert(_ATEN.permute.default, (joined, order_of), {})
            moved = insert(_ATEN.clone.default, (moved,), {"memory_format": torch.contiguous_format})
            joined = insert(_ATEN.permute.default, (moved, back), {})
        self.base.replace_all_uses_with(joined, delete_user_cb=lambda user: order.get(user, position + 1) > position)
        for stroke in self.strokes:
            graph.erase_node(stroke.write)
        for node in sorted({v for x in self.strokes for v in x.views}, key=order.__getitem__, reverse=True):
            if not node.users:
                graph.erase_node(node)


def _layout(value: torch.Tensor) -> list[int] | None:
    """The order of the dimensions in memory, the outermost first; None for a tensor with holes."""
    if any(isinstance(d, torch.SymInt) for d in value.shape):
        sizes, strides = ([size_expr(x) for x in of] for of in (value.shape, value.stride()))
        order = sorted(range(value.dim()), key=lambda k: (-hint(value.stride()[k]), k))
        wanted = [s.mul(1, *(sizes[k] for k in order[n + 1 :])) for n in range(len(order))]
        return order if [strides[k] for k in order] == wanted else None
    order = sorted(range(value.dim()), key=lambda k: (-int(value.stride()[k]), k))
    if tuple(value.permute(order).stride()) == tuple(make_contiguous_strides_for(value.permute(order).shape)):
        return order
    plain = tuple(value.stride()) == tuple(make_contiguous_strides_for(value.shape))
    return list(range(value.dim())) if plain else None


def _filled(base: fx.Node, order: dict[fx.Node, int]) -> _Filled | None:
    value = base.meta["val"]
    if value.requires_grad:
        return None
    if _layout(value) is None:
        return None
    strokes: list[_Stroke] = []
    for user in base.users:
        if _name(user) in ("slice", "select") and user.args[0] is base:
            found = _strokes(user, (), base)
            if found is not None:
                strokes += found
    if len(strokes) < 2 or len({(x.dim, x.selects) for x in strokes}) != 1:
        return None
    strokes.sort(key=lambda x: x.start)
    ends = [0, *(x.end for x in strokes)]
    if [x.start for x in strokes] != ends[:-1] or Const(ends[-1]) != shape_of(base)[strokes[0].dim]:
        return None
    last = max(order[x.write] for x in strokes)
    mine = {v for x in strokes for v in (x.write, *x.views)}
    if any(user not in mine and order[user] <= last for v in (base, *mine) for user in v.users):
        return None
    if any(user not in mine for v in mine for user in v.users):
        return None
    # What was written must still be the same when it is joined, with or without a gradient.
    first = min(order[x.write] for x in strokes)
    if any(getattr(n.target, "__name__", "") == "_set_grad_enabled" and first < order[n] < last for n in order):
        return None
    written = {_memory(n.args[0]) for n in order if first <= order[n] <= last and n not in mine and _writes(n)}
    if any(_memory(x.value) in written or _memory(x.value) is base for x in strokes):
        return None
    return _Filled(base, tuple(strokes))


def _strokes(view: fx.Node, above: tuple[fx.Node, ...], base: fx.Node) -> list[_Stroke] | None:
    """The writes through a view of the base, of which one dimension at most is a part."""
    views = (*above, view)
    found: list[_Stroke] = []
    for user in view.users:
        if _name(user) == "copy_" and user.args[0] is view:
            stroke = _stroke(user, views, base)
            if stroke is None:
                return None
            found.append(stroke)
        elif _name(user) in ("slice", "select") and user.args[0] is view:
            more = _strokes(user, views, base)
            if more is None:
                return None
            found += more
    return found


def _stroke(write: fx.Node, views: tuple[fx.Node, ...], base: fx.Node) -> _Stroke | None:
    parts = [v for v in views if shape_of(v) != shape_of(v.args[0])]  # type: ignore[arg-type]
    value = write.args[1]
    if len(parts) != 1 or not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    (part,) = parts
    if shape_of(value) != shape_of(write.args[0]):  # type: ignore[arg-type]
        return None
    given = value.meta["val"]
    if given.device != base.meta["val"].device:
        return None
    shape = shape_of(base)
    dim = int(part.args[1]) if len(part.args) > 1 else 0  # type: ignore[arg-type]
    dim %= len(shape)
    size = shape[dim]
    if not isinstance(size, Const):
        return None
    length = int(size.value)
    if _name(part) == "select":
        at = part.args[2]
        if not isinstance(at, int):
            return None
        at %= length
        return _Stroke(write, views, value, dim, at, at + 1, True)
    bounds: list[Any] = [*part.args[2:], *(None, None, 1)[len(part.args) - 2 :]]
    begin, end, step = bounds
    begin = 0 if begin is None else begin
    end = length if end is None else end
    if step != 1 or not isinstance(begin, int) or not isinstance(end, int):
        return None
    start, stop, _ = slice(begin, end).indices(length)
    return _Stroke(write, views, value, dim, start, stop, False)


def _name(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and bool(node.args)


def _memory(node: Any) -> Any:
    """The node that made the memory that a node may be a view of."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        target = node.target
        fresh = isinstance(target, torch._ops.OpOverload) and not any(
            r.alias_info is not None for r in target._schema.returns
        )
        if fresh and _name(node) not in ("reshape", "contiguous", "to", "type_as", "flatten", "expand_as", "unflatten"):
            return node
        node = node.args[0]
    return node
