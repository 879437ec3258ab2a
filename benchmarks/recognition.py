"""Which attention sites of many models are recognised and fused, and why each other one was left.

    python -m benchmarks.recognition                       the project's own list, each model in both spellings
    python -m benchmarks.recognition FILE.py               a registry: a file that defines
                                                           REGISTRY: name -> () -> (module, kwargs)
    python -m benchmarks.recognition --only bert --json out.json

Every region is forced through the engine named by --engine (default: tiled), so that what is left unfused is left
because it could not be fused; --engine plan lets the planner choose. The optimised model's output is compared with a
float64 run of the eager model, by the rule of `refocus.tolerances`: it may be off by 1.5 times what the eager model
itself is off, plus a floor.

A registry may define SITES: name -> number of attention sites, and --census FILE.csv (columns `model` and `sites`)
brings such numbers from elsewhere: sites that were not even seen are then counted too (MISSED). --wake gives the
models of a registry the weights of `models.wake`, with which every term of the scores matters. --time also times each
model against `torch.compile` alone (with one process and --engine plan, to mean anything).

Exit status: 0, or 1 if a model crashed (FAILED), timed out, changed its result, fell back to its original graph
because something of ours failed (BROKEN), or, with --time, got slower.
"""

from __future__ import annotations

import argparse
import collections
import copy
import csv
import importlib.util
import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.isolation import Outcome, run_isolated
from benchmarks.measure import floats, largest_difference, time_peers
from benchmarks.models import wake
from refocus.tolerances import allowed_error, difference, magnitude

SLOWER = 0.9  # of torch.compile's speed, below which a model counts as slowed down
REST = 2e-5  # of an output's magnitude: what Inductor's reordering of the rest of the model may cost on top


@dataclass(frozen=True)
class Task:
    name: str
    registry: str | None
    engine: str | None
    threads: int
    wake: bool
    time: bool


@dataclass(frozen=True)
class Result:
    """One model. `sites` are the report's, as dictionaries. Errors are largest absolute differences from float64."""

    name: str
    sites: list[dict[str, Any]] = field(default_factory=list)
    expected: int | None = None
    error: float | None = None
    eager_error: float | None = None
    allowed: float | None = None
    speed: float | None = None  # torch.compile's time over refocus's
    note: str = ""
    fallbacks: list[str] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0

    @property
    def recognized(self) -> int:
        return sum(site["recognized"] for site in self.sites)

    @property
    def fused(self) -> int:
        return sum(site["fused"] for site in self.sites)

    @property
    def changed(self) -> bool:
        """The output is further from the truth than it may be (NaN counts as changed)."""
        return self.error is not None and self.allowed is not None and not self.error <= self.allowed

    @property
    def status(self) -> str:
        if self.failure:
            return "FAILED"
        if self.changed:
            return "CHANGED"
        if self.fallbacks:
            return "BROKEN"
        if self.speed is not None and self.speed < SLOWER:
            return "SLOWER"
        return "MISSED" if self.expected is not None and self.recognized < self.expected else "ok"


# ------------------------------------------------------------------------------------------------ in a worker


@cache
def load_registry(path: str | None) -> ModuleType:
    """The module that defines REGISTRY; its own folder is importable while it runs, as when it is run as a script."""
    if path is None:
        from benchmarks import models

        return models
    file = Path(path).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent))
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "REGISTRY", None), dict):
        raise SystemExit(f"{path} defines no REGISTRY: name -> () -> (module, kwargs)")
    return module


