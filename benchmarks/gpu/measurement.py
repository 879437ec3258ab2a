"""One case: every peer in one process, with the same tensors and clock, and how far the results are apart."""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import FORWARD, STEP, Case, Setting, Subject, Suite
from benchmarks.gpu.clock import Clock, copy_bandwidth, launching
from benchmarks.gpu.suites import SUITES
from benchmarks.measure import floats, largest_difference, peak_memory, time_peers
from benchmarks.peers import COMPILE, EAGER, REFOCUS
from refocus.report import Report
from refocus.tolerances import tolerance

Entry = dict[str, Any]
Step = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """A case, and how: `tiny` without a GPU; `warm`: only have everything compiled, so that caches on disk hold it;
    `budget`: seconds of timing; `memory`: the share of the device's memory that the process may take; `limit`: GiB
    that the eager spelling may hold."""

    case: Case
    tiny: bool = False
    warm: bool = False
    budget: float = 1.5
    memory: float = 1.0
    limit: float = 40.0

    @property
    def setting(self) -> Setting:
        return Setting(torch.device("cpu" if self.tiny else "cuda"), self.tiny)


def run(task: Task) -> Entry:
    """In a worker. Raises what building the case raises; what goes wrong with one peer is that peer's entry."""
    setting = task.setting
    if not task.tiny and task.memory < 1:
        torch.cuda.set_per_process_memory_fraction(task.memory)
    torch._dynamo.reset()
    torch.manual_seed(0)
    # Backwards are timed again and again on one graph.
    with torch._functorch.config.patch(donated_buffer=False):
        suite = SUITES[task.case.suite]
        case = task.case.no_larger(suite.limits) if task.tiny else task.case
        return _Measurement(task, suite, case, suite.build(case, setting)).run()


def bandwidth(tiny: bool) -> float:
    """In a worker: what a copy moves in a second."""
    return copy_bandwidth(torch.device("cpu" if tiny else "cuda"))


