"""Operations that sum over an axis: contractions become `Dot`, softmax becomes exp(x) / sum exp(x).

The maximum that a stable softmax subtracts is left out here: it cancels over the reals.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from refocus import simplify as s
from refocus.convolutions import CHANNEL_PRODUCT, groups_of
from refocus.ir import BOOL, INT, Axis, Call, Const, Expr, Reduce
from refocus.lift import Handler, Index, Lifter, arguments, contract, dtype_of, kind_of, op_name
from refocus.sizes import shape_of


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return arguments(node)[position] if len(arguments(node)) > position else node.kwargs.get(name, default)


# ---------------------------------------------------------------------------------------------------- reductions


def reduced_axis(lift: Lifter, node: fx.Node, which: int, size: Expr, index: Index) -> Axis:
    """The axis a reduction runs over. At a position without key axis it is a key axis itself (row maximum, row sum);
    at one that has a key it is the width of a dot product written as multiply and sum."""
    axis = lift.bound(node, which, size)
    if not any(entry.axes & lift.key_axes for entry in index) and lift.sums_keys(node):
        lift.key_axes.add(axis)
    return axis


def reduce_over(
    lift: Lifter, node: fx.Node, source: fx.Node, dims: list[int] | None, keep: bool, index: Index, op: str, dtype: str
) -> Expr | None:
    shape = shape_of(source)
    rank = len(shape)
    gone = sorted({d % rank for d in (range(rank) if not dims else dims)})
    axes = {d: reduced_axis(lift, node, d, shape[d], index) for d in gone}
    rest = iter(x for k, x in enumerate(index) if not keep or k not in axes)
    position = tuple(axes[d] if d in axes else next(rest) for d in range(rank))
    product = op == "sum" and op_name(source) in ("mul", "multiply") and kind_of(dtype) not in (INT, BOOL)
    if product and not any(a in lift.key_axes for a in axes.values()):
        # multiply and sum: a product of queries and keys, though what is multiplied may lie outside of the region
        lift.visited.add(source)
        factors = [lift.broadcast(a, position, dtype) for a in arguments(source)[:2]]
        return contract(tuple(axes.values()), [f for x in factors for f in _factors(x)], lift, dtype)
    return reduction(lift, op, tuple(axes.values()), lift.at(source, position), dtype)


def reduction(lift: Lifter, op: str, axes: tuple[Axis, ...], body: Expr, dtype: str) -> Expr | None:
    if op == "sum" and not any(a in lift.key_axes for a in axes):
        return contract(axes, _factors(body), lift, dtype)
    for axis in reversed(axes):
        body = Reduce(op, axis, body, dtype)
    return body


def _factors(body: Expr) -> list[Expr]:
    if isinstance(body, Call) and body.op == "mul" and body.is_float:
        return [f for a in body.args for f in _factors(a)]
    return [body]


# A mask may sum over coordinates, or ask whether any of a few conditions holds; longer sums are vectors.
_UNROLLED = 8


def _unrolled(lift: Lifter, node: fx.Node, index: Index, op: str) -> Expr | None:
    dims, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
    dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(len(shape_of(arguments(node)[0]))))
    return unrolled(lift, node, arguments(node)[0], dims[0], keep, index, op) if len(dims) == 1 else None


def unrolled(
    lift: Lifter, node: fx.Node, source: fx.Node, dim: int, keep: bool, index: Index, op: str
) -> Expr | None:
    """A short reduction of positions written out: (dy, dx).square().sum(-1). None where tensors have a say: what they
    decide is read, not worked out again for every pair."""
    shape = shape_of(source)
    dim = dim % len(shape)
    size = shape[dim]
    if not isinstance(size, Const) or not 0 < size.value <= _UNROLLED:
        return None
    after = index[dim + 1 :] if keep else index[dim:]
    parts = [lift.at(source, (*index[:dim], Const(k), *after)) for k in range(int(size.value))]
    if any(p.loads or p.is_float for p in parts):
        return None
    if kind_of(dtype_of(node)) == BOOL:
        parts = [s.as_bool(p) for p in parts]
        return s.or_(*parts) if op in ("any", "max") else s.and_(*parts) if op in ("all", "min", "prod") else None
    total = s.cast(parts[0], INT)
    for part in parts[1:]:
        total = s.call(_JOINED[op], total, s.cast(part, INT), dtype=INT)
    return total


_JOINED = {"sum": "add", "max": "max", "min": "min", "prod": "mul"}


def _deciding(op: str) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        return _unrolled(lift, node, index, op)

    return handler


def _reducing(op: str) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        kind = kind_of(dtype_of(node))
        if node in lift.known.pure:
            found = _unrolled(lift, node, index, op)
            if found is not None:
                return found
        if kind in (INT, BOOL):
            return None
        dims, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
        dims = [dims] if isinstance(dims, int) else list(dims) if dims else None
        return reduce_over(lift, node, arguments(node)[0], dims, keep, index, op, kind)

    return handler


def _mean(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    total = _reducing("sum")(lift, node, index)
    if total is None:
        return None
    count: Expr = Const(1)
    shape = shape_of(arguments(node)[0])
    dims = _argument(node, 1, "dim")
    for d in [dims] if isinstance(dims, int) else dims or range(len(shape)):
        count = s.mul(count, shape[d])
    return s.call("div", total, count, dtype=kind_of(dtype_of(node)))


def _norm(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    """The sum of absolute values; no other norm."""
    order = _argument(node, 1, "p" if op_name(node) == "norm" else "ord")
    dims, keep = _argument(node, 2, "dim"), _argument(node, 3, "keepdim")
    kind = kind_of(dtype_of(node))
    if order not in (1, 1.0) or dims is None or node.kwargs.get("dtype") is not None:
        return None
    dims = [dims] if isinstance(dims, int) else list(dims)
    total = reduce_over(lift, node, arguments(node)[0], dims, bool(keep), index, "sum", kind)
    if not isinstance(total, Reduce):
        return None
    body = total.body if is_nonnegative(total.body) else s.call("abs", total.body, dtype=kind)
    return Reduce("sum", total.axis, body, kind) if len(dims) == 1 else None


def is_nonnegative(e: Expr) -> bool:
    """Whether a value is seen to be no less than zero, or no number."""
    if isinstance(e, Const):
        return e.value >= 0
    if isinstance(e, Reduce):
        return e.op in ("sum", "max", "min", "prod") and is_nonnegative(e.body)
    if not isinstance(e, Call):
        return False
    if e.op in ("mul", "div", "add", "min", "detach"):
        return all(map(is_nonnegative, e.args))
    if e.op == "where":
        return all(map(is_nonnegative, e.args[1:]))
    return e.op in ("exp", "exp2", "sigmoid", "relu", "square", "abs", "sqrt", "softplus")


def _logsumexp(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    dims, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
    shape = shape_of(arguments(node)[0])
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1:
        return None
    dim = dims[0] % len(shape)
    axis = reduced_axis(lift, node, dim, shape[dim], index)
    position = list(index)
    if keep:
        position[dim] = axis
    else:
        position.insert(dim, axis)
    kind = kind_of(dtype_of(node))
    body = s.call("exp", lift.at(arguments(node)[0], position), dtype=kind)
    return s.call("log", Reduce("sum", axis, body, kind), dtype=kind)


def _softmax(log: bool) -> Handler:
    def handler(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
        source, dim = arguments(node)[0], _argument(node, 1, "dim")
        kind = kind_of(dtype_of(node))
        rank = len(index)
        if rank == 0:
            return None
        dim = dim % rank
        axis = lift.bound(node, 0, shape_of(source)[dim])
        lift.key_axes.add(axis)
        here = lift.at(source, index)
        along = lift.at(source, (*index[:dim], axis, *index[dim + 1:]))
        total = Reduce("sum", axis, s.call("exp", along, dtype=kind), kind)
        if log:
            return s.call("sub", here, s.call("log", total, dtype=kind), dtype=kind)
        return s.call("div", s.call("exp", here, dtype=kind), total, dtype=kind)

    return handler


# ---------------------------------------------------------------------------------------------------- contractions


def operands_at(
    lift: Lifter, node: fx.Node, index: Index
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, Index]]] | None:
    """The summed axes of a contraction and where its operands are read for one element of the result."""
    name = op_name(node)
    if name in ("matmul", "mm", "bmm", "mv", "dot", "linalg_matmul"):
        return _matmul_at(lift, node, arguments(node)[0], arguments(node)[1], index)
    if name in ("baddbmm", "addmm", "addbmm"):
        return None if name == "addbmm" else _matmul_at(lift, node, arguments(node)[1], arguments(node)[2], index)
    if name == "linear":
        axis = lift.bound(node, 0, shape_of(arguments(node)[1])[-1])
        weight: Index = (index[-1], axis) if len(shape_of(arguments(node)[1])) == 2 else (axis,)
        lead = index[:-1] if len(shape_of(arguments(node)[1])) == 2 else index
        return (axis,), [(arguments(node)[0], (*lead, axis)), (arguments(node)[1], weight)]
    if name == "einsum":
        return _einsum_at(lift, node, index)
    if name in ("tensordot", "inner"):
        return _tensordot_at(lift, node, index)
    if name == CHANNEL_PRODUCT:
        return _convolution_at(lift, node, index)
    return None


def _convolution_at(lift: Lifter, node: fx.Node, index: Index) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, Index]]]:
    """Channels are summed over, those of the group that the channel of the result is in."""
    source, weight = arguments(node)[:2]
    shape = shape_of(weight)
    axis = lift.bound(node, 0, shape[1])
    spatial = len(shape) - 2
    channel = index[-spatial - 1]
    own: Expr = axis
    if groups_of(node) > 1:
        own = s.add(s.mul(s.floordiv(channel, s.floordiv(shape[0], groups_of(node))), shape[1]), axis)
    lead, places = index[: -spatial - 1], index[-spatial:]
    return (axis,), [(source, (*lead, own, *places)), (weight, (channel, axis, *(Const(0) for _ in places)))]


def _tensordot_at(
    lift: Lifter, node: fx.Node, index: Index
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, Index]]] | None:
    """Pairs of dimensions are summed over; the others are those of the left operand, then those of the right."""
    left, right, *dims = arguments(node)
    if not dims and not (shape_of(left) and shape_of(right)):
        return None  # an inner product with a number multiplies
    pairs = [[d % len(shape_of(x)) for d in ds] for x, ds in zip((left, right), dims or ([-1], [-1]))]
    sizes = [[shape_of(x)[d] for d in ds] for x, ds in zip((left, right), pairs)]
    if sizes[0] != sizes[1]:
        return None
    axes = tuple(lift.bound(node, k, size) for k, size in enumerate(sizes[0]))
    rest = iter(index)
    reads = []
    for operand, ds in zip((left, right), pairs):
        at = dict(zip(ds, axes))
        reads.append((operand, tuple(at[d] if d in at else next(rest) for d in range(len(shape_of(operand))))))
    return axes, reads


def _matmul_at(
    lift: Lifter, node: fx.Node, left: fx.Node, right: fx.Node, index: Index
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, Index]]]:
    ls, rs = shape_of(left), shape_of(right)
    axis = lift.bound(node, 0, ls[-1])
    rest = list(index)
    column = (rest.pop(),) if len(rs) > 1 else ()
    row = (rest.pop(),) if len(ls) > 1 else ()

    def batch(shape: Index, keep: int) -> Index:
        lead = shape[: len(shape) - keep]
        return tuple(Const(0) if d == Const(1) else x for d, x in zip(lead, rest[len(rest) - len(lead) :]))

    return (axis,), [
        (left, (*batch(ls, len(row) + 1), *row, axis)),
        (right, (*batch(rs, len(column) + 1), axis, *column)),
    ]


def _einsum_at(
    lift: Lifter, node: fx.Node, index: Index
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, Index]]] | None:
    equation, operands = arguments(node)[0], list(arguments(node)[1])
    inputs, labels = parse_einsum(equation, [len(shape_of(o)) for o in operands])
    at: dict[str, Expr] = dict(zip(labels, index))
    summed: list[Axis] = []
    reads: list[tuple[fx.Node, Index]] = []
    sizes: dict[str, Expr] = {}
    for operand, names in zip(operands, inputs):
        for label, size in zip(names, shape_of(operand)):
            if sizes.get(label, Const(1)) == Const(1):
                sizes[label] = size
    for operand, names in zip(operands, inputs):
        if len(set(names)) != len(names):
            return None  # a diagonal
        for label in names:
            if label not in at:
                axis = lift.bound(node, len(summed), sizes[label])
                at[label] = axis
                summed.append(axis)
        reads.append((operand, tuple(Const(0) if d == Const(1) else at[n] for n, d in zip(names, shape_of(operand)))))
    return tuple(summed), reads


def parse_einsum(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Labels of each operand and of the result; the dimensions of `...` are named "...0", "...1" from the right."""
    left, _, right = equation.replace(" ", "").partition("->")

    def spread(term: str, rank: int) -> list[str]:
        head, dots, tail = term.partition("...")
        if not dots:
            return list(term)
        extra = rank - len(head) - len(tail)
        return [*head, *(f"...{extra - 1 - k}" for k in range(extra)), *tail]

    inputs = [spread(t, r) for t, r in zip(left.split(","), ranks)]
    if "->" in equation:
        widest = max((sum(n.startswith("...") for n in names) for names in inputs), default=0)
        output = spread(right, widest + len(right.replace("...", "")))
    else:
        flat = [n for names in inputs for n in names]
        dots = sorted({n for n in flat if n.startswith("...")}, reverse=True)
        output = [*dots, *sorted(n for n in set(flat) if flat.count(n) == 1 and not n.startswith("..."))]
    return inputs, output


