"""Eager, `torch.compile` alone and Refocus side by side on the CPU: the demo, and every model of the list.

    python -m benchmarks.cpu                                everything; results in benchmarks/results/cpu.{json,md}
    python -m benchmarks.cpu --demo 4096 8192 --only none   the demo alone
    python -m benchmarks.cpu --only bert mistral --tokens 1024 --attention both

Each model runs in a process of its own, one after the other; within it the three peers take turns. Results are written
after each model, so that a run that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.isolation import Outcome, run_isolated
from benchmarks.measure import geometric_mean, machine
from benchmarks.peers import COMPILE, EAGER, REFOCUS, Row, compare

RESULTS = Path(__file__).parent / "results"
DEMO = "demo"


@dataclass(frozen=True)
class Task:
    """One measurement: the demo's model (`name` is "demo"), or a model of the list."""

    name: str
    tokens: int
    attention: str
    engine: str | None
    repeats: int
    budget: float
    threads: int

    @property
    def title(self) -> str:
        return self.name if self.name == DEMO else f"{self.name}:{self.attention}"


@dataclass(frozen=True)
class Measured:
    """What `run` brings back: a row for each peer, and how many sites there are and were fused."""

    rows: dict[str, Row]
    sites: int
    fused: int


def run(task: Task) -> Measured:
    """In a worker: build the model, run the three peers, ask Refocus what it did."""
    import refocus

    torch.set_num_threads(task.threads)
    torch._dynamo.reset()
    if task.name == DEMO:
        from examples.quickstart import build as build_demo

        model, inputs = build_demo(task.tokens)
    else:
        from benchmarks import models

        attention: models.Attention = "eager" if task.attention == "eager" else "default"
        model, inputs = models.build(task.name, task.tokens, attention, models.SMALL)
    rows = compare(model, inputs, engine=task.engine, repeats=task.repeats, at_least=3.0, budget=task.budget)
    with torch.no_grad():
        sites = refocus.explain(model, engine=task.engine, **inputs).sites
    return Measured(rows, len(sites), sum(site.fused for site in sites))


# ------------------------------------------------------------------------------------------------ results


def record(outcome: Outcome) -> dict[str, Any]:
    """One task as plain data for the JSON file."""
    task: Task = outcome.task
    entry: dict[str, Any] = {"model": task.title, "tokens": task.tokens}
    if outcome.error:
        return {**entry, "error": outcome.error, "brief": outcome.brief}
    measured: Measured = outcome.value
    rows = {name: asdict(row) for name, row in measured.rows.items()}
    return {**entry, "sites": measured.sites, "fused": measured.fused, "rows": rows}


def speedup(entry: dict[str, Any], over: str, which: str = "seconds") -> float:
    """Refocus against another peer, in time: 2 is twice as fast. `which`: medians, or the "fastest" calls."""
    return entry["rows"][over][which] / entry["rows"][REFOCUS][which]


