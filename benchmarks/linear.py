"""Linear attention as papers spell it: eager, `torch.compile` alone and Refocus side by side, time and peak memory.

    python -m benchmarks.linear                                      results in benchmarks/results/linear.{json,md}
    python -m benchmarks.linear --only retention --tokens 8192       one spelling
    python -m benchmarks.linear --train                              forward and backward

Each measurement runs in a process of its own; within it the peers take turns. Eager and compiled code are left out
where what they store (a weight for every pair, a state for every position) would not fit the memory that `--limit`
allows. At the end, how well the times of Refocus lie on a line through the lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.isolation import run_isolated
from benchmarks.measure import Timing, largest_difference, machine, peak_memory, time_peers
from benchmarks.peers import COMPILE, EAGER, REFOCUS

RESULTS = Path(__file__).parent / "results"
HEADS, WIDTH = 4, 64


def normalised(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A linear transformer: feature maps, a triangle, a division by the sum."""
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    weights = (q @ k.mT).tril()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A fixed decay for each head."""
    at = torch.arange(q.shape[2], device=q.device)
    distance = at[:, None] - at[None, :]
    decay = 1 - torch.exp2(-5 - torch.arange(HEADS, device=q.device))
    log = torch.log(decay)[:, None, None] * distance
    return (q @ k.mT * log.masked_fill(distance < 0, float("-inf")).exp()) @ v


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A decay that the data decide, one for each head: a difference of running sums."""
    sums = gate[..., 0].cumsum(-1)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(~keep, float("-inf"))
    return (q @ k.mT * between.exp()) @ v


def channels(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The same for each channel: eager code makes a number for each pair and channel."""
    sums = gate.cumsum(2)
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(~keep[..., None], float("-inf"))
    return torch.einsum("bhid,bhjd,bhijd->bhij", q, k, between.exp()) @ v


def states(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """A running sum of outer products: a state for each position."""
    return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))


Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
KINDS: dict[str, Function] = {f.__name__: f for f in (normalised, retention, gated, channels, states)}


@dataclass(frozen=True)
class Task:
    """One measurement. `engine`: what Refocus is asked for (None: it chooses)."""

    kind: str
    tokens: int
    train: bool
    engine: str | None
    repeats: int
    budget: float
    threads: int
    limit: float

    @property
    def fits(self) -> bool:
        """Whether eager code, which keeps several of its largest tensors, stays below `limit` GiB."""
        numbers = {"states": self.tokens * WIDTH * WIDTH, "channels": self.tokens**2 * WIDTH}
        kept = 6 if self.train else 3
        return kept * 4 * HEADS * numbers.get(self.kind, self.tokens**2) <= self.limit * 2**30


@dataclass(frozen=True)
class Measured:
    """Timings and peak bytes by peer; the largest difference of a result from that of the first peer, relative."""

    timings: dict[str, Timing]
    memory: dict[str, int | None]
    difference: float


def run(task: Task) -> Measured:
    """In a worker: the output, or the gradients of a sum of squares, by every peer."""
    import refocus

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    function = KINDS[task.kind]
    given = [torch.randn(1, HEADS, task.tokens, WIDTH) * WIDTH**-0.25 for _ in range(3)]
    given.append(-0.1 * torch.rand(1, HEADS, task.tokens, WIDTH))
    given = [x.requires_grad_(task.train) for x in given]
    peers: dict[str, Callable[..., Any]] = {}
    if task.fits:
        peers = {EAGER: function, COMPILE: torch.compile(function, dynamic=False)}
    peers[REFOCUS] = refocus.optimize(function, engine=task.engine)

    def step(peer: Callable[..., Any]) -> tuple[Tensor, ...]:
        out = peer(*given)
        if not task.train:
            return (out,)
        found = torch.autograd.grad(out.square().mean(), given, allow_unused=True)
        return tuple(g for g in found if g is not None)

    results = {name: step(peer) for name, peer in peers.items()}
    first = next(iter(results.values()))
    scale = max(float(x.abs().max()) for x in first)
    difference = largest_difference(results[REFOCUS], first) / scale
    del results, first
    calls = {name: (lambda peer=peer: step(peer)) for name, peer in peers.items()}
    cpu = torch.device("cpu")
    timings = time_peers(calls, device=cpu, repeats=task.repeats, warmup=1, at_least=1.0, budget=task.budget)
    return Measured(timings, {name: peak_memory(call, device=cpu) for name, call in calls.items()}, difference)


def straightness(lengths: Sequence[float], seconds: Sequence[float]) -> float:
    """R^2 of the best line through the times."""
    points = torch.tensor([lengths, seconds], dtype=torch.float64)
    return float(torch.corrcoef(points)[0, 1] ** 2) if len(lengths) > 2 else 1.0


def markdown(entries: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Linear attention on the CPU",
        "",
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, float32, {HEADS} heads of {WIDTH}. "
        "Medians of calls taken in turns in one process; memory is the peak of one call beyond its inputs; the "
        "difference is relative to the largest number of the result.",
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
        cells = [entry["kind"] + (", trained" if entry["train"] else ""), entry["tokens"]]
        cells += ["-" if t is None else f"{t * 1e3:.1f}" for t in times]
        cells += ["-" if t is None else f"{t / times[2]:.2f}" for t in times[:2]]
        cells += ["-" if m is None else f"{m / 2**20:.1f}" for m in peaks]
        lines.append("| " + " | ".join(map(str, (*cells, f"{entry['difference']:.1e}"))) + " |")
    fits = []
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        points = [(e["tokens"], e["seconds"][REFOCUS]) for e in entries if e["kind"] == kind and "seconds" in e]
        if len(points) > 2:
            fits.append(f"{kind} {straightness(*map(list, zip(*points))):.4f}")
    return "\n".join([*lines, *(["", "R^2 of time over length: " + ", ".join(fits) + "."] if fits else [])]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--engine", help="what Refocus is asked for (default: it chooses)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of timing for one measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that eager code may take")
    parser.add_argument("--out", type=Path, default=RESULTS / "linear", help="path of the results, no suffix")
    options = parser.parse_args(arguments)
    rest = (options.train, options.engine, options.repeats, options.budget, options.threads, options.limit)
    tasks = [Task(kind, tokens, *rest) for kind in options.only for tokens in options.tokens]
    where = {**machine(), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for outcome in run_isolated(run, tasks, timeout=900.0):
        task: Task = outcome.task
        entry: dict[str, Any] = {"kind": task.kind, "tokens": task.tokens, "train": task.train, "engine": task.engine}
        if outcome.error:
            entry["error"] = outcome.brief
        else:
            measured: Measured = outcome.value
            entry["seconds"] = {name: timing.median for name, timing in measured.timings.items()}
            entry["timings"] = {name: asdict(timing) for name, timing in measured.timings.items()}
            entry["memory"], entry["difference"] = measured.memory, measured.difference
        entries.append(entry)
        print(next(x for x in markdown([entry], where).splitlines() if x.startswith(f"| {task.kind}")), flush=True)
        options.out.with_suffix(".json").write_text(json.dumps({"machine": where, "results": entries}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(entries, where))
    return int(any("error" in entry for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
