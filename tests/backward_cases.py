"""Regions for the generated backward, as in `tests.region_cases`: what only matters when gradients are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from refocus import dropout as drops
from refocus import simplify as s
from refocus.ir import BOOL, Axis, Const, Load
from tests import region_cases as cases
from tests.region_cases import Case, Setting, add, call, mul, randn


def dropout(dtype: torch.dtype = torch.float32, n: int = 50, d: int = 16) -> Case:
    """Causal, with a third of the weights dropped."""
    setting = Setting(dtype, n, n, d, d)
    gate = drops.keep(
        "x",
        1 / 3,
        (setting.b, setting.h, setting.i, setting.j),
        tuple(Const(z) for z in (cases.B, cases.H, n, n)),
        setting.f,
    )
    setting.tensors[next(iter(gate.loads)).tensor] = torch.tensor(123456789123456789)
    return setting.case(setting.score, s.le(setting.j, setting.i), gate=gate)


def pair_gate(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """A learned gate for every pair, shared by the batch, which dilutes a learned bias of every head and pair."""
    setting = Setting(dtype, n, n, d, d)
    setting.tensors["g"], setting.tensors["bias"] = randn(6, dtype, n, n), randn(7, dtype, cases.B, cases.H, n, n)
    gate = call("sigmoid", Load("g", (setting.i, setting.j), setting.f))
    bias = Load("bias", (setting.b, setting.h, setting.i, setting.j), setting.f)
    return setting.case(add(setting.score, bias), s.le(setting.j, setting.i), gate=gate)


def emptied_bias(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """Left padding as an additive mask of -100, with biases that are and are not shared: emptied rows feel them."""
    setting, mask = cases._left_padded(dtype, n, d)
    setting.tensors["own"] = randn(6, dtype, cases.B, n, cases.H, n)
    setting.tensors["shared"] = randn(7, dtype, cases.H, n, n)
    own = Load("own", (setting.b, setting.i, setting.h, setting.j), setting.f)
    shared = Load("shared", (setting.h, setting.j, setting.i), setting.f)
    score = add(add(setting.score, own), shared)
    fill = call("where", mask, setting.const(0.0), setting.const(-100.0), dtype=setting.f)
    return setting.case(score, mask, add(score, fill), empty_row="logits")


def scaled_minima(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """Finite minima within a score that is scaled as a whole: their difference must be exactly zero."""
    setting = Setting(dtype, n, n, d, d)
    bias = torch.where(torch.ones(n, n).tril().bool(), 0.0, torch.finfo(torch.float32).min)
    bias[5] = torch.finfo(torch.float32).min
    setting.tensors["bias"] = bias
    summed = add(setting.score, Load("bias", (setting.i, setting.j), setting.f))
    return setting.case(mul(summed, setting.const(0.3)))


def temperatures(dtype: torch.dtype = torch.float32, n: int = 70, d: int = 16) -> Case:
    """A temperature of the head, a vector over keys, one over queries read in reverse, and a document's number."""
    setting = Setting(dtype, n, n, d, d, kv_heads=1)
    setting.tensors["t"] = randn(4, dtype, cases.H).exp()
    setting.tensors["row"], setting.tensors["column"] = randn(5, dtype, n), randn(6, dtype, cases.B, n)
    setting.tensors["of"], setting.tensors["level"] = torch.arange(n) // 20, randn(7, dtype, 4, cases.H)
    level = Load("level", (Load("of", (setting.j,), "int64"), setting.h), setting.f)
    row = Load("row", (s.sub(s.sub(setting.i.size, 1), setting.i),), setting.f)
    score = mul(setting.score, Load("t", (setting.h,), setting.f))
    score = add(add(add(score, row), Load("column", (setting.b, setting.j), setting.f)), level)
    return setting.case(score, s.and_(s.le(setting.j, setting.i), s.lt(s.sub(setting.i, setting.j), 30)))


def lone_query(dtype: torch.dtype = torch.float32, n: int = 33, d: int = 16) -> Case:
    """A learned query, the same for all rows, and a key that is the same for all batches."""
    setting = Setting(dtype, n, n, d, d)
    setting.tensors["q"], setting.tensors["k"] = randn(1, dtype, cases.H, d), randn(2, dtype, n, d)
    setting.tensors["row"] = randn(3, dtype, n, 1)
    query, key = Load("q", (setting.h, setting.d), setting.f), Load("k", (setting.j, setting.d), setting.f)
    score = replace(setting.score.args[0], query=query, key=key)  # type: ignore[attr-defined]
    return setting.case(add(score, Load("row", (setting.i, Const(0)), setting.f)), s.le(setting.j, setting.i))


def long_causal(dtype: torch.dtype = torch.float32, n: int = 90, d: int = 16) -> Case:
    """Long enough, in small tiles, for loops over tiles that the mask keeps whole."""
    return cases.causal(dtype, n, d)


def prefix(dtype: torch.dtype = torch.float32, n: int = 90, d: int = 16) -> Case:
    """Keys from a prefix on are bounded by a length that is read."""
    setting = Setting(dtype, n, n, d, d)
    setting.tensors["lengths"] = torch.tensor([n, 37])
    mask = s.and_(s.le(setting.j, s.maximum(setting.i, 19)), s.lt(setting.j, Load("lengths", (setting.b,), "int64")))
    return setting.case(setting.score, mask)


