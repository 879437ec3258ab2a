"""Index arithmetic that the simplifier must see through, form by form."""

from __future__ import annotations

import time

import pytest

from refocus import simplify as s
from refocus.ir import BOOL, FALSE, INT, TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce
from tests.index_trees import I6, J6, K4, XN, ZM, M, N, flatten, unflatten

B, H = Axis("b", N), Axis("h", Const(8))
D = Axis("d", Const(16))


def test_repeated_heads_read_the_shared_head() -> None:
    j = Axis("j", Const(64))
    flat = s.add(s.mul(16, j), D, s.mul(1024, H))
    assert s.floordiv(flat, 2048) == s.floordiv(H, 2)
    assert s.mod(s.floordiv(flat, 16), 64) == j
    assert s.mod(flat, 16) == D
    # expand [b, 4, 2, j, d] and reshape to [b, 8, j, d], with a symbolic length
    j = Axis("j", M)
    index = unflatten(flatten([B, H, j, D], [N, Const(8), M, Const(16)]), [N, Const(4), Const(2), M, Const(16)])
    assert index == [B, s.floordiv(H, 2), s.mod(H, 2), j, D]


def test_window_partition_round_trip() -> None:
    b, y, x, c = Axis("b", N), Axis("y", Const(56)), Axis("x", Const(56)), Axis("c", Const(96))
    image = [N, Const(56), Const(56), Const(96)]
    split = [N, Const(8), Const(7), Const(8), Const(7), Const(96)]
    windows = [s.mul(64, N), Const(49), Const(96)]
    # reverse: an image position in terms of windows, then windows in terms of the image
    b_, gy, uy, gx, ux, c_ = unflatten(flatten([b, y, x, c], image), split)
    tokens = unflatten(
        flatten([b_, gy, gx, uy, ux, c_], [N, Const(8), Const(8), Const(7), Const(7), Const(96)]), windows
    )
    parts = unflatten(flatten(tokens, windows), [N, Const(8), Const(8), Const(7), Const(7), Const(96)])
    order = [parts[0], parts[1], parts[3], parts[2], parts[4], parts[5]]
    assert unflatten(flatten(order, split), image) == [b, y, x, c]
    # and a window position reads one pixel
    w, t = Axis("w", windows[0]), Axis("t", Const(49))
    parts = unflatten(flatten([w, t, c], windows), [N, Const(8), Const(8), Const(7), Const(7), Const(96)])
    assert parts == [
        s.floordiv(w, 64), s.mod(s.floordiv(w, 8), 8), s.mod(w, 8), s.floordiv(t, 7), s.mod(t, 7), c,
    ]  # fmt: skip


@pytest.mark.parametrize("size", [Const(16), N, s.mul(7, N)], ids=["static", "symbolic", "product"])
def test_roll_and_unroll(size: Expr) -> None:
    p = Axis("p", size)
    assert s.mod(s.add(s.mod(s.sub(p, 3), size), 3), size) == p
    assert s.mod(s.sub(s.mod(s.add(p, 3), size), 3), size) == p


def test_roll_within_windows() -> None:
    g, u = Axis("g", Const(4)), Axis("u", Const(8))
    pixel = s.add(s.mul(8, g), u)
    rolled = s.mod(s.add(pixel, 4), 32)
    assert s.mod(s.sub(rolled, 4), 32) == pixel
    assert s.floordiv(s.mod(s.sub(rolled, 4), 32), 8) == g


def skew(length: Expr) -> tuple[Axis, Axis, Expr, Expr]:
    """Transformer-XL: pad a column on the left of [L, L], view as (L + 1, L), drop the first row."""
    i, j = Axis("i", length), Axis("j", length)
    wide = s.add(length, 1)
    flat = s.add(s.mul(s.add(i, 1), length), j)
    return i, j, s.floordiv(flat, wide), s.mod(flat, wide)


@pytest.mark.parametrize("length", [Const(8), Const(1024), N], ids=["8", "1024", "symbolic"])
def test_relative_shift_by_padding_and_viewing(length: Expr) -> None:
    i, j, row, column = skew(length)
    known = s.assume(s.le(j, i))
    assert s.under(row, known) == i
    assert s.under(s.sub(column, 1), known) == s.add(j, s.neg(i), length, -1)
    assert s.under(s.ge(column, 1), known) == TRUE
    # above the diagonal it reads the row below; the first superdiagonal is the padding
    above = s.assume(s.lt(i, j))
    assert s.under(row, above) == s.add(i, 1)
    assert s.under(column, above) == s.sub(s.sub(j, i), 1)
    # the same, found under the mask by itself
    read = s.where(s.ge(column, 1), Load("x", (row, s.sub(column, 1)), "float32"), Const(0.0, "float32"))
    masked = s.under(s.where(s.le(j, i), read, Const(-1e9, "float32")))
    assert masked.children[1] == Load("x", (i, s.add(j, s.neg(i), length, -1)), "float32")


