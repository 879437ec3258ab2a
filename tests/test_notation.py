"""Golden text of the index notation."""

from __future__ import annotations

import pytest

from refocus.ir import BOOL, FALSE, TRUE, Axis, Call, Const, Dot, Expr, Load, Operand, Reduce, Region, Sym
from refocus.notation import notation

N = Sym("n")
B, H = Axis("b", Const(2)), Axis("h", Const(4))
QI, KJ = Axis("i", Const(64)), Axis("j", Const(64))
D, E = Axis("d", Const(16)), Axis("e", Const(16))
F32 = "float32"


def iop(op: str, *args: Expr | int) -> Call:
    return Call(op, tuple(Const(a) if isinstance(a, int) else a for a in args), "int64")


def bop(op: str, *args: Expr | int) -> Call:
    return Call(op, tuple(Const(a) if isinstance(a, int) else a for a in args), BOOL)


def fop(op: str, *args: Expr | float) -> Call:
    return Call(op, tuple(Const(a, F32) if isinstance(a, float) else a for a in args), F32)


Q = Load("q", (B, H, QI, D), F32)
K = Load("k", (B, iop("floordiv", H, 2), KJ, D), F32)
V = Load("v", (B, iop("floordiv", H, 2), KJ, E), F32)
QK = Dot((D,), Q, K, F32)
BIAS = Load("bias", (H, iop("add", QI, iop("mul", -1, KJ), 63)), F32)
CAUSAL = bop("le", KJ, QI)
WINDOW = bop("le", QI, iop("add", KJ, 15))
DOC = bop("eq", Load("doc", (B, QI), "int64"), Load("doc", (B, KJ), "int64"))

GOLDEN = [
    (CAUSAL, "j <= i"),
    (WINDOW, "i - j < 16"),
    (bop("and", CAUSAL, WINDOW), "j <= i and i - j < 16"),
    (bop("le", iop("add", KJ, 1), QI), "j < i"),
    (bop("le", iop("add", KJ, 16), QI), "i - j >= 16"),
    (bop("le", KJ, 15), "j < 16"),
    (bop("le", KJ, 0), "j <= 0"),
    (bop("le", 16, KJ), "j >= 16"),
    (bop("le", iop("add", KJ, 1), N), "j < n"),
    (bop("le", N, KJ), "j >= n"),
    (bop("le", iop("add", N, 1), KJ), "j > n"),
    (bop("le", KJ, iop("add", QI, N, iop("mul", -1, Sym("m")))), "j <= i + n - m"),
    (bop("le", iop("add", KJ, iop("mul", -1, QI)), iop("add", N, -1)), "j < i + n"),
    (bop("not", CAUSAL), "i < j"),
    (bop("not", bop("eq", QI, KJ)), "i != j"),
    (bop("eq", iop("add", QI, iop("mul", -1, KJ)), 5), "i == j + 5"),
    (bop("eq", QI, iop("add", KJ, 5)), "i == j + 5"),
    (DOC, "doc[b,i] == doc[b,j]"),
    (bop("eq", iop("mod", iop("add", QI, iop("mul", -1, KJ)), 4), 0), "(i - j) % 4 == 0"),
    (bop("eq", iop("floordiv", QI, 16), iop("floordiv", KJ, 16)), "i//16 == j//16"),
    (bop("eq", iop("mod", iop("mul", 4, QI), 16), iop("floordiv", iop("floordiv", KJ, 2), 3)),
     "(4*i) % 16 == (j//2) // 3"),
    (bop("or", bop("and", CAUSAL, DOC), bop("le", KJ, 3)), "j <= i and doc[b,i] == doc[b,j] or j < 4"),
    (bop("and", bop("or", CAUSAL, bop("le", KJ, 3)), DOC), "(j <= i or j < 4) and doc[b,i] == doc[b,j]"),
    (bop("not", bop("or", CAUSAL, DOC)), "not (j <= i or doc[b,i] == doc[b,j])"),
    (bop("not", Load("pad", (B, KJ), BOOL)), "not pad[b,j]"),
    (bop("and", Load("pad", (B, KJ), BOOL), bop("and", CAUSAL, WINDOW)), "pad[b,j] and j <= i and i - j < 16"),
    (bop("lt", BIAS, Const(0.0, F32)), "bias[h,i - j + 63] < 0.0"),
    (bop("not", bop("le", BIAS, Const(0.0, F32))), "not (bias[h,i - j + 63] <= 0.0)"),
    (bop("xor", CAUSAL, TRUE), "(j <= i) != true"),
    (iop("mul", -3, iop("add", QI, KJ)), "-3*(i + j)"),
    (iop("mul", QI, iop("floordiv", KJ, 4)), "i*(j//4)"),
    (iop("max", iop("min", QI, KJ), iop("max", 0, H)), "max(min(i, j), 0, h)"),
    (iop("abs", iop("sub", QI, KJ)), "abs(i - j)"),
    (iop("add", iop("mul", -1, QI), 5), "-i + 5"),
    (Call("where", (CAUSAL, Q, Const(-3.4028234663852886e38, F32)), F32),
     "where(j <= i, q[b,h,i,d], finfo(float32).min)"),
    (QK, "sum_d q[b,h,i,d] * k[b,h//2,j,d]"),
    (fop("mul", QK, 0.25), "0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d]"),
    (fop("div", QK, 4.0), "(sum_d q[b,h,i,d] * k[b,h//2,j,d]) / 4.0"),
    (fop("add", fop("mul", QK, 0.25), BIAS), "0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d] + bias[h,i - j + 63]"),
    (fop("mul", fop("add", QK, BIAS), 0.1), "0.1 * (sum_d q[b,h,i,d] * k[b,h//2,j,d] + bias[h,i - j + 63])"),
    (fop("sub", BIAS, fop("add", BIAS, 1.0)), "bias[h,i - j + 63] - (bias[h,i - j + 63] + 1.0)"),
    (fop("mul", 50.0, fop("tanh", fop("div", BIAS, 50.0))), "50.0 * tanh(bias[h,i - j + 63] / 50.0)"),
    (fop("add", BIAS, fop("neg", BIAS)), "bias[h,i - j + 63] - bias[h,i - j + 63]"),
    (fop("pow", fop("add", BIAS, 1.0), fop("neg", BIAS)), "(bias[h,i - j + 63] + 1.0)**(-bias[h,i - j + 63])"),
    (fop("mul", Load("slope", (H,), F32), fop("cast", iop("add", KJ, iop("mul", -1, QI)))), "slope[h] * (j - i)"),
    (fop("cast", Load("x", (QI,), "bfloat16")), "x[i]"),
    (Call("cast", (fop("square", Load("x", (QI,), F32)),), "float16"), "float16(x[i]**2)"),
    (iop("cast", fop("log", fop("cast", QI))), "int(log(i))"),
    (fop("cast", CAUSAL), "float(j <= i)"),
    (Reduce("max", KJ, fop("exp", BIAS), F32), "max_j(exp(bias[h,i - j + 63]))"),
    (Load("scale", (), F32), "scale"),
    (Const(0.08838834764831845, F32), "0.0883883"),
    (Const(float("-inf"), F32), "-inf"),
    (FALSE, "false"),
    (iop("add", QI, Axis("i", Const(3))), "i + i'"),
]


