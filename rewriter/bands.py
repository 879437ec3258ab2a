"""Change of variables: a key axis that counts offsets becomes an axis over the tokens that it reaches.

    before   S[i, w] = q[i] . k[i + w - r] + bias[w],                       O[i] = softmax_w(S) . v[i + w - r]
    after    S[i, j] = q[i] . k[j] + bias[j - i + r]  where 0 <= j - i + r < W,   O[i] = softmax_j(S) . v[j]

However the copies were made (unfold, a gather at a table of neighbours, overlapping strides, slices of a padded
tensor), all that the lift leaves of them is the place where keys are read. Where that place is the query's own plus a
multiple of the offset, in each of one to three dimensions, distinct offsets are distinct tokens, and the sum over
offsets is one over tokens under a mask. Places that wrap around (i + w) mod n do as well; places that are clamped one
by one do not, for there one token is reached twice. Blocks of keys that were chosen before (the results of topk, which
are all different) are read where the token's block is one of them.

Keys read past the border are zeros in most models, and mostly take part in the softmax: then the tokens include the
border, as the padded tensor does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from refocus import simplify as s
from refocus.ir import TRUE, Axis, Call, Const, Dot, Expr, Load, rewrite
from refocus.lift_joins import clamped
from refocus.patterns.declined import Declined
from refocus.patterns.masking import separate_mask
from refocus.patterns.softmax import Softmax
from refocus.polynomial import from_poly, isolate, to_poly

Index = tuple[Expr, ...]
_Index = tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True)
class Reading:
    """Softmaxes over `key` with the `values` that they weigh; `free` are the axes of the result."""

    key: Axis
    values: Expr
    softs: tuple[Softmax, ...]
    free: tuple[Axis, ...]


@dataclass(frozen=True)
class Banded:
    """The same over tokens. The result is read at `places` of its axes, where queries of several axes became one."""

    reading: Reading
    places: dict[Axis, Expr]


@dataclass(frozen=True)
class Tensors:
    """What is known of loaded tensors: their shapes; and whether a load never gives one number twice along an axis
    (what topk or argsort returns)."""

    shape_of: Callable[[str], Index]
    distinct: Callable[[Load, Axis], bool]


@dataclass(frozen=True)
class _Offset:
    """Keys are read at base + step * digit, modulo `wrap` if there is one. `part`: where only x // d % m of the place x
    is decided here, (d, m)."""

    digit: Axis
    step: int
    base: Expr
    wrap: Expr | None = None
    part: tuple[int, int] | None = None

    @property
    def axes(self) -> frozenset[Axis]:
        return self.base.axes

    @property
    def by_token(self) -> bool:
        """Whether neighbouring queries read neighbouring keys, not blocks of queries blocks of keys."""
        return all(abs(c) == 1 for mono, c in to_poly(self.base).items() if mono)

    def over(self, queries: Mapping[Expr, Expr]) -> _Offset:
        return replace(self, base=s.substitute(self.base, queries))

    def reached(self, token: Expr) -> Expr:
        """Whether some digit reads this token."""
        gap = self._gap(token)
        last = s.mul(self.step, s.sub(self.digit.size, 1))
        fits = s.and_(s.le(0, gap), s.le(gap, last))
        return s.and_(fits, s.eq(s.mod(gap, self.step), 0)) if self.step > 1 else fits

    def digit_at(self, token: Expr) -> Expr:
        return s.floordiv(self._gap(token), self.step)

    def _gap(self, token: Expr) -> Expr:
        gap = s.sub(_part(token, self.part), self.base)
        return gap if self.wrap is None else s.mod(gap, self.wrap)


@dataclass(frozen=True)
class _Choice:
    """Keys are read at numbers that were chosen before, `chosen`, different ones for different digits."""

    digit: Axis
    chosen: Expr
    count: int
    part: tuple[int, int] | None = None
    by_token = False

    @property
    def axes(self) -> frozenset[Axis]:
        return self.chosen.axes - {self.digit}

    def over(self, queries: Mapping[Expr, Expr]) -> _Choice:
        return replace(self, chosen=s.substitute(self.chosen, queries))

    def reached(self, token: Expr) -> Expr:
        return s.or_(*self._hits(token))

    def digit_at(self, token: Expr) -> Expr:
        digit: Expr = Const(0)
        for number, hit in enumerate(self._hits(token)):
            digit = s.where(hit, Const(number), digit)
        return digit

    def _hits(self, token: Expr) -> list[Expr]:
        here = _part(token, self.part)
        return [s.eq(s.substitute(self.chosen, {self.digit: Const(k)}), here) for k in range(self.count)]


def _part(token: Expr, part: tuple[int, int] | None) -> Expr:
    return token if part is None else s.mod(s.floordiv(token, part[0]), part[1])


_Place = _Offset | _Choice
_MOST_CHOICES = 16


def to_tokens(reading: Reading, query_axes: frozenset[Axis], tensors: Tensors) -> Banded | Declined:
    """The reading over tokens, or why it has none. `query_axes`: what was taken for queries so far (the positions in
    a block)."""
    reading, conditional = _unguarded(reading)
    key, free = reading.key, reading.free
    loads = _key_loads(reading)
    indices = {_places_of(x, key, tensors.shape_of) for x in loads}
    if len(indices) != 1:
        return Declined("keys and values are read at different places")
    (index,) = indices
    digits, whole = _digits(key, tuple(entry for entry, _ in index))
    places: list[tuple[_Place, ...]] = []
    for entry, extent in index:
        found = _places(s.substitute(entry, {key: whole}), digits, extent, tensors)
        if found is None:
            return Declined("keys are not read at a query's own place plus an offset")
        places.append(found)
    if sorted(p.digit.name for ps in places for p in ps) != sorted(d.name for d in digits):
        return Declined("an offset does not decide which key is read")
    beside = frozenset().union(*(e.axes for x in loads for e in x.index if key not in e.axes))
    moving = [a for a in free if a not in beside and any(a in p.axes for ps in places for p in ps)]
    if not moving:
        return Declined("every query reads the same keys")
    # Padding that was written out is a condition on the place: then tokens run past both ends, unless none is kept.
    kept = s.assume(separate_mask(reading.softs[0].logits)[1]) if len(reading.softs) == 1 else {}
    conditional = conditional and not _all_inside(index, kept)
    low: list[Expr] = []
    sizes: list[Expr] = []
    for entry, extent in index:
        first, last = s.bounds(entry) if conditional else (0, 0)
        if first is None or last is None:
            return Declined("how far keys are read past the border is not known")
        low.append(Const(min(first, 0)))
        sizes.append(s.sub(s.maximum(last + 1, extent), low[-1]) if conditional else extent)
    by_token = all(p.by_token for ps in places for p in ps)
    queries = [a for a in free if a in moving or (not by_token and a in query_axes)]
    query = queries[0] if len(queries) == 1 else Axis("tokens", s.mul(*(a.size for a in queries)))
    token = Axis(f"{key.name}.token", s.mul(*sizes) if len(sizes) > 1 else sizes[0])
    to_query: dict[Expr, Expr] = {}
    if len(queries) > 1:
        to_query.update(zip(queries, unflatten(query, [a.size for a in queries])))
    at = tuple(s.add(x, first) for x, first in zip(unflatten(token, sizes), low))
    read_at = tuple(clamped(x, extent) for x, (_, extent) in zip(at, index)) if conditional else at
    placed = tuple((p.over(to_query), x) for ps, x in zip(places, at) for p in ps)
    change = _Change(key, whole, index, read_at, placed, to_query, tensors, kept)
    keep = s.and_(*(place.reached(x) for place, x in change.places))
    values = change(reading.values)
    softs = tuple(_masked(soft, change, keep) for soft in reading.softs)
    over = Reading(token, values, softs, (*(a for a in free if a not in queries), query))
    if any(not side.axes.isdisjoint((key, query, *queries)) for side in _sides(over)):
        return Declined("keys depend on the query by more than their place")
    return Banded(over, {} if len(queries) == 1 else {query: _flatten(queries)})


def _unguarded(reading: Reading) -> tuple[Reading, bool]:
    """Places as they are where a condition holds, for a load under it is kept in range where it does not; and whether
    there is one."""
    found: list[Expr] = []

    def visit(node: Expr) -> Expr | None:
        if not (isinstance(node, Call) and node.op == "where" and isinstance(node.args[1], Load)):
            return None
        condition, load, other = node.args
        facts = s.assume(condition)
        index = tuple(s.under(e, facts) if reading.key in e.axes else e for e in load.index)  # type: ignore[attr-defined]
        found.append(condition)
        return s.where(condition, Load(load.tensor, index, load.dtype), other)  # type: ignore[attr-defined]

    def side(value: Expr) -> Expr:
        return rewrite(value, visit, s.rebuild)

    def products(value: Expr) -> Expr:
        dots: dict[Expr, Expr] = {n: replace(n, key=side(n.key)) for n in value.walk() if isinstance(n, Dot)}
        return s.substitute(value, dots)

    softs = tuple(replace(soft, logits=products(soft.logits)) for soft in reading.softs)
    return replace(reading, values=side(reading.values), softs=softs), bool(found)


def _all_inside(index: _Index, kept: s.Knowledge) -> bool:
    """Whether a mask keeps no key that is read past the border."""
    return all(s.under(s.and_(s.ge(e, 0), s.lt(e, extent)), kept) == TRUE for e, extent in index)


@dataclass(frozen=True)
class _Change:
    """Rewrites expressions over (queries, offsets) to ones over (query, tokens)."""

    key: Axis
    whole: Expr
    index: _Index
    at: Index
    places: tuple[tuple[_Place, Expr], ...]  # with the token's coordinate that each decides
    to_query: Mapping[Expr, Expr]
    tensors: Tensors
    kept: s.Knowledge  # what holds of the offsets that the mask keeps

    def __call__(self, value: Expr) -> Expr:
        digits: dict[Expr, Expr] = {p.digit: p.digit_at(token) for p, token in self.places}
        kept: dict[Expr, Expr] = {
            p.digit: s.minimum(s.maximum(digits[p.digit], 0), s.sub(p.digit.size, 1)) for p, _ in self.places
        }
        safe = {**self.to_query, self.key: s.substitute(self.whole, kept)}

        def visit(node: Expr) -> Expr | None:
            if isinstance(node, Axis):
                return self.whole if node == self.key else self.to_query.get(node, node)
            if isinstance(node, Load) and self.key in node.axes:
                if self.index in (self._places(node), self._places(s.under(node, self.kept))):
                    there = iter(self.at)
                    index = (next(there) if self.key in e.axes else s.substitute(e, self.to_query) for e in node.index)
                else:  # where no offset reaches a token nothing is kept, but something is read
                    index = (s.substitute(e, safe) for e in node.index)
                return Load(node.tensor, tuple(index), node.dtype)
            return None

        # First in digits, whose ranges are known: what is asked of one of them is then asked of it alone.
        return s.substitute(rewrite(value, visit, s.rebuild), digits)

    def _places(self, load: Expr) -> _Index | None:
        return _places_of(load, self.key, self.tensors.shape_of) if isinstance(load, Load) else None


def _masked(soft: Softmax, change: _Change, keep: Expr) -> Softmax:
    logits = change(soft.logits)
    return replace(
        soft,
        logits=s.where(keep, logits, Const(float("-inf"), logits.dtype)),
        extra=tuple(change(e) for e in soft.extra),
        gate=change(soft.gate),
        selected=change(soft.selected),
    )


def _sides(reading: Reading) -> list[Expr]:
    """The values, and what products of queries and keys have of keys."""
    dots = [n for soft in reading.softs for n in soft.logits.walk() if isinstance(n, Dot)]
    return [reading.values, *(dot.key for dot in dots)]


def _key_loads(reading: Reading) -> list[Load]:
    """What is read of keys and values at an offset."""
    found = dict.fromkeys(x for side in _sides(reading) for x in side.loads)
    return [x for x in found if x.is_float and reading.key in x.axes]


def _places_of(load: Load, key: Axis, shape_of: Callable[[str], Index]) -> _Index:
    """Where a load depends on the offset: those entries of its index, and how long their dimensions are."""
    return tuple((e, extent) for e, extent in zip(load.index, shape_of(load.tensor)) if key in e.axes)


def _digits(key: Axis, entries: Index) -> tuple[list[Axis], Expr]:
    """The key axis taken apart at the sizes by which places divide it, and put together again from its digits."""
    cuts = {1}
    for entry in entries:
        for node in entry.walk():
            if isinstance(node, Call) and node.op in ("floordiv", "mod") and node.args[0] == key:
                by = node.args[1]
                if isinstance(by, Const):
                    cuts.add(int(by.value))
    strides = sorted(cuts)
    sizes: list[Expr] = [Const(b // a) for a, b in pairwise(strides) if b % a == 0]
    if len(sizes) != len(strides) - 1:
        return [key], key
    last = s.floordiv(key.size, strides[-1])
    if s.mul(last, strides[-1]) != key.size:
        return [key], key
    digits = [Axis(f"{key.name}.{k}", size) for k, size in enumerate((*sizes, last))]
    return digits, s.add(*(s.mul(d, stride) for d, stride in zip(digits, strides)))


def _places(entry: Expr, digits: Sequence[Axis], extent: Expr, tensors: Tensors) -> tuple[_Place, ...] | None:
    """How the digits decide one dimension of the place: one digit as an offset or a choice, or a choice of blocks and
    an offset inside of them (64 * chosen[t] + u)."""
    mine = [d for d in digits if d in entry.axes]
    picked = [(d, x) for x in entry.loads for d in mine if d in x.axes]
    if not picked:
        offset = _offset(entry, mine, extent)
        return None if offset is None else (offset,)
    if len({x for _, x in picked}) != 1 or len(mine) > 2:
        return None
    digit, load = picked[0]
    slope, rest = isolate(to_poly(entry), load)
    if set(slope) != {()} or digit in from_poly(rest).axes or not isinstance(digit.size, Const):
        return None
    if digit.size.value > _MOST_CHOICES or not tensors.distinct(load, digit):
        return None
    count = int(digit.size.value)
    if len(mine) == 1:
        return (_Choice(digit, entry, count),)
    (inner,) = (d for d in mine if d != digit)
    block = slope[()]
    if inner.size != Const(block) or from_poly(rest) != inner or not isinstance(extent, Const) or extent.value % block:
        return None
    return (
        _Choice(digit, load, count, (block, int(extent.value) // block)),
        _Offset(inner, 1, Const(0), None, (1, block)),
    )


def _offset(entry: Expr, mine: Sequence[Axis], extent: Expr) -> _Offset | None:
    wrap = None
    if isinstance(entry, Call) and entry.op == "mod" and entry.args[1] == extent:
        entry, wrap = entry.args[0], extent
    if len(mine) != 1:
        return None
    slope, rest = isolate(to_poly(entry), mine[0])
    base = from_poly(rest)
    if set(slope) != {()} or slope[()] <= 0 or mine[0] in base.axes:
        return None
    if wrap is not None and (slope[()] != 1 or not s.is_nonneg(s.sub(wrap, mine[0].size))):
        return None
    return _Offset(mine[0], slope[()], base, wrap)


def _flatten(axes: Sequence[Axis]) -> Expr:
    flat: Expr = Const(0)
    for axis in axes:
        flat = s.add(s.mul(flat, axis.size), axis)
    return flat


def unflatten(flat: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    out: list[Expr] = []
    stride: Expr = Const(1)
    for k, size in enumerate(reversed(sizes)):
        digit = s.floordiv(flat, stride)
        out.append(digit if k == len(sizes) - 1 else s.mod(digit, size))
        stride = s.mul(stride, size)
    return out[::-1]
