"""Indices that are out of range fail as they do in eager code, where a region reads keys and biases by them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import refocus
from refocus import backend
from refocus.options import Options
from refocus.testing import rewritten
from refocus.tolerances import difference

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

KEYS = 6


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_gather(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    at = at[..., None].expand(-1, -1, k.shape[-1])
    return attend(q, k.gather(1, at), v.gather(1, at))


def by_select(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return attend(q, k.index_select(1, at[0]), v.index_select(1, at[0]))


def by_first_select(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    first, values = k.transpose(0, 1), v.transpose(0, 1)
    return attend(q, first.index_select(0, at[0]).transpose(0, 1), values.index_select(0, at[0]).transpose(0, 1))


def by_index(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return attend(q, k[:, at[0]], v[:, at[0]])


def by_embedding(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return attend(q, F.embedding(at, k[0]), F.embedding(at, v[0]))


def by_remainder(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return attend(q, torch.take_along_dim(k, at[..., None], 1), torch.take_along_dim(v, at[..., None], 1))


def as_a_bias(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    table = q[0, 0, :KEYS]
    return (q @ k.mT + table[at].unsqueeze(1)).softmax(-1) @ v


def tensors(length: int = KEYS) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, generator=drawn),
        torch.randn(2, length, 8, generator=drawn),
        torch.randn(2, length, 8, generator=drawn),
    )


def indices(*last: int) -> Tensor:
    return torch.tensor([[0, 3, 3, 1, 2, 5], [4, 2, 0, 1, 5, 3]]).index_fill(1, torch.tensor([5]), 0) + torch.tensor(
        [0, 0, 0, 0, 0, *last]
    )


@pytest.mark.parametrize(
    ("read", "last"),
    [
        (by_gather, 6), (by_gather, -1), (by_select, 6), (by_select, -1), (by_first_select, 6), (by_first_select, -1),
        (by_index, 6), (by_index, -7), (by_embedding, 6), (by_embedding, -1), (as_a_bias, 6), (as_a_bias, -7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lower", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_index_out_of_range_fails(read: Attend, last: int, lower: bool) -> None:
    torch._dynamo.reset()
    run = (refocus.optimize if lower else rewritten)(read, engine="tiled", require=True)
    assert difference(run(*tensors(), indices(5)), read(*tensors(), indices(5))) < 1e-5
    with pytest.raises((IndexError, RuntimeError)) as eager:
        read(*tensors(), indices(last))
    if lower and read is by_embedding:  # left to Inductor, of which not all versions check the lower end
        if last < 0 and not _fails(torch.compile(read), last):
            return
        with pytest.raises(RuntimeError, match="out of"):
            run(*tensors(), indices(last))
        return
    with pytest.raises(eager.type, match="out of"):
        run(*tensors(), indices(last))


def _fails(run: Attend, last: int) -> bool:
    try:
        run(*tensors(), indices(last))
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize(("read", "low"), [(by_gather, 0), (by_select, 0), (by_index, -7)])
def test_the_range_is_that_of_the_call(read: Attend, low: int) -> None:
    """Sizes are run-time numbers here."""
    torch._dynamo.reset()
    run = rewritten(read, engine="tiled", require=True, dynamic=True)
    for length in (6, 9):
        at = torch.arange(12).view(2, 6) % length
        assert difference(run(*tensors(length), at), read(*tensors(length), at)) < 1e-5
        for wrong in (low - 1, length) if low == 0 else (-length - 1, length):
            with pytest.raises(IndexError if read is by_index else RuntimeError, match="out of bounds"):
                run(*tensors(length), at.index_fill(1, torch.tensor([2]), wrong))


def test_an_index_of_the_last_elements_counts_from_the_end() -> None:
    torch._dynamo.reset()
    run = rewritten(by_index, engine="tiled", require=True)
    assert difference(run(*tensors(), indices(-6)), by_index(*tensors(), indices(-6))) < 1e-5


@pytest.mark.parametrize("last", [6, 11, -1, -9])
def test_take_along_dim_takes_the_remainder(last: int) -> None:
    torch._dynamo.reset()
    run = rewritten(by_remainder, engine="tiled", require=True)
    assert difference(run(*tensors(), indices(last)), by_remainder(*tensors(), indices(last))) < 1e-5


def by_part(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return by_gather(q, k, v, at[:, :5])


def test_what_is_not_read_may_be_out_of_range() -> None:
    torch._dynamo.reset()
    run = rewritten(by_part, engine="tiled", require=True)
    assert difference(run(*tensors(), indices(-1)), by_part(*tensors(), indices(-1))) < 1e-5


def by_topk(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return by_gather(q, k, v, k.sum(-1).topk(4).indices.sort(-1).values)


def by_order(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    blocks = k.sum(-1).view(2, 3, 2).sum(-1).argsort(-1, descending=True)[:, :2]
    return by_gather(q, k, v, (blocks[..., None] * 2 + torch.arange(2)).flatten(1))


def by_table(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return by_index(q, k, v, (torch.arange(5) + torch.arange(2)[:, None]).clamp(max=5))


def by_first(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
    return by_gather(q, k, v, (k + 9.0 * (torch.arange(8) < KEYS)).argmax(-1)[:, :4])


def assertions(read: Attend) -> list[str]:
    graphs: list[fx.GraphModule] = []

    def lower(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    def compiled(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        return backend.compile_graph(gm, inputs, Options(engine="tiled", require=True), lower)

    torch._dynamo.reset()
    torch.compile(read, backend=compiled)(*tensors(), indices(5))
    (graph,) = graphs
    return [n.args[1] for n in graph.graph.nodes if n.target is torch.ops.aten._assert_async.msg]


@pytest.mark.parametrize("read", [by_topk, by_order, by_table])
def test_indices_that_are_seen_to_be_in_range_are_not_checked(read: Attend) -> None:
    assert assertions(read) == []


@pytest.mark.parametrize("read", [by_gather, by_first])
def test_keys_and_values_are_checked_together(read: Attend) -> None:
    """Features are chosen among eight, and keys are six."""
    assert assertions(read) == ["`gather`: an index is out of bounds for dimension 1 with size 6"]