@pytest.mark.parametrize("length", [Const(8), N], ids=["8", "symbolic"])
def test_relative_shift_of_twice_the_length(length: Expr) -> None:
    """XLNet: [L, 2L] viewed as (2L, L), first row dropped, viewed as (L, 2L - 1), first L columns."""
    i, j = Axis("i", length), Axis("j", length)
    twice = s.mul(2, length)
    flat = s.add(s.mul(i, s.sub(twice, 1)), j, length)
    assert s.floordiv(flat, twice) == i
    assert s.mod(flat, twice) == s.add(j, s.neg(i), length)


def test_sums_of_sizes_divide() -> None:
    a, b, c = Axis("a", M), Axis("b", s.add(N, M)), Axis("c", Const(6))
    size = s.add(N, M)
    assert s.floordiv(s.add(s.mul(a, size), b), size) == a
    assert s.mod(s.add(s.mul(a, size), b), size) == b
    assert s.floordiv(s.add(s.mul(c, size), b), s.mul(2, size)) == s.floordiv(c, 2)
    assert s.mod(s.add(s.mul(c, size), b), s.mul(2, size)) == s.add(s.mul(size, s.mod(c, 2)), b)


def test_parts_of_a_position_join() -> None:
    x = Axis("x", Const(1000))
    low, mid = s.mod(x, 16), s.mod(s.floordiv(x, 16), 4)
    assert s.add(s.mul(16, mid), low) == s.mod(x, 64)
    assert s.add(s.mul(64, s.floordiv(x, 64)), s.mul(16, mid), low) == x
    assert s.add(s.mul(3, N, s.add(s.mul(16, mid), low)), s.mul(192, N, s.floordiv(x, 64))) == s.mul(3, N, x)
    assert s.mod(s.mod(x, 64), 16) == low and s.floordiv(s.mod(x, 64), 16) == mid
    assert s.floordiv(s.floordiv(x, 4), 5) == s.floordiv(x, 20)
    assert s.floordiv(s.add(s.floordiv(x, 4), s.mul(3, H)), 5) == s.floordiv(s.add(x, s.mul(12, H)), 20)


@pytest.mark.parametrize(
    "claim",
    [
        s.le(s.mul(16, s.floordiv(XN, 16)), XN),
        s.lt(s.floordiv(XN, 16), s.floordiv(s.add(N, 15), 16)),
        s.le(s.minimum(XN, 7), XN),
        s.le(XN, s.maximum(XN, 7)),
        s.le(0, s.mul(XN, XN)),
        s.le(s.minimum(XN, ZM), s.maximum(XN, ZM)),
        s.le(0, s.where(s.le(XN, ZM), s.sub(ZM, XN), s.sub(XN, ZM))),
        s.le(XN, s.call("abs", s.neg(XN), dtype=INT)),
        s.le(s.sub(ZM, XN), s.call("abs", s.sub(XN, ZM), dtype=INT)),
        s.lt(s.mod(XN, s.add(N, 3)), N),
        s.le(s.floordiv(N, 2), N),
        s.lt(s.mul(s.floordiv(N, 16), Axis("u", Const(16))), N),
        s.or_(s.le(I6, J6), s.le(J6, s.add(I6, 3))),
        s.or_(s.le(I6, J6), s.le(J6, s.sub(I6, 1))),
        s.not_(s.and_(s.le(I6, J6), s.le(J6, s.sub(I6, 1)), s.le(K4, 2))),
    ],
)
def test_provable_claims(claim: Expr) -> None:
    assert claim == TRUE


