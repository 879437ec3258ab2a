"""Where a product with values reads its operands: a contraction, or one that is spelled as multiply and sum."""

from __future__ import annotations

from torch import fx

from refocus.convolutions import CHANNEL_PRODUCT
from refocus.facts import contraction_operands
from refocus.ir import Axis, Const, Expr
from refocus.lift import Lifter, op_name
from refocus.lift_reductions import CONTRACTIONS, operands_at
from refocus.sizes import shape_of


def adds(root: fx.Node) -> bool:
    """Whether an operation adds something to what it multiplies."""
    if op_name(root) in ("linear", CHANNEL_PRODUCT):
        return (root.args[2] if len(root.args) > 2 else root.kwargs.get("bias")) is not None
    return op_name(root) in ("baddbmm", "addmm")


def reads_of(
    lifter: Lifter, root: fx.Node, index: tuple[Expr, ...], weights: int = 0
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, tuple[Expr, ...]]]] | None:
    """What a product sums over, and where it reads its operands, for one element of it. `weights`: which of these are
    the weights."""
    if op_name(root) in CONTRACTIONS:
        return None if adds(root) else operands_at(lifter, root, index)
    if op_name(root) in ("mul", "multiply"):
        return _of_one_key(lifter, root, index, weights)
    # sum(p * v): a contraction spelled as multiply and sum
    product = root.args[0]
    dims = root.args[1] if len(root.args) > 1 else None
    keep = bool(root.args[2]) if len(root.args) > 2 else bool(root.kwargs.get("keepdim", False))
    assert isinstance(product, fx.Node)
    lifter.visited.add(product)  # weights are led through it to the sum
    shape = shape_of(product)
    gone = {int(d) % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))}  # type: ignore[union-attr, arg-type, call-overload]
    axes = {d: lifter.bound(root, d, shape[d]) for d in sorted(gone)}
    rest = iter(x for k, x in enumerate(index) if not keep or k not in axes)
    position = tuple(axes[d] if d in axes else next(rest) for d in range(len(shape)))
    return tuple(axes.values()), [(o, aligned(o, position)) for o in contraction_operands(root)]


def aligned(node: fx.Node, position: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """Where an operand is read for an element of what it is broadcast to."""
    own = shape_of(node)
    tail = position[len(position) - len(own) :]
    return tuple(Const(0) if d == Const(1) else x for d, x in zip(own, tail))


def _of_one_key(
    lifter: Lifter, root: fx.Node, index: tuple[Expr, ...], weights: int
) -> tuple[tuple[Axis, ...], list[tuple[fx.Node, tuple[Expr, ...]]]]:
    """The weights of one key times its value: a sum over the dimension of size one that the weights have for the key,
    where the value has one of its own."""
    operands: list[fx.Node] = list(root.args[:2])  # type: ignore[arg-type]
    reads = [(n, aligned(n, index)) for n in operands]
    own = shape_of(operands[weights])
    wide = [k for k, (d, e) in enumerate(zip(own, shape_of(root)[-len(own) :])) if d == Const(1) != e]
    if not wide:
        return (), reads
    axis = lifter.bound(root, 0, Const(1))
    at = list(reads[weights][1])
    at[wide[-1]] = axis
    reads[weights] = (operands[weights], tuple(at))
    return (axis,), reads
