"""The axes of a result, and which axis of a product with values is the key and which counts as the query."""

from __future__ import annotations

from dataclasses import dataclass, field

from refocus import simplify as s
from refocus.bands import unflatten
from refocus.ir import Axis, Const, Expr


@dataclass
class Axes:
    """The result's axes: one list for each dimension of the root (split axes make several)."""

    dims: list[list[Axis]] = field(default_factory=list)

    def index(self) -> tuple[Expr, ...]:
        out = []
        for axes in self.dims:
            flat: Expr = Const(0)
            for axis in axes:
                flat = s.add(s.mul(flat, axis.size), axis)
            out.append(flat)
        return tuple(out)

    def flat(self) -> list[Axis]:
        return [a for axes in self.dims for a in axes]


def one_key(keys: list[Axis], *indices: tuple[Expr, ...]) -> tuple[Axis, tuple[Expr, ...], tuple[Expr, ...]]:
    """Keys in rows and columns of a window are one axis: the softmax runs over all of them."""
    key = keys[0] if len(keys) == 1 else Axis(f"{keys[0].name}.all", s.mul(*(a.size for a in keys)))
    if len(keys) > 1:
        places = dict[Expr, Expr](zip(keys, unflatten(key, [a.size for a in keys])))
        indices = tuple(tuple(s.substitute(e, places) for e in index) for index in indices)
    return key, *indices  # type: ignore[return-value]


def cut_axes(free: list[Axis], weights_index: tuple[Expr, ...], key: Axis) -> set[Axis]:
    """The axis that counts as the query for the cut. Heads that share one value head are not in the values either, but
    keys may depend on them; the row of the weights matrix is preferred, then the longest axis, then the last."""
    at = next((k for k, e in enumerate(weights_index) if e == key), 0)
    row = (
        weights_index[at - 1].axes
        if at > 0
        else weights_index[at + 1].axes
        if at + 1 < len(weights_index)
        else frozenset()
    )

    def rank(axis: Axis) -> tuple[bool, float, int]:
        size = float(axis.size.value) if isinstance(axis.size, Const) else float("inf")
        return axis in row, size, free.index(axis)

    if not row and at > 0:
        return set()  # one query: what is left are heads, of which the keys may have their own
    return {max(free, key=rank)} if free else set()
