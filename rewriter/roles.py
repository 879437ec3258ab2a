"""The axes of a result, and which axis of a product with values is the key and which counts as the query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import combinations

from refocus import simplify as s
from refocus.bands import unflatten
from refocus.ir import Axis, Call, Const, Expr
from refocus.polynomial import to_poly


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

    def split(self, values: Iterable[Expr], among: Set[Axis], read: str = "mod") -> Axes | None:
        """The axes, the first of those `among` them that `values` read as a % c, or a // c ("floordiv"), taken as two:
        a // c and a % c."""
        by: dict[Expr, dict[Expr, None]] = {}
        for value in values:
            for node in value.walk():
                if isinstance(node, Call) and node.op == read:
                    by.setdefault(node.args[0], {})[node.args[1]] = None
        for d, group in enumerate(self.dims):
            for k, axis in enumerate(group):
                for inner in by.get(axis, ()) if axis in among else ():
                    halves = halved(axis, inner)
                    if halves is not None:
                        dims = [list(g) for g in self.dims]
                        dims[d] = [*group[:k], *halves, *group[k + 1 :]]
                        return Axes(dims)
        return None


@dataclass(frozen=True)
class Summed:
    """What a product of weights and values sums over: the key, and axes over which results are summed (`heads`)."""

    key: Axis
    heads: tuple[Axis, ...]
    weights: tuple[Expr, ...]
    values: tuple[Expr, ...]


def all_keys(
    summed: tuple[Axis, ...], weights: tuple[Expr, ...], values: tuple[Expr, ...], heads: tuple[Axis, ...] = ()
) -> Summed | None:
    """All but `heads` are keys. Keys in rows and columns of a window are one axis: the softmax runs over them."""
    keys = [a for a in summed if a not in heads]
    if not keys or not all(_reads(weights, a) and (a in heads or _reads(values, a)) for a in summed):
        return None
    if len(keys) == 1:
        return Summed(keys[0], heads, weights, values)
    key = Axis(f"{keys[0].name}.all", s.mul(*(a.size for a in keys)))
    places = dict[Expr, Expr](zip(keys, unflatten(key, [a.size for a in keys])))
    return Summed(key, heads, _at(weights, places), _at(values, places))


def keys_and_heads(
    summed: tuple[Axis, ...], weights: tuple[Expr, ...], values: tuple[Expr, ...], lifted: Callable[[], Expr]
) -> Iterator[Summed]:
    """Some axes are the key, and the rest are heads whose results are summed. `lifted`: the weights there, which tell
    in what parts they read an axis that is both.

        out[i,d] = sum_(h,j) p[h,i,j] v[h,j,d]                           j is the key
        out[i,d] = sum_c p[c // n, i, c % n] v[c,d]                      c % n is the key
    """
    for count in range(1, len(summed)):
        for heads in combinations(summed, count):
            found = all_keys(summed, weights, values, heads)
            if found is not None:
                yield found
    if len(summed) > 1:
        return
    for both in summed:
        by = (n.args[1] for n in lifted().walk() if isinstance(n, Call) and n.op == "mod" and n.args[0] == both)
        for inner in dict.fromkeys(by):
            halves = halved(both, inner)
            if halves is not None:
                head, key = halves
                place: dict[Expr, Expr] = {both: s.add(s.mul(head, key.size), key)}
                yield Summed(key, (head,), _at(weights, place), _at(values, place))


def halved(axis: Axis, inner: Expr) -> tuple[Axis, Axis] | None:
    """An axis a as (a // inner, a % inner), where that divides it."""
    outer = s.floordiv(axis.size, inner)
    parts = any(isinstance(a, Call) for m in to_poly(outer) for a in m)
    if outer == Const(1) or parts or s.mul(outer, inner) != axis.size:
        return None
    return Axis(f"{axis.name}a", outer), Axis(f"{axis.name}b", inner)


def _reads(index: tuple[Expr, ...], axis: Axis) -> bool:
    return any(axis in e.axes for e in index)


def _at(index: tuple[Expr, ...], places: dict[Expr, Expr]) -> tuple[Expr, ...]:
    return tuple(s.substitute(e, places) for e in index)


def cut_axes(free: list[Axis], weights_index: tuple[Expr, ...], key: Axis) -> set[Axis]:
    """The axis that counts as the query for the cut. Heads that share one value head are not in the values either, but
    keys may depend on them; the row of the weights matrix is preferred, then the longest axis, then the last."""
    at = next((k for k, e in enumerate(weights_index) if e == key), 0)
    before = weights_index[at - 1].axes if at > 0 else frozenset()
    after = weights_index[at + 1].axes if at + 1 < len(weights_index) else frozenset()
    row = before or (after if at == 0 else after & frozenset(free))  # of one head, or sample, transposed

    def rank(axis: Axis) -> tuple[bool, float, int]:
        size = float(axis.size.value) if isinstance(axis.size, Const) else float("inf")
        return axis in row, size, free.index(axis)

    if not row and at > 0:
        return set()  # one query: what is left are heads, of which the keys may have their own
    return {max(free, key=rank)} if free else set()
