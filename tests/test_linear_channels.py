"""The delta rule in chunks whose channels decay each in its own way: scores made column by column, or all at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus import simplify as s
from refocus.ir import Axis, Const, Expr, Load, Reduce
from refocus.progressions import named_alike, one_function
from refocus.testing import check
from tests.linear_cases import Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SIZE = 4  # of a chunk


def inputs(length: int = 12) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 5, generator=drawn) for _ in range(3))
    g, b = torch.rand(2, 3, length, 5, generator=drawn), torch.rand(2, 3, length, generator=drawn)
    return [q, F.normalize(k, dim=-1), v, -g, b]


def by_columns(q: Tensor, k: Tensor, c: Tensor, slip: str = "") -> Tensor:
    """Products of two rows, decayed channel by channel from the column's position to the row's."""
    scores = q.new_zeros(*q.shape[:-1], SIZE)
    for j in range(SIZE):
        at = 1 if slip == "column" and j == 2 else j
        by = 0.5 if slip == "number" and j == 1 else 1.0
        scores[..., j] = by * torch.einsum("...id,...d->...i", q * (c - c[..., j : j + 1, :]).exp(), k[..., at, :])
    return scores


def at_once(q: Tensor, k: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("...id,...jd,...ijd->...ij", q, k, (c[..., :, None, :] - c[..., None, :, :]).exp())


def summed(q: Tensor, k: Tensor, c: Tensor) -> Tensor:
    """The same without a matrix product: all pairs, those above the diagonal weightless, summed over channels."""
    above = torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1)[..., None]
    decays = (c[..., :, None, :] - c[..., None, :, :]).masked_fill(above, -torch.inf).exp()
    return (q[..., :, None, :] * k[..., None, :, :] * decays).sum(-1)


WHOLE = {"at once": at_once, "summed": summed}


def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, how: str = "columns", slip: str = "") -> Tensor:
    q, k, v, g, b = (x.unflatten(2, (-1, SIZE)) for x in (q, k, v, g, b))
    c, above = g.cumsum(-2), torch.ones(SIZE, SIZE, dtype=torch.bool).triu()

    def scores(q: Tensor, k: Tensor, c: Tensor, slip: str = "") -> Tensor:
        return WHOLE[how](q, k, c) if how in WHOLE else by_columns(q, k, c, slip)

    system = -(scores(k, k, c) * b[..., None]).masked_fill(above, 0)
    for i in range(1, SIZE):
        row, before = system[..., i, :i].clone(), system[..., :i, :i].clone()
        system[..., i, :i] = row + (row[..., None] * before).sum(-2)
    inverse = (system + torch.eye(SIZE)) * b[..., None, :]
    own, seen = inverse @ v, inverse @ (c.exp() * k)
    state, out = k.new_zeros(2, 3, 5, 5), torch.zeros_like(v)
    for t in range(q.shape[2]):
        query, key, sums = q[:, :, t], k[:, :, t], c[:, :, t]
        inside = scores(query, key, sums, slip).masked_fill(above.triu(1), 0)
        new = own[:, :, t] - seen[:, :, t] @ state
        out[:, :, t] = (query * sums.exp()) @ state + inside @ new
        state = state * sums[:, :, -1, :, None].exp() + ((sums[:, :, -1:] - sums).exp() * key).mT @ new
    return out.flatten(2, 3)


@pytest.mark.parametrize("how", ["columns", *WHOLE])
def test_spelling(how: str) -> None:
    report = check(Module(attend, how=how), inputs(), family="linear", sites=1, lower=False, gradients=True).report
    assert "exp(gate[b,h,t,d])" in report.sites[0].notation and "erase" in report.sites[0].notation


def test_parts_that_nobody_reads() -> None:
    """Of gates that come out of a product, decayed sums look like a softmax that lacks something; they are gone."""

    def gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return attend(q, k, v, F.logsigmoid(g @ torch.eye(5).to(g)), b, "summed")

    report = check(Module(gated), inputs(), family="linear", sites=1, lower=False).report
    assert [site.name for site in report.sites] == ["attention0"]


@pytest.mark.parametrize("slip", ["column", "number"])
def test_a_column_that_differs(slip: str) -> None:
    report = check(Module(attend, slip=slip), inputs(), fused=False, engines=(), lower=False).report
    assert not any("erase" in site.notation for site in report.sites)


# ---------------------------------------------------------------------------------------------------- the function


def part(number: int, name: str, at: Expr | None = None) -> Expr:
    """sum over an axis of its own of x[axis, number] where axis <= number."""
    axis = Axis(name, Const(5))
    value = Load("x", (axis, at or Const(number)), "float32")
    return Reduce("sum", axis, s.where(s.le(axis, number), value, Const(0.0, "float32")), "float32")


def test_parts_are_one_function_of_their_number() -> None:
    number = Axis("part", Const(5))
    values = named_alike([part(t, f"a{t}") for t in range(5)])
    assert one_function(values, number) is not None
    assert one_function([part(t, f"a{t}") for t in range(5)], number) is None  # sums of other names
    values[1] = part(1, "a0", Const(2))
    assert one_function(values, number) is None