def examine(task: Task) -> Result:
    """Capture, optimise and run one model; compare it with its eager self."""
    import refocus

    torch.set_num_threads(task.threads)
    torch._dynamo.reset()
    torch._inductor.config.fallback_random = True  # a model that draws random numbers draws the same ones
    torch.manual_seed(0)
    module, kwargs = load_registry(task.registry).REGISTRY[task.name]()
    module.eval()
    if task.wake:
        wake(module)
    with torch.no_grad():
        eager = _call(module, kwargs)
        again = _call(module, kwargs, seed=1)
        reference, note = _reference(module, kwargs, eager)
        if largest_difference(eager, again) > 0:
            note = "the eager model's output is random: not compared"
        began = time.perf_counter()
        reports: list[refocus.Report] = []  # one for each graph
        optimized = refocus.optimize(module, engine=task.engine, report=reports.append)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", refocus.FallbackWarning)
            output = _call(optimized, kwargs)
        seconds = time.perf_counter() - began
        speed = _speed(module, optimized, kwargs) if task.time else None
    random = note.startswith("the eager model's output is random")
    error, eager_error, allowed = (None, None, None) if random else worst(output, eager, reference)
    return Result(
        name=task.name,
        sites=[asdict(site) for report in reports for site in report.sites],
        error=error,
        eager_error=eager_error,
        allowed=allowed,
        speed=speed,
        note=note,
        fallbacks=[str(w.message) for w in caught if issubclass(w.category, refocus.FallbackWarning)],
        seconds=seconds,
    )


def worst(output: Any, eager: Any, reference: Any) -> tuple[float, float, float]:
    """(error, eager error, allowed error) of the output tensor that comes closest to its limit, or passes it most."""
    outputs, eagers, references = floats(output), floats(eager), floats(reference)
    if [t.shape for t in outputs] != [t.shape for t in eagers]:
        return math.inf, 0.0, 0.0
    found = [(0.0, 0.0, 1.0)]
    for got, usual, truth in zip(outputs, eagers, references):
        eager_error, scale = difference(usual, truth), magnitude(truth)
        # Where the eager model is infinite or NaN and float64 is not, there is nothing to hold the output against.
        if math.isfinite(eager_error):
            allowed = allowed_error(usual.dtype, eager_error, scale) + REST * scale
            found.append((difference(got, truth), eager_error, max(allowed, 1e-30)))
    return max(found, key=lambda entry: entry[0] / entry[2])


def _speed(module: nn.Module, optimized: nn.Module, kwargs: dict[str, Any]) -> float:
    compiled = torch.compile(module)
    peers = {"torch.compile": lambda: compiled(**kwargs), "refocus": lambda: optimized(**kwargs)}
    timings = time_peers(peers, device=torch.device("cpu"), repeats=15, at_least=2, budget=20)
    return timings["torch.compile"].median / timings["refocus"].median


def _copy(kwargs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, kwargs)


