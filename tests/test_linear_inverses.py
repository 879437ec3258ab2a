"""The delta rule in chunks, its triangular systems inverted in all the ways that models do it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refocus.testing import check
from tests.linear_cases import Module

pytestmark = pytest.mark.filterwarnings("error::refocus.backend.FallbackWarning")

SIZE = 4  # of a chunk
Solver = Callable[[Tensor], Callable[[Tensor], Tensor]]  # of (1 + L) x = y, given L


def inputs(length: int = 12) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, width, generator=drawn) for width in (5, 5, 6))
    g, b = (torch.rand(2, 3, length, generator=drawn) for _ in range(2))
    return [q, F.normalize(k, dim=-1), v, -g, b]


def chunked(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % SIZE)).unflatten(2, (-1, SIZE))


def in_chunks(solver: Solver) -> Callable[..., Tensor]:
    """The gated delta rule."""

    def attend(*given: Tensor) -> Tensor:
        q, k, v, g, b = map(chunked, given)
        c, b = g.cumsum(-1), b[..., None]
        between = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
        solve = solver((b * k @ k.mT * between).tril(-1))
        own, seen = solve(b * v), solve(b * k * c[..., None].exp())
        state, rows = v.new_zeros(2, 3, 5, 6), []
        for t in range(q.shape[2]):
            new = own[:, :, t] - seen[:, :, t] @ state
            inside = (q[:, :, t] @ k[:, :, t].mT * between[:, :, t]) @ new
            rows.append((q[:, :, t] * c[:, :, t, :, None].exp()) @ state + inside)
            kept = k[:, :, t] * (c[:, :, t, -1:] - c[:, :, t])[..., None].exp()
            state = state * c[:, :, t, -1, None, None].exp() + kept.mT @ new
        return torch.stack(rows, 2).flatten(2, 3)[:, :, : given[0].shape[2]]

    return attend


def undecayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """The delta rule, its inverse multiplied with the shares."""
    q, k, v, b = map(chunked, (q, k, v, b))
    inverse = torch.linalg.inv(whole((b[..., None] * k @ k.mT).tril(-1))) * b[..., None, :]
    own, seen = inverse @ v, inverse @ k
    state, out = v.new_zeros(2, 3, 5, 6), torch.zeros_like(v)
    for t in range(q.shape[2]):
        new = own[:, :, t] - seen[:, :, t] @ state
        out[:, :, t] = q[:, :, t] @ state + (q[:, :, t] @ k[:, :, t].mT).tril() @ new
        state = state + k[:, :, t].mT @ new
    return out.flatten(2, 3)


def whole(below: Tensor) -> Tensor:
    return torch.eye(below.shape[-1]).to(below) + below


def by_rows(below: Tensor, slip: str = "") -> Callable[[Tensor], Tensor]:
    """Forward substitution in place, as the reference code of the delta rule has it."""
    x = -below if slip != "sign" else below.clone()
    for i in range(1, SIZE if slip != "last row" else SIZE - 1):
        row, above = x[..., i, :i].clone(), x[..., :i, :i].clone()
        if slip == "fewer" and i > 1:
            row, above = row[..., 1:], above[..., 1:, :]
        x[..., i, :i] = x[..., i, :i] + (row[..., None] * above).sum(-2)
    if slip == "again":
        x[..., 1, :1] = x[..., 1, :1] + x[..., 1, :1] * x[..., :1, 0]
    inverse = x + torch.eye(SIZE).to(x) * (2 if slip == "diagonal" else 1)
    return lambda y: inverse @ y


def by_whole_rows(below: Tensor) -> Callable[[Tensor], Tensor]:
    x = -below
    for i in range(1, SIZE):
        x[..., i, :] = x[..., i, :] + torch.einsum("bhcm,bhcmn->bhcn", x[..., i, :].clone(), x.clone())
    inverse = x + torch.eye(SIZE).to(x)
    return lambda y: inverse @ y


def by_columns(below: Tensor, copy: Callable[[Tensor], Tensor] = torch.clone) -> Callable[[Tensor], Tensor]:
    """The older rows of a column are read before they are there: no substitution."""
    x = -below
    before = copy(x.mT).mT
    for i in range(1, SIZE):
        x[..., i, :i] = x[..., i, :i] + (x[..., i, :i, None] * before[..., :i, :i]).sum(-2)
    inverse = x + torch.eye(SIZE).to(x)
    return lambda y: inverse @ y


SOLVERS: dict[str, Solver] = {
    "rows": by_rows,
    "whole rows": by_whole_rows,
    "solve": lambda below: lambda y: torch.linalg.solve(whole(below), y),
    "triangular": lambda below: lambda y: torch.linalg.solve_triangular(whole(below), y, upper=False),
    "inverse": lambda below: lambda y: torch.inverse(whole(below)) @ y,
    "inv": lambda below: torch.linalg.inv(whole(below)).matmul,
    "identity": lambda below: torch.linalg.solve_triangular(
        whole(below), torch.eye(SIZE).to(below).expand_as(below), upper=False
    ).matmul,
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_solver(name: str) -> None:
    report = check(Module(in_chunks(SOLVERS[name])), inputs(10), sites=1, lower=False, gradients=name == "rows").report
    assert "erase" in report.sites[0].notation
    assert "gate" in report.sites[0].notation


def in_each_chunk(solver: Solver, slip: str = "") -> Callable[..., Tensor]:
    """The gated delta rule, each chunk's system made and solved in the loop."""

    def attend(*given: Tensor) -> Tensor:
        state, rows = given[2].new_zeros(2, 3, 5, 6), []
        for start in range(0, given[0].shape[2], SIZE):
            q, k, v, g, b = (x[:, :, start : start + SIZE] for x in given)
            c, b = g.cumsum(-1), b[..., None]
            between = (c[..., :, None] - c[..., None, :]).tril().exp().tril()
            below = (b * k @ k.mT * between).tril(-1)
            if slip == "system" and start == SIZE:
                below = below * 0.5
            if slip == "key":
                below = (b * k @ q.mT * between).tril(-1)
            solve = solver(below)
            new = solve(b * v) - solve((2.0 if slip == "side" else 1.0) * b * k * c[..., None].exp()) @ state
            rows.append((q * c[..., None].exp()) @ state + (q @ k.mT * between) @ new)
            kept = k * (c[..., -1:] - c)[..., None].exp()
            state = state * c[..., -1, None, None].exp() + kept.mT @ new
        return torch.cat(rows, 2)

    return attend


