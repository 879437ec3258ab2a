"""Forward and backward: eager, `torch.compile` alone and Refocus side by side, time and peak memory.

    python -m benchmarks.training                                    results in benchmarks/results/training.{json,md}
    python -m benchmarks.training --only window --tokens 4096        one kind of attention
    python -m benchmarks.training --only mistral --tokens 2048       the demo's model, all its parameters trained

Each measurement runs in a process of its own; within it the peers take turns. Eager and compiled code are left out
where their scores would not fit the memory that `--limit` allows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.isolation import run_isolated
from benchmarks.measure import Timing, largest_difference, machine, peak_memory, time_peers
from benchmarks.peers import COMPILE, EAGER, REFOCUS

RESULTS = Path(__file__).parent / "results"
HEADS, WIDTH = 8, 64
KINDS = ("window", "causal", "documents", "bias", "mistral")


class Attention(nn.Module):
    """Self-attention of 8 heads of 64, as eager code spells it: a score for every pair, a mask of every pair."""

    def __init__(self, kind: str, tokens: int) -> None:
        super().__init__()
        self.kind = kind
        self.bias = nn.Parameter(torch.randn(HEADS, tokens, tokens)) if kind == "bias" else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, document: Tensor) -> Tensor:
        at = torch.arange(query.shape[2], device=query.device)
        distance = at[:, None] - at[None, :]
        scores = query @ key.mT / math.sqrt(WIDTH)
        if self.bias is not None:
            scores = scores + self.bias
        keep = distance >= 0
        if self.kind == "window":
            keep = keep & (distance < 256)
        elif self.kind == "documents":
            keep = keep & (document[:, None] == document[None, :])
        return scores.masked_fill(~keep, float("-inf")).softmax(-1) @ value


@dataclass(frozen=True)
class Task:
    """One measurement. `engine`: what Refocus is asked for (None: it chooses)."""

    kind: str
    tokens: int
    engine: str | None
    repeats: int
    budget: float
    threads: int
    limit: float

    @property
    def dense_fits(self) -> bool:
        """Whether eager code, which keeps several tensors of all scores, stays below `limit` GiB."""
        return self.kind == "mistral" or 6 * 4 * HEADS * self.tokens**2 <= self.limit * 2**30


@dataclass(frozen=True)
class Measured:
    """Timings and peak bytes by peer; the largest difference of a gradient from that of the first peer, relative."""

    timings: dict[str, Timing]
    memory: dict[str, int | None]
    difference: float


def build(task: Task) -> tuple[nn.Module, dict[str, Tensor], list[Tensor]]:
    """The model, its inputs, and what gradients are asked for."""
    torch.manual_seed(0)
    if task.kind == "mistral":
        from examples.quickstart import build as demo

        model, given = demo(task.tokens)
        return model, given, [p for p in model.parameters() if p.requires_grad]
    model = Attention(task.kind, task.tokens)
    qkv = [torch.randn(1, HEADS, task.tokens, WIDTH, requires_grad=True) for _ in range(3)]
    document = torch.arange(task.tokens) // 512
    inputs = dict(zip(("query", "key", "value"), qkv)) | {"document": document}
    return model, inputs, [*qkv, *model.parameters()]


def run(task: Task) -> Measured:
    """In a worker: gradients of the sum of squares, by every peer."""
    import refocus

    torch.set_num_threads(task.threads)
    model, inputs, leaves = build(task)
    peers: dict[str, Callable[..., Any]] = {}
    if task.dense_fits:
        peers = {EAGER: model, COMPILE: torch.compile(model)}
    peers[REFOCUS] = refocus.optimize(model, engine=task.engine)

    def step(peer: Callable[..., Any]) -> tuple[Tensor, ...]:
        out = peer(**inputs)
        out = out if isinstance(out, Tensor) else out[0]
        return torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)

    grads = {name: [g for g in step(peer) if g is not None] for name, peer in peers.items()}
    reference = next(iter(grads.values()))
    scale = max(float(g.abs().max()) for g in reference)
    difference = largest_difference(grads[REFOCUS], reference) / scale
    del grads, reference
    calls = {name: (lambda peer=peer: step(peer)) for name, peer in peers.items()}
    timings = time_peers(
        calls, device=torch.device("cpu"), repeats=task.repeats, warmup=1, at_least=1.0, budget=task.budget
    )
    memory = {name: peak_memory(call, device=torch.device("cpu")) for name, call in calls.items()}
    return Measured(timings, memory, difference)


def markdown(entries: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Training on the CPU",
        "",
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, float32: forward and backward. "
        "Medians of calls taken in turns in one process; memory is the peak of one step beyond the model, its inputs "
        "and its gradients' leaves; the difference is that of a gradient, relative to the largest.",
        "",
        "| what | tokens | eager ms | compile ms | refocus ms | over eager | over compile | eager MiB | compile MiB "
        "| refocus MiB | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        if "error" in entry:
            lines.append(f"| {entry['kind']} | {entry['tokens']} | {entry['error']} |")
            continue
        times = [entry["seconds"].get(peer) for peer in (EAGER, COMPILE, REFOCUS)]
        peaks = [entry["memory"].get(peer) for peer in (EAGER, COMPILE, REFOCUS)]
        cells = [entry["kind"], entry["tokens"]]
        cells += ["-" if t is None else f"{t * 1e3:.1f}" for t in times]
        cells += ["-" if t is None else f"{t / times[2]:.2f}" for t in times[:2]]
        cells += ["-" if m is None else f"{m / 2**20:.1f}" for m in peaks]
        lines.append("| " + " | ".join(map(str, (*cells, f"{entry['difference']:.1e}"))) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--engine", help="what Refocus is asked for (default: it chooses)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing for one measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that eager code may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "training", help="path of the results, no suffix")
    options = parser.parse_args(arguments)
    tasks = [
        Task(kind, tokens, options.engine, options.repeats, options.budget, options.threads, options.limit)
        for kind in options.only
        for tokens in options.tokens
    ]
    where = {**machine(), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for outcome in run_isolated(run, tasks, timeout=900.0):
        task: Task = outcome.task
        entry: dict[str, Any] = {"kind": task.kind, "tokens": task.tokens, "engine": task.engine}
        if outcome.error:
            entry["error"] = outcome.brief
        else:
            measured: Measured = outcome.value
            entry["seconds"] = {name: timing.median for name, timing in measured.timings.items()}
            entry["timings"] = {name: asdict(timing) for name, timing in measured.timings.items()}
            entry["memory"], entry["difference"] = measured.memory, measured.difference
        entries.append(entry)
        print(markdown([entry], where).splitlines()[-1], flush=True)
        options.out.with_suffix(".json").write_text(json.dumps({"machine": where, "results": entries}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(entries, where))
    return int(any("error" in entry for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
