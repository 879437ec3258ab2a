"""Times what a region can be run by on a CPU: the eager code compiled by Inductor, SDPA, and the `cpp` engine.

    python benchmarks/engines_cpu.py                      the table that codegen/policy.py was drawn from
    python benchmarks/engines_cpu.py --kinds window --lengths 4096 --blocks 32x64 64x64 128x128

Each figure is the least of several runs, in milliseconds. `--clock cpu` measures processor time on one thread instead
of wall time: on a machine that does other work, too, ratios are then still meaningful.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from refocus import simplify as s
from refocus.codegen import cpp
from refocus.codegen.plan import Plan
from refocus.ir import TRUE, Axis, Const, Dot, Expr, Load, Operand, Region

KINDS = ("dense", "causal", "window", "bias", "decode")
WINDOW = 256


def region_of(kind: str, heads: int, kv_heads: int, queries: int, keys: int, d: int) -> Region:
    """q is [1, heads, queries, d], k and v [1, kv_heads, keys, d], a bias [1, heads, queries, keys]."""
    f = "float32"
    b, h, i, j = Axis("b", Const(1)), Axis("h", Const(heads)), Axis("i", Const(queries)), Axis("j", Const(keys))
    c, e = Axis("d", Const(d)), Axis("e", Const(d))
    kv = s.floordiv(h, heads // kv_heads)
    score: Expr = Dot((c,), Load("q", (b, h, i, c), f), Load("k", (b, kv, j, c), f), f)
    score = s.call("mul", score, Const(d**-0.5, f), dtype=f)
    shapes = {"q": (1, heads, queries, d), "k": (1, kv_heads, keys, d), "v": (1, kv_heads, keys, d)}
    mask: Expr = TRUE
    if kind == "bias":
        score = s.call("add", score, Load("bias", (b, h, i, j), f), dtype=f)
        shapes["bias"] = (1, heads, queries, keys)
    elif kind in ("causal", "window"):
        mask = s.le(j, i)
    if kind == "window":
        mask = s.and_(mask, s.le(s.add(i, 1 - WINDOW), j))
    operands = tuple(Operand(n, f, tuple(Const(x) for x in shape)) for n, shape in shapes.items())
    values = Load("v", (b, kv, j, e), f)
    logits = s.where(mask, score, Const(-math.inf, f))
    return Region((b, h), i, j, (e,), score, mask, logits, values, operands, f, empty_row="never")


def eager(kind: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """As models spell it: repeated heads, matmul, additive mask, softmax, matmul."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if kind in ("causal", "window"):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        keep = j <= i if kind == "causal" else (j <= i) & (j > i - WINDOW)
        scores = scores + torch.where(keep, 0.0, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def contenders(
    kind: str, region: Region, tensors: list[Tensor], blocks: list[tuple[int, int]]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    compiled = torch.compile(eager, dynamic=False)
    yield "eager+inductor", lambda: compiled(kind, *tensors)
    if kind in ("dense", "causal", "decode"):
        q, k, v = tensors
        yield (
            "sdpa",
            lambda: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=kind == "causal", enable_gqa=q.shape[1] != k.shape[1]
            ),
        )
    else:
        yield "sdpa+mask", lambda: _dense_mask(kind, tensors)
    for block_q, block_k in blocks:
        plan = Plan("cpp", block_q=block_q, block_k=block_k)
        yield f"cpp {block_q}x{block_k}", lambda plan=plan: cpp.run(region, plan, tensors, [])  # type: ignore[misc]


def _dense_mask(kind: str, tensors: list[Tensor]) -> Tensor:
    q, k, v, *bias = tensors
    if kind == "window":
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        mask = torch.where((j <= i) & (j > i - WINDOW), 0.0, -torch.inf)
    else:
        mask = bias[0]
    gqa = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def least(run: Callable[[], Tensor], clock: Callable[[], float], seconds: float) -> float:
    """The shortest of as many runs as fit (at least three), in milliseconds."""
    run()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        start = clock()
        run()
        times.append(clock() - start)
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--dims", nargs="+", type=int, default=[64])
    parser.add_argument("--heads", nargs="+", type=int, default=[8])
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--blocks", nargs="+", default=["64x64"], help="query x key tile sizes of the cpp engine")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    clock = time.perf_counter
    if args.clock == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    blocks = [tuple(map(int, b.split("x"))) for b in args.blocks]
    with torch.no_grad():
        for kind in args.kinds:
            for n in args.lengths:
                for d in args.dims:
                    for heads in args.heads:
                        kv = args.kv_heads or heads
                        queries = 1 if kind == "decode" else n
                        region = region_of(kind, heads, kv, queries, n, d)
                        shapes = [tuple(int(x.value) for x in o.shape) for o in region.operands]  # type: ignore[attr-defined]
                        tensors = [torch.randn(shape) for shape in shapes]
                        parts = [f"{kind:7} n={n:5} d={d:3} heads={heads}/{kv}"]
                        for name, run in contenders(kind, region, tensors, blocks):
                            parts.append(f"{name} {least(run, clock, args.seconds):9.3f}")
                        torch.compiler.reset()
                        print("   ".join(parts), flush=True)


if __name__ == "__main__":
    main()
