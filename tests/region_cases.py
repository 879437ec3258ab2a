"""Small regions, built by hand, that every engine is tried on.

Each case is a function `case(dtype=torch.float32, n=..., d=...) -> (region, tensors, sizes)`: `tensors` in the order
of `region.operands`, `sizes` in the order of `region.syms`. `CASES` lists them all by name. Lengths are no multiple of
a power of two on purpose, so that every engine meets ragged tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from refocus import simplify
from refocus.ir import BOOL, INT, TRUE, Axis, Call, Const, Dot, Expr, Load, Operand, Region, Sym
from refocus.simplify import and_, le

Case = tuple[Region, list[Tensor], list[int]]
B, H = 2, 4


def add(*args: Expr) -> Expr:
    return simplify.call("add", *args, dtype=args[0].dtype) if args[0].is_float else simplify.add(*args)


def mul(*args: Expr) -> Expr:
    dtype = next((a.dtype for a in args if a.is_float), None)
    return simplify.call("mul", *args, dtype=dtype) if dtype else simplify.mul(*args)


def call(op: str, *args: Expr, dtype: str = "") -> Expr:
    return simplify.call(op, *args, dtype=dtype or args[0].dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def operand(name: str, tensor: Tensor) -> Operand:
    return Operand(name, name_of(tensor.dtype), tuple(Const(s) for s in tensor.shape))


def randn(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Setting:
    """Axes b, h, i, j, d, e and the operands q[b,h,i,d], k[b,h_kv,j,d], v[b,h_kv,j,e] of one case."""

    def __init__(self, dtype: torch.dtype, n: int, m: int, d: int, e: int, kv_heads: int = H) -> None:
        self.dtype, self.f = dtype, name_of(dtype)
        self.b, self.h = Axis("b", Const(B)), Axis("h", Const(H))
        self.i, self.j = Axis("i", Const(n)), Axis("j", Const(m))
        self.d, self.e = Axis("d", Const(d)), Axis("e", Const(e))
        self.tensors = {
            "q": randn(1, dtype, B, H, n, d),
            "k": randn(2, dtype, B, kv_heads, m, d),
            "v": randn(3, dtype, B, kv_heads, m, e),
        }
        group = H // kv_heads
        self.hk = simplify.floordiv(self.h, group)
        dot = Dot((self.d,), Load("q", (self.b, self.h, self.i, self.d), self.f),
                  Load("k", (self.b, self.hk, self.j, self.d), self.f), self.f)
        self.score = mul(dot, self.const(d**-0.5))
        self.values: Expr = Load("v", (self.b, self.hk, self.j, self.e), self.f)

    def const(self, value: float) -> Expr:
        return Const(float(value), self.f)

    @property
    def lowest(self) -> float:
        return torch.finfo(self.dtype).min

    def masked(self, score: Expr, mask: Expr, fill: float | None = None) -> Expr:
        return simplify.where(mask, score, self.const(self.lowest if fill is None else fill))

    def region(self, score: Expr, mask: Expr = TRUE, logits: Expr | None = None, **more: object) -> Region:
        if logits is None:
            logits = score if mask == TRUE else self.masked(score, mask)
        more.setdefault("empty_row", "never")
        return Region((self.b, self.h), self.i, self.j, (self.e,), score, mask, logits, self.values,
                      tuple(operand(n, t) for n, t in self.tensors.items()), self.f, **more)  # type: ignore[arg-type]

    def case(self, score: Expr, mask: Expr = TRUE, logits: Expr | None = None, **more: object) -> Case:
        return self.region(score, mask, logits, **more), list(self.tensors.values()), []


def dense(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d)
    return s.case(s.score)


def causal(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d)
    return s.case(s.score, le(s.j, s.i))


def causal_bfloat16(dtype: torch.dtype = torch.bfloat16, n: int = 50, d: int = 16) -> Case:
    return causal(dtype, n, d)


def window(dtype: torch.dtype = torch.float32, n: int = 75, d: int = 16, width: int = 9) -> Case:
    s = Setting(dtype, n, n, d, d)
    return s.case(s.score, and_(le(s.j, s.i), le(add(s.i, Const(1 - width)), s.j)))


def gqa(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d, kv_heads=2)
    return s.case(s.score, le(s.j, s.i))


def additive_bias(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """A float bias shared by the batch."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["bias"] = randn(4, dtype, 1, H, n, n)
    return s.case(add(s.score, Load("bias", (Const(0), s.h, s.i, s.j), s.f)))


