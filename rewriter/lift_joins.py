"""Operations that put several tensors together: each element comes from one of them, told by its position.

cat([x, y])[i]               ->  x[i] where i < len(x) else y[i - len(x)]
pad(x, (2, 0))[i]            ->  x[i - 2] where i >= 2 else 0
slice_scatter(x, y, 0, 3)[i] ->  y[i - 3] where i >= 3 else x[i]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx

from refocus import simplify as s
from refocus.infer import constant_form
from refocus.ir import BOOL, Axis, Const, Expr, Load
from refocus.lift import Handler, Index, Lifter, Standing, arguments, dtype_of, kind_of, op_name
from refocus.lift_views import PARTS, arguments_of, dimension, start_of
from refocus.progressions import named_alike, one_function
from refocus.simplify import Knowledge
from refocus.sizes import shape_of, size_expr

# So many parts are no formula any more: rows of a mask made one by one, whose values may tell what they are together.
_MANY = 32


def clamped(position: Expr, size: Expr) -> Expr:
    """A position that is only used where a condition holds, kept in range where it does not: a load is carried out
    everywhere. It is the position itself wherever the range is proved, as it is once the condition is decided."""
    return s.minimum(s.maximum(position, 0), s.sub(size, 1))


def _guarded(lift: Lifter, source: fx.Node, index: Iterable[Expr], facts: Knowledge) -> Expr:
    """A value that is only used where `facts` hold. Positions inside a load stay clamped: see `_clamped`."""
    value = lift.at(source, index)
    return value if value.loads else s.under(value, facts)


def _cat(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    tensors, dim = arguments_of(node, "tensors", "dim", dim=0)
    dim = dimension(dim, len(index))
    parts = [t for t in tensors if not (len(shape_of(t)) == 1 and shape_of(t)[0] == Const(0) and len(index) > 1)]
    sizes = [shape_of(t)[dim] for t in parts]
    if all(size == sizes[0] and size != Const(0) for size in sizes):
        which, local = s.floordiv(index[dim], sizes[0]), s.mod(index[dim], sizes[0])
        run = _run(lift, [(t, (*index[:dim], local, *index[dim + 1 :])) for t in parts], which)
        if run is not None:
            return run
    if len(parts) > _MANY and not isinstance(index[dim], Const):
        return lift.constant(node, index)
    with _joining(lift, parts):
        return _pieces(lift, parts, index, dim)


def _pieces(lift: Lifter, parts: list[fx.Node], index: Index, dim: int) -> Expr:
    sizes = [shape_of(t)[dim] for t in parts]
    start: Expr = Const(0)
    pieces: list[tuple[Expr, Expr]] = []  # (end, value)
    for k, (tensor, size) in enumerate(zip(parts, sizes)):
        local = s.sub(index[dim], start)
        end = s.add(start, size)
        reached = s.lt(index[dim], end) if k < len(parts) - 1 else Const(True, BOOL)  # one tensor may come twice
        begun = s.ge(index[dim], start)
        if begun != Const(False, BOOL) and reached != Const(False, BOOL):
            facts = {**s.assume(s.and_(begun, reached))}
            at = Const(0) if size == Const(1) else clamped(s.under(local, facts), size)
            pieces.append((reached, _guarded(lift, tensor, (*index[:dim], at, *index[dim + 1 :]), facts)))
            if reached == Const(True, BOOL):
                break
        start = end
    value = pieces[-1][1]
    for reached, piece in reversed(pieces[:-1]):
        value = _joined(lift, reached, piece, value)
    return value


@contextmanager
def _joining(lift: Lifter, parts: list[fx.Node]) -> Iterator[None]:
    """Where all parts are of one tensor, they are read there."""
    before = lift.joining
    lift.joining = before or (lift.far and len({_origin(t) for t in parts}) == 1)
    try:
        yield
    finally:
        lift.joining = before


def _joined(lift: Lifter, condition: Expr, a: Expr, b: Expr) -> Expr:
    """`a` where the condition holds, else `b`. Two places of one tensor are one place that depends on the condition:

    cat([x[:, :2], roll(x[:, 2:], 8)], 1)[j, h]   ->   x[j if h < 2 else (j - 8) % n, h]
    """
    if lift.joining and isinstance(a, Load) and isinstance(b, Load) and a.tensor == b.tensor:
        return Load(a.tensor, tuple(s.where(condition, x, y) for x, y in zip(a.index, b.index)), a.dtype)
    return s.where(condition, a, b)


_MOVERS = ("getitem", "split", "chunk", "unbind", "roll", "flip", "slice_scatter", "select_scatter")


def _origin(node: fx.Node) -> fx.Node:
    """The tensor whose elements were moved to make this one."""
    while op_name(node) in PARTS or op_name(node) in _MOVERS:
        node = arguments(node)[0]
    return node


def _run(lift: Lifter, parts: list[tuple[fx.Node, Index]], which: Expr) -> Expr | None:
    """Parts of one tensor at places in arithmetic progression, read at the place of part number `which`.

    stack([x[:, 0:n], x[:, 1:n+1], x[:, 2:n+2]])[w, b, i]   ->   x[b, i + w]
    cat([x[:-1], x[1:]], 1)[g, j]                           ->   x[g + j // c, j % c]
    """
    viewed = [_viewed(*part) for part in parts]
    source = viewed[0][0]
    if len(viewed) < 2 or any(node is not source for node, _ in viewed):
        return None
    place = []
    for entries in zip(*(index for _, index in viewed)):
        step = s.sub(entries[1], entries[0])
        if not isinstance(step, Const) or any(
            s.sub(entry, entries[0]) != s.mul(step, k) for k, entry in enumerate(entries)
        ):
            return None
        place.append(s.add(entries[0], s.mul(step, which)))
    lift.visited.update(n for part, _ in parts for n in _views(part))
    return lift.at(source, place)


def _viewed(node: fx.Node, index: Index) -> tuple[fx.Node, Index]:
    """The tensor that parts of parts are of, and the position in it."""
    while op_name(node) in PARTS:
        node, index = PARTS[op_name(node)](node, index)
    return node, index


def _views(node: fx.Node) -> Iterator[fx.Node]:
    """The parts of parts that `_viewed` looks through."""
    while op_name(node) in PARTS:
        yield node
        node = arguments(node)[0]


def _stack(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    tensors, dim = arguments_of(node, "tensors", "dim", dim=0)
    dim = dimension(dim, len(index))
    rest = index[:dim] + index[dim + 1 :]
    run = _run(lift, [(t, rest) for t in tensors], index[dim])
    if run is not None:
        return run
    if len(tensors) > _MANY and not isinstance(index[dim], Const):
        return lift.constant(node, index)
    values = [lift.at(tensor, rest) for tensor in tensors]
    if lift.alike and len(values) > 2:
        number = Axis(f"{node.name}.part", Const(len(values)))
        one = one_function(named_alike(values), number)
        if one is not None:
            return s.substitute(one, {number: index[dim]})
    value = values[-1]
    for k in reversed(range(len(values) - 1)):
        value = s.where(s.eq(index[dim], k), values[k], value)
    return value


def _pad(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    source, pads, *_ = arguments_of(node, "self", "pad")
    options = [*arguments(node)[2:], *node.kwargs.values()]  # constant_pad_nd has no mode
    mode = next((o for o in options if isinstance(o, str)), "constant")
    value = next((o for o in options if o is not None and not isinstance(o, str)), 0)
    if mode != "constant":
        return None
    shape = shape_of(source)
    position = list(index)
    ok: Expr = Const(True, BOOL)
    for k in range(len(pads) // 2):
        dim = len(index) - 1 - k
        position[dim] = s.sub(index[dim], size_expr(pads[2 * k]))
        ok = s.and_(ok, s.ge(position[dim], 0), s.lt(position[dim], shape[dim]))
    facts = s.assume(ok)
    dtype = kind_of(dtype_of(node))
    fill = s.cast(lift.scalar(value, dtype), dtype)
    at = [clamped(s.under(p, facts), d) for p, d in zip(position, shape)]
    return s.where(ok, _guarded(lift, source, at, facts), fill)


def _block_diag(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """Matrices along the diagonal, zeros elsewhere."""
    tensors = arguments(node)[0]
    if any(len(shape_of(t)) != 2 for t in tensors):
        return None
    value = s.cast(Const(0), kind_of(dtype_of(node)))
    rows: list[Expr] = [Const(0)]
    columns: list[Expr] = [Const(0)]
    for t in tensors:
        rows.append(s.add(rows[-1], shape_of(t)[0]))
        columns.append(s.add(columns[-1], shape_of(t)[1]))
    for k in reversed(range(len(tensors))):
        (y, x), (height, width) = index, shape_of(tensors[k])
        down, right = s.sub(y, rows[k]), s.sub(x, columns[k])
        inside = s.and_(s.ge(down, 0), s.lt(down, height), s.ge(right, 0), s.lt(right, width))
        facts = s.assume(inside)
        at = (clamped(s.under(down, facts), height), clamped(s.under(right, facts), width))
        value = s.where(inside, _guarded(lift, tensors[k], at, facts), value)
    return value


def _diag_embed(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    """Vectors on a diagonal of matrices, zeros elsewhere."""
    source, offset, a, b = arguments_of(node, "self", "offset", "dim1", "dim2", offset=0, dim1=-2, dim2=-1)
    a, b = dimension(a, len(index)), dimension(b, len(index))
    row, column = index[a], index[b]
    on = s.eq(s.sub(column, row), Const(offset))
    facts = s.assume(on)
    place = clamped(s.under(row if offset >= 0 else column, facts), shape_of(source)[-1])
    rest = [x for k, x in enumerate(index) if k not in (a, b)]
    value = _guarded(lift, source, (*rest, place), facts)
    return s.where(on, value, s.cast(Const(0), kind_of(dtype_of(node))))


def _diagonal_scatter(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    """A tensor with another one on a diagonal of its matrices."""
    source, new, offset, a, b = arguments_of(
        node, "self", "src", "offset", "dim1", "dim2", offset=0, dim1=0, dim2=1
    )
    a, b = dimension(a, len(index)), dimension(b, len(index))
    row, column = index[a], index[b]
    on = s.eq(s.sub(column, row), Const(offset))
    facts = s.assume(on)
    place = clamped(s.under(row if offset >= 0 else column, facts), shape_of(new)[-1])
    rest = [x for k, x in enumerate(index) if k not in (a, b)]
    return s.where(on, _guarded(lift, new, (*rest, place), facts), lift.at(source, index))


@dataclass(frozen=True)
class _Stroke:
    """One write to a part of a tensor: `new` at `at` where `inside`, where some positions of the tensor are known."""

    inside: Expr
    new: fx.Node
    at: Index
    known: tuple[Standing, ...]


def _stroke(lift: Lifter, node: fx.Node, index: Index) -> _Stroke:
    """What `x[.., start:end:step] = y` or `x[.., k] = y` writes, seen at one position of x.

    A write to a view of a view is a scatter into a scatter: one stroke, where both conditions hold.
    """
    source, new, dim, start, end, step = arguments_of(node, "self", "src", "dim", "start", "end", "step", dim=0, step=1)
    dim = dimension(dim, len(index))
    size = shape_of(source)[dim]
    at: Index
    known: tuple[Standing, ...] = ()
    if op_name(node) == "select_scatter":
        seen = start_of(start, size)
        known = (Standing(source, dim, seen, index[dim]),)
        inside = s.eq(index[dim], seen)
        at = index[:dim] + index[dim + 1 :]
    else:
        first, by = s.minimum(start_of(start, size), size), size_expr(step)
        last = size if end is None else s.minimum(start_of(end, size), size)
        ahead = s.sub(index[dim], first)
        inside = s.and_(s.ge(ahead, 0), s.lt(index[dim], last), s.eq(s.mod(ahead, by), 0))
        position = clamped(s.under(s.floordiv(ahead, by), s.assume(inside)), shape_of(new)[dim])
        at = (*index[:dim], position, *index[dim + 1 :])
    if op_name(new) in ("slice_scatter", "select_scatter"):
        viewed = arguments(new)[0]
        if op_name(viewed) in ("slice", "select") and arguments(viewed)[0] is source:
            lift.visited.update((new, viewed))  # seen through: both are read by nobody but this stroke, if by one
            inner = _stroke(lift, new, at)
            return _Stroke(s.and_(inside, inner.inside), inner.new, inner.at, (*known, *inner.known))
    return _Stroke(inside, new, at, known)


def _scatter(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    stroke = _stroke(lift, node, index)
    if stroke.inside == Const(True, BOOL):
        return lift.at(stroke.new, stroke.at)
    if stroke.inside == Const(False, BOOL):
        return lift.at(arguments(node)[0], index)
    source = arguments(node)[0]
    with _joining(lift, [stroke.new, source]):
        with _standing(lift, stroke.known):
            value = _guarded(lift, stroke.new, stroke.at, s.assume(stroke.inside))
        return _joined(lift, stroke.inside, value, lift.at(source, index))


@contextmanager
def _standing(lift: Lifter, known: tuple[Standing, ...]) -> Iterator[None]:
    before = lift.standing
    lift.standing = (*before, *known)
    try:
        yield
    finally:
        lift.standing = before


def _copied(lift: Lifter, node: fx.Node, index: Index) -> Expr:
    """x.copy_(y), out of place: y, broadcast."""
    return s.cast(lift.broadcast(arguments(node)[1], index), kind_of(dtype_of(node)))


def _put(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """x[.., mask] = number, which is masked_fill, and x[.., 3, [1, 5]] = number at places that are known now."""
    source, places, new, adds = arguments_of(node, "self", "indices", "values", "accumulate", accumulate=False)
    dims = [dim for dim, place in enumerate(places) if place is not None]
    if adds or not dims or any(size != Const(1) for size in shape_of(new)):
        return None
    first = places[dims[0]]
    if len(dims) == 1 and dtype_of(first) == BOOL:
        inside: Expr | None = lift.at(first, index[dims[0] : dims[0] + len(shape_of(first))])
    else:
        inside = _is_among(lift, [places[dim] for dim in dims], [shape_of(source)[dim] for dim in dims])
        axes: dict[Expr, Expr] = {Axis(f"dim{k}", shape_of(source)[dim]): index[dim] for k, dim in enumerate(dims)}
        inside = None if inside is None else s.substitute(inside, axes)
    if inside is None:
        return None
    kind = kind_of(dtype_of(node))
    number = lift.at(new, [Const(0)] * len(shape_of(new)))
    return s.where(inside, s.cast(number, kind), lift.at(source, index))


def _is_among(lift: Lifter, places: list[fx.Node], sizes: list[Expr]) -> Expr | None:
    """Whether a position is one of those that index tensors of known values give, as a function of the dimensions."""
    known = [lift.known.constant(place) for place in places]
    values = [value for value in known if value is not None and value.dtype == torch.int64]
    lengths = [int(size.value) for size in sizes if isinstance(size, Const)]
    if len(values) < len(places) or len(lengths) < len(sizes) or math.prod(lengths) > _TABLE:
        return None
    table = torch.zeros(lengths, dtype=torch.bool)
    try:
        table[tuple(values)] = True
    except (IndexError, RuntimeError):
        return None
    return constant_form(table)


_TABLE = 1 << 20  # elements of a table that is written to tell which places are meant


JOINS: dict[str, Handler] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat), **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "stack": _stack, "block_diag": _block_diag, "diag_embed": _diag_embed, "copy": _copied, "index_put": _put,
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter), "diagonal_scatter": _diagonal_scatter,
}  # fmt: skip
