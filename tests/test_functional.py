"""Writes into parts of a tensor that only the graph sees: the same values afterwards, and the lift can read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.functional import make_functional
from refocus.testing import check

Write = Callable[[Tensor], None]


def functional(run: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """`run` captured as the pipeline captures it."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        traced = make_fx(run, pre_dispatch=True)(*fakes)
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            node.meta.setdefault("val", getattr(traced, node.target))
    make_functional(traced, mode)
    traced.graph.lint()
    traced.recompile()
    return traced


def writes(gm: fx.GraphModule) -> list[str]:
    targets = [n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    return [str(t) for t in targets if t._schema.name.endswith("_") and not t._schema.name.startswith("aten::_")]


spans = st.tuples(st.integers(-6, 6), st.integers(-2, 9), st.integers(1, 3))


@st.composite
def strokes(draw: st.DrawFn) -> tuple[str, tuple[int, int, int], tuple[int, int, int], int]:
    return (
        draw(st.sampled_from(["block", "row", "column", "turned", "band", "flat", "kept"])),
        draw(spans),
        draw(spans),
        draw(st.integers(1, 5)),
    )


def paint(canvas: Tensor, kept: list[Tensor], kind: str, a: tuple[int, ...], b: tuple[int, ...], value: int) -> None:
    rows, columns = slice(*a), slice(*b)
    if kind == "block":
        canvas[rows, columns] = value
    elif kind == "row":
        canvas[a[0]] = canvas[a[0]] * 2 + value
    elif kind == "column":
        canvas[rows, b[0]] += value
    elif kind == "turned":
        canvas.transpose(0, 1)[rows].fill_(value)
    elif kind == "band":
        canvas[:, None][rows, 0, columns].add_(value)
    elif kind == "flat":
        canvas.view(-1)[columns].mul_(value)
    else:
        kept.append(canvas[rows])  # read at the end: it sees later writes


@settings(deadline=None, max_examples=20)
@given(st.lists(strokes(), min_size=1, max_size=5))
def test_painted_tensors_are_the_same(strokes_: list[tuple[str, tuple[int, ...], tuple[int, ...], int]]) -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        canvas = torch.zeros(7, 8, dtype=torch.int64) + x
        kept: list[Tensor] = []
        for kind, a, b, value in strokes_:
            paint(canvas, kept, kind, a, b, value)
        return canvas.clone(), *(k.clone() for k in kept)

    x = torch.arange(8)
    traced = functional(run, x)
    assert not writes(traced)
    for got, expected in zip(traced(x), run(x), strict=True):
        assert torch.equal(got, expected)


def test_writes_that_others_see_stay() -> None:
    def to_input(x: Tensor) -> Tensor:
        x[1:].fill_(2)
        return x + 1

    def to_products(x: Tensor) -> Tensor:
        y = x @ x
        y[1:].fill_(2)
        return y + 1

    def seen_strided(x: Tensor) -> Tensor:
        y = torch.zeros(4, 4)
        across = y.as_strided((4,), (5,))
        y[1:].fill_(2)
        return across + x[0]

    for run in (to_input, to_products, seen_strided):
        x = torch.randn(4, 4)
        traced = functional(run, x.clone())
        assert writes(traced)
        assert torch.equal(traced(x.clone()), run(x.clone()))


def test_products_are_written_into_memory_made_for_them() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.new_zeros(4, 3, 4)
        y[:, 1:, :2] = (x @ x).view(2, 2, 4).transpose(0, 2)[:, :, :2]
        y.view(12, 4)[::2] += x[:1]
        turned = y.transpose(0, 1)
        turned.view(3, 4, 2, 2)[1, :, 1].fill_(2)
        return turned.clone(), y.view(-1)

    x = torch.randn(4, 4)
    traced = functional(run, x)
    for got, expected in zip(traced(x), run(x), strict=True):
        assert torch.equal(got, expected)
    assert not writes(traced)


class Painted(nn.Module):
    """A mask painted stroke by stroke, one of them read from the mask itself."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(30, 30, dtype=torch.bool)
        mask[:, :5] = True
        for start in range(0, 30, 10):
            mask[start : start + 10, start : start + 10] = True
        mask[20:, 10:20] = mask[:10, :10]
        mask[::7] |= True
        scores = x @ x.transpose(-1, -2)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ x


def test_a_painted_mask_is_closed() -> None:
    report = check(Painted(), (torch.randn(2, 30, 8),), lower=False).report
    [site] = report.sites
    assert site.mask and "t0" not in site.mask
    assert site.tiles is not None


@pytest.mark.parametrize("count", [5, 60])
def test_many_strokes_are_left_alone(count: int) -> None:
    """Each stroke of a mask is a case of its predicate: past a number of them the tensor is taken as it is."""

    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(100, 100, dtype=torch.bool)
        for k in range(count):
            mask[k : k + 2, k : k + 2] = True
        return mask & x

    x = torch.ones(100, 100, dtype=torch.bool)
    traced = functional(run, x)
    assert bool(writes(traced)) == (count > 32)
    assert torch.equal(traced(x), run(x))


def all_written(x: Tensor, y: Tensor) -> None:
    x[...] = y


def copied(x: Tensor, y: Tensor) -> None:
    x.copy_(y[:1])  # spread over rows


def half_written(x: Tensor, y: Tensor) -> None:
    x[:, :2] = y[:, :2]


def through_a_view(x: Tensor, y: Tensor) -> None:
    x.transpose(0, 2).view(-1, 4)[3:].copy_(y.reshape(-1, 4)[3:])


WRITES = [all_written, copied, half_written, through_a_view]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("view", [lambda x: x.as_strided((8, 3), (3, 1)), lambda x: x.transpose(0, 2).view(-1)])
def test_what_is_written_lies_in_memory_as_before(write: Callable[..., None], view: Callable[[Tensor], Tensor]) -> None:
    """Of a tensor that is laid out in another way than what is written to it, views are asked for afterwards."""

    def run(y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.zeros(4, 2, 3).transpose(0, 2)
        write(x, y)
        return view(x).clone(), x

    y = torch.arange(24.0).reshape(3, 2, 4)
    gm = functional(run, y)
    assert write is through_a_view or not writes(gm)
    for got, wanted in zip(gm(y), run(y)):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride()


def test_what_lies_between_elements_that_are_written_is_read_in_place() -> None:
    def run(y: Tensor) -> Tensor:
        x = torch.zeros(6, 4)[::2]
        x.copy_(y)
        return x.as_strided((4, 2), (4, 1)).clone()

    y = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(functional(run, y)(y), run(y))
