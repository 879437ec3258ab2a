"""Operations that move elements without computing: each rewrites the position it is read at.

transpose(x)[i, j]           ->  x[j, i]
x.view(a, b*c)[i, j]         ->  x[i, j // c, j % c]
roll(x, 3)[i]                ->  x[(i - 3) % n]
x[idx][i]                    ->  x[idx[i]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from refocus import simplify as s
from refocus.chosen import chosen_among
from refocus.ir import BOOL, INT, Const, Expr
from refocus.lift import Handler, Index, Lifter, arguments, dtype_of, is_tensor, kind_of, op_name
from refocus.sizes import shape_of, size_expr

Place = tuple[fx.Node, Index]


def dimension(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def arguments_of(node: fx.Node, *names: str, **defaults: Any) -> list[Any]:
    """Arguments by schema position and name."""
    out = []
    for k, name in enumerate(names):
        if k < len(arguments(node)):
            out.append(arguments(node)[k])
        else:
            out.append(node.kwargs.get(name, defaults.get(name)))
    return out


# ---------------------------------------------------------------------------------------------------- shape changes


def reindex(index: Index, out_shape: Index, in_shape: Index) -> Index:
    """Position in `in_shape` of a position in `out_shape`, both row-major over the same elements.

    Dimensions are matched in groups of equal extent first, so that no arithmetic crosses a group."""
    result: list[Expr] = []
    a, b = 0, 0
    n, m = len(out_shape), len(in_shape)
    while b < m:
        if in_shape[b] == Const(1):
            result.append(Const(0))
            b += 1
            continue
        while a < n and out_shape[a] == Const(1):
            a += 1
        outs, ins = [a], [b]
        a, b = a + 1, b + 1
        extent_out, extent_in = out_shape[outs[0]], in_shape[ins[0]]
        while extent_out != extent_in:
            if b < m and (a >= n or s.is_nonneg(s.sub(extent_out, extent_in))):
                extent_in = s.mul(extent_in, in_shape[b])
                ins.append(b)
                b += 1
            elif a < n:
                extent_out = s.mul(extent_out, out_shape[a])
                outs.append(a)
                a += 1
            else:
                break
        flat: Expr = Const(0)
        for k in outs:
            flat = s.add(s.mul(flat, out_shape[k]), index[k])
        if len(ins) == 1:
            result.append(flat)
            continue
        stride: Expr = Const(1)
        group: list[Expr] = []
        for k in reversed(ins):
            if k == ins[0]:
                group.append(s.floordiv(flat, stride))
            elif in_shape[k] == Const(1):
                group.append(Const(0))
            else:
                group.append(s.mod(s.floordiv(flat, stride), in_shape[k]))
            stride = s.mul(stride, in_shape[k])
        result.extend(reversed(group))
    return tuple(result)


def _reshape(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """x.view(dtype) is none: it reads the bits of its elements as other numbers."""
    source = arguments(node)[0]
    if node.target is torch.ops.aten.view.dtype:
        return None
    return lift.at(source, reindex(index, shape_of(node), shape_of(source)))


def _permute(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, dims = arguments_of(node, "self", "dims")
    position: list[Expr] = [Const(0)] * len(index)
    for k, d in enumerate(dims):
        position[dimension(d, len(index))] = index[k]
    return lift.at(source, position)


def _transpose(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, a, b = arguments_of(node, "self", "dim0", "dim1")
    position = list(index)
    if position:
        a, b = dimension(a, len(index)), dimension(b, len(index))
        position[a], position[b] = position[b], position[a]
    return lift.at(source, position)


def _t(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    return lift.at(arguments(node)[0], index[::-1])


def _swap_last(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    if len(index) < 2:
        return lift.at(arguments(node)[0], index)
    return lift.at(arguments(node)[0], (*index[:-2], index[-1], index[-2]))


def _movedim(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, src, dst = arguments_of(node, "self", "source", "destination")
    src, dst = ([v] if isinstance(v, int) else list(v) for v in (src, dst))
    rank = len(index)
    src, dst = [dimension(d, rank) for d in src], [dimension(d, rank) for d in dst]
    rest = iter(d for d in range(rank) if d not in src)
    order = [src[dst.index(k)] if k in dst else next(rest) for k in range(rank)]
    position: list[Expr] = [Const(0)] * rank
    for k, d in enumerate(order):
        position[d] = index[k]
    return lift.at(source, position)


def _expand(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    return lift.broadcast(arguments(node)[0], index)


def _unsqueeze(node: fx.Node, index: Index) -> Place:
    source, dim = arguments_of(node, "self", "dim")
    dim = dimension(dim, len(index))
    return source, index[:dim] + index[dim + 1 :]


def _squeeze(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, dims = arguments_of(node, "self", "dim")
    shape = shape_of(source)
    rank = len(shape)
    chosen = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dimension(d, rank) for d in chosen if shape[dimension(d, rank)] == Const(1)}
    rest = iter(index)
    return lift.at(source, [Const(0) if k in gone else next(rest) for k in range(rank)])


def _same(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    return lift.at(arguments(node)[0], index)


def _repeat(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source = arguments(node)[0]
    shape = shape_of(source)
    tail = index[len(index) - len(shape) :]
    return lift.at(source, [Const(0) if d == Const(1) else s.mod(x, d) for d, x in zip(shape, tail)])


def _repeat_interleave(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, repeats, dim = arguments_of(node, "self", "repeats", "dim")
    if not isinstance(repeats, int):
        return None
    if dim is None:
        return lift.at(
            source,
            reindex((s.floordiv(index[0], repeats),), (size_expr(source.meta["val"].numel()),), shape_of(source)),
        )
    dim = dimension(dim, len(index))
    return lift.at(source, [s.floordiv(x, repeats) if k == dim else x for k, x in enumerate(index)])


# ---------------------------------------------------------------------------------------------------- selections


def start_of(value: Any, size: Expr) -> Expr:
    if value is None:
        return Const(0)
    start = size_expr(value)
    from_end = s.maximum(s.add(start, size), 0)
    return s.where(s.lt(start, 0), from_end, start)  # the sign of a size is known: x[-n:]


def _slice(node: fx.Node, index: Index) -> Place:
    source, dim, start, _, step = arguments_of(node, "self", "dim", "start", "end", "step", dim=0, step=1)
    dim = dimension(dim, len(index))
    first = s.minimum(start_of(start, shape_of(source)[dim]), shape_of(source)[dim])
    at = s.add(first, s.mul(index[dim], size_expr(step)))
    return source, (*index[:dim], at, *index[dim + 1 :])


def _narrow(node: fx.Node, index: Index) -> Place:
    source, dim, start, _ = arguments_of(node, "self", "dim", "start", "length")
    dim = dimension(dim, len(index))
    first = start_of(start, shape_of(source)[dim])
    return source, (*index[:dim], s.add(first, index[dim]), *index[dim + 1 :])


def _select(node: fx.Node, index: Index) -> Place:
    source, dim, at = arguments_of(node, "self", "dim", "index")
    shape = shape_of(source)
    dim = dimension(dim, len(shape))
    return source, (*index[:dim], start_of(at, shape[dim]), *index[dim:])


# What is part of one tensor: the position there.
PARTS: dict[str, Callable[[fx.Node, Index], Place]] = {
    "unsqueeze": _unsqueeze, "slice": _slice, "narrow": _narrow, "select": _select,
}  # fmt: skip


def _part(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, position = PARTS[op_name(node)](node, index)
    if lift.standing and lift.tainted(source):
        for known in lift.standing:
            if known.written is source and position[known.dim] == known.seen:
                position = (*position[: known.dim], known.place, *position[known.dim + 1 :])
    return lift.at(source, position)


SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")


def _getitem(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """One of several results: a part of a split, one of an unbind, the values of max(dim)."""
    producer, which = arguments(node)
    if not isinstance(producer, fx.Node) or producer.op != "call_function":
        return None
    name = op_name(producer)
    source = arguments(producer)[0]
    lift.visited.add(producer)
    if name == "unbind":
        dim = dimension(arguments_of(producer, "self", "dim", dim=0)[1], len(index) + 1)
        return lift.at(source, (*index[:dim], Const(which), *index[dim:]))
    if name in SPLITS:
        dim = dimension(arguments_of(producer, "self", "n", "dim", dim=0)[2], len(index))
        before = s.add(0, *(size_expr(part.shape[dim]) for part in producer.meta["val"][:which]))
        return lift.at(source, [s.add(before, x) if k == dim else x for k, x in enumerate(index)])
    if name in ("max", "min") and which == 0:
        from refocus.lift_reductions import reduce_over, unrolled

        _, dim, keep = arguments_of(producer, "self", "dim", "keepdim", keepdim=False)
        if kind_of(dtype_of(node)) in (INT, BOOL):
            return unrolled(lift, node, source, dim, keep, index, name)
        return reduce_over(lift, node, source, [dim], keep, index, name, dtype_of(node))
    if name in ("broadcast_tensors", "meshgrid"):
        return _broadcast_many(lift, producer, which, index)
    return None


def _broadcast_many(lift: Lifter, producer: fx.Node, which: int, index: Index) -> Expr | None:
    tensors = arguments(producer)[0]
    if producer.target in (torch.ops.aten.meshgrid.default, torch.ops.aten.meshgrid.indexing):
        indexing = producer.kwargs.get("indexing", arguments(producer)[1] if len(arguments(producer)) > 1 else "ij")
        at = which
        if indexing == "xy" and which < 2:
            at = 1 - which
        return lift.at(tensors[which], (index[at],) if shape_of(tensors[which]) else ())
    return lift.broadcast(tensors[which], index)


def _advanced(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """x[idx0, :, idx1]: the broadcast dimensions stand where the adjacent indices stood, or in front."""
    source, indices = arguments_of(node, "self", "indices")
    shape = shape_of(source)
    entries = list(indices) + [None] * (len(shape) - len(indices))
    used = [k for k, e in enumerate(entries) if e is not None]
    if any(kind_of(dtype_of(entries[k])) == BOOL for k in used):
        return None
    rank = max(len(shape_of(entries[k])) for k in used)
    adjacent = used == list(range(used[0], used[-1] + 1))
    front = used[0] if adjacent else 0
    position = index[front : front + rank]
    rest = iter(index[:front] + index[front + rank :])
    return lift.at(
        source, [next(rest) if e is None else _wrap(lift.broadcast(e, position), d) for e, d in zip(entries, shape)]
    )


def _wrap(value: Expr, size: Expr) -> Expr:
    """A stored index may count from the end."""
    low, _ = s.bounds(value)
    if low is not None and low >= 0:
        return value
    if value.loads or low is None:
        # proof that a loaded index is not negative is not to be had; aten's rule is kept
        return s.where(s.lt(value, 0), s.add(value, size), value)
    return s.where(s.lt(value, 0), s.add(value, size), value)


def _index_select(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, dim, which = arguments_of(node, "self", "dim", "index")
    dim = dimension(dim, len(index))
    at = lift.at(which, (index[dim],) if shape_of(which) else ())
    return lift.at(source, (*index[:dim], at, *index[dim + 1 :]))


def _gather(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, dim, which = arguments_of(node, "self", "dim", "index")
    if node.kwargs.get("sparse_grad") and source in lift.known.needs_grad:
        return None  # its gradient is a sparse tensor, which a region has none of
    at = lift.at(which, index)
    dim = dimension(dim, len(index))
    return lift.at(source, (*index[:dim], at, *index[dim + 1 :]))


def _take_along_dim(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, which, dim = arguments_of(node, "self", "indices", "dim")
    if dim is None:
        return None
    dim = dimension(dim, len(index))
    at, size = lift.broadcast(which, index), shape_of(source)[dim]
    position = [Const(0) if d == Const(1) else x for d, x in zip(shape_of(source), index)]
    among = chosen_among(which)
    known = among is not None and s.is_nonneg(s.sub(size, among))
    position[dim] = at if known else s.mod(at, size)  # PyTorch takes the remainder of any index
    return lift.at(source, position)


def _embedding(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """No gradient flows to the row of a padding index. One that is scaled by how often a row is read, or is a sparse
    tensor, has no reading."""
    table, which, padding, scaled, sparse = arguments_of(
        node, "weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse", padding_idx=-1
    )
    if (scaled or sparse) and table in lift.known.needs_grad:
        return None
    row = lift.at(which, index[:-1])
    value = lift.at(table, (row, index[-1]))
    if padding == -1 or table not in lift.known.needs_grad:
        return value
    return s.where(s.eq(row, padding), s.call("detach", value, dtype=value.dtype), value)


# ---------------------------------------------------------------------------------------------------- moving whole rows


def _flip(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, dims = arguments_of(node, "self", "dims")
    shape = shape_of(source)
    flipped = {dimension(d, len(index)) for d in dims}
    return lift.at(source, [s.sub(s.sub(shape[k], 1), x) if k in flipped else x for k, x in enumerate(index)])


def _roll(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, shifts, dims = arguments_of(node, "self", "shifts", "dims", dims=[])
    shifts, dims = ([v] if isinstance(v, int | fx.Node) else list(v) for v in (shifts, dims))
    if not dims:
        return None
    shape = shape_of(source)
    position = list(index)
    for shift, dim in zip(shifts, dims):
        d = dimension(dim, len(index))
        position[d] = s.mod(s.sub(position[d], size_expr(shift)), shape[d])
    return lift.at(source, position)


def _diagonal(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    source, offset, a, b = arguments_of(node, "self", "offset", "dim1", "dim2", offset=0, dim1=0, dim2=1)
    rank = len(shape_of(source))
    a, b = dimension(a, rank), dimension(b, rank)
    rest = iter(index[:-1])
    position = []
    for k in range(rank):
        if k == a:
            position.append(s.add(index[-1], max(-offset, 0)))
        elif k == b:
            position.append(s.add(index[-1], max(offset, 0)))
        else:
            position.append(next(rest))
    return lift.at(source, position)


def _as_typed(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    """A cast moves nothing either; between floats it is the identity over the reals."""
    return s.cast(lift.at(arguments(node)[0], index), kind_of(dtype_of(node)))


VIEWS: dict[str, Handler] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("t", "numpy_T"), _t),
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("mT", "matrix_H", "adjoint"), _swap_last),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("contiguous", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "positive"), _same),
    **dict.fromkeys(("squeeze", "squeeze_copy"), _squeeze),
    **dict.fromkeys(("to", "_to_copy", "type_as"), _as_typed),
    **dict.fromkeys(PARTS, _part), "permute": _permute, "repeat_interleave": _repeat_interleave, "getitem": _getitem,
    "index": _advanced, "index_select": _index_select,
    "gather": _gather, "take_along_dim": _take_along_dim, "embedding": _embedding, "flip": _flip, "roll": _roll,
    "diagonal": _diagonal,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- creations


def _arange(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    args = list(arguments(node))
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if any(isinstance(v, float) and not v.is_integer() for v in (start, step)):
        return s.call(
            "add", lift.scalar(start), s.call("mul", lift.scalar(step), index[0], dtype="float32"), dtype="float32"
        )
    whole = [size_expr(int(v)) if isinstance(v, float) else size_expr(v) for v in (start, step)]
    return s.add(whole[0], s.mul(whole[1], index[0]))


def _filled(value: Any) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        return _number(lift, value, kind_of(dtype_of(node)))

    return handler


def _number(lift: Lifter, value: Any, kind: str) -> Expr | None:
    if is_tensor(value):
        return s.cast(lift.at(value, ()), kind) if not shape_of(value) else None
    number = lift.scalar(value, kind)
    return s.cast(number, kind)


def _full(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    value = node.kwargs.get("fill_value", arguments(node)[-1])
    return _number(lift, value, kind_of(dtype_of(node)))


def _scalar_tensor(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    return _number(lift, arguments(node)[0], kind_of(dtype_of(node)))


def _eye(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    return s.cast(s.eq(index[0], index[1]), kind_of(dtype_of(node)))


CREATIONS: dict[str, Handler] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "fill"), _full),
    "arange": _arange, "scalar_tensor": _scalar_tensor, "eye": _eye,
}  # fmt: skip
