"""Masks: what it costs to find the tiles, and whether the attention's time follows them; beside FlexAttention.

    python -m benchmarks.masks                             all of it, on this machine
    python -m benchmarks.masks --what maps --lengths 32768 1048576
    python -m benchmarks.masks --what infer                closed forms found in constant 4096 x 4096 tensors
    python -m benchmarks.masks --what attention --names window documents

maps        ours counts the tiles of 128 x 128 of the map, range by range; `create_block_mask` evaluates every pair, so
            it is only asked up to `--dense` tokens. Seconds, and memory beyond what was alive before.
infer       a constant tensor's form, found and proved on every element.
attention   the region on the `cpp` engine, and `flex_attention` compiled, with the mask given to each in its own
            language; milliseconds of one call with everything compiled and `flex_attention`'s block mask made before.
            At the end: how well time follows the number of tiles that are not empty, for all and for each mask.
unskipped   masks without an empty tile: the `cpp` engine with what it knows of the tiles, and with all of them taken
            for partial ones, so that the mask is evaluated at each pair. Their ratio: what looking at tiles costs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, peak_memory, time_peers
from refocus import simplify as s
from refocus.infer import closed_form
from refocus.ir import BOOL, INT, TRUE, Axis, Const, Dot, Expr, Load, Operand, Region
from refocus.masks import Tiling, count_tiles
from refocus.notation import notation

TILE, HEADS, WIDTH = 128, 8, 64
Index = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Mask:
    """One mask in our notation and as a `mask_mod`; `tensors` by name are what the two read: the latter as more
    arguments, in this order."""

    expr: Expr
    mod: Callable[..., Tensor]
    tensors: dict[str, Tensor]

    def bound(self, tensors: Mapping[str, Tensor] | None = None) -> Index:
        """As FlexAttention takes it, reading these tensors."""
        mod, read = self.mod, [(tensors or self.tensors)[name] for name in self.tensors]
        return lambda b, h, q, k: mod(b, h, q, k, *read)


def axes(n: int) -> tuple[Axis, Axis, Axis, Axis]:
    return Axis("b", Const(1)), Axis("h", Const(HEADS)), Axis("i", Const(n)), Axis("j", Const(n))


def masks(n: int) -> dict[str, Callable[[], Mask]]:
    _, h, i, j = axes(n)
    causal = s.le(j, i)
    near = s.lt(s.sub(i, j), 512)
    side = 1 << (n.bit_length() - 1) // 2

    def documents() -> Mask:
        cuts = torch.randint(0, n, (max(1, n // 700),), generator=torch.Generator().manual_seed(0)).sort().values
        ids = torch.bucketize(torch.arange(n), cuts, right=True)
        same = s.eq(Load("ids", (i,), INT), Load("ids", (j,), INT))
        return Mask(s.and_(causal, same), lambda b, h, q, k, ids: (k <= q) & (ids[q] == ids[k]), {"ids": ids})

    def neighbours() -> Mask:
        down = s.call("abs", s.sub(s.floordiv(i, side), s.floordiv(j, side)), dtype=INT)
        aside = s.call("abs", s.sub(s.mod(i, side), s.mod(j, side)), dtype=INT)
        return Mask(
            s.and_(s.le(down, 3), s.le(aside, 3)),
            lambda b, h, q, k: ((q // side - k // side).abs() <= 3) & ((q % side - k % side).abs() <= 3),
            {},
        )

    def blocks() -> Mask:
        side = -(-n // TILE)
        scores = torch.rand(HEADS, side, side, generator=torch.Generator().manual_seed(0))
        kept = torch.zeros(HEADS, side, side, dtype=torch.bool)
        kept.scatter_(2, scores.topk(max(1, side // 10), 2).indices, True)
        row, column = s.floordiv(i, TILE), s.floordiv(j, TILE)
        return Mask(
            Load("kept", (h, row, column), BOOL),
            lambda b, h, q, k, kept: kept[h, q // TILE, k // TILE],
            {"kept": kept},
        )

    return {
        "causal": lambda: Mask(causal, lambda b, h, q, k: k <= q, {}),
        "window": lambda: window(n, 512),
        "window and sinks": lambda: Mask(
            s.and_(causal, s.or_(near, s.lt(j, 4))), lambda b, h, q, k: (k <= q) & ((q - k < 512) | (k < 4)), {}
        ),
        "prefix": lambda: Mask(s.or_(causal, s.lt(j, n // 4)), lambda b, h, q, k: (k <= q) | (k < n // 4), {}),
        "chunks": lambda: Mask(
            s.and_(causal, s.eq(s.floordiv(i, 512), s.floordiv(j, 512))),
            lambda b, h, q, k: (k <= q) & (q // 512 == k // 512),
            {},
        ),
        "windows by head": lambda: Mask(
            s.and_(causal, s.lt(s.sub(i, j), s.mul(128, s.add(h, 1)))),
            lambda b, h, q, k: (k <= q) & (q - k < 128 * (h + 1)),
            {},
        ),
        "dilated": lambda: Mask(
            s.and_(causal, s.lt(s.sub(i, j), 2048), s.eq(s.mod(s.sub(i, j), 4), 0)),
            lambda b, h, q, k: (k <= q) & (q - k < 2048) & ((q - k) % 4 == 0),
            {},
        ),
        "neighbours": neighbours,
        "documents": documents,
        "blocks": blocks,
    }


def window(n: int, width: int) -> Mask:
    """Each query sees so many keys, its own the last of them."""
    _, _, i, j = axes(n)
    mask = s.and_(s.le(j, i), s.lt(s.sub(i, j), width))
    return Mask(mask, lambda b, h, q, k: (k <= q) & (q - k < width), {})


# ------------------------------------------------------------------------------------------------------------- maps


@dataclass(frozen=True)
class MapRow:
    name: str
    n: int
    empty: int
    partial: int
    full: int
    seconds: float
    bytes: int | None
    flex_seconds: float | None = None
    flex_bytes: int | None = None
    flex_failed: str = ""


def timed(run: Callable[[], Any], at_least: float = 0.2) -> float:
    """Seconds of one call: the least of three or more."""
    run()
    found: list[float] = []
    until = time.perf_counter() + at_least
    while len(found) < 3 or (time.perf_counter() < until and len(found) < 100):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
        if found[-1] > 5 * at_least:
            break
    return min(found)


def map_row(name: str, n: int, dense: int) -> MapRow:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = masks(n)[name]()
    b, h, i, j = axes(n)
    device = torch.device("cpu")

    def ours() -> Any:
        return count_tiles(mask.expr, Tiling((b, h), i, j, TILE, TILE, mask.tensors, {}))

    counts = ours()
    seconds, memory = timed(ours), peak_memory(ours, device=device)
    row = MapRow(name, n, *counts, seconds, memory)
    if n > dense:
        return row

    def theirs() -> Any:
        heads = HEADS if h in mask.expr.axes else None
        return create_block_mask(mask.bound(), None, heads, n, n, device="cpu", BLOCK_SIZE=TILE)

    try:
        return replace(row, flex_seconds=timed(theirs), flex_bytes=peak_memory(theirs, device=device))
    except RuntimeError as problem:
        if "allocate memory" not in str(problem):
            raise
        return replace(row, flex_failed="out of memory")


# ------------------------------------------------------------------------------------------------------------- infer


def constants(n: int) -> dict[str, Callable[[], Tensor]]:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    d, side = i - j, math.isqrt(n)
    y, x, v, u = i // side, i % side, j // side, j % side
    return {
        "causal": lambda: d >= 0,
        "window": lambda: (d >= 0) & (d < 512),
        "dilated window": lambda: (d >= 0) & (d < 512) & (d % 4 == 0),
        "block diagonal": lambda: i // 64 == j // 64,
        "prefix": lambda: (d >= 0) | (j < 300),
        "global": lambda: (d.abs() < 64) | (i < 8) | (j < 8),
        "neighbours": lambda: ((y - v).abs() <= 3) & ((x - u).abs() <= 3),
        "circle": lambda: (y - v) ** 2 + (x - u) ** 2 <= 25,
        "Sparse Transformer": lambda: (j <= i) & ((i // 64 == j // 64) | (j % 64 >= 56)),
        "additive": lambda: torch.zeros(n, n).masked_fill(d < 0, -torch.inf),
        "random blocks": lambda: (torch.rand(n // 64, n // 64) < 0.2).repeat_interleave(64, 0).repeat_interleave(64, 1),
        "random": lambda: torch.rand(n, n) < 0.5,
    }


# --------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class AttentionRow:
    name: str
    n: int
    tiles: int
    ours: float
    flex: float


def region_of(mask: Mask, n: int) -> Region:
    f = "float32"
    b, h, i, j = axes(n)
    c, e = Axis("d", Const(WIDTH)), Axis("e", Const(WIDTH))
    dot = Dot((c,), Load("q", (b, h, i, c), f), Load("k", (b, h, j, c), f), f)
    score = s.call("mul", dot, Const(WIDTH**-0.5, f), dtype=f)
    shape = (Const(1), Const(HEADS), Const(n), Const(WIDTH))
    extra = tuple(
        Operand(name, str(t.dtype).removeprefix("torch."), tuple(map(Const, t.shape)))  # type: ignore[arg-type]
        for name, t in mask.tensors.items()
    )
    operands = (*(Operand(name, f, shape) for name in "qkv"), *extra)
    logits = s.where(mask.expr, score, Const(-math.inf, f))
    values = Load("v", (b, h, j, e), f)
    return Region((b, h), i, j, (e,), score, mask.expr, logits, values, operands, f, empty_row="never")


def attention_row(name: str, n: int, repeats: int) -> AttentionRow:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from refocus.codegen import cpp
    from refocus.codegen.plan import Plan

    torch.compiler.reset()
    mask = masks(n)[name]()
    region, plan = region_of(mask, n), Plan("cpp", block_q=TILE, block_k=TILE)
    q, k, v = torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0)).unbind(0)
    heads = HEADS if axes(n)[1] in mask.expr.axes else None
    blocks = create_block_mask(mask.bound(), None, heads, n, n, device="cpu", BLOCK_SIZE=TILE)
    flex = torch.compile(flex_attention)
    peers = {
        "ours": lambda: cpp.run(region, plan, [q, k, v, *mask.tensors.values()], []),
        "flex": lambda: flex(q, k, v, block_mask=blocks),
    }
    with torch.no_grad():
        torch.testing.assert_close(peers["ours"](), peers["flex"](), atol=1e-4, rtol=1e-4)
        times = time_peers(peers, device=torch.device("cpu"), repeats=repeats)
    b, h, i, j = axes(n)
    counts = count_tiles(mask.expr, Tiling((b, h), i, j, TILE, TILE, mask.tensors, {}))
    shared = 1 if h in mask.expr.axes else HEADS
    return AttentionRow(name, n, shared * (counts.partial + counts.full), times["ours"].fastest, times["flex"].fastest)


def unskipped(n: int) -> dict[str, Callable[[], Mask]]:
    """Masks that leave no tile empty, and all, some or none of them full."""
    _, _, i, j = axes(n)
    noise = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 0.5
    lengths = torch.full((1,), n - TILE // 2)
    apart = s.eq(s.mod(s.sub(i, j), 2), 0)
    return {
        "every second": lambda: Mask(apart, lambda b, h, q, k: (q - k) % 2 == 0, {}),
        "padding in the last tile": lambda: Mask(
            s.lt(j, Load("lengths", (Const(0),), INT)), lambda b, h, q, k, lengths: k < lengths[0], {"lengths": lengths}
        ),
        "not itself": lambda: Mask(s.ne(i, j), lambda b, h, q, k: q != k, {}),
        "random": lambda: Mask(Load("noise", (i, j), "bool"), lambda b, h, q, k, noise: noise[q, k], {"noise": noise}),
    }


@dataclass(frozen=True)
class UnskippedRow:
    name: str
    n: int
    ours: float
    dense: float


def unskipped_row(name: str, n: int, repeats: int) -> UnskippedRow:
    """Seconds of one call, with the tiles told apart and with the mask evaluated at every pair."""
    from refocus.codegen import cpp
    from refocus.codegen.plan import Plan

    torch.compiler.reset()
    mask = unskipped(n)[name]()
    region, plan = region_of(mask, n), Plan("cpp", block_q=TILE, block_k=TILE)
    whole = region.logits  # the mask within the score: a fill of -inf, and no tile but a partial one
    everywhere = replace(region, score=whole, mask=TRUE, empty_row="never")
    b, h, i, j = axes(n)
    counts = count_tiles(mask.expr, Tiling((b, h), i, j, TILE, TILE, mask.tensors, {}))
    assert counts.empty == 0, f"{name} has {counts.empty} empty tiles"
    tensors = [*torch.randn(3, 1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(0)), *mask.tensors.values()]
    peers = {
        "ours": lambda: cpp.run(region, plan, tensors, []),
        "dense": lambda: cpp.run(everywhere, plan, tensors, []),
    }
    with torch.no_grad():
        torch.testing.assert_close(peers["ours"](), peers["dense"](), atol=1e-4, rtol=1e-4)
        times = time_peers(peers, device=torch.device("cpu"), repeats=repeats)
    return UnskippedRow(name, n, times["ours"].fastest, times["dense"].fastest)


def fit(rows: list[AttentionRow]) -> tuple[float, float, float]:
    """Seconds = a + b * tiles by least squares, and R^2."""
    x = torch.tensor([r.tiles for r in rows], dtype=torch.float64)
    y = torch.tensor([r.ours for r in rows], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    start = y.mean() - slope * x.mean()
    rest = ((y - start - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return float(start), float(slope), 1 - float(rest)


# -------------------------------------------------------------------------------------------------------------- main


def _map_lines(rows: list[MapRow]) -> Iterator[str]:
    for r in rows:
        memory = "" if r.bytes is None else f"{r.bytes / 2**20:8.1f} MiB"
        line = f"{r.name:18} {r.n:8} {r.partial + r.full:9} of {r.empty + r.partial + r.full:10} tiles"
        line += f" {r.seconds * 1e3:10.2f} ms {memory}"
        if r.flex_seconds is not None:
            theirs = "" if r.flex_bytes is None else f"{r.flex_bytes / 2**20:8.1f} MiB"
            line += f"   create_block_mask {r.flex_seconds * 1e3:10.1f} ms {theirs} x{r.flex_seconds / r.seconds:.0f}"
        elif r.flex_failed:
            line += f"   create_block_mask {r.flex_failed}"
        yield line


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["maps", "infer", "attention", "unskipped"]
    parser.add_argument("--what", nargs="+", default=parts, choices=parts)
    parser.add_argument("--names", nargs="+", default=list(masks(1024)), choices=list(masks(1024)))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1 << k for k in (10, 12, 13, 15, 17, 20)])
    parser.add_argument("--attention-lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dense", type=int, default=1 << 15, help="longest sequence for create_block_mask")
    parser.add_argument("--size", type=int, default=4096, help="of the constants whose form is inferred")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine()}
    if "maps" in options.what:
        found["maps"] = []
        for n in options.lengths:
            for name in options.names:
                row = map_row(name, n, options.dense)
                found["maps"].append(asdict(row))
                print(next(_map_lines([row])), flush=True)
    if "infer" in options.what:
        found["infer"] = []
        for name, make in constants(options.size).items():
            tensor = make()
            seconds = timed(lambda tensor=tensor: closed_form(tensor))  # type: ignore[misc]
            form = closed_form(tensor)
            found["infer"].append({"name": name, "seconds": seconds, "form": None if form is None else notation(form)})
            text = "no closed form" if form is None else notation(form)
            print(f"{name:18} {options.size:8} {seconds * 1e3:10.1f} ms   {text[:90]}", flush=True)
    if "attention" in options.what:
        rows = []
        for n in options.attention_lengths:
            for name in options.names:
                rows.append(attention_row(name, n, options.repeats))
                r = rows[-1]
                ratio = f"flex_attention {r.flex * 1e3:9.2f} ms x{r.flex / r.ours:.2f}"
                print(f"{name:18} {n:8} {r.tiles:9} tiles {r.ours * 1e3:10.2f} ms   {ratio}", flush=True)
        found["attention"] = [asdict(r) for r in rows]
        found["fit"] = {}
        for name in ("all", *options.names):
            chosen = [r for r in rows if name in ("all", r.name)]
            if len(chosen) > 2:
                start, slope, r2 = fit(chosen)
                found["fit"][name] = {"start": start, "slope": slope, "r2": r2}
                print(f"{name:18} time = {start * 1e3:.2f} ms + {slope * 1e6:.2f} us a tile, R^2 = {r2:.4f}")
    if "unskipped" in options.what:
        found["unskipped"] = []
        for n in options.attention_lengths:
            for name in unskipped(n):
                u = unskipped_row(name, n, options.repeats)
                found["unskipped"].append(asdict(u))
                ratio = f"at every pair {u.dense * 1e3:10.2f} ms x{u.dense / u.ours:.2f}"
                print(f"{name:25} {n:8} {u.ours * 1e3:10.2f} ms, {ratio}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
