"""Running the decode schedule: how many parts, the memory between its kernels, and both launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from refocus.codegen import decode, flash
from refocus.codegen.decode_fit import multiprocessors, parts_of, rows_of
from refocus.codegen.launch import (
    INT32_MAX,
    Kernel,
    device_of,
    empty_result,
    launch,
    needs_wide,
    result_shape,
    saved,
    start,
)
from refocus.codegen.plan import Plan
from refocus.ir import Region


@lru_cache(maxsize=512)
def emit(region: Region, plan: Plan, wide: bool = False) -> tuple[Kernel, Kernel]:
    """The kernel of a part of the keys, and the one that puts the parts together."""
    rows = rows_of(region)
    sources = (decode.write_parts(rows, plan, wide), decode.write_merge(rows, plan, wide))
    first, second = (saved(source, rows, plan, wide, source.name) for source in sources)
    return first, second


@lru_cache(maxsize=512)
def emit_whole(region: Region, plan: Plan, wide: bool = False) -> Kernel:
    """One kernel, where the keys are not split: the device has enough programs without."""
    rows = rows_of(region)
    return saved(flash.write(rows, plan, wide), rows, plan, wide)


def run(
    region: Region, plan: Plan, operands: Sequence[Tensor], sizes: Sequence[int], parts: int | None = None
) -> Tensor:
    """The region's result; see `launch.launch`. `parts`: how many, if the device is not to decide."""
    rows, device = rows_of(region), device_of(operands)
    shape, keys = result_shape(region, tuple(sizes))
    parts = parts_of(rows, plan, sizes, multiprocessors(device)) if parts is None else parts
    wide = needs_wide(region, operands, sizes) or needs_wide(rows, operands, sizes) or parts * prod(shape) > INT32_MAX
    if parts == 1 or keys == 0 or prod(shape) == 0:
        out, _ = launch(emit_whole(region, plan, wide), operands, sizes)
        return out if region.output is not None else out.view(shape)
    first, second = emit(region, plan, wide)
    *batch, length = result_shape(rows, tuple(sizes))[0][: len(rows.batch) + 1]
    lines = prod(batch) * length
    acc = torch.empty([parts, lines, prod(shape) // lines], dtype=torch.float32, device=device)
    sums = torch.empty([2, parts, lines], dtype=torch.float32, device=device)
    out = empty_result(region, sizes, device)
    programs = prod(batch) * -(-length // plan.block_q)
    start(first, (programs, parts), operands, sizes, (acc, sums), counts=(parts,))
    start(second, (programs,), operands, sizes, (out,), (acc, sums), counts=(parts,))
    return out
