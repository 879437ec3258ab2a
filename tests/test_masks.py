"""Tile states, key bounds and never-empty proofs against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus import simplify as s
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.ir import BOOL, FALSE, INT, TRUE, Axis, Const, Expr, Load, Sym
from refocus.masks import (
    EMPTY,
    FULL,
    PARTIAL,
    Tiling,
    block_lists,
    first_query,
    key_bounds,
    last_query,
    never_empty,
    tile_states,
)
from refocus.notation import notation
from refocus.refine import refine
from refocus.tile_grid import TileGrid, is_exact
from tests.attended import tile_states as tile_states_of
from tests.mask_cases import (
    BATCH,
    CLOSED,
    HEADS,
    KINDS,
    Predicate,
    Space,
    absolute,
    leaf,
    masked_spaces,
    spread,
    truth,
)

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


@quick
@given(masked_spaces(KINDS), st.sampled_from([1, 4, 8, 16, 64]), st.sampled_from([1, 5, 8, 32]))
def test_small_masks_are_classified_without_loss(case: tuple[Space, Predicate], block_q: int, block_k: int) -> None:
    """What intervals leave open is decided by looking, as long as that is little."""
    space, predicate = case
    if is_exact(predicate[0]):
        _, best = truth(space, predicate, block_q, block_k)
        assert torch.equal(spread(space, space.classify(predicate[0], block_q, block_k)).int(), best)


@pytest.mark.parametrize("budget", [0, 1 << 10, 1 << 16])
def test_a_budget_decides_some_tiles_and_never_one_wrong(budget: int) -> None:
    i, j = Axis("i", Const(192)), Axis("j", Const(192))
    steps = s.sub(s.floordiv(i, 3), s.floordiv(j, 3))
    mask = s.and_(s.eq(s.mod(i, 3), s.mod(j, 3)), s.lt(steps, 7), s.le(0, steps))
    tiling = Tiling((), i, j, 16, 16, {}, {})
    rough = tile_states(mask, tiling)
    found = refine(rough, mask, tiling, budget)
    best = tile_states_of(evaluate(mask, arange_env((i, j), {}), {}, {}), 16, 16)
    assert bool(((found == best) | (found == PARTIAL)).all())
    assert torch.equal(found, rough) == (budget == 0)
    assert torch.equal(found, best) == (budget == 1 << 16)


def test_rows_named_by_a_vector_are_bounded_by_what_they_hold() -> None:
    """order[segment[i], j] <= own[i]: the rows that the segments of a tile name, reduced over the tile's keys."""
    i, j = Axis("i", Const(64)), Axis("j", Const(48))
    segment = torch.arange(4).repeat_interleave(torch.tensor([10, 22, 2, 30]))
    order = torch.stack([torch.randperm(48) for _ in range(4)])
    own = torch.randint(0, 48, (64,))
    tensors = {"segment": segment, "order": order, "own": own}
    named = Load("segment", (i,), INT)
    read = TileGrid(Tiling((), i, j, 16, 16, tensors, {})).interval(Load("order", (named, j), INT))
    tiles = order[segment].unflatten(0, (4, 16)).unflatten(-1, (3, 16))
    assert torch.equal(read.lo, tiles.amin((1, 3))) and torch.equal(read.hi, tiles.amax((1, 3)))


def test_squares_of_differences_are_not_taken_apart() -> None:
    """(y - y')^2 + (x - x')^2, multiplied out by the canonical form, keeps its bounds."""
    i, j = Axis("i", Const(1024)), Axis("j", Const(1024))
    dy, dx = (s.sub(f(i, 32), f(j, 32)) for f in (s.floordiv, s.mod))
    circle = s.le(s.add(s.mul(dy, dy), s.mul(dx, dx)), 30)
    rough = tile_states(circle, Tiling((), i, j, 32, 32, {}, {}))
    rows = torch.arange(32)
    assert torch.equal(rough == EMPTY, (rows[:, None] - rows[None, :]).abs() > 5)


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
        state = tile_states(mask, Tiling((space.b, space.h), space.i, space.j, 8, 8, dict(zip(names, tensors)), sizes))
        return (state, *block_lists(state))

    def arguments(length: int) -> list[Tensor]:
        other = Space(length, length, symbolic=True, seed=length)
        return [torch.zeros(length), *(other.tensors[name] for name in names)]

    traced = make_fx(states, tracing_mode="symbolic")(*arguments(40))
    for length in (40, 51, 24):
        for got, want in zip(traced(*arguments(length)), states(*arguments(length)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_stays_on_the_device_of_the_tensors(kind: str) -> None:
    space = Space(40, 40, symbolic=False, seed=0)
    mask = leaf(space, kind, 3, 4)[0]
    tensors = {name: t.to("meta") for name, t in space.tensors.items()}
    state = tile_states(mask, Tiling((space.b, space.h), space.i, space.j, 8, 8, tensors, {}, "meta"))
    assert state.device.type == "meta"


def test_what_is_traced_compiles() -> None:
    space = Space(40, 40, symbolic=True, seed=0)
    mask = s.and_(leaf(space, "causal", 0, 1)[0], leaf(space, "document", 0, 1)[0])
    n, m = space.i.size, space.j.size

    def states(doc: Tensor) -> Tensor:
        sizes = {n: doc.shape[1], m: doc.shape[1]}
        return tile_states(mask, Tiling((space.b, space.h), space.i, space.j, 8, 8, {"doc": doc}, sizes))

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
