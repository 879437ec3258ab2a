"""Eager, `torch.compile` alone and Refocus side by side, one measurement a process: what the suites share.

A suite says what its tasks are and how a task's model is built; here are the measurement, the table and the command
line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.isolation import run_isolated
from benchmarks.measure import Timing, keep_free_memory, largest_difference, machine, peak_memory, time_peers
from benchmarks.peers import COMPILE, EAGER, REFOCUS

RESULTS = Path(__file__).parent / "results"
PEERS = (EAGER, COMPILE, REFOCUS)


@dataclass(frozen=True)
class Task:
    """One measurement. `engine`: what Refocus is asked for (None: it chooses). `limit`: GiB that eager code may take.
    `training`: with the backward. `heads` and `width`: for suites that vary them (0: as ever)."""

    kind: str
    tokens: int
    engine: str | None
    repeats: int
    budget: float
    threads: int
    limit: float
    training: bool = False
    heads: int = 0
    width: int = 0


@dataclass(frozen=True)
class Measured:
    """Timings and peak bytes by peer; the largest difference from the first peer's result, relative to the largest.

    `alone`: Refocus where no peer takes turns, which would empty the caches or move gigabytes, and with an allocator
    that keeps what is given back (`benchmarks.measure.keep_free_memory`)."""

    timings: dict[str, Timing]
    alone: Timing
    memory: dict[str, int | None]
    difference: float


@dataclass(frozen=True)
class Subject:
    """What a task measures: a function or module with its inputs, and the leaves whose gradients are asked for.

    `dense`: eager and compiled code are measured too; otherwise their memory would not fit."""

    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    leaves: Sequence[Tensor] = ()
    dense: bool = True


def measure(task: Task, subject: Subject) -> Measured:
    """In a worker: the result, or with `task.training` the gradients of its mean square, by every peer."""
    import refocus

    torch.set_num_threads(task.threads)
    peers: dict[str, Callable[..., Any]] = {}
    if subject.dense:
        peers = {EAGER: subject.call, COMPILE: torch.compile(subject.call)}
    peers[REFOCUS] = refocus.optimize(subject.call, engine=task.engine)

    def step(peer: Callable[..., Any]) -> Any:
        if not task.training:
            with torch.no_grad():
                return peer(**subject.inputs)
        out = peer(**subject.inputs)
        out = out if isinstance(out, Tensor) else out[0]
        found = torch.autograd.grad(out.square().mean(), list(subject.leaves), allow_unused=True)
        return [g for g in found if g is not None]

    calls = {name: (lambda peer=peer: step(peer)) for name, peer in peers.items()}
    results = {name: _tensors(call()) for name, call in calls.items()}
    reference = next(iter(results.values()))
    scale = max(float(t.abs().max()) for t in reference)
    difference = largest_difference(results[REFOCUS], reference) / scale
    del results, reference

    def timed(some: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        return time_peers(
            some, device=torch.device("cpu"), repeats=task.repeats, warmup=1, at_least=1.0, budget=task.budget
        )

    timings = timed(calls)
    keep_free_memory()
    alone = timed({REFOCUS: calls[REFOCUS]})[REFOCUS]
    memory = {name: peak_memory(call, device=torch.device("cpu")) for name, call in calls.items()}
    return Measured(timings, alone, memory, difference)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    what = f"{entry['kind']}, backward" if entry["training"] else entry["kind"]
    if "error" in entry:
        return f"| {what} | {entry['tokens']} | {entry['error']} |"
    times = [entry["seconds"].get(peer) for peer in PEERS]
    peaks = [entry["memory"].get(peer) for peer in PEERS]
    cells = [what, entry["tokens"]]
    cells += ["-" if t is None else f"{t * 1e3:.1f}" for t in times]
    cells += ["-" if t is None else f"{t / times[2]:.2f}" for t in times[:2]]
    cells += ["-" if m is None else f"{m / 2**20:.1f}" for m in peaks]
    cells.append(f"{entry['alone']['fastest'] * 1e3:.1f}")
    return "| " + " | ".join(map(str, (*cells, f"{entry['difference']:.1e}"))) + " |"


def markdown(title: str, note: str, entries: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        f"# {title}",
        "",
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, float32. {note} "
        "Medians of calls taken in turns in one process; memory is the peak of one call beyond what is alive before it "
        "(the model, its inputs); `alone` is the fastest call of Refocus where no peer takes turns with it, its "
        "memory mapped already; the difference is relative to the largest value.",
        "",
        "| what | tokens | eager ms | compile ms | refocus ms | over eager | over compile | eager MiB | compile MiB "
        "| refocus MiB | alone ms | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [row(entry) for entry in entries]
    fits = []
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        points = [(e["tokens"], e["alone"]["fastest"]) for e in entries if e["kind"] == kind and "alone" in e]
        if len(points) > 2:
            fits.append(f"{kind} {straightness(*map(list, zip(*points))):.4f}")
    if fits:
        lines += ["", f"How well a line through the lengths fits the times of Refocus alone (R^2): {', '.join(fits)}."]
    return "\n".join(lines) + "\n"


def straightness(lengths: Sequence[float], seconds: Sequence[float]) -> float:
    """R^2 of the best line through the times."""
    points = torch.tensor([lengths, seconds], dtype=torch.float64)
    return float(torch.corrcoef(points)[0, 1] ** 2)


def parser(name: str, about: str | None, kinds: Sequence[str], tokens: Sequence[int]) -> argparse.ArgumentParser:
    """The command line of a suite."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(about or "").split("\n")[0])
    found.add_argument("--only", nargs="+", choices=kinds, default=list(kinds))
    found.add_argument("--tokens", nargs="+", type=int, default=list(tokens))
    found.add_argument("--engine", help="what Refocus is asked for (default: it chooses)")
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--budget", type=float, default=30.0, help="seconds of timing for one measurement")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--limit", type=float, default=6.0, help="GiB that eager code may take")
    found.add_argument("--out", type=Path, default=RESULTS / name, help="path of the results, no suffix")
    return found


def task_of(kind: str, tokens: int, options: argparse.Namespace, training: bool = False) -> Task:
    """A task with what the command line says of all of them."""
    return Task(kind, tokens, options.engine, options.repeats, options.budget, options.threads, options.limit, training)


def drive(
    run: Callable[[Task], Measured], tasks: Sequence[Task], options: argparse.Namespace, title: str, note: str
) -> int:
    """Measure the tasks one by one, print a line for each, and write the results after each; 1 if any failed."""
    where = {**machine(), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for outcome in run_isolated(run, list(tasks), timeout=900.0, lifetime=1):
        done: Task = outcome.task
        entry: dict[str, Any] = {
            "kind": done.kind, "tokens": done.tokens, "engine": done.engine, "training": done.training,
        }  # fmt: skip
        if outcome.error:
            entry["error"] = outcome.brief
        else:
            measured: Measured = outcome.value
            entry["seconds"] = {name: timing.median for name, timing in measured.timings.items()}
            entry["timings"] = {name: asdict(timing) for name, timing in measured.timings.items()}
            entry["alone"] = asdict(measured.alone)
            entry["memory"], entry["difference"] = measured.memory, measured.difference
        entries.append(entry)
        print(row(entry), flush=True)
        options.out.with_suffix(".json").write_text(json.dumps({"machine": where, "results": entries}, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(markdown(title, note, entries, where))
    return int(any("error" in entry for entry in entries))
