"""DTensor rules without processes: which axis is cut, and what each place of a mesh then computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("torch.distributed.tensor", reason="this torch has no distributed package")

from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from refocus import oracle, simplify
from refocus.codegen import sharding
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Region
from tests import region_cases as cases


def shard_of(tensor: Tensor, places: tuple[Placement, ...], mesh: tuple[int, ...], at: tuple[int, ...]) -> Tensor:
    for place, size, k in zip(places, mesh, at):
        if isinstance(place, Shard):
            tensor = tensor.chunk(size, place.dim)[k]
    return tensor


def axis_named(region: Region, name: str | None) -> Axis | None:
    return next((a for a in (*region.batch, region.query) if a.name == name), None)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("gqa", ("b", "h")), ("alibi", ("h", "h")), ("alibi", ("h", "b")), ("merged_heads", ("b", "i")),
        ("additive_bias", ("i", "h")), ("padding", ("b", "i")), ("windows_2d", ("wy", None)), ("symbolic", ("h", "b")),
        ("dropout", ("h", "b")), ("empty_min", ("i", "b")),
    ],
)  # fmt: skip
def test_parts_of_a_mesh_make_the_whole(name: str, axes: tuple[str | None, ...]) -> None:
    region, tensors, sizes = cases.CASES[name]()
    mesh, numbers = (2, 2), dict(zip(region.syms, sizes))
    cut = sharding.Cut(region, mesh, tuple(axis_named(region, a) for a in axes))
    assert cut.divides(numbers)
    places = tuple(cut.operand(o, numbers) for o in region.operands)
    found = torch.full_like(whole := oracle.run(region, tensors, sizes), torch.nan)
    for at in itertools.product(*map(range, mesh)):
        local = sharding.local_part(cut, places, at)
        parts = [shard_of(t, p, mesh, at) for t, p in zip(tensors, places)]
        shard_of(found, cut.result(), mesh, at).copy_(oracle.run(local.region, parts, local.sizes(numbers)))
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


def test_heads_that_share_keys_are_cut_alike() -> None:
    region, _, _ = cases.gqa()
    by_head = (Shard(1),)
    cut = sharding.cut_of(region, (2,), {}, [by_head] * 3)
    assert cut.axes == (axis_named(region, "h"),)
    assert [cut.operand(o, {}) for o in region.operands] == [by_head] * 3
    assert cut.result() == (Shard(1),) and cut.result(1) == (Shard(2),)


def test_more_parts_than_key_heads_leave_keys_whole() -> None:
    region, _, _ = cases.gqa()  # four heads on two
    cut = sharding.cut_of(region, (4,), {}, [(Shard(1),), (Replicate(),), (Replicate(),)])
    assert cut.axes == (axis_named(region, "h"),)
    assert [cut.operand(o, {}) for o in region.operands] == [(Shard(1),), (Replicate(),), (Replicate(),)]
    assert [cut.gradient(o, {})[0] for o in region.operands] == [Shard(1), Partial("sum"), Partial("sum")]


def test_what_does_not_divide_is_not_cut() -> None:
    region, _, _ = cases.gqa()
    assert sharding.cut_of(region, (3,), {}, [(Shard(1),)] * 3).axes == (None,)


def test_keys_cut_along_their_length_are_brought_together() -> None:
    region, _, _ = cases.gqa()
    cut = sharding.cut_of(region, (2,), {}, [(Shard(2),)] * 3)  # queries may be cut, keys not
    assert cut.axes == (region.query,)
    assert [cut.operand(o, {}) for o in region.operands] == [(Shard(2),), (Replicate(),), (Replicate(),)]


def test_heads_inside_a_wider_dimension_are_cut() -> None:
    """q [b, i, heads * d], as a projection leaves it; keys and values of half as many heads."""
    n, d, f = 20, 8, "float64"
    b, h, i, j = Axis("b", Const(2)), Axis("h", Const(4)), Axis("i", Const(n)), Axis("j", Const(n))
    c, e = Axis("d", Const(d)), Axis("e", Const(d))
    shared = simplify.floordiv(h, 2)

    def at(name: str, row: Expr, head: Expr, lane: Expr) -> Load:
        return Load(name, (b, row, simplify.add(simplify.mul(head, d), lane)), f)

    score = Dot((c,), at("q", i, h, c), at("k", j, shared, c), f)
    tensors = [torch.randn(2, n, heads * d, dtype=torch.float64) for heads in (4, 2, 2)]
    operands = tuple(cases.operand(o, t) for o, t in zip("qkv", tensors))
    region = Region((b, h), i, j, (e,), score, TRUE, score, at("v", j, shared, e), operands, f, empty_row="never")
    places = [(Shard(2),)] * 3
    cut = sharding.cut_of(region, (2,), {}, places)
    assert cut.axes == (h,) and [cut.operand(o, {}) for o in operands] == places
    whole = oracle.run(region, tensors, [])
    for rank in range(2):
        local = sharding.local_part(cut, tuple(places), (rank,))
        part = oracle.run(local.region, [t.chunk(2, 2)[rank] for t in tensors], [])
        torch.testing.assert_close(part, whole.chunk(2, 1)[rank], rtol=0, atol=1e-12)
