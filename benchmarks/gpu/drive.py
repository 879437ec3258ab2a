"""One run: numbers and first calls in many processes, then times in one, for as long as there is time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import measurement, numerics
from benchmarks.gpu.case import Case
from benchmarks.gpu.measurement import Task
from benchmarks.gpu.numerics import Numbers
from benchmarks.gpu.store import Store
from benchmarks.gpu.suites import SUITES
from benchmarks.isolation import Outcome, run_isolated

NUMERICS = "numerics"
# Of the time, at most: for numbers, and until caches are filled. What is not reached waits for the next run.
NUMBERS, PREPARING = 0.3, 0.5
ENDING = 10.0  # seconds kept for writing things up


@dataclass(frozen=True)
class Deadline:
    """When a run began, and how many seconds it has."""

    began: float
    seconds: float

    def left(self, share: float = 1.0) -> float:
        return self.began + share * self.seconds - time.monotonic()


def serve(task: Numbers | Task | bool) -> Any:
    """In a worker."""
    if isinstance(task, bool):
        return measurement.bandwidth(task)
    return numerics.run(task) if isinstance(task, Numbers) else measurement.run(task)


def prepare(store: Store, options: argparse.Namespace, pending: Sequence[Case], deadline: Deadline) -> None:
    """Numbers, and a first call of every case that is to be timed, in many processes at a time."""

    def drawn() -> Iterator[Numbers | Task]:
        asked = numerics.tasks(options.only, options.tiny) if NUMERICS in options.suite else iter(())
        for task in asked:
            if deadline.left(NUMBERS if pending else 1.0) <= 0:
                break
            if options.again or not store.has(NUMERICS, task.key):
                yield task
        for case in () if options.tiny else pending:
            if deadline.left(PREPARING) <= 0:
                break
            yield Task(case, warm=True, memory=0.9 / options.processes)

    for outcome in run_isolated(serve, drawn(), processes=options.processes, timeout=options.timeout):
        if isinstance(outcome.task, Numbers):
            entry = {"value": outcome.value, "error": outcome.brief, "seconds": outcome.seconds}
            if outcome.error:
                entry["trace"] = outcome.error[-2000:]
            store.put(NUMERICS, outcome.task.key, entry)
            if outcome.error or options.verbose:
                print(f"numbers  {outcome.task.key:<40} {outcome.brief or outcome.value}", flush=True)
        elif options.verbose or outcome.error:
            print(f"warm     {outcome.task.case.key:<70} {outcome.seconds:5.1f} s  {outcome.brief}", flush=True)


def schedule(pending: Sequence[Case], options: argparse.Namespace, deadline: Deadline) -> Iterator[Task]:
    """Cases as long as there is time: a suite that has used its share lets the others go first."""
    total = sum(SUITES[name].share for name in options.suite if name in SUITES)
    seconds = max(deadline.left(), 0.0)
    spent = dict.fromkeys(SUITES, 0.0)
    late: list[Case] = []
    for patient, some in ((False, pending), (True, late)):
        for case in tuple(some):
            if deadline.left() <= ENDING:
                return
            if not patient and spent[case.suite] > seconds * SUITES[case.suite].share / total:
                late.append(case)
                continue
            began = time.monotonic()
            yield Task(case, tiny=options.tiny, budget=options.budget, limit=options.limit)
            spent[case.suite] += time.monotonic() - began


def times(store: Store, options: argparse.Namespace, pending: Sequence[Case], deadline: Deadline) -> None:
    """Every case, one after the other."""
    for outcome in run_isolated(serve, schedule(pending, options, deadline), timeout=options.timeout):
        entry = outcome.value if outcome.value is not None else failed(outcome)
        store.put("cases", outcome.task.case.key, entry)
        print(line(outcome, entry), flush=True)


def failed(outcome: Outcome) -> dict[str, Any]:
    case = outcome.task.case
    return {
        "suite": case.suite, "kind": case.kind, "work": case.work, "sizes": case.sizes, "tokens": case.tokens,
        "width": case.width, "peers": {}, "error": outcome.brief, "trace": outcome.error[-2000:],
    }  # fmt: skip


def line(outcome: Outcome, entry: dict[str, Any]) -> str:
    """What is printed of a case."""
    peers = entry["peers"].items()
    parts = [f"{name} {p['seconds'] * 1e3:.3f}" for name, p in peers if "seconds" in p]
    parts += [f"{name}: {p['error'][:60]}" for name, p in peers if "error" in p]
    parts += [f"{name} DISAGREES by {p['difference']:.1e}" for name, p in peers if p.get("agrees") is False]
    return f"{outcome.task.case.key}  [{outcome.seconds:.0f} s]  {entry.get('error', '')}{'  '.join(parts)}"


def wrong(data: dict[str, Any]) -> list[str]:
    """What must not be: numbers that are off, and results of Refocus that differ from the other peers'."""
    found = [f"numbers, {key}: {e['error']}" for key, e in data[NUMERICS].items() if e.get("error")]
    for key, entry in data["cases"].items():
        own = {n: p for n, p in entry["peers"].items() if n.startswith("refocus")}
        found += [f"{key}: {n} differs from {entry['against']}" for n, p in own.items() if p.get("agrees") is False]
        found += [f"{key}: {n} failed: {p['error']}" for n, p in own.items() if "error" in p]
        if "error" in entry:
            found.append(f"{key}: {entry['error']}")
    return found