class _Measurement:
    """One case under way: peers that fail leave it, with their reason."""

    def __init__(self, task: Task, suite: Suite, case: Case, subject: Subject) -> None:
        self.task, self.suite, self.case, self.subject = task, suite, case, subject
        self.device = task.setting.device
        self.peers: dict[str, Entry] = {}
        self.steps: dict[str, Step] = {}
        self.reference: list[Tensor] | None = None
        self.against = ""

    def run(self) -> Entry:
        for name, make in self._makers().items():
            self._first(name, make)
        self.reference = None
        for name, alone in self.subject.alone.items():
            self._guarded(name, lambda name=name, alone=alone: self._add(name, alone()))  # type: ignore[misc]
        if not self.task.warm and self.steps:
            self._time()
        return {
            "suite": self.case.suite, "kind": self.case.kind, "work": self.case.work, "sizes": self.case.sizes,
            "tokens": self.case.tokens, "queries": self.case.queries or self.case.tokens, "width": self.case.width,
            "flops": self.subject.flops, "bytes": self.subject.bytes, "against": self.against, "peers": self.peers,
        }  # fmt: skip

    # ----------------------------------------------------------------------------------------------------- the peers

    def _makers(self) -> dict[str, Callable[[], Callable[..., Any]]]:
        subject, setting = self.subject, self.task.setting
        makers: dict[str, Callable[[], Callable[..., Any]]] = {}
        if subject.dense_bytes <= self.task.limit * 2**30 * self.task.memory:
            if not self.task.warm:
                makers[EAGER] = lambda: subject.call
            makers[COMPILE] = lambda: setting.compiled(subject.call)
        makers |= subject.peers
        forced = ("triton",) if setting.tiny else (None, *self.suite.engines)
        for engine in forced:
            name = REFOCUS if engine is None or setting.tiny else f"{REFOCUS} {engine}"
            makers[name] = lambda engine=engine, name=name: self._refocused(name, engine)  # type: ignore[misc]
        return makers

    def _refocused(self, name: str, engine: str | None) -> Callable[..., Any]:
        import refocus
        from refocus.testing import rewritten

        if self.subject.own is not None:
            return self.subject.own
        reports: list[Report] = []
        self.peers[name] = {"sites": reports}  # filled at the first call
        if self.task.tiny:
            return rewritten(self.subject.call, engine=engine, report=reports.append)
        return refocus.optimize(self.subject.call, engine=engine, report=reports.append)

    def _first(self, name: str, make: Callable[[], Callable[..., Any]]) -> None:
        def first() -> None:
            began = time.perf_counter()
            step, result = self._step(make())
            results = [x.detach() for x in floats(result)]
            self._synchronize()
            entry = self.peers.setdefault(name, {})
            entry["first"] = time.perf_counter() - began
            self._compare(entry, name, results)
            self._add(name, step)

        self._guarded(name, first)
        entry = self.peers[name]
        if "sites" in entry:
            entry["sites"] = [_site(site) for report in entry["sites"] for site in report.sites]

    def _step(self, peer: Callable[..., Any]) -> tuple[Step, Any]:
        """What is timed, and what it gave the first time."""
        inputs, leaves = self.subject.inputs, list(self.subject.leaves)
        if self.case.work == FORWARD:

            def forward() -> Any:
                with torch.no_grad():
                    return peer(**inputs)

            return forward, forward()
        if self.case.work == STEP:
            back: Tensor | None = None

            def step() -> Any:
                nonlocal back
                out = floats(peer(**inputs))[0]
                back = _flowing_back(out) if back is None else back
                return torch.autograd.grad(out, leaves, back, allow_unused=True)

            return step, _given(step())
        out = floats(peer(**inputs))[0]
        back = _flowing_back(out)

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, back, retain_graph=True, allow_unused=True)

        return backward, _given(backward())

    def _compare(self, entry: Entry, name: str, results: Sequence[Tensor]) -> None:
        if self.reference is None:
            self.reference, self.against = list(results), name
        reference = self.reference
        if len(results) != len(reference):  # a peer without a gradient for a bias, say
            entry["difference"] = None
            return
        worst = 0.0
        for mine, theirs in zip(results, reference):
            worst = max(worst, largest_difference(mine, theirs) / (float(theirs.abs().max()) or 1.0))
        # That of the case's dtype: a gate's gradient is float32, and made of narrow numbers.
        allowed = tolerance(self.case.torch_dtype).pairwise
        entry["difference"], entry["agrees"] = worst, worst <= allowed or self.suite.whole

    # ------------------------------------------------------------------------------------------------------ the clock

    def _time(self) -> None:
        clock = Clock(self.device, head_start=not self.suite.whole)
        repeats = 3 if self.task.tiny else 25
        took = time_peers(
            self.steps, device=self.device, repeats=repeats, warmup=1, budget=self.task.budget, stopwatch=clock
        )
        for name, timing in took.items():
            entry, step = self.peers[name], self.steps[name]
            entry |= {"seconds": timing.median, "fastest": timing.fastest, "calls": timing.calls}
            entry["launch"] = launching(step, self.device)
            entry["memory"] = peak_memory(step, device=self.device)

    def _add(self, name: str, step: Step) -> None:
        step()
        self._synchronize()
        self.peers.setdefault(name, {})
        self.steps[name] = step

    def _guarded(self, name: str, attempt: Callable[[], None]) -> None:
        try:
            attempt()
        except Exception as problem:  # any failure of one peer is that peer's entry; a lost device ends the process
            if _lost(problem):
                traceback.print_exc()
                os._exit(70)
            self.peers.setdefault(name, {})["error"] = f"{type(problem).__name__}: {problem}".strip()[:500]
            del problem
            gc.collect()
            if self.device.type != "cpu":
                torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.cuda.synchronize()


def _flowing_back(out: Tensor) -> Tensor:
    """The same random numbers for every peer. (A mean square would tell nothing behind a last normalisation.)"""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(out.device, out.dtype)


def _given(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    return [g for g in gradients if g is not None]


def _lost(problem: BaseException) -> bool:
    """After such an error nothing more runs in this process."""
    return any(words in str(problem) for words in ("illegal memory access", "device-side assert", "launch failure"))


def _site(site: Any) -> Entry:
    tiles = site.tiles and {
        "shape": list(site.tiles.shape), "empty": site.tiles.empty, "partial": site.tiles.partial,
        "full": site.tiles.full,
    }  # fmt: skip
    return {"fused": site.fused, "engine": site.engine, "reason": site.reason, "tiles": tiles or None}
