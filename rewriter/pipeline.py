"""The pipeline on one screen: a Dynamo graph in, the same graph with its attention fused out.

    capture      Dynamo's FX graph  -> functional ATen graph before autograd       refocus.capture
    facts        what each node is made of; closed arithmetic is folded on demand   refocus.facts
    recognize    lift and match: regions in index notation, or why not              refocus.recognize
                 what belongs together is put together, and read again              refocus.regroup
    plan         region + shapes + device -> engine and tile sizes, or leave it     refocus.codegen.policy
    splice       swap each root for its fused form; keep shape, strides, order      refocus.splice
    place        results are put where they are first computed with                 refocus.output_chain

Bodies of activation checkpoints are graphs of their own, and rewritten first (refocus.bodies). The result is lowered by
`refocus.backend`. `REFOCUS_DUMP=dir` writes what every stage produced.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from refocus import debug
from refocus.assumptions import Assumption, model_buffers
from refocus.attention import Left, Site
from refocus.bodies import closed_attentions, fused_attentions, with_bodies
from refocus.candidates import given_scores
from refocus.capture import CaptureFailed, capture
from refocus.close_linear import LinearSite, sources_of
from refocus.codegen.choose import plan_part
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.codegen.readings import prefers_tokens
from refocus.dead_code import remove_dead_code
from refocus.errors import RegionNotFused
from refocus.facts import Facts
from refocus.functional import drop_unread_writes
from refocus.index_checks import check_indices
from refocus.ir import Region
from refocus.lift import op_name
from refocus.linear_sites import describe_linear, plan_linear
from refocus.options import Options
from refocus.output_chain import is_call, place_results
from refocus.regroup import recognized
from refocus.report import Report, joined
from refocus.report import Site as Row
from refocus.sites import describe_left, describe_site, kernel_path, location_of, numbers_of
from refocus.splice import IN_GRAPH, CannotSplice, Splicer
from refocus.splice_linear import replace_linear
from refocus.training import trained_operands, with_cancelled


@dataclass(frozen=True)
class Rewritten:
    """The outcome for one graph. `gm` is the input graph itself when nothing was fused."""

    gm: fx.GraphModule
    report: Report
    assumptions: tuple[Assumption, ...] = ()


def rewrite(gm: fx.GraphModule, options: Options, inputs: Sequence[Any] = ()) -> Rewritten:
    """Run all stages on one Dynamo graph. `inputs`: its inputs now, of which the model's buffers are looked into; what
    was taken for granted of them is in the result's `assumptions`.

    Raises RegionNotFused when `options.require` asks for it, EngineUnavailable when the named engine cannot run here;
    never for attention that is merely not understood.
    """
    inner: list[Report] = []

    def change(body: fx.GraphModule) -> fx.GraphModule:
        done = rewrite(body, options)
        inner.append(done.report)
        return done.gm

    done = _rewrite_outer(with_bodies(gm, change), options, inputs)
    return Rewritten(done.gm, joined((*inner, done.report)), done.assumptions) if inner else done


def _rewrite_outer(gm: fx.GraphModule, options: Options, inputs: Sequence[Any]) -> Rewritten:
    """All stages on one graph, past the bodies of operations that it holds."""
    started = time.perf_counter()
    try:
        traced = capture(gm)
    except CaptureFailed as problem:
        debug.log(1, f"capture failed: {problem}")
        debug.dump("capture", str(problem))
        note = f"a graph could not be captured, and runs as it is: {problem}"
        return Rewritten(gm, Report((), 1, time.perf_counter() - started, (note,)))
    debug.dump("capture", traced)
    placeholders = traced.graph.find_nodes(op="placeholder")
    buffers = model_buffers(placeholders, inputs)
    facts, found = recognized(traced, buffers)
    debug.dump("recognize", found)
    operands = {node for site in found if isinstance(site, LinearSite) for node in sources_of(site, facts)}
    ready_made = given_scores(facts, operands)
    rows, calls = _replace_all(found, traced, facts, options)
    fused = any(row.fused for row in rows)
    notes = [
        f"{location_of(node)}: a softmax over what came into its graph; attention is fused only where the product of "
        "queries and keys is in the same graph (a graph break stands between them, if they are not the model's input)"
        for node in ready_made
    ]
    notes += [
        f"{location_of(node)}: `{op_name(node)}` holds an attention in a graph of its own, which is not looked into "
        "(a torch.autograd.Function, say, has a backward of its own)"
        for node in closed_attentions(traced)
    ]
    notes += [
        f"{location_of(node)}: `{op_name(node)}` is a fused attention already, and runs as it is"
        for node in fused_attentions(traced)
    ]
    if fused:
        check_indices(traced, facts, _mode(traced))
        remove_dead_code(traced.graph)
        drop_unread_writes(traced)  # a matrix inverted in place, row by row
        placed = place_results(traced)
        rows = [replace(r, kernel_path=calls[r.name].kernel_path(placed)) if r.name in calls else r for r in rows]
        rows = _still_there(rows, found, traced)
    report = Report(tuple(rows), 1, time.perf_counter() - started, tuple(dict.fromkeys(notes)))
    debug.dump("report", report)
    if options.require:
        _require(report)
    if not fused:
        return Rewritten(gm, report)
    remove_dead_code(traced.graph)
    traced.graph.lint()
    traced.recompile()
    debug.dump("splice", traced)
    assumed = [Assumption(k, facts.assumed[n]) for k, n in enumerate(placeholders) if n in facts.assumed]
    return Rewritten(traced, report, tuple(assumed))


@dataclass(frozen=True)
class _Calls:
    """The calls that stand for a site, and what the first of them was made of."""

    nodes: tuple[fx.Node, ...]
    region: Region
    plan: Plan

    def kernel_path(self, placed: Mapping[fx.Node, Region]) -> str | None:
        """The generated file of the first call. `placed`: calls that others took the place of."""
        region = next((placed[n] for n in self.nodes[:1] if n in placed), self.region)
        return kernel_path(region, self.plan)


def _replace_all(
    found: Sequence[Site | Left | LinearSite], traced: fx.GraphModule, facts: Facts, options: Options
) -> tuple[list[Row], dict[str, _Calls]]:
    """The rows of the report, and by name what stands now for the sites that were fused with a softmax."""
    rows: list[Row] = []
    calls: dict[str, _Calls] = {}
    if not found:  # a graph may not even hold a tensor: one that was cut before a break, and only checked numbers
        return rows, calls
    splicer = Splicer(traced, facts, _mode(traced))
    for k, site in enumerate(found):
        name = f"attention{k}"
        if isinstance(site, Left):
            rows.append(describe_left(name, site))
        elif isinstance(site, LinearSite):
            rows.append(_replace_linear(name, site, splicer, facts, options))
        else:
            rows.append(_replace(name, site, splicer, facts, options, calls))
    return rows, calls


def _replace(name: str, site: Site, splicer: Splicer, facts: Facts, options: Options, calls: dict[str, _Calls]) -> Row:
    """Plan one site and splice it in; its row of the report. Adds what stands for it to `calls`."""
    site, plans, reason = _plan(site, facts, options)
    trained = trained_operands(site, facts)
    if plans is not None:
        try:
            nodes = splicer.replace(site, plans, any(trained))
            calls[name] = _Calls(tuple(n for n in nodes if is_call(n)), site.parts[0].region, plans[0])
        except CannotSplice as problem:
            plans, reason = None, str(problem)
    return describe_site(name, site, plans, reason, facts.inferred)


def _replace_linear(name: str, site: LinearSite, splicer: Splicer, facts: Facts, options: Options) -> Row:
    """The same for a linear attention."""
    outcome = plan_linear(site, facts, options.engine)
    plan, reason = (outcome.plan if isinstance(outcome, Chosen) else None), outcome.reason
    if plan is not None:
        try:
            replace_linear(splicer, site, plan)
        except CannotSplice as problem:
            plan, reason = None, str(problem)
    return describe_linear(name, site, plan, reason, facts)


def _still_there(rows: Sequence[Row], found: Sequence[Site | Left | LinearSite], traced: fx.GraphModule) -> list[Row]:
    """The rows without those of sites that were left, and that nobody reads any more: parts of an attention that
    another site stands for (a delta rule in chunks looks up keys in several products)."""
    nodes = set(traced.graph.nodes)
    kept = [row for row, site in zip(rows, found, strict=True) if not isinstance(site, Left) or site.root in nodes]
    return [replace(row, name=f"attention{k}") for k, row in enumerate(kept)]


def _plan(site: Site, facts: Facts, options: Options) -> tuple[Site, list[Plan] | None, str]:
    """The first reading of a site that an engine takes, and a plan for each of its parts; or the site as it is
    written, and the reason to leave it."""
    left = ""
    if debug.disabled(site.family):
        return site, None, debug.off(site.family)
    for reading in _readings(site, options):
        copied = site if site.readings.in_place and site.readings.copies else None
        trained = trained_operands(reading, facts)
        if any(trained):
            reading = with_cancelled(reading, facts)
            trained = trained_operands(reading, facts)
        plans, reason = _plan_parts(reading, trained, options, copied)
        if plans is not None:
            return reading, plans, reason
        left = left or reason
    return site, None, left


def _readings(site: Site, options: Options) -> list[Site]:
    """The readings of a site, best first. In-graph engines want operands that lie in memory as they are read: for them
    keys are copied together as the model does it."""
    tokens, in_place = site.readings.over_tokens, site.readings.in_place
    numbers = numbers_of(site)
    device = site.root.meta["val"].device
    found = [site]
    if debug.disabled("readings"):
        return found
    engine = options.engine or ("triton" if device.type != "cpu" else None)
    if in_place is not None and engine is not None and engine not in IN_GRAPH:
        found.insert(0, in_place)
    if tokens is not None and all(
        prefers_tokens(over.region, part.region, numbers) for over, part in zip(tokens.parts, site.parts)
    ):
        found.insert(0, tokens)
    return found


def _plan_parts(
    reading: Site, trained: list[frozenset[str]], options: Options, written: Site | None
) -> tuple[list[Plan] | None, str]:
    plans = []
    reasons = []
    for k, (part, names) in enumerate(zip(reading.parts, trained)):
        outcome = plan_part(
            part.region,
            numbers_of(reading),
            reading.root.meta["val"].device,
            options.engine,
            reading.normaliser is reading.root,
            names if any(trained) else None,
            written.parts[k].region if written else None,
        )
        if isinstance(outcome, Leave):
            return None, outcome.reason
        plans.append(outcome.plan)
        reasons.append(outcome.reason)
    return plans, reasons[0] if reasons else ""


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
