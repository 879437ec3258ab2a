"""The pipeline on one screen: a Dynamo graph in, the same graph with its attention fused out.

    capture      Dynamo's FX graph  -> functional ATen graph before autograd       refocus.capture
    facts        what each node is made of; closed arithmetic is folded on demand   refocus.facts
    recognize    lift and match: regions in index notation, or why not              refocus.recognize
    plan         region + shapes + device -> engine and tile sizes, or leave it     refocus.codegen.policy
    splice       swap each root for its fused form; keep shape, strides, order      refocus.splice

The result is lowered by `refocus.backend`. `REFOCUS_DUMP=dir` writes what every stage produced.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import fx

from refocus import debug
from refocus.capture import CaptureFailed, capture
from refocus.codegen.choose import Leave, plan_part
from refocus.codegen.plan import Plan
from refocus.errors import RegionNotFused
from refocus.facts import Facts, gather_facts
from refocus.options import Options
from refocus.patterns.declined import Declined
from refocus.recognize import Left, Site, recognize
from refocus.report import Report
from refocus.sites import describe_left, describe_site, numbers_of
from refocus.splice import CannotSplice, Splicer


@dataclass(frozen=True)
class Rewritten:
    """The outcome for one graph. `gm` is the input graph itself when nothing was fused."""

    gm: fx.GraphModule
    report: Report


def rewrite(gm: fx.GraphModule, options: Options) -> Rewritten:
    """Run all stages on one Dynamo graph.

    Raises RegionNotFused when `options.require` asks for it, EngineUnavailable when the named engine cannot run here;
    never for attention that is merely not understood.
    """
    started = time.perf_counter()
    try:
        traced = capture(gm)
    except CaptureFailed as problem:
        debug.log(1, f"capture failed: {problem}")
        debug.dump("capture", str(problem))
        note = f"a graph could not be captured, and runs as it is: {problem}"
        return Rewritten(gm, Report((), 1, time.perf_counter() - started, (note,)))
    debug.dump("capture", traced)
    facts = gather_facts(traced)
    found = recognize(facts)
    debug.dump("recognize", found)
    splicer = Splicer(traced, facts, _mode(traced))
    rows = []
    fused = 0
    for k, site in enumerate(found):
        name = f"attention{k}"
        if isinstance(site, Left):
            rows.append(describe_left(name, site))
            continue
        plans, reason = _plan(site, facts, options)
        if plans is not None:
            try:
                splicer.replace(site, plans)
                fused += 1
            except CannotSplice as problem:
                plans, reason = None, str(problem)
        rows.append(describe_site(name, site, plans, reason))
    report = Report(tuple(rows), 1, time.perf_counter() - started)
    debug.dump("report", report)
    if options.require:
        _require(report)
    if not fused:
        return Rewritten(gm, report)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    debug.dump("splice", traced)
    return Rewritten(traced, report)


def _plan(site: Site, facts: Facts, options: Options) -> tuple[list[Plan] | None, str]:
    """A plan for every part, or the reason to leave the site."""
    grad = _needs_gradient(site, facts)
    if grad is not None:
        return None, grad.reason
    plans = []
    reasons = []
    for part in site.parts:
        outcome = plan_part(
            part.region, numbers_of(site), site.root.meta["val"].device, options.engine, site.normaliser is site.root
        )
        if isinstance(outcome, Leave):
            return None, outcome.reason
        plans.append(outcome.plan)
        reasons.append(outcome.reason)
    return plans, reasons[0] if reasons else ""


def _needs_gradient(site: Site, facts: Facts) -> Declined | None:
    if not facts.grad_enabled[site.root]:
        return None
    inputs = set(site.root.all_input_nodes) | set(site.interior)
    if any(n in facts.needs_grad for n in inputs):
        return Declined("needs gradients; fused training is not built yet")
    return None


def _require(report: Report) -> None:
    for row in report.sites:
        if not row.fused:
            raise RegionNotFused(
                f"{row.name} was not fused: {row.reason}",
                expected="every attention site fused (require=True)",
                got=row.state,
                todo="drop require=True, name an engine, or change the operation that is to blame",
                location=row.location,
            )


def _mode(gm: fx.GraphModule) -> object:
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode
    raise CaptureFailed("no fake tensor in the captured graph")