def test_facts_are_used() -> None:
    i, j = Axis("i", N), Axis("j", N)
    causal = s.assume(s.le(j, i))
    band = s.assume(s.and_(s.le(j, i), s.lt(s.sub(i, j), 16)))
    assert s.is_nonneg(s.sub(i, j), causal) and not s.is_nonneg(s.sub(i, j))
    assert s.is_nonneg(s.add(s.mul(N, s.sub(i, j)), 1), causal)
    assert s.is_nonneg(s.sub(s.floordiv(i, 16), s.floordiv(j, 16)), causal)
    assert s.under(s.floordiv(s.sub(i, j), 16), band) == Const(0)
    assert s.under(s.mod(s.sub(i, j), 16), band) == s.sub(i, j)
    assert s.under(s.maximum(s.sub(i, j), 0), causal) == s.sub(i, j)
    assert s.under(s.call("abs", s.sub(i, j), dtype=INT), causal) == s.sub(i, j)
    assert s.under(s.le(s.sub(i, j), 20), band) == TRUE
    assert s.under(s.le(s.add(i, 1), j), causal) == FALSE
    half = Axis("d", Const(16))
    low = s.assume(s.lt(half, 8))
    assert s.under(s.floordiv(s.add(s.mul(16, H), half, 8), 16), low) == H
    assert s.under(s.mod(s.add(half, 8), 16), s.assume(s.not_(s.lt(half, 8)))) == s.sub(half, 8)
    assert s.under(s.add(half, H), s.assume(s.eq(half, 3))) == s.add(H, 3)
    assert s.under(s.maximum(half, 1), s.assume(s.ne(half, 0))) == half
    assert s.under(s.minimum(half, 14), s.assume(s.ne(half, 15))) == half
    seen = Load("mask", (i, j), BOOL)
    assert s.under(s.and_(seen, s.le(j, 3)), s.assume(seen)) == s.le(j, 3)
    assert s.under(s.where(seen, i, j), s.assume(s.not_(seen))) == j


def test_facts_may_be_written_as_ranges() -> None:
    assert s.under(s.minimum(D, 7), {D: (None, 7)}) == D
    facts = {**s.assume(s.le(I6, J6))}
    assert s.under(s.maximum(I6, J6), facts) == J6


def test_branches_know_their_condition() -> None:
    d = Axis("d", Const(16))
    rotated = s.where(
        s.lt(d, 8),
        Load("x", (s.floordiv(s.add(s.mul(16, H), d, 8), 16), s.mod(s.add(d, 8), 16)), "float32"),
        Load("x", (s.floordiv(s.add(s.mul(16, H), d, -8), 16), s.mod(s.sub(d, 8), 16)), "float32"),
    )
    plain = s.under(rotated)
    assert plain.children[1:] == (
        Load("x", (H, s.add(d, 8)), "float32"),
        Load("x", (H, s.sub(d, 8)), "float32"),
    )


def test_bound_axes_are_not_confused_with_free_ones() -> None:
    read = Load("x", (s.minimum(D, 7),), "float32")
    known = s.assume(s.le(D, 7))
    assert s.under(Dot((D,), read, read, "float32"), known) == Dot((D,), read, read, "float32")
    assert s.under(Reduce("sum", D, read, "float32"), known) == Reduce("sum", D, read, "float32")
    assert s.under(read, known) == Load("x", (D,), "float32")


# ------------------------------------------------------------------------------------------------------- floats, casts

F32 = "float32"
SCORE = Load("score", (I6, J6), F32)


def number(x: float) -> Const:
    return Const(x, F32)


def test_positions_kept_in_floats_are_compared_as_integers() -> None:
    distance = s.sub(I6, J6)
    assert s.le(distance, number(2.5)) == s.le(distance, 2)
    assert s.lt(distance, number(2.0)) == s.le(distance, 1)
    assert s.lt(distance, number(2.5)) == s.le(distance, 2)
    assert s.lt(number(2.0), distance) == s.le(3, distance)
    assert s.lt(number(2.5), distance) == s.le(3, distance)
    assert s.le(number(2.5), distance) == s.le(3, distance)
    assert s.eq(distance, number(2.0)) == s.eq(distance, 2)
    assert s.eq(distance, number(2.5)) == FALSE
    assert s.eq(number(2.0), distance) == s.eq(distance, 2)
    for huge in (number(float("inf")), number(float("nan")), number(1e30)):
        assert s.le(distance, huge).children == (distance, huge)
    for op in (s.le, s.lt, s.eq):  # a number that is an integer, against a float: nothing to round
        assert op(SCORE, Const(0)).children == (SCORE, Const(0))
        assert op(Const(0), SCORE).children == (Const(0), SCORE)
        assert op(distance, SCORE).children == (distance, SCORE)


def test_comparison_of_floats_stays_what_it_is() -> None:
    assert s.not_(s.lt(SCORE, number(0.0))) == Call("not", (Call("lt", (SCORE, number(0.0)), BOOL),), BOOL)
    assert s.lt(SCORE, SCORE).children == (SCORE, SCORE)  # x < x decides nothing that NaN may not change
    mask = s.where(s.le(J6, I6), number(1.0), number(0.0))
    assert s.eq(mask, number(0.0)) == s.lt(I6, J6)
    assert s.as_bool(mask) == s.le(J6, I6)
    additive = s.call("mul", s.call("sub", number(1.0), mask, dtype=F32), number(-1e9), dtype=F32)
    assert additive in (
        s.where(s.le(J6, I6), number(0.0), number(-1e9)),
        s.where(s.lt(I6, J6), number(-1e9), number(0.0)),
    )