@pytest.mark.parametrize(("expr", "text"), GOLDEN, ids=[text for _, text in GOLDEN])
def test_expression(expr: Expr, text: str) -> None:
    assert notation(expr) == text


def region(**changes: object) -> Region:
    score = fop("mul", QK, 0.25)
    fields: dict[str, object] = {
        "batch": (B, H), "query": QI, "key": KJ, "value": (E,), "score": score, "mask": TRUE, "logits": score,
        "values": V, "operands": (Operand("q", F32, (Const(2), Const(4), Const(64), Const(16))),), "out_dtype": F32,
    }
    return Region(**(fields | changes))  # type: ignore[arg-type]


def test_plain_region() -> None:
    assert notation(region()) == (
        "S[b,h,i,j] = 0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d]\n"
        "O[b,h,i,e] = softmax_j(S) . v[b,h//2,j,e]"
    )


def test_masked_region() -> None:
    mask = bop("and", CAUSAL, WINDOW)
    assert notation(region(mask=mask, empty_row="never")) == (
        "S[b,h,i,j] = 0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d]\n"
        "mask       = j <= i and i - j < 16\n"
        "O[b,h,i,e] = softmax_j(S | mask) . v[b,h//2,j,e]"
    )


def test_region_with_every_part() -> None:
    score = fop("mul", QK, 0.25)
    filled = Call("where", (DOC, score, Const(-3.4028234663852886e38, F32)), F32)
    full = region(
        mask=DOC, logits=filled, extra=(Load("sink", (H,), F32),),
        gate=fop("sigmoid", Load("g", (B, H, QI), F32)), values=fop("mul", V, V),
    )
    assert notation(full) == (
        "S[b,h,i,j] = 0.25 * sum_d q[b,h,i,d] * k[b,h//2,j,d]\n"
        "mask       = doc[b,i] == doc[b,j]\n"
        "extra      = sink[h]\n"
        "gate       = sigmoid(g[b,h,i])\n"
        "O[b,h,i,e] = (softmax_j(S | mask; extra) * gate) . (v[b,h//2,j,e] * v[b,h//2,j,e])\n"
        "empty row  = softmax_j(where(mask, S, finfo(float32).min); extra)"
    )
    zero = region(mask=DOC, empty_row="zero", normalizer="sigmoid")
    assert notation(zero).splitlines()[-2:] == [
        "O[b,h,i,e] = sigmoid(S | mask) . v[b,h//2,j,e]",
        "empty row  = 0",
    ]