def markdown(entries: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page: one table for each length, worst first, and what they come to."""
    lines = [
        "# Refocus on the CPU",
        "",
        f"{where['processor']}, {where['threads']} threads, torch {where['torch']}, float32, no gradients. "
        "Times are medians of calls taken in turns in one process; memory is the peak of one call beyond the model "
        "and its inputs; the difference is the largest absolute one from the eager output.",
    ]
    good = [entry for entry in entries if "rows" in entry]
    demos = [entry for entry in good if entry["model"] == DEMO]
    rest = [entry for entry in good if entry["model"] != DEMO]
    if demos:
        lines += ["", "## The demo", "", *table(demos)]
    for tokens in sorted({entry["tokens"] for entry in rest}):
        some = sorted((e for e in rest if e["tokens"] == tokens), key=lambda e: speedup(e, COMPILE))
        lines += ["", f"## {tokens} tokens", "", *table(some), "", summary(some)]
    if rest:
        lines += ["", "## All models", "", summary(rest)]
    failed = [entry for entry in entries if "error" in entry]
    if failed:
        lines += ["", "## Failed", ""]
        lines += [f"- {e['model']}, {e['tokens']} tokens: {e['brief']}" for e in failed]
    return "\n".join(lines) + "\n"


def table(entries: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | tokens | fused | eager ms | compile ms | refocus ms | over eager | over compile "
        "| eager MiB | compile MiB | refocus MiB | difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        rows = [entry["rows"][peer] for peer in (EAGER, COMPILE, REFOCUS)]
        cells = [
            entry["model"],
            entry["tokens"],
            f"{entry['fused']}/{entry['sites']}",
            *(f"{row['seconds'] * 1e3:.2f}" for row in rows),
            f"{speedup(entry, EAGER):.2f}",
            f"{speedup(entry, COMPILE):.2f}",
            *("-" if row["memory"] is None else f"{row['memory'] / 2**20:.1f}" for row in rows),
            f"{rows[-1]['difference']:.1e}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def summary(entries: list[dict[str, Any]]) -> str:
    """Geometric means, and the models that got slower than 0.9 of `torch.compile`'s speed."""
    ratios = {f"{e['model']} at {e['tokens']}": speedup(e, COMPILE) for e in entries}
    slow = [f"{name} ({ratio:.2f})" for name, ratio in ratios.items() if ratio < 0.9]
    mean = geometric_mean(list(ratios.values()))
    fastest = geometric_mean([speedup(e, COMPILE, "fastest") for e in entries])
    eager = geometric_mean([speedup(e, EAGER) for e in entries])
    return (
        f"Geometric mean over {len(entries)}: {mean:.3f} against torch.compile ({fastest:.3f} by the fastest calls), "
        f"{eager:.3f} against eager. "
        f"Below 0.9 of torch.compile: {', '.join(slow) or 'none'}."
    )


def progress(entry: dict[str, Any]) -> str:
    head = f"{entry['model']:<24} {entry['tokens']:>6}"
    if "error" in entry:
        return f"{head}  FAILED {entry['brief']}"
    times = "  ".join(f"{peer} {row['seconds'] * 1e3:8.2f} ms" for peer, row in entry["rows"].items())
    return f"{head}  {times}  x{speedup(entry, COMPILE):.2f}  fused {entry['fused']}/{entry['sites']}"


# ------------------------------------------------------------------------------------------------ the command


def tasks(options: argparse.Namespace) -> list[Task]:
    from benchmarks import models

    def task(name: str, tokens: int, attention: str) -> Task:
        return Task(name, tokens, attention, options.engine, options.repeats, options.budget, options.threads)

    chosen = [n for n in models.names() if not options.only or any(word in n for word in options.only)]
    attentions = models.ATTENTIONS if options.attention == "both" else (options.attention,)
    return [task(DEMO, tokens, "eager") for tokens in options.demo] + [
        task(name, tokens, attention) for tokens in options.tokens for name in chosen for attention in attentions
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--demo", nargs="*", type=int, default=[4096, 8192], help="lengths to run the demo at")
    parser.add_argument("--tokens", nargs="*", type=int, default=[128, 1024], help="lengths to run the models at")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only names that contain one of these")
    parser.add_argument("--attention", choices=("eager", "default", "both"), default="eager")
    parser.add_argument("--engine", help="force an engine (default: refocus chooses)")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (more for fast models)")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing for one model, after 3 rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one model, compilation included")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="path of the results, without its suffix")
    options = parser.parse_args(arguments)

    where = {**machine(), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for outcome in run_isolated(run, tasks(options), timeout=options.timeout, lifetime=1):
        entries.append(record(outcome))
        print(progress(entries[-1]), flush=True)
        content = json.dumps({"machine": where, "results": entries}, indent=1) + "\n"
        options.out.with_suffix(".json").write_text(content)
        options.out.with_suffix(".md").write_text(markdown(entries, where))
    print("\n" + markdown(entries, where))
    return int(any("error" in entry for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
