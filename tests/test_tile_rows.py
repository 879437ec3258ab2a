"""Tile maps by ranges of query tiles: what they decide, and what they keep."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.measure import peak_memory
from refocus import simplify as s
from refocus.evaluate import Scope, arange_env, evaluate
from refocus.ir import BOOL, INT, Axis, Const, Load
from refocus.masks import EMPTY, PARTIAL, TileMap, Tiling, count_tiles, tile_rows, tile_states
from refocus.polynomial import to_poly
from refocus.refine import leaves_open
from tests.attended import tile_states as tile_states_of
from tests.mask_cases import CLOSED, KINDS, Space, leaf, spread, truth


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_of_rows_make_up_the_map(kind: str) -> None:
    space = Space(75, 40, symbolic=kind in CLOSED, seed=1)
    mask, run = leaf(space, kind, 3, 5)
    arguments = (mask, space.tiling(8, 8))
    whole = space.classify(mask, 8, 8)
    parts = list(tile_rows(*arguments, at_once=11))
    assert len(parts) > 3 and [first for first, _ in parts] == sorted({first for first, _ in parts})
    joined = torch.cat([state for _, state in parts], -2)
    _, best = truth(space, (mask, run), 8, 8)
    got = spread(space, TileMap(joined, whole.axes, 8, 8))
    assert not ((got != PARTIAL) & (got != best)).any()
    # A range can only tell more than the whole does by intervals alone; the map knows what a look at pairs adds.
    rough = tile_states(*arguments)
    assert not ((rough != PARTIAL) & (joined != rough)).any()
    assert not ((joined != PARTIAL) & (joined != whole.state)).any()
    assert count_tiles(*arguments) == whole.counts()
    # Each range may look at pairs of its own.
    looked = torch.cat([state for _, state in tile_rows(*arguments, at_once=11, budget=1 << 22)], -2)
    assert torch.equal(spread(space, TileMap(looked, whole.axes, 8, 8)), best)


def test_one_linear_form_leaves_no_tile_open() -> None:
    space = Space(75, 40, symbolic=False, seed=1)
    causal, near = s.le(space.j, space.i), s.le(s.sub(space.i, space.j), 9)
    assert not leaves_open(causal, space.i, space.j) and not leaves_open(s.and_(causal, near), space.i, space.j)
    assert not leaves_open(s.le(space.j, 7), space.i, space.j)
    for other in (s.le(space.j, 30), s.le(s.add(space.i, space.j), 20), s.eq(s.mod(s.sub(space.i, space.j), 3), 0)):
        assert leaves_open(s.and_(causal, other), space.i, space.j)


def test_conditions_on_whole_tiles_leave_none_open() -> None:
    i, j = Axis("i", Const(256)), Axis("j", Const(256))
    table = Load("chosen", (s.floordiv(i, 64), Const(0)), "int64")
    chosen, causal = s.eq(s.floordiv(j, 32), table), s.le(j, i)
    for mask in (chosen, s.and_(chosen, causal), s.or_(chosen, s.eq(s.floordiv(i, 64), s.floordiv(j, 32)))):
        assert not leaves_open(mask, i, j, (64, 32)) and not leaves_open(mask, i, j, (32, 16))
        assert leaves_open(mask, i, j) and leaves_open(mask, i, j, (64, 64)) and leaves_open(mask, i, j, (48, 32))
    assert leaves_open(s.or_(chosen, causal), i, j, (64, 32))


@pytest.mark.parametrize("name", ["neighbours", "windows by head", "chosen blocks", "chosen tiles"])
def test_tiles_are_counted_in_less_memory_than_a_map_or_what_it_reads(name: str) -> None:
    n, side = 1 << 17, 1 << 8
    h, i, j = Axis("h", Const(8)), Axis("i", Const(n)), Axis("j", Const(n))
    tensors: dict[str, Tensor] = {}
    if name == "neighbours":
        apart = [s.sub(at(i, side), at(j, side)) for at in (s.floordiv, s.mod)]
        mask = s.and_(*(s.le(s.call("abs", x, dtype=INT), 3) for x in apart))
    elif name == "windows by head":
        mask = s.and_(s.le(j, i), s.lt(s.sub(i, j), s.mul(128, s.add(h, 1))))
    else:
        size = 32 if name == "chosen blocks" else 128
        side = n // size  # 128 or 8 MiB
        tensors["kept"] = torch.rand(8, side, side, generator=torch.Generator().manual_seed(0)) < 0.1
        mask = Load("kept", (h, s.floordiv(i, size), s.floordiv(j, size)), BOOL)
    tiling = Tiling((h,), i, j, 128, 128, tensors, {})
    rows = tile_rows(mask, tiling, at_once=1 << 15)
    next(rows)
    gc.disable()  # nothing must wait for it
    try:
        peak = peak_memory(lambda: list(zip(range(30), rows)), device=torch.device("cpu"))
    finally:
        gc.enable()
    assert peak is None or peak < 24 << 20


def test_ranges_leave_nothing_in_the_simplifier() -> None:
    """What is written once for each range would stay in its memory: tens of megabytes at a million tokens."""
    h, i, j = Axis("h", Const(8)), Axis("i", Const(1 << 14)), Axis("j", Const(1 << 14))
    near = s.lt(s.call("abs", s.sub(s.floordiv(i, 64), s.floordiv(j, 64)), dtype=INT), s.mul(3, s.add(h, 1)))
    rows = tile_rows(s.and_(s.le(j, i), near), Tiling((h,), i, j, 64, 64, {}, {}), at_once=1 << 12, budget=1 << 20)
    next(rows)
    kept = to_poly.cache_info().currsize
    assert len(list(rows)) > 100 and to_poly.cache_info().currsize == kept


@pytest.mark.parametrize("blocks", [(4, 8), (16, 8), (12, 32), (2, 4), (6, 5)])
@pytest.mark.parametrize("at_once", [1 << 18, 7])
def test_blocks_that_do_not_begin_where_tiles_do(blocks: tuple[int, int], at_once: int) -> None:
    h, i, j = Axis("h", Const(2)), Axis("i", Const(75)), Axis("j", Const(90))
    kept = torch.rand(2, 30, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    for ahead in (0, 1, 4, 32):
        row = s.add(s.floordiv(s.add(i, ahead), 4), 1)
        mask = Load("kept", (h, row, s.floordiv(s.add(j, 2 * ahead), 8)), BOOL)
        tiling = Tiling((h,), i, j, *blocks, {"kept": kept}, {})
        found = torch.cat([state for _, state in tile_rows(mask, tiling, at_once=at_once)], -2)
        dense = evaluate(mask, arange_env((h, i, j), {}), tiling.tensors, {})
        assert torch.equal(found, tile_states_of(dense, *blocks))


def test_some_of_the_rows_in_ranges() -> None:
    i, j = Axis("i", Const(75)), Axis("j", Const(40))
    doc = torch.arange(75) // 9
    mask = s.and_(s.le(j, i), s.eq(Load("doc", (i,), INT), Load("doc", (j,), INT)), s.le(s.mod(i, 8), 5))
    tiling = Tiling((), i, j, 8, 8, {"doc": doc}, {})
    whole, some = tile_states(mask, tiling), replace(tiling, rows=(16, 50))
    assert torch.equal(tile_states(mask, some)[:-1], whole[2:6])  # the last tile is cut
    ranges = list(tile_rows(mask, some, at_once=11))
    assert len(ranges) > 2 and torch.equal(torch.cat([state for _, state in ranges]), tile_states(mask, some))


def test_what_one_axis_decides_together_is_not_taken_apart() -> None:
    """An absolute value of queries alone is exact over a tile; its two signs, one by one, are not."""
    i, j = Axis("i", Const(64)), Axis("j", Const(64))
    apart = s.call("abs", s.sub(s.mul(30, s.mod(i, 2)), 15), dtype=INT)
    mask = s.le(s.add(apart, j), 20)
    found = tile_states(mask, Tiling((), i, j, 8, 2, {}, {}))
    assert torch.equal(found, tile_states_of(evaluate(mask, arange_env((i, j), {}), {}, {}), 8, 2))


def test_a_scope_is_gone_when_nobody_has_it() -> None:
    i = Axis("i", Const(8))
    gc.disable()
    try:
        outer = Scope({i: torch.arange(8)}, {}, {})
        inner = outer.child({i: torch.arange(4)})
        assert [len(x.tensor(s.add(s.floordiv(i, 2), 1))) for x in (outer, inner)] == [8, 4]
        left = [weakref.ref(x) for x in (outer, inner)]
        del outer, inner
        assert [x() for x in left] == [None, None]
    finally:
        gc.enable()


def test_a_million_tokens_in_little_memory() -> None:
    n = 1 << 20
    i, j = Axis("i", Const(n)), Axis("j", Const(n))
    mask = s.and_(s.le(j, i), s.lt(s.sub(i, j), 4096))
    seen = 0
    for _, state in tile_rows(mask, Tiling((), i, j, 1024, 1024, {}, {}), at_once=1 << 14):
        assert state.numel() <= 1 << 14
        seen += int((state != EMPTY).sum())
    assert seen == 1024 * 5 - 10
