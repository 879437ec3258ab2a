"""Lists of tiles for generated kernels: what is in them, and where they are used at all."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from refocus import simplify as s
from refocus.codegen import flash, flash_fit, tile_lists
from refocus.codegen.plan import Plan
from refocus.ir import BOOL, INT, Axis, Expr, Load, Operand, Region
from tests import region_cases as cases
from tests.mask_cases import KINDS, Space, leaf, spread, truth

PLAN = Plan("triton", block_q=8, block_k=8, listed=True)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_hold_the_tiles(kind: str) -> None:
    space = Space(40, 33, symbolic=False, seed=2)
    predicate = leaf(space, kind, 3, 5)
    region = Region(
        (space.b, space.h), space.i, space.j, (), Load("x", (space.i, space.j), "float32"), predicate[0],
        Load("x", (space.i, space.j), "float32"), Load("x", (space.i, space.j), "float32"),
        tuple(Operand(n, str(t.dtype).removeprefix("torch."), ()) for n, t in space.tensors.items()), "float32",
    )  # fmt: skip
    counts, indices = tile_lists.lists_of(region, PLAN, list(space.tensors.values()), [], torch.device("cpu"))
    state = space.classify(predicate[0], 8, 8).state
    assert counts.dtype == indices.dtype == torch.int32 and counts.is_contiguous() and indices.is_contiguous()
    assert counts.shape == (*state.shape[:-1], 2) and indices.shape == state.shape
    rows = zip(counts.reshape(-1, 2).tolist(), indices.flatten(0, -2).tolist(), state.flatten(0, -2).tolist())
    for (full, used), listed, states in rows:
        assert listed[:full] == [k for k, one in enumerate(states) if one == 2]
        assert listed[full:used] == [k for k, one in enumerate(states) if one == 1]
    _, best = truth(space, predicate, 8, 8)
    assert not ((spread(space, space.classify(predicate[0], 8, 8)) == 0) & (best != 0)).any()


def masked(make: Callable[[Axis, Axis, Axis], Expr], **more: int) -> Region:
    region = cases.causal(torch.bfloat16, n=2048, d=64, **more)[0]
    return replace(region, mask=make(region.batch[0], region.query, region.key))


def near(i: Axis, j: Axis, width: int) -> Expr:
    return s.and_(s.le(j, i), s.lt(s.sub(i, j), width))


def test_used_where_bounds_would_visit_tiles_in_vain() -> None:
    def doc(b: Axis, i: Axis) -> Load:
        return Load("doc", (b, i), INT)

    listed = {
        "documents": lambda b, i, j: s.and_(s.le(j, i), s.eq(doc(b, i), doc(b, j))),
        "padding anywhere": lambda b, i, j: Load("keep", (b, j), BOOL),
        "selected blocks": lambda b, i, j: Load("chosen", (b, s.floordiv(i, 64), s.floordiv(j, 64)), BOOL),
        "window and sinks": lambda b, i, j: s.and_(s.le(j, i), s.or_(s.lt(s.sub(i, j), 128), s.lt(j, 4))),
        "strided blocks": lambda b, i, j: s.eq(s.mod(s.floordiv(j, 64), 8), 0),
    }
    bounded = {
        "causal": lambda b, i, j: s.le(j, i),
        "window": lambda b, i, j: near(i, j, 256),
        "prefix": lambda b, i, j: s.or_(s.le(j, i), s.lt(j, 300)),
        "lengths": lambda b, i, j: s.lt(j, Load("lengths", (b,), INT)),
        "chunks": lambda b, i, j: s.eq(s.floordiv(i, 256), s.floordiv(j, 256)),
        "fine stride": lambda b, i, j: s.eq(s.mod(j, 3), 0),
    }
    got = {name: flash_fit.default_plan(masked(make)).listed for name, make in (listed | bounded).items()}
    assert got == dict.fromkeys(listed, True) | dict.fromkeys(bounded, False)


def test_short_sequences_need_no_lists() -> None:
    region = cases.documents(torch.bfloat16, n=256, d=64)[0]
    assert not flash_fit.default_plan(region).listed


def test_the_kernel_reads_them() -> None:
    region = cases.documents(n=64)[0]
    text = flash.write(region, Plan("triton", block_q=16, block_k=16, listed=True)).text
    ast.parse(text)
    assert "for tile in range(0, tile_whole):" in text and "for tile in range(tile_whole, tile_stop):" in text
    assert "start = tl.load(tile_indices_ptr + tile_row * 4 + tile) * BLOCK_K" in text
    assert "tile_row = b * 4 + first // BLOCK_Q" in text
    whole, cut = text.split("for tile in range(tile_whole")
    assert "tl.where((" not in whole.split("for tile")[1] and "doc" in cut
    bounded = flash.write(region, Plan("triton", block_q=16, block_k=16)).text
    assert "tile_" not in bounded


def test_closed_forms_are_listed_once() -> None:
    region = masked(lambda b, i, j: near(i, j, 128))
    first = tile_lists.lists_of(region, PLAN, [], [], torch.device("cpu"))
    assert tile_lists.lists_of(region, PLAN, [], [], torch.device("cpu")) is first