def _call(module: Any, kwargs: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return module(**_copy(kwargs))


def _reference(module: nn.Module, kwargs: dict[str, Any], eager: Any) -> tuple[Any, str]:
    """The eager model in float64; where that cannot run, or is no number where the model's own output is one, its own
    output, and a note that says so."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        output = _call(copy.deepcopy(module).double(), tree_map(widen, kwargs))
    except Exception as error:  # models that mix in float32 on their own: any kind of error
        return eager, f"no float64 run ({type(error).__name__}): compared with the eager output"
    finally:
        torch.set_default_dtype(default)
    if [t.shape for t in floats(output)] != [t.shape for t in floats(eager)]:
        return eager, "the float64 run has other outputs: compared with the eager output"
    if any(bool((a.isfinite() & ~b.isfinite()).any()) for a, b in zip(floats(eager), floats(output))):
        return eager, "the float64 run is not finite: compared with the eager output"
    return output, ""


# ------------------------------------------------------------------------------------------------ in the parent


def result_of(outcome: Outcome, census: dict[str, int]) -> Result:
    name = outcome.task.name
    if outcome.error:
        return Result(name, expected=census.get(name), failure=outcome.error, seconds=outcome.seconds)
    return Result(**{**outcome.value.__dict__, "expected": census.get(name)})


def lines(result: Result) -> list[str]:
    """One line for the model, then one for each reason that sites were left for."""
    seen = f"{len(result.sites)}" + (f"/{result.expected}" if result.expected is not None else "")
    error = "" if result.error is None else f"error {result.error:.1e} (eager {result.eager_error:.1e})"
    head = f"{result.name:<34} sites {seen:>6}  recognised {result.recognized:>3}  fused {result.fused:>3}"
    speed = "" if result.speed is None else f"  speed {result.speed:.2f}"
    out = [f"{head}  {result.status:<7} {error}{speed}"]
    reasons = collections.Counter((site["reason"], site["location"]) for site in result.sites if not site["fused"])
    out += [f"    {count} x {reason or 'no reason given'}  [{place}]" for (reason, place), count in reasons.items()]
    out += [f"    fell back: {message.splitlines()[0]}" for message in result.fallbacks]
    if result.note:
        out.append(f"    note: {result.note}")
    if result.failure:
        out += ["    " + line for line in result.failure.strip().splitlines()[-7:]]
    return out


def totals(results: list[Result]) -> list[str]:
    sites, fused = sum(len(r.sites) for r in results), sum(r.fused for r in results)
    recognized = sum(r.recognized for r in results)
    known = [r for r in results if r.expected is not None]
    out = [
        f"{len(results)} models: {sites} sites, {recognized} recognised, {fused} fused, {sites - fused} left; "
        f"{sum(bool(r.failure) for r in results)} failed, {sum(r.changed for r in results)} changed, "
        f"{sum(bool(r.fallbacks) for r in results)} fell back, "
        f"{sum(r.status == 'SLOWER' for r in results)} slower"
    ]
    if known:
        expected = sum(r.expected or 0 for r in known)
        covered = sum(min(r.recognized, r.expected or 0) for r in known)
        out.append(f"of {expected} sites known to be there, {covered} recognised ({covered / max(expected, 1):.1%})")
    reasons = collections.Counter(site["reason"] for r in results for site in r.sites if not site["fused"])
    out += [f"    {count:>4} x {reason or 'no reason given'}" for reason, count in reasons.most_common()]
    return out


def read_census(path: str | None, registry: ModuleType) -> dict[str, int]:
    if path is None:
        return dict(getattr(registry, "SITES", {}))
    with open(path, newline="") as file:
        return {row["model"]: int(row["sites"]) for row in csv.DictReader(file) if row.get("sites")}


def main(arguments: list[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recognition", description=summary)
    parser.add_argument("registry", nargs="?", help="a Python file that defines REGISTRY (default: the project's list)")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only names that contain one of these")
    parser.add_argument("--engine", default="tiled", help="engine that every region is forced through, or `plan`")
    parser.add_argument("--census", metavar="CSV", help="numbers of sites to hold the result against")
    parser.add_argument("--json", metavar="PATH", help="also write everything there")
    parser.add_argument("--wake", action="store_true", help="give all weights the scale of a trained model's")
    parser.add_argument("--time", action="store_true", help="also time each model against torch.compile alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    options = parser.parse_args(arguments)

    registry = load_registry(options.registry)
    census = read_census(options.census, registry)
    names = [n for n in registry.REGISTRY if not options.only or any(word in n for word in options.only)]
    if not options.registry:
        installed = registry.names()
        names = [n for n in names if n.split(":")[0] in installed]
    engine = None if options.engine == "plan" else options.engine
    threads = max((torch.get_num_threads()) // options.processes, 1)
    tasks = [Task(name, options.registry, engine, threads, options.wake, options.time) for name in names]

    results = []
    for outcome in run_isolated(examine, tasks, processes=options.processes, timeout=options.timeout):
        results.append(result_of(outcome, census))
        print("\n".join(lines(results[-1])), flush=True)
    print("\n" + "\n".join(totals(results)))
    if options.json:
        content = [{**asdict(r), "recognized": r.recognized, "fused": r.fused, "status": r.status} for r in results]
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return int(any(r.status not in ("ok", "MISSED") for r in results))


if __name__ == "__main__":
    sys.exit(main())