def _contraction(lift: Lifter, node: fx.Node, index: Index) -> Expr | None:
    found = operands_at(lift, node, index)
    if found is None:
        return None
    axes, reads = found
    kind = kind_of(dtype_of(node))
    value = contract(axes, [lift.at(n, i) for n, i in reads], lift, kind)
    if value is None:
        return None
    name = op_name(node)
    if name in ("baddbmm", "addmm"):
        options: dict[str, Any] = dict(node.kwargs)
        beta, alpha = options.get("beta", 1), options.get("alpha", 1)
        if alpha != 1:
            value = s.call("mul", value, lift.factor(alpha, kind), dtype=kind)
        if beta != 0:
            extra = lift.broadcast(arguments(node)[0], index)
            if beta != 1:
                extra = s.call("mul", extra, lift.factor(beta, kind), dtype=kind)
            value = s.call("add", value, extra, dtype=kind)
    if name == "linear" and _argument(node, 2, "bias") is not None:
        value = s.call("add", value, lift.broadcast(_argument(node, 2, "bias"), index), dtype=kind)
    if name == CHANNEL_PRODUCT and _argument(node, 2, "bias") is not None:
        channel = index[1 - len(shape_of(arguments(node)[1]))]
        value = s.call("add", value, lift.at(_argument(node, 2, "bias"), (channel,)), dtype=kind)
    return value


CONTRACTIONS = (
    "matmul", "mm", "bmm", "mv", "dot", "baddbmm", "addmm", "linear", "einsum", "linalg_matmul", "tensordot", "inner",
    CHANNEL_PRODUCT,
)  # fmt: skip

REDUCTIONS: dict[str, Handler] = {
    "sum": _reducing("sum"), "amax": _reducing("max"), "amin": _reducing("min"), "mean": _mean, "logsumexp": _logsumexp,
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm),
    "any": _deciding("any"), "all": _deciding("all"), "prod": _deciding("prod"),
    **dict.fromkeys(("softmax", "_softmax", "_safe_softmax", "special_softmax"), _softmax(False)),
    **dict.fromkeys(("log_softmax", "_log_softmax", "special_log_softmax"), _softmax(True)),
    **dict.fromkeys(CONTRACTIONS, _contraction),
}  # fmt: skip