def test_constants_fold_as_tensors_would() -> None:
    nan, inf = float("nan"), float("inf")
    assert s.call("add", number(1.5), number(2.0), dtype=F32) == number(3.5)
    for op in ("min", "max"):
        for pair in ((nan, 1.0), (1.0, nan)):
            folded = s.call(op, *map(number, pair), dtype=F32)
            assert isinstance(folded, Const) and folded.value != folded.value
    assert s.call("pow", Const(2), Const(10), dtype=INT) == Const(1024)
    for op, args in (("div", (1.0, 0.0)), ("log", (-1.0,)), ("pow", (-8.0, 1 / 3)), ("exp", (1e6,))):
        assert s.call(op, *map(number, args), dtype=F32).children  # left to the tensor library
    assert s.cast(number(-2.7), INT) == Const(-2)
    assert s.cast(number(inf), INT).children == (number(inf),)
    assert s.call("round", number(2.5), dtype=F32) == number(2.0)
    assert s.call("isnan", number(nan), dtype=BOOL) == TRUE


def test_booleans_count_as_numbers() -> None:
    mask = s.le(J6, I6)
    count = s.cast(mask, INT)
    assert s.le(1, mask) == mask and s.eq(mask, 0) == s.not_(mask) and s.lt(0, count) == mask
    assert s.add(count, s.cast(s.not_(mask), INT), True) == s.add(count, s.cast(s.not_(mask), INT), 1)
    assert type(s.expr(True).value) is int  # type: ignore[attr-defined]
    assert s.where(mask, mask, Const(5)).dtype == INT
    assert s.xor(mask, s.not_(mask)) == TRUE and s.xor(mask, SCORE_SEEN) == s.xor(SCORE_SEEN, mask)
    assert s.and_(mask, s.not_(mask)) == FALSE and s.or_(mask, s.not_(mask)) == TRUE
    assert s.and_(s.le(J6, I6), s.le(J6, s.add(I6, 2))) == mask
    assert s.or_(s.le(J6, I6), s.le(J6, s.add(I6, 2))) == s.le(J6, s.add(I6, 2))


SCORE_SEEN = Load("seen", (I6, J6), BOOL)


def test_divisors_that_may_not_be_positive_are_kept() -> None:
    for b in (Const(0), Const(-3), J6, s.sub(N, 5)):
        assert s.floordiv(XN, b) == Call("floordiv", (XN, b), INT)
        assert s.mod(XN, b) == Call("mod", (XN, b), INT)
        assert not s.is_nonneg(s.mod(XN, b)) and s.bounds(s.mod(XN, b)) == (None, None)
    assert s.floordiv(7, -2) == Const(-4) and s.mod(7, -2) == Const(-1)
    assert s.mod(I6, s.add(J6, 6)) == I6


# ------------------------------------------------------------------------------------------------------- speed


def layer(name: str) -> int:
    """The index arithmetic of one attention layer with rotary, GQA and a causal window; returns the number of calls."""
    sizes = {"b": N, "h": Const(32), "i": M, "j": M, "d": Const(128)}
    b, h, i, j, d = (Axis(letter + name, size) for letter, size in sizes.items())
    calls = 0
    full, kv = [N, Const(32), M, Const(128)], [N, Const(8), Const(4), M, Const(128)]
    for row in (i, j):
        for shape in (full, kv, [N, M, Const(32), Const(128)], [s.mul(N, 32), M, Const(128)], [N, M, Const(4096)]):
            index = unflatten(flatten([b, h, row, d], full), shape)
            assert len(index) == len(shape)
            calls += 2 * 4 + 3 * len(shape)
        for part in (s.lt(d, 64), s.ge(d, 64)):
            facts = s.assume(part)
            s.under(s.mod(s.add(d, 64), 128), facts)
            calls += 4
    for k in range(8):
        s.and_(s.le(j, i), s.lt(s.sub(i, j), 256 + k), s.le(j, s.add(M, k)))
        s.where(s.le(j, s.add(i, k)), s.sub(i, j), s.minimum(s.sub(j, i), 7))
        calls += 9
    return calls


def test_construction_is_fast() -> None:
    """Twelve layers that share their axes, as a lifted model does: far below a second even on a slow machine."""
    start = time.process_time()
    calls = sum(layer("") for _ in range(12))
    cold = sum(layer(f"_{k}") for k in range(4))
    seconds = time.process_time() - start
    assert calls > 2000 and cold > 500
    assert seconds < 2.0
