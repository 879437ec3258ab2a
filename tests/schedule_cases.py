"""Regions of few queries and many keys, and of windows: what is compiled ahead of time of their schedules."""

from __future__ import annotations

import torch

from refocus import simplify as s
from refocus.ir import BOOL, TRUE, Axis, Const, Dot, Load, Operand, Region, Sym

ALL = ("sm_80", "sm_90", "gfx942")
NVIDIA = ALL[:2]


def cached(dtype: torch.dtype, d: int = 128, kv_heads: int = 8, queries: int = 1, padded: bool = False) -> Region:
    """32 heads of a cache of any length; `padded`: which keys count is read, so a row may be without one."""
    f = str(dtype).removeprefix("torch.")
    m = Sym("s0")
    b, h = Axis("b", Const(4)), Axis("h", Const(32))
    i, j, over, e = (Axis(n, z) for n, z in (("i", Const(queries)), ("j", m), ("d", Const(d)), ("e", Const(d))))
    hk = s.floordiv(h, 32 // kv_heads)
    dot = Dot((over,), Load("q", (b, h, i, over), f), Load("k", (b, hk, j, over), f), f)
    score = s.call("mul", dot, Const(d**-0.5, f), dtype=f)
    mask = s.le(s.add(j, queries), s.add(i, m))
    heads = (("q", 32, Const(queries)), ("k", kv_heads, m), ("v", kv_heads, m))
    operands = tuple(Operand(x, f, (Const(4), Const(n), length, Const(d))) for x, n, length in heads)
    if padded:
        mask = s.and_(mask, Load("keep", (b, j), BOOL))
        operands = (*operands, Operand("keep", "bool", (Const(4), m)))
    logits = s.where(mask, score, Const(float(torch.finfo(dtype).min), f))
    empty = "logits" if padded else "never"
    return Region((b, h), i, j, (e,), score, mask, logits, Load("v", (b, hk, j, e), f), operands, f, empty_row=empty)


def windowed(dtype: torch.dtype, n: int, d: int, shifted: bool = True, cut: bool = False) -> Region:
    """Windows of n tokens with a bias by head, and a shift mask by window, additive or `cut`."""
    f = str(dtype).removeprefix("torch.")
    b, w, h = Axis("b", Const(16)), Axis("w", Const(64)), Axis("h", Const(4))
    i, j, over, e = (Axis(x, Const(z)) for x, z in (("i", n), ("j", n), ("d", d), ("e", d)))
    at = (b, w, h)
    dot = Dot((over,), Load("q", (*at, i, over), f), Load("k", (*at, j, over), f), f)
    score = s.call("mul", dot, Const(d**-0.5, f), dtype=f)
    score = s.call("add", score, Load("bias", (h, i, j), f), dtype=f)
    mask, logits, empty = TRUE, score, "never"
    if cut:
        mask, empty = Load("shift", (w, i, j), BOOL), "logits"
        logits = s.where(mask, score, Const(float(torch.finfo(dtype).min), f))
    elif shifted:
        score = logits = s.call("add", score, Load("shift", (w, i, j), f), dtype=f)
    sizes = {"q": (16, 64, 4, n, d), "k": (16, 64, 4, n, d), "v": (16, 64, 4, n, d), "bias": (4, n, n)}
    sizes |= {"shift": (64, n, n)} if shifted or cut else {}
    operands = tuple(
        Operand(x, "bool" if cut and x == "shift" else f, tuple(Const(z) for z in shape)) for x, shape in sizes.items()
    )
    return Region(at, i, j, (e,), score, mask, logits, Load("v", (*at, j, e), f), operands, f, empty_row=empty)


def windows() -> dict[str, tuple[Region, tuple[str, ...]]]:
    """Regions for the `windows` schedule."""
    half, single = torch.bfloat16, torch.float32
    return {
        "16": (windowed(half, 16, 32), ALL),
        "49": (windowed(half, 49, 32), ALL),
        "49 wide": (windowed(half, 49, 64), ALL),
        "64 narrow": (windowed(half, 64, 8, shifted=False), ALL),
        "49 cut": (windowed(half, 49, 32, cut=True), ALL),
        "64 cut": (windowed(half, 64, 64, cut=True), ALL),
        "16 float32": (windowed(single, 16, 32), ALL),
        "49 float32": (windowed(single, 49, 32), ALL),
        "49 wide float32": (windowed(single, 49, 64), ALL),
        "49 cut float32": (windowed(single, 49, 32, cut=True), ALL),
    }


def few_queries() -> dict[str, tuple[Region, tuple[str, ...]]]:
    """Regions for the `decode` schedule, and the targets that their kernels are compiled for."""
    half, single = torch.bfloat16, torch.float32
    return {
        "64": (cached(half, 64), ALL),
        "128": (cached(half, 128), ALL),
        "256": (cached(half, 256), NVIDIA),
        "512": (cached(half, 512), NVIDIA),
        "8 queries": (cached(half, 128, queries=8), ALL),
        "64 rows 64": (cached(half, 64, kv_heads=2, queries=4), ALL),
        "64 rows 128": (cached(half, 128, kv_heads=2, queries=4), ALL),
        "one key head": (cached(half, 128, kv_heads=1), NVIDIA),
        "padded": (cached(half, 128, padded=True), ALL),
        "float32": (cached(single, 128), NVIDIA),
    }
