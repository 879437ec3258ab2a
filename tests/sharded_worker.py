"""Run by tests/test_distributed.py in two processes: regions whose operands are DTensors, against the whole thing.

    python -m tests.sharded_worker RANK WORLD FILE OUT

Each process writes what it found to OUT.RANK: for each (case, axis that is cut) the collectives and the largest errors.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from refocus.codegen import sharding
from refocus.codegen.operator import call, call_saving, call_with_sums
from refocus.codegen.plan import Plan
from refocus.ir import Axis, Operand, Region
from tests import region_cases

PLAN = Plan("tiled", block_q=16, block_k=16)


def laid(region: Region, operand: Operand, tensor: Tensor, axis: Axis, mesh: Any) -> Any:
    """An operand, cut where it is read at this axis."""
    ways = sharding.read_at(region, operand)
    dims = [d for d, way in ways.items() if way.axis == axis and way.divides(tensor.shape[d], mesh.size())]
    return distribute_tensor(tensor, mesh, [Shard(dims[0]) if dims else Replicate()])


def whole(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def attended(region: Region, sizes: list[int], operands: list[Any], weights: Any) -> list[Any]:
    """The result in training and in inference, and the gradients of the operands that are floats; the row sums, where
    these are a result as well, and what flows back from them alone."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
    with torch.no_grad():
        inferred = call(region, PLAN, leaves, sizes)
    out = call_saving(region, PLAN, leaves, sizes)
    back = weights.reshape(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], back)
    both = replace(region, row_sums=True)
    sums = call_with_sums(both, PLAN, leaves, sizes)[1].sum(0)
    kept = torch.where(sums.isfinite(), sums, 0.0)
    of_sums = torch.autograd.grad(kept, [t for t in leaves if t.requires_grad], torch.ones_like(kept))
    return [out, inferred, *grads, kept, *of_sums]


def error(a: Tensor, b: Tensor) -> float:
    """The largest difference, where the largest number is one; where both are NaN, they agree."""
    a, b = (t.detach().double() for t in (a, b))
    return float(torch.where(a.isnan() & b.isnan(), 0.0, a - b).abs().max()) / max(
        1.0, float(b.nan_to_num().abs().max())
    )


def case(name: str) -> region_cases.Case:
    """In float64, where only a wrong pair shows and not the order of a sum; one in the dtype that it is named after."""
    make = region_cases.CASES[name]
    return make() if "bfloat16" in name else make(dtype=torch.float64)


def compared(name: str, axis_name: str, mesh: Any, elsewhere: bool = False) -> dict[str, Any]:
    region, tensors, sizes = case(name)
    axis = next(a for a in (*region.batch, region.query) if a.name == axis_name)
    weights = torch.linspace(-1.0, 1.0, call(region, PLAN, tensors, sizes).numel())
    wanted = attended(region, sizes, tensors, weights)
    operands = [laid(region, o, t, axis, mesh) for o, t in zip(region.operands, tensors)]
    if elsewhere:
        operands = [distribute_tensor(t, mesh, [Shard(max(0, t.dim() - 2))]) for t in tensors]
    weights = distribute_tensor(weights, mesh, [Replicate()])
    with CommDebugMode() as seen:
        found = attended(region, sizes, operands, weights)
    errors = [error(whole(a), b) for a, b in zip(found, wanted)]
    return {"collectives": seen.get_total_counts(), "errors": errors, "cut": str(found[0].placements[0])}


def main() -> None:
    rank, world, file, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name in region_cases.CASES:
        region, _, _ = case(name)
        for axis in (*region.batch, region.query):
            found[f"{name} {axis.name}"] = compared(name, axis.name, mesh)
    for name in ("gqa", "causal"):
        found[f"{name} elsewhere"] = compared(name, "b", mesh, elsewhere=True)
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
