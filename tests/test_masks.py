"""Tile states, key bounds and never-empty proofs against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus import simplify as s
from refocus.evaluate import size_of
from refocus.ir import BOOL, FALSE, INT, TRUE, Axis, Const, Expr, Load, Sym
from refocus.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    TileMap,
    block_lists,
    classify,
    first_query,
    key_bounds,
    last_query,
    never_empty,
    tile_states,
)

Positions = tuple[Tensor, Tensor, Tensor, Tensor]  # b, h, i, j, broadcasting against each other
BATCH, HEADS = 2, 3


@dataclass
class Space:
    """Axes b, h, i, j and random tensors over them; the lengths are constants or symbols."""

    n: int
    m: int
    symbolic: bool
    seed: int

    def __post_init__(self) -> None:
        ns, ms = (Sym("n", 1), Sym("m", 1)) if self.symbolic else (Const(self.n), Const(self.m))
        self.sizes = {ns: self.n, ms: self.m} if self.symbolic else {}
        self.b, self.h = Axis("b", Const(BATCH)), Axis("h", Const(HEADS))
        self.i, self.j = Axis("i", ns), Axis("j", ms)
        g = torch.Generator().manual_seed(self.seed)
        n, m = self.n, self.m
        length = max(n, m)
        self.tensors = {
            "doc": torch.randint(0, 2, (BATCH, length), generator=g).cumsum(-1),
            "kind": torch.randint(0, 3, (BATCH, length), generator=g, dtype=torch.int32),
            "keep": torch.rand(BATCH, m, generator=g) < 0.7,
            "lengths": torch.randint(1, m + 1, (BATCH,), generator=g),
            "reach": torch.randint(0, 9, (HEADS,), generator=g),
            "rank": torch.randn(BATCH, length, generator=g),
            "dense": torch.rand(BATCH, 1, n + 2, m + 1, generator=g) < torch.tensor([0.97, 0.03]).reshape(2, 1, 1, 1),
            "blocks": torch.rand(HEADS, (n + 3) // 4, (m + 7) // 8, generator=g) < 0.5,
            "bias": torch.randn(m, n, generator=g),
            "route": torch.randint(0, (m + 3) // 4, (BATCH, (n + 3) // 4), generator=g),
        }

    @property
    def positions(self) -> Positions:
        grid = [torch.arange(k) for k in (BATCH, HEADS, self.n, self.m)]
        return tuple(torch.meshgrid(*grid, indexing="ij"))  # type: ignore[return-value]

    def classify(self, mask: Expr, block_q: int, block_k: int) -> TileMap:
        return classify(mask, (self.b, self.h), self.i, self.j, block_q, block_k, self.tensors, self.sizes)


Predicate = tuple[Expr, Callable[[Space, Positions], Tensor]]


def absolute(a: Expr) -> Expr:
    return s.call("abs", a, dtype=INT)


def leaf(space: Space, kind: str, a: int, w: int) -> Predicate:
    """One predicate by name, as an expression and as plain tensor code. `a` is any small number, `w` a positive one."""
    b, h, i, j = space.b, space.h, space.i, space.j
    t = space.tensors

    def load(name: str, *index: Expr | int, dtype: str = INT) -> Load:
        return Load(name, tuple(Const(x) if isinstance(x, int) else x for x in index), dtype)

    table: dict[str, Callable[[], Predicate]] = {
        "causal": lambda: (s.le(j, s.add(i, a)), lambda _, p: p[3] <= p[2] + a),
        "aligned": lambda: (s.le(s.add(j, i.size), s.add(i, j.size)), lambda x, p: p[3] + x.n <= p[2] + x.m),
        "window": lambda: (s.lt(s.sub(i, j), w), lambda _, p: p[2] - p[3] < w),
        "band": lambda: (s.le(absolute(s.sub(i, j)), a), lambda _, p: (p[2] - p[3]).abs() <= a),
        "dilated": lambda: (s.eq(s.mod(s.sub(i, j), w), a % w), lambda _, p: (p[2] - p[3]) % w == a % w),
        "dilated range": lambda: (s.le(s.mod(s.sub(i, j), w), a), lambda _, p: (p[2] - p[3]) % w <= a),
        "same block": lambda: (s.eq(s.floordiv(i, w), s.floordiv(j, w)), lambda _, p: p[2] // w == p[3] // w),
        "shifted block": lambda: (
            s.eq(s.floordiv(s.add(i, a), w), s.floordiv(j, w)), lambda _, p: (p[2] + a) // w == p[3] // w,
        ),
        "block causal": lambda: (s.le(s.floordiv(j, w), s.floordiv(i, w)), lambda _, p: p[3] // w <= p[2] // w),
        "block distance": lambda: (
            s.le(s.floordiv(s.sub(i, j), w), a), lambda _, p: (p[2] - p[3]).div(w, rounding_mode="floor") <= a,
        ),
        "prefix": lambda: (s.lt(j, a), lambda _, p: p[3] < a),
        "scaled": lambda: (s.le(s.mul(2, j), s.add(s.mul(3, i), a)), lambda _, p: 2 * p[3] <= 3 * p[2] + a),
        "rows": lambda: (s.le(a, i), lambda _, p: p[2] >= a),
        "stride": lambda: (s.eq(s.mod(j, w), a % w), lambda _, p: p[3] % w == a % w),
        "map rows": lambda: (
            s.le(absolute(s.sub(s.floordiv(i, w), s.floordiv(j, w))), a),
            lambda _, p: (p[2] // w - p[3] // w).abs() <= a,
        ),
        "map columns": lambda: (
            s.le(absolute(s.sub(s.mod(i, w), s.mod(j, w))), a), lambda _, p: (p[2] % w - p[3] % w).abs() <= a,
        ),
        "head window": lambda: (s.le(s.sub(i, j), s.mul(w, h)), lambda _, p: p[2] - p[3] <= w * p[1]),
        "sum": lambda: (s.le(s.add(i, j), s.add(a, s.floordiv(i, w))), lambda _, p: p[2] + p[3] <= a + p[2] // w),
        "corner": lambda: (
            s.lt(s.minimum(i, j), a), lambda _, p: torch.minimum(p[2], p[3]) < a,
        ),
        "far corner": lambda: (s.le(s.maximum(s.sub(i, w), j), a + w), lambda _, p: torch.maximum(p[2] - w, p[3]) <= a + w),
        "product": lambda: (s.le(s.mul(i, j), w * w), lambda _, p: p[2] * p[3] <= w * w),
        "saw": lambda: (s.le(s.sub(i, s.mul(w, s.floordiv(i, w))), j), lambda _, p: p[2] % w <= p[3]),
        "choice": lambda: (
            s.le(s.where(s.le(j, i), s.add(j, a), s.mul(2, i)), Const(w)),
            lambda _, p: torch.where(p[3] <= p[2], p[3] + a, 2 * p[2]) <= w,
        ),
        "reach": lambda: (
            s.le(s.sub(i, j), load("reach", h)), lambda _, p: p[2] - p[3] <= t["reach"][p[1]],
        ),
        "lengths": lambda: (s.lt(j, load("lengths", b)), lambda _, p: p[3] < t["lengths"][p[0]]),
        "document": lambda: (
            s.eq(load("doc", b, i), load("doc", b, j)), lambda _, p: t["doc"][p[0], p[2]] == t["doc"][p[0], p[3]],
        ),
        "document order": lambda: (
            s.le(load("doc", b, j), s.add(load("doc", b, i), 1)),
            lambda _, p: t["doc"][p[0], p[3]] <= t["doc"][p[0], p[2]] + 1,
        ),
        "kind": lambda: (
            s.eq(load("kind", b, i, dtype="int32"), load("kind", b, j, dtype="int32")),
            lambda _, p: t["kind"][p[0], p[2]] == t["kind"][p[0], p[3]],
        ),
        "keep": lambda: (load("keep", b, j, dtype=BOOL), lambda _, p: t["keep"][p[0], p[3]]),
        "xor": lambda: (
            s.xor(load("keep", b, j, dtype=BOOL), s.le(j, i)), lambda _, p: t["keep"][p[0], p[3]] != (p[3] <= p[2]),
        ),
        "rank": lambda: (
            s.call("le", load("rank", b, i, dtype="float32"), load("rank", b, j, dtype="float32"), dtype=BOOL),
            lambda _, p: t["rank"][p[0], p[2]] <= t["rank"][p[0], p[3]],
        ),
        "threshold": lambda: (
            s.call("lt", Const(0.0, "float32"), load("rank", b, j, dtype="float32"), dtype=BOOL),
            lambda _, p: t["rank"][p[0], p[3]] > 0,
        ),
        "dense": lambda: (load("dense", b, 0, s.add(i, 2), j, dtype=BOOL), lambda _, p: t["dense"][p[0], 0, p[2] + 2, p[3]]),
        "dense shared": lambda: (
            load("dense", 0, 0, i, s.add(j, 1), dtype=BOOL), lambda _, p: t["dense"][0, 0, p[2], p[3] + 1],
        ),
        "bias": lambda: (
            s.call("lt", Const(-1.0, "float32"), load("bias", j, i, dtype="float32"), dtype=BOOL),
            lambda _, p: t["bias"][p[3], p[2]] > -1,
        ),
        "blocks": lambda: (
            load("blocks", h, s.floordiv(i, 4), s.floordiv(j, 8), dtype=BOOL),
            lambda _, p: t["blocks"][p[1], p[2] // 4, p[3] // 8],
        ),
        "route": lambda: (
            s.eq(load("route", b, s.floordiv(i, 4)), s.floordiv(j, 4)),
            lambda _, p: t["route"][p[0], p[2] // 4] == p[3] // 4,
        ),
    }
    return table[kind]()


KINDS = [
    "causal", "aligned", "window", "band", "dilated", "dilated range", "same block", "shifted block", "block causal",
    "block distance", "prefix", "scaled", "rows", "stride", "map rows", "map columns", "head window", "sum", "corner",
    "far corner", "product", "saw", "choice", "reach", "lengths", "document", "document order", "kind", "keep", "xor",
    "rank", "threshold", "dense", "dense shared", "bias", "blocks", "route",
]  # fmt: skip
CLOSED = KINDS[: KINDS.index("reach")]


def predicates(space: Space, kinds: list[str]) -> st.SearchStrategy[Predicate]:
    leaves = st.builds(
        leaf, st.just(space), st.sampled_from(kinds), st.integers(-3, 24), st.integers(1, 12)
    )

    def join(op: str, parts: list[Predicate]) -> Predicate:
        build = s.and_ if op == "and" else s.or_
        run = torch.logical_and if op == "and" else torch.logical_or
        return build(*(e for e, _ in parts)), lambda x, p: run(parts[0][1](x, p), parts[-1][1](x, p))

    def negate(part: Predicate) -> Predicate:
        return s.not_(part[0]), lambda x, p: ~part[1](x, p)

    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(join, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=2)),
            st.builds(negate, inner),
        ),
        max_leaves=4,
    )


@st.composite
def masked_spaces(draw: st.DrawFn, kinds: list[str]) -> tuple[Space, Predicate]:
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        m = n
    space = Space(n, m, draw(st.booleans()), draw(st.integers(0, 1000)))
    return space, draw(predicates(space, kinds))


def truth(space: Space, predicate: Predicate, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """The dense mask [b, h, i, j], and the best possible states [b, h, query tiles, key tiles]."""
    dense = predicate[1](space, space.positions)
    rows = [dense[..., q : q + block_q, :] for q in range(0, space.n, block_q)]
    tiles = [[r[..., k : k + block_k].flatten(2) for k in range(0, space.m, block_k)] for r in rows]
    best = [torch.stack([t.all(-1).int() + t.any(-1).int() for t in row], -1) for row in tiles]
    return dense, torch.stack(best, -2)


def spread(space: Space, found: TileMap) -> Tensor:
    """A tile map over all batch axes."""
    shape = [size if axis in found.axes else 1 for axis, size in ((space.b, BATCH), (space.h, HEADS))]
    return found.state.reshape(*shape, *found.state.shape[-2:]).expand(BATCH, HEADS, -1, -1)


quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(masked_spaces(KINDS), st.sampled_from([1, 3, 4, 8, 16, 64]), st.sampled_from([1, 4, 5, 8, 32]))
def test_states_are_proofs(case: tuple[Space, Predicate], block_q: int, block_k: int) -> None:
    space, predicate = case
    found = space.classify(predicate[0], block_q, block_k)
    _, best = truth(space, predicate, block_q, block_k)
    state = spread(space, found)
    assert found.state.dtype == torch.int8 and state.shape == best.shape
    wrong = (state != PARTIAL) & (state != best)
    assert not wrong.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symbolic", [False, True])
def test_each_kind(kind: str, symbolic: bool) -> None:
    for (n, m), (a, w), (block_q, block_k) in itertools.product(
        [(33, 33), (16, 40), (1, 7)], [(0, 4), (5, 7)], [(8, 8), (16, 4), (64, 64)]
    ):
        space = Space(n, m, symbolic, seed=n)
        predicate = leaf(space, kind, a, w)
        state = spread(space, space.classify(predicate[0], block_q, block_k))
        _, best = truth(space, predicate, block_q, block_k)
        assert not ((state != PARTIAL) & (state != best)).any()
        assert kind in LOSSY or torch.equal(state.int(), best)


# Where interval arithmetic may give up: the sides share an axis, or values skip about inside their interval.
LOSSY = {"map columns", "product", "choice", "kind", "xor", "route"}


def standard_masks() -> dict[str, tuple[Space, Predicate]]:
    """What is common is classified without loss: causal, window, blocks, documents, prefix, strides and dense."""
    space = Space(40, 40, symbolic=False, seed=3)
    space.tensors["doc"] = torch.arange(6).repeat_interleave(torch.tensor([5, 1, 9, 14, 3, 8])).expand(2, 40)

    def both(*names: tuple[str, int, int]) -> Predicate:
        parts = [leaf(space, *name) for name in names]
        return s.and_(*(e for e, _ in parts)), lambda x, p: torch.stack([f(x, p) for _, f in parts]).all(0)

    masks = {
        "causal": both(("causal", 0, 1)),
        "offset causal": both(("causal", 5, 1)),
        "window": both(("causal", 0, 1), ("window", 0, 11)),
        "two-sided window": both(("band", 6, 1)),
        "block diagonal": both(("same block", 0, 8)),
        "finer blocks": both(("same block", 0, 4)),
        "coarser blocks": both(("same block", 0, 16)),
        "block causal": both(("block causal", 0, 4)),
        "causal blocks": both(("causal", 0, 1), ("same block", 0, 8)),
        "documents": both(("document", 0, 1)),
        "causal documents": both(("causal", 0, 1), ("document", 0, 1)),
        "padding": both(("lengths", 0, 1)),
        "causal padding": both(("causal", 0, 1), ("lengths", 0, 1)),
        "strided": both(("stride", 2, 5)),
        "wide dilation": both(("dilated", 0, 12)),
        "head windows": both(("causal", 0, 1), ("head window", 0, 6)),
        "dense": both(("dense", 0, 1)),
        "selected blocks": both(("blocks", 0, 1)),
    }
    return {name: (space, predicate) for name, predicate in masks.items()}


@pytest.mark.parametrize("name", standard_masks())
def test_standard_masks_are_tight(name: str) -> None:
    space, predicate = standard_masks()[name]
    found = space.classify(predicate[0], 8, 8)
    _, best = truth(space, predicate, 8, 8)
    assert torch.equal(spread(space, found).int(), best)


def test_the_map_has_only_the_axes_it_needs() -> None:
    space = Space(40, 40, symbolic=False, seed=0)
    assert space.classify(leaf(space, "causal", 0, 1)[0], 8, 8).axes == ()
    assert space.classify(leaf(space, "document", 0, 1)[0], 8, 8).axes == (space.b,)
    assert space.classify(leaf(space, "reach", 0, 1)[0], 8, 8).state.shape == (HEADS, 5, 5)
    assert space.classify(TRUE, 8, 8).counts() == (0, 0, 25)
    assert space.classify(FALSE, 8, 8).counts() == (25, 0, 0)


def test_lists_and_ranges() -> None:
    space = Space(32, 32, symbolic=False, seed=0)
    found = space.classify(s.and_(leaf(space, "causal", 0, 1)[0], leaf(space, "window", 0, 17)[0]), 8, 8)
    assert found.counts() == (16 - 4 - 3 - 2, 6, 3)
    assert [found.key_range(k) for k in range(4)] == [(0, 1), (0, 2), (0, 3), (1, 4)]
    lists = found.lists()
    assert lists.partial_count.tolist() == [1, 1, 2, 2] and lists.full_count.tolist() == [0, 1, 1, 1]
    assert lists.partial_index.dtype == torch.int32
    assert lists.partial_index[3, :2].tolist() == [1, 3] and lists.full_index[3, :1].tolist() == [2]
    assert found.by_key().partial_count.tolist() == [2, 2, 1, 1]
    empty = space.classify(s.le(s.add(space.i, 8), space.j), 8, 8)
    assert empty.key_range(3) == (0, 0)


def test_extreme_ids_do_not_overflow() -> None:
    """Padding ids at the ends of int64: a difference would wrap around."""
    space = Space(16, 16, symbolic=False, seed=0)
    ends = torch.iinfo(torch.int64)
    space.tensors["doc"] = torch.tensor([ends.min] * 8 + [ends.max] * 8).expand(2, 16)
    same = leaf(space, "document", 0, 1)[0]
    assert space.classify(same, 8, 8).state[0].tolist() == [[FULL, EMPTY], [EMPTY, FULL]]


def test_not_a_number_proves_nothing_wrong() -> None:
    space = Space(16, 16, symbolic=False, seed=0)
    space.tensors["rank"] = torch.full((2, 16), float("nan"))
    for flip in (False, True):
        mask = leaf(space, "rank", 0, 1)[0]
        assert (space.classify(s.not_(mask) if flip else mask, 8, 8).state != (EMPTY if flip else FULL)).all()


def test_computed_floats_prove_nothing() -> None:
    space = Space(16, 16, symbolic=False, seed=0)
    near = s.call("exp", Load("rank", (space.b, space.j), "float32"), dtype="float32")
    mask = s.call("le", near, Const(1e30, "float32"), dtype=BOOL)
    assert (space.classify(mask, 8, 8).state == PARTIAL).all()


TRACED = [
    "causal", "window", "dilated", "same block", "map rows", "map columns", "stride", "document", "keep", "aligned",
    "lengths", "reach", "head window", "route", "threshold",
]  # fmt: skip


@pytest.mark.parametrize("kind", TRACED)
def test_traced_with_symbolic_sizes(kind: str) -> None:
    space = Space(40, 40, symbolic=True, seed=0)
    mask = leaf(space, kind, 3, 4)[0]
    n, m = space.i.size, space.j.size
    names = sorted({load.tensor for load in mask.loads})
    assert isinstance(n, Sym) and isinstance(m, Sym)

    def states(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        sizes = {n: x.shape[0], m: x.shape[0]}
        state = tile_states(mask, (space.b, space.h), space.i, space.j, 8, 8, dict(zip(names, tensors)), sizes)
        return (state, *block_lists(state))

    def arguments(length: int) -> list[Tensor]:
        other = Space(length, length, symbolic=True, seed=length)
        return [torch.zeros(length), *(other.tensors[name] for name in names)]

    traced = make_fx(states, tracing_mode="symbolic")(*arguments(40))
    for length in (40, 51, 24):
        for got, want in zip(traced(*arguments(length)), states(*arguments(length)), strict=True):
            assert torch.equal(got, want)


def test_what_is_traced_compiles() -> None:
    space = Space(40, 40, symbolic=True, seed=0)
    mask = s.and_(leaf(space, "causal", 0, 1)[0], leaf(space, "document", 0, 1)[0])
    n, m = space.i.size, space.j.size

    def states(doc: Tensor) -> Tensor:
        sizes = {n: doc.shape[1], m: doc.shape[1]}
        return tile_states(mask, (space.b, space.h), space.i, space.j, 8, 8, {"doc": doc}, sizes)  # type: ignore[arg-type]

    def documents(length: int) -> Tensor:
        return Space(length, length, symbolic=True, seed=length).tensors["doc"]

    traced = make_fx(states, tracing_mode="symbolic")(documents(40))
    run = torch.compile(traced, backend="aot_eager", dynamic=True, fullgraph=True)
    for length in (40, 53):
        assert torch.equal(run(documents(length)), states(documents(length)))


# ------------------------------------------------------------------------------------------------ bounds of key loops


def value_at(space: Space, bound: Expr, first: int, last: int, b: int, h: int) -> int:
    """A bound as a number."""
    at = {first_query(space.i): first, last_query(space.i): last, space.b: b, space.h: h}
    at = {axis: Const(x) for axis, x in at.items()}
    loads = {load: Const(int(space.tensors[load.tensor][b if space.b in load.axes else h])) for load in bound.loads}
    return size_of(s.substitute(s.substitute(bound, loads), at), space.sizes)  # type: ignore[arg-type]


@quick
@given(masked_spaces([*CLOSED, "reach", "lengths", "keep"]), st.sampled_from([3, 4, 8, 16, 64]))
def test_key_bounds_hold(case: tuple[Space, Predicate], block_q: int) -> None:
    space, predicate = case
    bounds = key_bounds(predicate[0], space.i, space.j, loads=True)
    assert (bounds.full_lo is None) == (bounds.full_hi is None)
    dense = predicate[1](space, space.positions)
    keys = torch.arange(space.m)
    batches = [range(size if axis in predicate[0].axes else 1) for axis, size in ((space.b, BATCH), (space.h, HEADS))]
    for b, h, first in itertools.product(*batches, range(0, space.n, block_q)):
        last = min(first + block_q, space.n) - 1
        run = dense[b, h, first : last + 1]
        ends = [None if e is None else value_at(space, e, first, last, b, h) for e in
                (bounds.lo, bounds.hi, bounds.full_lo, bounds.full_hi)]  # fmt: skip
        lo, hi, full_lo, full_hi = ends
        assert not run[:, (keys < (lo or 0)) | (keys >= (space.m if hi is None else hi))].any()
        if full_lo is not None and full_hi is not None:
            assert run[:, (keys >= full_lo) & (keys < full_hi)].all()


def shown(mask: Expr, space: Space, loads: bool = False) -> list[str | None]:
    from refocus.notation import notation

    found = key_bounds(mask, space.i, space.j, loads)
    ends = (found.lo, found.hi, found.full_lo, found.full_hi)
    return [None if end is None else notation(end) for end in ends]


def test_key_bounds_of_standard_masks() -> None:
    space = Space(64, 64, symbolic=False, seed=0)
    i, j = space.i, space.j
    causal = s.le(j, i)
    window = s.and_(causal, s.lt(s.sub(i, j), 16))
    first, last = "q_first", "q_last"
    assert shown(TRUE, space) == [None, None, "0", "64"]
    assert shown(causal, space) == [None, f"{last} + 1", "0", f"{first} + 1"]
    assert shown(window, space) == [f"max(0, {first} - 15)", f"{last} + 1", f"max(0, {last} - 15)", f"{first} + 1"]
    assert shown(leaf(space, "block causal", 0, 8)[0], space) == [
        None, f"8*({last}//8) + 8", "0", f"8*({first}//8) + 8"
    ]  # fmt: skip
    assert shown(leaf(space, "same block", 0, 8)[0], space) == [
        f"8*({first}//8)", f"8*({last}//8) + 8", f"8*({last}//8)", f"8*({first}//8) + 8"
    ]  # fmt: skip
    assert shown(s.or_(causal, s.lt(j, 10)), space) == [None, f"max(10, {last} + 1)", "0", f"max(10, {first} + 1)"]
    lengths = leaf(space, "lengths", 0, 1)[0]
    assert shown(lengths, space) == [None] * 4
    assert shown(lengths, space, loads=True) == [None, "min(64, lengths[b])", "0", "min(64, lengths[b])"]
    cached = Space(64, 80, symbolic=True, seed=0)
    assert shown(leaf(cached, "aligned", 0, 1)[0], cached) == [
        None, f"{last} + m - n + 1", "0", f"{first} + m - n + 1"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ rows that keep a key


@quick
@given(masked_spaces(KINDS))
def test_never_empty_is_a_proof(case: tuple[Space, Predicate]) -> None:
    space, predicate = case
    if never_empty(predicate[0], (space.b, space.h), space.i, space.j):
        assert predicate[1](space, space.positions).any(-1).all()


def test_never_empty_of_standard_masks() -> None:
    for symbolic in (False, True):
        space = Space(64, 64, symbolic, seed=0)
        # With symbolic sizes only one symbol for both lengths tells that the diagonal is in range.
        i, j = space.i, Axis("j", space.i.size)
        batch = (space.b, space.h)
        causal = s.le(j, i)
        yes = [
            TRUE,
            causal,
            s.and_(causal, s.lt(s.sub(i, j), 16)),
            s.eq(s.floordiv(i, 8), s.floordiv(j, 8)),
            s.and_(causal, s.eq(s.mod(s.sub(i, j), 4), 0)),
            s.or_(s.lt(j, 1), Load("keep", (space.b, j), BOOL)),
            s.eq(Load("doc", (space.b, i), INT), Load("doc", (space.b, j), INT)),
            s.and_(causal, s.eq(Load("doc", (space.b, i), INT), Load("doc", (space.b, j), INT))),
            s.eq(s.mod(j, 8), 0),
            s.and_(s.eq(s.mod(j, 8), 0), causal),
            s.le(absolute(s.sub(s.mod(i, 8), s.mod(j, 8))), 1),
        ]
        for mask in yes:
            assert never_empty(mask, batch, i, j), mask
        no = [FALSE, s.lt(j, i), s.and_(causal, Load("keep", (space.b, j), BOOL)), s.le(s.add(i, j), 5)]
        for mask in no:
            assert not never_empty(mask, batch, i, j), mask
    shorter = Space(16, 64, symbolic=False, seed=0)
    assert never_empty(leaf(shorter, "aligned", 0, 1)[0], (), shorter.i, shorter.j)
    # No simple witness, but small enough to try: query i keeps j == 3 * i + 1.
    tripled = s.eq(shorter.j, s.add(s.mul(3, shorter.i), 1))
    assert never_empty(tripled, (), shorter.i, shorter.j)