def alibi(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d)
    s.tensors["slopes"] = torch.tensor([2.0 ** -(x + 1) for x in range(H)]).to(dtype)
    bias = call("mul", Load("slopes", (s.h,), s.f), simplify.sub(s.j, s.i))
    return s.case(add(s.score, bias), le(s.j, s.i))


def softcap(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d, kv_heads=1)
    capped = mul(call("tanh", call("div", s.score, s.const(2.0))), s.const(2.0))
    return s.case(capped, and_(le(s.j, s.i), le(add(s.i, Const(-20)), s.j)))


def padding(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Right padding: a bool vector over keys, loaded."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["keep"] = torch.arange(n)[None] < torch.tensor([n, n - 19])[:, None]
    return s.case(s.score, Load("keep", (s.b, s.j), BOOL), empty_row="logits")


def documents(dtype: torch.dtype = torch.float32, n: int = 75, d: int = 16) -> Case:
    """Packed sequences: equal document ids, and causal."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["doc"] = torch.stack([torch.arange(n) // 13, torch.arange(n) // 31])
    same = simplify.eq(Load("doc", (s.b, s.i), INT), Load("doc", (s.b, s.j), INT))
    return s.case(s.score, and_(le(s.j, s.i), same))


def sinks(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    s = Setting(dtype, n, n, d, d, kv_heads=2)
    s.tensors["sink"] = randn(5, dtype, H)
    return s.case(s.score, le(s.j, s.i), extra=(Load("sink", (s.h,), s.f),))


def _left_padded(dtype: torch.dtype, n: int, d: int) -> tuple[Setting, Expr]:
    """Causal with left padding: in sequence 1 the first 11 rows keep no key."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["keep"] = torch.arange(n)[None] >= torch.tensor([0, 11])[:, None]
    return s, and_(le(s.j, s.i), Load("keep", (s.b, s.j), BOOL))


def empty_min(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Emptied rows become the mean of all values."""
    s, mask = _left_padded(dtype, n, d)
    return s.case(s.score, mask, empty_row="logits")


def empty_inf(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Emptied rows become NaN."""
    s, mask = _left_padded(dtype, n, d)
    return s.case(s.score, mask, s.masked(s.score, mask, -math.inf), empty_row="logits")


def empty_zero(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Emptied rows become zero."""
    s, mask = _left_padded(dtype, n, d)
    return s.case(s.score, mask, s.masked(s.score, mask, -math.inf), empty_row="zero")


def empty_added(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """An additive mask of -100: emptied rows keep the pattern of their scores, and a sink takes its share."""
    s, mask = _left_padded(dtype, n, d)
    fill = call("where", mask, s.const(0.0), s.const(-100.0), dtype=s.f)
    s.tensors["sink"] = randn(5, dtype, H)
    sink = add(Load("sink", (s.h,), s.f), s.const(-100.0))
    return s.case(s.score, mask, add(s.score, fill), extra=(sink,), empty_row="logits")


def low_scores(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Padding at the left is added as numbers lower than the fill of a causal mask: rows that see padding only become
    the mean of the later keys that are none."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["added"] = torch.where(torch.arange(n)[None] < torch.tensor([0, 11])[:, None], -3e4, 0.0).to(dtype)
    added = Load("added", (s.b, s.j), s.f)
    low = call("le", added, s.const(-1e4), dtype=BOOL)
    causal = le(s.j, s.i)
    logits = add(s.masked(s.score, causal, -1e4), added)
    return s.case(add(s.score, added), and_(causal, simplify.not_(low)), logits, empty_row="logits")


def masked_rows(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Whole rows are masked, by a fill that the scores are lost in: they become the mean of all values."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["keep"] = torch.arange(n)[None] >= torch.tensor([0, 11])[:, None]
    mask = Load("keep", (s.b, s.i), BOOL)
    fill = call("where", mask, s.const(0.0), s.const(torch.finfo(dtype).min), dtype=s.f)
    return s.case(s.score, mask, add(s.score, fill), empty_row="logits")


def emptied_by_bias(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Nothing is masked, but what is added takes all keys of some rows away: they are zeros."""
    s = Setting(dtype, n, n, d, d)
    bias = randn(4, dtype, H, n, n)
    bias[1, 3], bias[0, n - 1] = -math.inf, -math.inf
    s.tensors["bias"] = bias
    return s.case(add(s.score, Load("bias", (s.h, s.i, s.j), s.f)), empty_row="zero")


def pairwise(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Weights that are a function of each score, and no softmax: a mean of equal scores, gated."""
    s = Setting(dtype, n, n, d, d)
    gate = call("square", call("relu", s.score))
    return s.case(s.const(0.0), le(s.j, s.i), gate=gate, empty_row="zero")


def gated(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """The normalised weight is multiplied by a sigmoid of the key and one of the query."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["gate_k"], s.tensors["gate_q"] = randn(6, dtype, B, n), randn(7, dtype, H, n)
    gate = mul(call("sigmoid", Load("gate_k", (s.b, s.j), s.f)), call("sigmoid", Load("gate_q", (s.h, s.i), s.f)))
    return s.case(s.score, le(s.j, s.i), gate=gate)


def cross(dtype: torch.dtype = torch.float32, n: int = 37, d: int = 16) -> Case:
    """Other lengths, other widths."""
    s = Setting(dtype, n, 2 * n + 5, d, d // 2)
    return s.case(s.score)


def relative_table(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16, reach: int = 12) -> Case:
    """+ table[clamp(i - j + reach, 0, 2 reach), h]"""
    s = Setting(dtype, n, n, d, d)
    s.tensors["table"] = randn(8, dtype, 2 * reach + 1, H)
    offset = simplify.sub(add(s.i, Const(reach)), s.j)
    clamped = call("min", call("max", offset, Const(0)), Const(2 * reach))
    return s.case(add(s.score, Load("table", (clamped, s.h), s.f)))


def t5_buckets(dtype: torch.dtype = torch.float32, n: int = 75, d: int = 16) -> Case:
    """T5's relative buckets, computed in float32 whatever the model's dtype; the decoder's, causal."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["table"] = randn(8, dtype, 32, H)
    distance = call("max", simplify.sub(s.i, s.j), Const(0))
    far = call("log", call("div", distance, Const(16.0, "float32"), dtype="float32"))
    far = mul(call("div", far, Const(math.log(8.0), "float32")), Const(16.0, "float32"))
    # The logarithm of zero is -inf; its cast is undefined, so keep the argument at one or above.
    far = call("where", le(distance, Const(0)), Const(0.0, "float32"), far, dtype="float32")
    far = call("min", add(simplify.cast(far, INT), Const(16)), Const(31))
    bucket = call("where", le(distance, Const(15)), distance, far, dtype=INT)
    (s.score, _) = s.score.args  # type: ignore[attr-defined]  # T5 does not scale
    return s.case(add(s.score, Load("table", (bucket, s.h), s.f)), le(s.j, s.i))


def symbolic(dtype: torch.dtype = torch.float32, n: int = 53, d: int = 16) -> Case:
    """Causal with a cache: n and m are symbols, queries are the last n of m positions."""
    s = Setting(dtype, n, n + 20, d, d, kv_heads=2)
    ns, ms = Sym("s0"), Sym("s1")
    i, j = Axis("i", ns), Axis("j", ms)
    dot = Dot((s.d,), Load("q", (s.b, s.h, i, s.d), s.f), Load("k", (s.b, s.hk, j, s.d), s.f), s.f)
    score = mul(dot, s.const(d**-0.5))
    mask = le(add(j, ns), add(i, ms))
    operands = tuple(Operand(x, s.f, (Const(B), Const(s.tensors[x].shape[1]), size, Const(d)))
                     for x, size in (("q", ns), ("k", ms), ("v", ms)))
    region = Region((s.b, s.h), i, j, (s.e,), score, mask, s.masked(score, mask),
                    Load("v", (s.b, s.hk, j, s.e), s.f), operands, s.f, empty_row="never")
    return region, list(s.tensors.values()), [n, n + 20]


def two_dots(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Content and position products, of different widths."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["qp"], s.tensors["kp"] = randn(9, dtype, B, H, n, 8), randn(10, dtype, n, 8)
    c = Axis("c", Const(8))
    dot = Dot((c,), Load("qp", (s.b, s.h, s.i, c), s.f), Load("kp", (s.j, c), s.f), s.f)
    return s.case(add(s.score, mul(dot, s.const(0.3))), le(s.j, s.i))


def merged_heads(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """q, k, v as [b, i, heads * d]: the last index is h * d + d; one packed projection of all three."""
    f = name_of(dtype)
    b, h, i, j = Axis("b", Const(B)), Axis("h", Const(H)), Axis("i", Const(n)), Axis("j", Const(n))
    c, e = Axis("d", Const(d)), Axis("e", Const(d))

    def at(row: Expr, lane: Expr, part: int) -> Load:
        offset = (Const(part * H * d),) if part else ()
        return Load("qkv", (b, row, add(mul(Const(d), h), lane, *offset)), f)

    score = mul(Dot((c,), at(i, c, 0), at(j, c, 1), f), Const(d**-0.5, f))
    qkv = randn(11, dtype, B, n, 3 * H * d)
    region = Region((b, h), i, j, (e,), score, TRUE, score, at(j, e, 2), (operand("qkv", qkv),), f, empty_row="never")
    return region, [qkv], []


def windows_2d(dtype: torch.dtype = torch.float32, n: int = 0, d: int = 8) -> Case:
    """Swin: 4x4 windows of an 8x12 map, rolled by 2; q = k = v's map is read at a wrapped index; two value axes."""
    f, side, rows, cols = name_of(dtype), 4, 8, 12
    wy, wx = Axis("wy", Const(rows // side)), Axis("wx", Const(cols // side))
    i, j = Axis("i", Const(side * side)), Axis("j", Const(side * side))
    c, e, g = Axis("d", Const(d)), Axis("e", Const(d // 2)), Axis("g", Const(2))
    x = randn(12, dtype, rows, cols, d)

    def at(token: Expr, lane: Expr) -> Load:
        y = add(mul(Const(side), wy), simplify.floordiv(token, side), Const(2))
        z = add(mul(Const(side), wx), simplify.mod(token, side), Const(2))
        return Load("x", (simplify.mod(y, rows), simplify.mod(z, cols), lane), f)

    score = mul(Dot((c,), at(i, c), at(j, c), f), Const(d**-0.5, f))
    values = at(j, add(mul(Const(2), e), g))
    region = Region((wy, wx), i, j, (e, g), score, TRUE, score, values, (operand("x", x),), f, empty_row="never")
    return region, [x], []


def unbatched(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """No batch axis at all; a learned scale, read from a tensor with no dimensions."""
    f = name_of(dtype)
    i, j, c, e = Axis("i", Const(n)), Axis("j", Const(n)), Axis("d", Const(d)), Axis("e", Const(d))
    tensors = {"q": randn(1, dtype, n, d), "k": randn(2, dtype, n, d), "t": torch.tensor(0.3).to(dtype)}
    score = mul(Dot((c,), Load("q", (i, c), f), Load("k", (j, c), f), f), Load("t", (), f))
    operands = tuple(operand(x, t) for x, t in tensors.items())
    region = Region((), i, j, (e,), score, TRUE, score, Load("k", (j, e), f), operands, f, empty_row="never")
    return region, list(tensors.values()), []


def dropout(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """A third of the weights dropped: which ones follows from a seed and from their position."""
    s = Setting(dtype, n, n, d, d)
    s.tensors["seed"] = torch.tensor(0x1234_5678_9ABC_DEF)
    row = add(mul(Const(n), add(mul(Const(H), s.b), s.h)), s.i)
    drawn = Call("random", (Load("seed", (), INT), row, s.j), "float32")
    keep = simplify.call("le", Const(1 / 3, "float32"), drawn, dtype=BOOL)
    return s.case(s.score, le(s.j, s.i), gate=simplify.where(keep, Const(1.5, s.f), Const(0.0, s.f)))


CASES: dict[str, Callable[..., Case]] = {
    f.__name__: f
    for f in (
        dense, causal, causal_bfloat16, window, gqa, additive_bias, alibi, softcap, padding, documents, sinks,
        empty_min, empty_inf, empty_zero, empty_added, low_scores, gated, pairwise, emptied_by_bias, cross,
        relative_table, t5_buckets, symbolic, two_dots, masked_rows, merged_heads, windows_2d, unbatched, dropout,
    )
}


def floor(dtype: torch.dtype) -> float:
    """What an engine's largest error may exceed 1.5 times the eager one by."""
    return {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]


def all_names() -> Sequence[str]:
    return tuple(CASES)
