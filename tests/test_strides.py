"""Strides over memory are read in the tensor that lies there, in whatever order it does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.evaluate import arange_env, evaluate
from refocus.facts import gather_facts
from refocus.ir import Axis, Load
from refocus.lift import Lifter, Unliftable
from refocus.sizes import shape_of


class Everything(Lifter):
    """Reads whatever has a reading."""

    def within(self, node, index):  # type: ignore[no-untyped-def]
        return True

    def inside(self, index):  # type: ignore[no-untyped-def]
        return True


Strides = tuple[tuple[int, ...], tuple[int, ...], int | None]


def read_in(view: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """A view of `x` by the lift's reading, None where there is none."""
    gm = make_fx(view, tracing_mode="fake")(x)
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.as_strided.default)
    (source,) = gm.graph.find_nodes(op="placeholder")
    axes = tuple(Axis(f"i{k}", size) for k, size in enumerate(shape_of(node)))
    try:
        value = Everything(gather_facts(gm), tainted=lambda n: True, expands=True).at(node, axes)
    except Unliftable:
        return None
    if any(isinstance(e, Load) and e.tensor != source.name for e in value.walk()):
        return None
    return evaluate(value, arange_env(axes, {}), {source.name: x}, {}).expand(node.meta["val"].shape)


def tokens_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1)  # [4, 12, 3] of memory [12, 4, 3]


def within(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[:, 2:10]


def of_one_head(x: Tensor) -> Tensor:
    return x[:, 1]


@pytest.mark.parametrize(
    ("base", "strides"),
    [
        (tokens_first, ((4, 5, 4, 3), (3, 24, 12, 1), None)),
        (tokens_first, ((5, 4, 3, 4), (24, 12, 1, 3), 0)),
        (tokens_first, ((4, 3), (12, 1), 3)),
        (tokens_first, ((3, 6), (3, 1), None)),  # across heads
        (of_one_head, ((5, 4, 3), (24, 12, 1), None)),
        (of_one_head, ((4, 4, 3), (24, 12, 1), 15)),
        (within, ((4, 3, 4, 3), (3, 24, 12, 1), None)),
        (lambda x: x.permute(2, 0, 1), ((3, 4, 6), (1, 12, 6), 2)),
        (lambda x: x[:, :1], ((11, 2, 3), (12, 12, 1), None)),
    ],
)
def test_what_lies_in_a_tensor_is_read_there(base: Callable[[Tensor], Tensor], strides: Strides) -> None:
    x = torch.randn(12, 4, 3)
    found = read_in(lambda t: base(t).as_strided(*strides), x)
    assert found is not None
    assert torch.equal(found, base(x).as_strided(*strides))


@pytest.mark.parametrize(
    ("base", "strides"),
    [
        (of_one_head, ((5, 4), (12, 1), None)),  # the fourth number is another head's
        (of_one_head, ((4, 3), (12, 1), 0)),  # before the tensor
        (of_one_head, ((12, 3), (12, 1), 6)),  # behind it
        (lambda x: x[:, :2].select(2, 0), ((5, 2), (12, 1), None)),  # numbers of which it has every third
        (lambda x: x[:1, :, 0].expand(3, 4), ((4,), (1,), None)),  # the same places several times
    ],
)
def test_what_lies_elsewhere_is_not(base: Callable[[Tensor], Tensor], strides: Strides) -> None:
    assert read_in(lambda t: base(t).as_strided(*strides), torch.randn(12, 4, 3)) is None
