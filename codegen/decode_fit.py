"""When the decode schedule is worth its second kernel, its tiles, and into how many parts it splits the keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

import torch

from refocus.codegen.flash_fit import all_dots, dot_dtype, no_larger, padded, supports, width
from refocus.codegen.packing import packed
from refocus.codegen.plan import Plan
from refocus.codegen.tile_lists import pays
from refocus.evaluate import size_of
from refocus.ir import Const, Expr, Region, Sym
from refocus.key_bounds import first_query, key_bounds, last_query
from refocus.simplify import bounds, sub, substitute

# More queries keep a device busy by themselves; fewer keys are no work to share.
FEW_QUERIES, MANY_KEYS = 16, 128
# What a part is worth its row of the merge: fewer tiles of keys than these are not split off.
_LEAST_TILES = 2
_MOST_PARTS = 128
# Programs that run at once on a multiprocessor, so that one loads while another multiplies.
_PROGRAMS_EACH = 2
# Where the device does not say how many multiprocessors it has, or is none.
_MULTIPROCESSORS = 64
# Widest product or value (padded) -> keys of a tile, for 16 rows, that spill no registers; more rows leave fewer keys
# (tests/aot_resources.json).
_NARROW = {32: 128, 64: 128, 128: 64, 256: 32, 512: 16}
_FLOAT32 = {32: 64, 64: 32, 128: 32, 256: 16, 512: 16}
_MOST_ROWS = 64


@lru_cache(maxsize=512)
def rows_of(region: Region) -> Region:
    """What the kernels compute: with the heads that share keys packed along the queries, where that can be."""
    rows = packed(region)
    return rows if supports(rows) is None else region


def suits(region: Region, numbers: Mapping[Sym, int]) -> bool:
    """Whether there are few queries and many keys, at these sizes. The kernels are right at any."""
    queries, keys = (size_of(a.size, numbers) for a in (region.query, region.key))
    return queries <= FEW_QUERIES and keys >= MANY_KEYS


def decode_plan(region: Region) -> Plan:
    """Tile sizes by width and dtype, and no larger than the region."""
    rows, dots = rows_of(region), all_dots(region)
    widest = max([32, padded(width(region.value) or 1), *(padded(width(d.over) or 1) for d in dots)])
    narrow = all(dot_dtype(d) != "float32" for d in dots) and region.values.dtype in ("float16", "bfloat16")
    most = _MOST_ROWS if widest <= 128 else 16
    block_q = no_larger(most, rows.query) if isinstance(rows.query.size, Const) else 16
    block_k = (_NARROW if narrow else _FLOAT32)[widest]
    block_k = no_larger(block_k if block_q == 16 else max(16, min(32, block_k // 2)), rows.key)
    # Lists cost more than a step of decoding where they are made again for each: closed forms of a fixed size are not.
    listed = not rows.mask.loads and isinstance(rows.key.size, Const) and pays(rows, block_q, block_k)
    return Plan("triton", "decode", block_q, block_k, 4, 2, listed)


def parts_of(rows: Region, plan: Plan, sizes: Sequence[int], multiprocessors: int) -> int:
    """Into how many parts the keys are split: as many programs as the device runs at once, and no part without work."""
    numbers = dict(zip(rows.syms, sizes, strict=True))
    tiles = -(-_span(rows, plan, tuple(sizes)) // plan.block_k)
    alone = prod(size_of(a.size, numbers) for a in rows.batch) * -(-size_of(rows.query.size, numbers) // plan.block_q)
    wanted = _PROGRAMS_EACH * multiprocessors // max(1, alone)
    return max(1, min(wanted, tiles // _LEAST_TILES, _MOST_PARTS))


@lru_cache(maxsize=1024)
def _span(rows: Region, plan: Plan, sizes: tuple[int, ...]) -> int:
    """No tile of queries needs more keys than these: what lies between the loop bounds."""
    numbers: dict[Expr, Expr] = {sym: Const(value) for sym, value in zip(rows.syms, sizes, strict=True)}
    keys = size_of(rows.key.size, dict(zip(rows.syms, sizes)))
    found = key_bounds(rows.mask, rows.query, rows.key)
    queries = size_of(rows.query.size, dict(zip(rows.syms, sizes)))
    if queries <= plan.block_q:
        numbers |= {first_query(rows.query): Const(0), last_query(rows.query): Const(queries - 1)}
    low, high = (Const(n) if end is None else end for end, n in ((found.lo, 0), (found.hi, keys)))
    longest = bounds(substitute(sub(high, low), numbers))[1]
    return keys if longest is None else max(0, min(keys, longest))


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    if device.type == "cpu":
        return _MULTIPROCESSORS
    properties = torch.get_device_module(device).get_device_properties(device)
    names = ("multi_processor_count", "gpu_subslice_count")
    return int(next((n for n in (getattr(properties, name, 0) for name in names) if n), _MULTIPROCESSORS))