def padded_pairs(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """A bias shared by batch and heads, under a window that the head sets and a padding that empties rows."""
    setting = Setting(dtype, n, n + 9, d, d)
    setting.tensors["bias"] = randn(4, dtype, n, n + 9)
    setting.tensors["keep"] = torch.arange(n + 9)[None] >= torch.tensor([0, 11])[:, None]
    near = s.and_(s.le(setting.j, setting.i), s.lt(s.sub(setting.i, setting.j), s.add(s.mul(setting.h, 8), 4)))
    mask = s.and_(near, Load("keep", (setting.b, setting.j), BOOL))
    score = add(setting.score, Load("bias", (setting.i, setting.j), setting.f))
    return setting.case(score, mask, empty_row="logits")


def whole_rows(dtype: torch.dtype = torch.float32, n: int = 96, d: int = 16) -> Case:
    """No mask, and tiles that end with the keys."""
    return cases.dense(dtype, n, d)


def no_batch(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """A bias and no batch axis at all."""
    region, tensors, sizes = cases.unbatched(dtype, n, d)
    i, j = region.query, region.key
    bias = randn(3, dtype, n, n)
    score = add(region.score, Load("bias", (i, j), cases.name_of(dtype)))
    operands = (*region.operands, cases.operand("bias", bias))
    return replace(region, score=score, logits=score, operands=operands), [*tensors, bias], sizes


def one_head(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """A batch axis of one, at which a bias is not read."""
    region, tensors, sizes = no_batch(dtype, n, d)
    return replace(region, batch=(Axis("o", Const(1)),)), tensors, sizes


def one_query(dtype: torch.dtype = torch.float32, n: int = 40, d: int = 16) -> Case:
    """A single learned query, which has no axis of its own in its operand; a bias of its keys that the batch shares."""
    setting = Setting(dtype, 1, n, d, d)
    setting.tensors["bias"] = randn(5, dtype, cases.H, 1, n)
    query = Load("q", (setting.b, setting.h, Const(0), setting.d), setting.f)
    score = replace(setting.score.args[0], query=query)  # type: ignore[attr-defined]
    return setting.case(add(score, Load("bias", (setting.h, Const(0), setting.j), setting.f)))


def grid_table(dtype: torch.dtype = torch.float32, n: int = 48, d: int = 16, width: int = 8) -> Case:
    """Swin's: a table by the distance in two dimensions; and one of each query, by its distance to the key."""
    setting = Setting(dtype, n, n, d, d, kv_heads=2)
    rows = n // width
    setting.tensors["table"] = randn(4, dtype, (2 * rows - 1) * (2 * width - 1), cases.H)
    setting.tensors["own"] = randn(5, dtype, cases.B, cases.H, n, 17)
    i, j = setting.i, setting.j
    down = s.add(s.sub(s.floordiv(i, width), s.floordiv(j, width)), rows - 1)
    aside = s.add(s.sub(s.mod(i, width), s.mod(j, width)), width - 1)
    table = Load("table", (s.add(s.mul(down, 2 * width - 1), aside), setting.h), setting.f)
    near = s.minimum(s.maximum(s.add(s.sub(i, j), 8), 0), 16)
    own = Load("own", (setting.b, setting.h, i, near), setting.f)
    return setting.case(add(add(setting.score, table), own))


def read_buckets(dtype: torch.dtype = torch.float32, n: int = 45, d: int = 16) -> Case:
    """A table of heads, by numbers of pairs that are read; its fills are felt by rows that the padding empties."""
    setting, mask = cases._left_padded(dtype, n, d)
    setting.tensors["bucket"] = (torch.arange(n)[:, None] * 7 + torch.arange(n) * 3) % 11
    setting.tensors["table"] = randn(7, dtype, 11, cases.H)
    bucket = Load("bucket", (setting.i, setting.j), "int64")
    score = add(setting.score, Load("table", (bucket, setting.h), setting.f))
    fill = call("where", mask, setting.const(0.0), setting.const(-100.0), dtype=setting.f)
    return setting.case(score, mask, add(score, fill), empty_row="logits")


def emptied_table(dtype: torch.dtype = torch.float32, n: int = 45, d: int = 16) -> Case:
    """Two tables by distance, of which one is scaled and a gate has the other, under a padding that empties rows."""
    setting, mask = cases._left_padded(dtype, n, d)
    setting.tensors["table"], setting.tensors["gates"] = randn(6, dtype, 2 * n - 1), randn(7, dtype, cases.H, n)
    apart = s.sub(setting.i, setting.j)
    table = Load("table", (s.add(apart, n - 1),), setting.f)
    gate = call("sigmoid", Load("gates", (setting.h, s.maximum(apart, 0)), setting.f))
    score = add(setting.score, mul(table, setting.const(0.5)))
    fill = call("where", mask, setting.const(0.0), setting.const(-100.0), dtype=setting.f)
    return setting.case(score, mask, add(score, fill), gate=gate, empty_row="logits")


def cached_table(dtype: torch.dtype = torch.float32, n: int = 37, d: int = 16) -> Case:
    """With a cache, of lengths that are symbols: a table by distance, causal within a window."""
    region, tensors, sizes = cases.symbolic(dtype, n, d)
    i, j, h = region.query, region.key, region.batch[1]
    apart = s.sub(s.add(i, s.sub(j.size, i.size)), j)
    table = randn(6, dtype, 33, cases.H)
    score = add(region.score, Load("table", (s.minimum(s.maximum(apart, 0), 32), h), cases.name_of(dtype)))
    mask = s.and_(region.mask, s.le(apart, 30))
    operands = (*region.operands, cases.operand("table", table))
    changed = replace(region, score=score, mask=mask, logits=score, operands=operands, empty_row="never")
    return changed, [*tensors, table], sizes


BACKWARD: dict[str, Callable[..., Case]] = {
    f.__name__: f
    for f in (
        dropout, pair_gate, emptied_bias, scaled_minima, temperatures, lone_query, long_causal, prefix, padded_pairs,
        whole_rows, no_batch, one_head, one_query, grid_table, read_buckets, emptied_table, cached_table,
    )
}  # fmt: skip
