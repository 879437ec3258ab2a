"""Parts of a form that depend on a difference of positions alone: the same values, read off one vector."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from refocus import simplify as s
from refocus.evaluate import evaluate
from refocus.infer import agrees
from refocus.ir import BOOL, INT, Axis, Call, Const, Expr, Load
from refocus.lags import lags

ROW, COLUMN = Axis("i", Const(37)), Axis("j", Const(50))
D = s.sub(ROW, COLUMN)
FORMS: dict[str, tuple[Expr, int]] = {  # and how many parts are read
    "dilated window": (s.and_(s.le(COLUMN, ROW), s.lt(D, 9), s.eq(s.mod(D, 3), 0)), 1),
    "with a prefix": (s.or_(s.lt(COLUMN, 4), s.eq(s.mod(s.add(D, 60), 4), 1)), 1),
    "blocks and lags": (s.and_(s.eq(s.floordiv(ROW, 8), s.floordiv(COLUMN, 8)), s.ne(s.mod(D, 2), 0)), 1),
    "doubled": (s.le(s.mul(2, D), 9), 1),
    "a choice": (s.where(s.le(COLUMN, ROW), Const(0.0, "float32"), Const(-1.0, "float32")), 1),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows", [1, 5, 37])
def test_blocks_hold_what_the_form_is(name: str, rows: int) -> None:
    form, count = FORMS[name]
    found = lags(form, ROW, COLUMN)
    assert found is not None and len(found.values) == count
    i, j = torch.arange(37)[:, None], torch.arange(50)[None]
    whole = evaluate(form, {ROW: i, COLUMN: j}, {}, {}).expand(37, 50)
    for first in range(0, 37, rows):
        length = min(rows, 37 - first)
        at = {ROW: i[first : first + length], COLUMN: j, found.local: torch.arange(length)[:, None]}
        got = evaluate(found.form, at, found.block(first, length), {})
        assert torch.equal(got.expand(length, 50), whole[first : first + length])


@pytest.mark.parametrize(
    "form",
    [
        s.le(s.add(ROW, COLUMN), 9),
        s.le(s.sub(s.mul(2, ROW), COLUMN), 9),
        s.eq(s.mod(ROW, 3), s.mod(COLUMN, 3)),
        s.lt(COLUMN, 4),
        s.le(s.sub(s.floordiv(ROW, 2), s.floordiv(COLUMN, 2)), 1),
        s.le(s.sub(s.mul(ROW, ROW), s.mul(COLUMN, COLUMN)), 9),
        s.le(D, Load("t", (COLUMN,), "int64")),
    ],
)
def test_other_parts_are_left(form: Expr) -> None:
    assert lags(form, ROW, COLUMN) is None


def test_an_axis_that_is_equal_but_another_object() -> None:
    twin = replace(COLUMN)
    read = Load("t", (twin,), "int64")
    below = Call("le", (s.mul(2, COLUMN), Call("add", (ROW, read), INT)), BOOL)
    assert lags(below, ROW, COLUMN) is None


def test_a_proof_by_lags_fails_for_one_element() -> None:
    form, _ = FORMS["dilated window"]
    tensor = evaluate(form, {ROW: torch.arange(37)[:, None], COLUMN: torch.arange(50)[None]}, {}, {}).clone()
    assert agrees(form, (ROW, COLUMN), tensor)
    for at in ((0, 0), (36, 49), (20, 3)):
        wrong = tensor.clone()
        wrong[at] ^= True
        assert not agrees(form, (ROW, COLUMN), wrong)
