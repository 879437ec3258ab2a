"""Run by tests/test_distributed.py in two processes: train a small model in parallel, eager and optimised.

    python -m tests.distributed_worker ddp,fsdp,tp,dtensor RANK WORLD FILE OUT

Each process writes the losses that it saw to OUT.RANK, for each way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import refocus


class Layer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, biased: bool = True) -> None:
        super().__init__()
        self.biased = biased
        self.width = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.bias = nn.Parameter(torch.zeros(24, 24))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (part(x).view(b, n, -1, self.width).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = (q @ k.mT) / 8**0.5
        if self.biased:
            keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            scores = (scores + self.bias[:n, :n]).masked_fill(~keep, float("-inf"))
        weights = scores.softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))


class Model(nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = Layer(biased=biased), Layer(biased=biased), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def train(how: str, rank: int, optimised: bool) -> tuple[list[float], int]:
    """Losses of five steps, and how many sites were fused."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: Any = Model(biased=how != "dtensor")  # eager code adds no plain tensor to a DTensor
    found: list[refocus.Report] = []
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in (model.first, model.second):
            fully_shard(layer)
        fully_shard(model)
    elif how in ("tp", "dtensor"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        heads_apart = {name: ColwiseParallel(use_local_output=how == "tp") for name in ("q", "k", "v")}
        for layer in (model.first, model.second):
            parallelize_module(layer, mesh, {**heads_apart, "out": RowwiseParallel()})
        rank = 0  # all processes see the same data
    else:
        model = nn.parallel.DistributedDataParallel(model)
    call = refocus.optimize(model, engine="tiled", report=found.append) if optimised else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)  # DTensors among plain tensors
    data = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(5):
        x, y = torch.randn(2, 24, 32, generator=data), torch.randint(0, 5, (2, 24), generator=data)
        loss = F.cross_entropy(call(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, sum(len(report.fused) for report in found)


def main() -> None:
    ways, rank, world, file, out = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    found = {}
    for how in ways:
        try:
            eager, _ = train(how, rank, False)
        except (RuntimeError, NotImplementedError) as problem:  # torch 2.11 has no eager matmul of sharded heads
            found[how] = {"refused": str(problem)}
            continue
        fused, sites = train(how, rank, True)
        found[how] = {"eager": eager, "fused": fused, "sites": sites}
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
