"""Random masks: predicates as expressions, each beside the plain tensor code that says what it means.

`masked_spaces(kinds)` draws a space (axes, tensors) and a predicate made of `and`, `or`, `not` and the `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from refocus import simplify as s
from refocus.ir import BOOL, INT, Axis, Const, Expr, Load, Sym
from refocus.masks import TileMap, Tiling, classify

Positions = tuple[Tensor, Tensor, Tensor, Tensor]  # b, h, i, j, broadcasting against each other
BATCH, HEADS = 2, 3


@dataclass
class Space:
    """Axes b, h, i, j and random tensors over them; the lengths are constants or symbols."""

    n: int
    m: int
    symbolic: bool
    seed: int

    def __post_init__(self) -> None:
        ns, ms = (Sym("n", 1), Sym("m", 1)) if self.symbolic else (Const(self.n), Const(self.m))
        self.sizes = {ns: self.n, ms: self.m} if self.symbolic else {}
        self.b, self.h = Axis("b", Const(BATCH)), Axis("h", Const(HEADS))
        self.i, self.j = Axis("i", ns), Axis("j", ms)
        g = torch.Generator().manual_seed(self.seed)
        n, m = self.n, self.m
        length = max(n, m)
        self.tensors = {
            "doc": torch.randint(0, 2, (BATCH, length), generator=g).cumsum(-1),
            "kind": torch.randint(0, 3, (BATCH, length), generator=g, dtype=torch.int32),
            "keep": torch.rand(BATCH, m, generator=g) < 0.7,
            "lengths": torch.randint(1, m + 1, (BATCH,), generator=g),
            "reach": torch.randint(0, 9, (HEADS,), generator=g),
            "rank": torch.randn(BATCH, length, generator=g),
            "dense": torch.rand(BATCH, 1, n + 2, m + 1, generator=g) < torch.tensor([0.97, 0.03]).reshape(2, 1, 1, 1),
            "blocks": torch.rand(HEADS, (n + 3) // 4, (m + 7) // 8, generator=g) < 0.5,
            "bias": torch.randn(m, n, generator=g),
            "route": torch.randint(0, (m + 3) // 4, (BATCH, (n + 3) // 4), generator=g),
        }

    @property
    def positions(self) -> Positions:
        grid = [torch.arange(k) for k in (BATCH, HEADS, self.n, self.m)]
        return tuple(torch.meshgrid(*grid, indexing="ij"))  # type: ignore[return-value]

    def classify(self, mask: Expr, block_q: int, block_k: int) -> TileMap:
        return classify(mask, self.tiling(block_q, block_k))

    def tiling(self, block_q: int, block_k: int) -> Tiling:
        return Tiling((self.b, self.h), self.i, self.j, block_q, block_k, self.tensors, self.sizes)


Predicate = tuple[Expr, Callable[[Space, Positions], Tensor]]


def absolute(a: Expr) -> Expr:
    return s.call("abs", a, dtype=INT)


def leaf(space: Space, kind: str, a: int, w: int) -> Predicate:
    """One predicate by name, as an expression and as plain tensor code. `a` is any small number, `w` a positive one."""
    b, h, i, j = space.b, space.h, space.i, space.j
    t = space.tensors

    def load(name: str, *index: Expr | int, dtype: str = INT) -> Load:
        return Load(name, tuple(Const(x) if isinstance(x, int) else x for x in index), dtype)

    table: dict[str, Callable[[], Predicate]] = {
        "causal": lambda: (s.le(j, s.add(i, a)), lambda _, p: p[3] <= p[2] + a),
        "aligned": lambda: (s.le(s.add(j, i.size), s.add(i, j.size)), lambda x, p: p[3] + x.n <= p[2] + x.m),
        "window": lambda: (s.lt(s.sub(i, j), w), lambda _, p: p[2] - p[3] < w),
        "band": lambda: (s.le(absolute(s.sub(i, j)), a), lambda _, p: (p[2] - p[3]).abs() <= a),
        "dilated": lambda: (s.eq(s.mod(s.sub(i, j), w), a % w), lambda _, p: (p[2] - p[3]) % w == a % w),
        "dilated range": lambda: (s.le(s.mod(s.sub(i, j), w), a), lambda _, p: (p[2] - p[3]) % w <= a),
        "same block": lambda: (s.eq(s.floordiv(i, w), s.floordiv(j, w)), lambda _, p: p[2] // w == p[3] // w),
        "shifted block": lambda: (
            s.eq(s.floordiv(s.add(i, a), w), s.floordiv(j, w)),
            lambda _, p: (p[2] + a) // w == p[3] // w,
        ),
        "block causal": lambda: (s.le(s.floordiv(j, w), s.floordiv(i, w)), lambda _, p: p[3] // w <= p[2] // w),
        "block distance": lambda: (
            s.le(s.floordiv(s.sub(i, j), w), a),
            lambda _, p: (p[2] - p[3]).div(w, rounding_mode="floor") <= a,
        ),
        "prefix": lambda: (s.lt(j, a), lambda _, p: p[3] < a),
        "scaled": lambda: (s.le(s.mul(2, j), s.add(s.mul(3, i), a)), lambda _, p: 2 * p[3] <= 3 * p[2] + a),
        "rows": lambda: (s.le(a, i), lambda _, p: p[2] >= a),
        "stride": lambda: (s.eq(s.mod(j, w), a % w), lambda _, p: p[3] % w == a % w),
        "map rows": lambda: (
            s.le(absolute(s.sub(s.floordiv(i, w), s.floordiv(j, w))), a),
            lambda _, p: (p[2] // w - p[3] // w).abs() <= a,
        ),
        "map columns": lambda: (
            s.le(absolute(s.sub(s.mod(i, w), s.mod(j, w))), a),
            lambda _, p: (p[2] % w - p[3] % w).abs() <= a,
        ),
        "head window": lambda: (s.le(s.sub(i, j), s.mul(w, h)), lambda _, p: p[2] - p[3] <= w * p[1]),
        "sum": lambda: (s.le(s.add(i, j), s.add(a, s.floordiv(i, w))), lambda _, p: p[2] + p[3] <= a + p[2] // w),
        "corner": lambda: (
            s.lt(s.minimum(i, j), a),
            lambda _, p: torch.minimum(p[2], p[3]) < a,
        ),
        "far corner": lambda: (
            s.le(s.maximum(s.sub(i, w), j), a + w),
            lambda _, p: torch.maximum(p[2] - w, p[3]) <= a + w,
        ),
        "product": lambda: (s.le(s.mul(i, j), w * w), lambda _, p: p[2] * p[3] <= w * w),
        "saw": lambda: (s.le(s.sub(i, s.mul(w, s.floordiv(i, w))), j), lambda _, p: p[2] % w <= p[3]),
        "choice": lambda: (
            s.le(s.where(s.le(j, i), s.add(j, a), s.mul(2, i)), Const(w)),
            lambda _, p: torch.where(p[3] <= p[2], p[3] + a, 2 * p[2]) <= w,
        ),
        "reach": lambda: (
            s.le(s.sub(i, j), load("reach", h)),
            lambda _, p: p[2] - p[3] <= t["reach"][p[1]],
        ),
        "lengths": lambda: (s.lt(j, load("lengths", b)), lambda _, p: p[3] < t["lengths"][p[0]]),
        "document": lambda: (
            s.eq(load("doc", b, i), load("doc", b, j)),
            lambda _, p: t["doc"][p[0], p[2]] == t["doc"][p[0], p[3]],
        ),
        "document order": lambda: (
            s.le(load("doc", b, j), s.add(load("doc", b, i), 1)),
            lambda _, p: t["doc"][p[0], p[3]] <= t["doc"][p[0], p[2]] + 1,
        ),
        "kind": lambda: (
            s.eq(load("kind", b, i, dtype="int32"), load("kind", b, j, dtype="int32")),
            lambda _, p: t["kind"][p[0], p[2]] == t["kind"][p[0], p[3]],
        ),
        "keep": lambda: (load("keep", b, j, dtype=BOOL), lambda _, p: t["keep"][p[0], p[3]]),
        "xor": lambda: (
            s.xor(load("keep", b, j, dtype=BOOL), s.le(j, i)),
            lambda _, p: t["keep"][p[0], p[3]] != (p[3] <= p[2]),
        ),
        "rank": lambda: (
            s.call("le", load("rank", b, i, dtype="float32"), load("rank", b, j, dtype="float32"), dtype=BOOL),
            lambda _, p: t["rank"][p[0], p[2]] <= t["rank"][p[0], p[3]],
        ),
        "threshold": lambda: (
            s.call("lt", Const(0.0, "float32"), load("rank", b, j, dtype="float32"), dtype=BOOL),
            lambda _, p: t["rank"][p[0], p[3]] > 0,
        ),
        "dense": lambda: (
            load("dense", b, 0, s.add(i, 2), j, dtype=BOOL),
            lambda _, p: t["dense"][p[0], 0, p[2] + 2, p[3]],
        ),
        "dense shared": lambda: (
            load("dense", 0, 0, i, s.add(j, 1), dtype=BOOL),
            lambda _, p: t["dense"][0, 0, p[2], p[3] + 1],
        ),
        "bias": lambda: (
            s.call("lt", Const(-1.0, "float32"), load("bias", j, i, dtype="float32"), dtype=BOOL),
            lambda _, p: t["bias"][p[3], p[2]] > -1,
        ),
        "blocks": lambda: (
            load("blocks", h, s.floordiv(i, 4), s.floordiv(j, 8), dtype=BOOL),
            lambda _, p: t["blocks"][p[1], p[2] // 4, p[3] // 8],
        ),
        "route": lambda: (
            s.eq(load("route", b, s.floordiv(i, 4)), s.floordiv(j, 4)),
            lambda _, p: t["route"][p[0], p[2] // 4] == p[3] // 4,
        ),
    }
    return table[kind]()


KINDS = [
    "causal", "aligned", "window", "band", "dilated", "dilated range", "same block", "shifted block", "block causal",
    "block distance", "prefix", "scaled", "rows", "stride", "map rows", "map columns", "head window", "sum", "corner",
    "far corner", "product", "saw", "choice", "reach", "lengths", "document", "document order", "kind", "keep", "xor",
    "rank", "threshold", "dense", "dense shared", "bias", "blocks", "route",
]  # fmt: skip
CLOSED = KINDS[: KINDS.index("reach")]


def predicates(space: Space, kinds: list[str]) -> st.SearchStrategy[Predicate]:
    leaves = st.builds(leaf, st.just(space), st.sampled_from(kinds), st.integers(-3, 24), st.integers(1, 12))

    def join(op: str, parts: list[Predicate]) -> Predicate:
        build = s.and_ if op == "and" else s.or_
        run = torch.logical_and if op == "and" else torch.logical_or
        return build(*(e for e, _ in parts)), lambda x, p: run(parts[0][1](x, p), parts[-1][1](x, p))

    def negate(part: Predicate) -> Predicate:
        return s.not_(part[0]), lambda x, p: ~part[1](x, p)

    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(join, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=2)),
            st.builds(negate, inner),
        ),
        max_leaves=4,
    )


@st.composite
def masked_spaces(draw: st.DrawFn, kinds: list[str]) -> tuple[Space, Predicate]:
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    if draw(st.booleans()):
        m = n
    space = Space(n, m, draw(st.booleans()), draw(st.integers(0, 1000)))
    return space, draw(predicates(space, kinds))


def truth(space: Space, predicate: Predicate, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """The dense mask [b, h, i, j], and the best possible states [b, h, query tiles, key tiles]."""
    dense = predicate[1](space, space.positions)
    rows = [dense[..., q : q + block_q, :] for q in range(0, space.n, block_q)]
    tiles = [[r[..., k : k + block_k].flatten(2) for k in range(0, space.m, block_k)] for r in rows]
    best = [torch.stack([t.all(-1).int() + t.any(-1).int() for t in row], -1) for row in tiles]
    return dense, torch.stack(best, -2)


def spread(space: Space, found: TileMap) -> Tensor:
    """A tile map over all batch axes."""
    shape = [size if axis in found.axes else 1 for axis, size in ((space.b, BATCH), (space.h, HEADS))]
    return found.state.reshape(*shape, *found.state.shape[-2:]).expand(BATCH, HEADS, -1, -1)