INSIDE = {
    **{name: SOLVERS[name] for name in ("solve", "triangular", "inv", "inverse", "identity")},
    "ones": lambda below: lambda y: torch.linalg.solve_triangular(whole(below), y, upper=False, unitriangular=True),
    "below": lambda below: lambda y: torch.linalg.solve_triangular(below, y, upper=False, unitriangular=True),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_in_each_chunk(name: str) -> None:
    report = check(Module(in_each_chunk(INSIDE[name])), inputs(), sites=1, lower=False, gradients=name == "inv").report
    assert "erase" in report.sites[0].notation


@pytest.mark.parametrize("slip", ["system", "key", "side"])
def test_no_delta_rule_in_each_chunk(slip: str) -> None:
    report = check(Module(in_each_chunk(SOLVERS["inv"], slip)), inputs(), fused=False, engines=(), lower=False).report
    assert not any("erase" in site.notation for site in report.sites)


def test_no_decays() -> None:
    report = check(Module(undecayed), inputs(), sites=1, lower=False, gradients=True).report
    assert "erase" in report.sites[0].notation


def test_the_inverse_is_gone(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was inverted in place is not computed any more."""
    monkeypatch.setenv("REFOCUS_DUMP", str(tmp_path))
    check(Module(in_chunks(by_rows)), inputs(), family="linear", sites=1, lower=False)
    dumped = {p.stem.split("_")[-1]: p.read_text() for p in sorted(tmp_path.iterdir())}  # type: ignore[attr-defined]
    assert "copy_" in dumped["capture"]
    assert "copy_" not in dumped["splice"]


@pytest.mark.parametrize("slip", ["sign", "last row", "fewer", "again", "diagonal"])
def test_no_inverse(slip: str) -> None:
    attend = Module(in_chunks(lambda below: by_rows(below, slip)))
    report = check(attend, inputs(), fused=False, lower=False).report
    assert not any("erase" in site.notation for site in report.sites)


@pytest.mark.parametrize("copy", [torch.clone, Tensor.contiguous])
def test_rows_that_are_read_too_early(copy: Callable[[Tensor], Tensor]) -> None:
    report = check(Module(in_chunks(lambda below: by_columns(below, copy))), inputs(), fused=False, lower=False).report
    assert not any("erase" in site.notation for site in report.sites)


@pytest.mark.parametrize("slip", ["above", "diagonal"])
def test_no_triangle(slip: str) -> None:
    """A system with something above its diagonal, and one whose diagonal is not ones."""

    def solver(below: Tensor) -> Callable[[Tensor], Tensor]:
        more = 1e-3 * below.mT if slip == "above" else torch.eye(SIZE).to(below)
        return torch.linalg.inv(whole(below + more)).matmul

    report = check(Module(in_chunks(solver)), inputs(), fused=False, lower=False).report
    assert not any("erase" in site.notation for site in report.sites)
