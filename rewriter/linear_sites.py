"""What the pipeline does with a recognised linear attention: a plan, a row of the report."""

from __future__ import annotations

import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refocus import debug
from refocus import notation as notes
from refocus.close_linear import LinearSite, sources_of
from refocus.codegen.linear_operator import NAMES
from refocus.codegen.linear_policy import LinearWork, Passes, Sample, choose_linear
from refocus.codegen.plan import Chosen, Leave, Plan
from refocus.evaluate import size_of
from refocus.facts import Facts
from refocus.ir import ONE, Axis, Expr, Load, Sym, rewrite
from refocus.lift import op_name
from refocus.linear_ir import mask_of, notation
from refocus.report import Cost
from refocus.report import Site as Row
from refocus.simplify import rebuild
from refocus.sites import location_of
from refocus.sizes import hint
from refocus.splice_linear import form_of


def plan_linear(site: LinearSite, facts: Facts, engine: str | None) -> Chosen | Leave:
    """The plan of a site, or the reason to leave it."""
    if debug.disabled(site.family):
        return Leave(debug.off(site.family))
    trained = facts.grad_enabled[site.root] and any(n in facts.needs_grad for n in sources_of(site, facts))
    device = site.root.meta["val"].device
    return choose_linear(work_of(site, facts), sample_of(site, facts), device, engine, trained)


def sample_of(site: LinearSite, facts: Facts) -> Sample:
    """Fake tensors like those that the operator will be called with."""
    region, work = site.region, work_of(site, facts)
    steps = (work.key_heads, work.keys)
    shapes = {
        "q": (work.heads, work.queries, work.width),
        "k": (*steps, work.width),
        "v": (*steps, work.value_width),
        "gate": (*steps, *([work.width] if region.gate == "channel" else [])),
        "erase": (*steps, work.width) if region.lookup else steps,
        "lookup": (*steps, work.width),
        "initial": (work.key_heads, work.width, work.value_width),
    }
    device = site.root.meta["val"].device
    with FakeTensorMode():
        given = {
            o.name: torch.empty(shapes[o.name], dtype=getattr(torch, o.dtype), device=device) for o in region.operands
        }
    return Sample(form_of(region), *(given.get(name) for name in NAMES))  # type: ignore[arg-type]


def numbers_of(site: LinearSite, facts: Facts) -> dict[Sym, int]:
    """Representative values of the symbolic sizes."""
    found: dict[str, int] = {}
    for node in sources_of(site, facts):
        for size in node.meta["val"].shape:
            if isinstance(size, torch.SymInt):
                found[str(size.node.expr)] = hint(size)
    return {sym: found.get(sym.name, 1024) for sym in site.region.syms}


def work_of(site: LinearSite, facts: Facts) -> LinearWork:
    """The sizes that decide about a site."""
    region, numbers = site.region, numbers_of(site, facts)

    def count(*axes: Axis) -> int:
        return math.prod(size_of(a.size, numbers) for a in axes)

    return LinearWork(
        heads=count(*region.batch, *region.share),
        key_heads=count(*region.batch),
        queries=count(region.query),
        keys=count(region.key),
        width=count(*region.dot),
        value_width=count(*region.value),
        gate=region.gate,
        spelled=site.spelled,
        rows=size_of(site.rows, numbers),
        passes=_passes(site, facts) if site.spelled == "step" else None,
    )


def _passes(site: LinearSite, facts: Facts) -> Passes:
    """A compiler makes one kernel of what is done to each element, and of a sum right after it; a product of matrices
    reads the new state again, and so does what the delta rule looks up. Fused, the state is read and written once; what
    it starts from may have to be made first, and what it ends with may be copied to a cache."""
    start = next(b.value for b, o in zip(site.bindings, site.region.operands) if o.name == "initial")
    made = not isinstance(start, Load) or start.dtype != site.region.operand("initial").dtype
    kept = [o.node for o in site.outputs if o.node is not site.root]
    copied = any(op_name(user) == "copy_" for node in kept for user in node.users)
    product = op_name(site.root) != "sum"
    return Passes(2 + product + site.region.erase, 2 + 2 * made + 2 * copied)


def describe_linear(name: str, site: LinearSite, plan: Plan | None, reason: str, facts: Facts) -> Row:
    """The report's row of a site; `plan` is None where it was left as it is."""
    before, after = _costs(site, facts)
    return Row(
        name,
        location_of(site.root),
        recognized=True,
        fused=plan is not None,
        reason=reason,
        family=site.family,
        notation="\n".join((notation(site.region), *_epilogues(site))),
        mask=mask_of(site.region),
        mask_source="closed form" if site.region.causal else "",
        engine=plan.engine if plan else "",
        kernel_path=sample_of(site, facts).kernel_path(plan) if plan else None,
        before=before,
        after=after if plan else None,
    )


def _epilogues(site: LinearSite) -> list[str]:
    """What becomes of the sums, where it is more than the site's own results; of positions that are counted from the
    end, or of which only some are asked for, where they are: at `t`."""
    region = site.region
    names = {"out": "O", "sums": "Z"}
    back: dict[Axis, Axis] = {}
    for binding, operand in zip(site.bindings, region.operands):
        back |= dict(zip(binding.axes, region.axes_of(operand.name)))
    moved = site.rows == ONE and any(not isinstance(x, Axis) for o in site.outputs for x in _index(o.value))
    if moved:
        back |= {a: Axis("t", a.size) for o in site.outputs for a in o.dims if a is not None and a not in back}

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Axis):
            return back.get(node, node)
        if isinstance(node, Load) and node.tensor in names:
            return Load(names[node.tensor], tuple(rewrite(x, visit, rebuild) for x in node.index), node.dtype)
        return None

    values = [rewrite(o.value, visit, rebuild) for o in site.outputs if moved or not isinstance(o.value, Load)]
    return [f"result = {notes.notation(value)}" for value in values]


def _index(value: Expr) -> tuple[Expr, ...]:
    return next((x.index for x in value.walk() if isinstance(x, Load) and x.tensor == "out"), ())


def _costs(site: LinearSite, facts: Facts) -> tuple[Cost, Cost]:
    """Work as the model spells it, and in chunks."""
    work = work_of(site, facts)
    size = site.root.meta["val"].element_size()
    rows, widths = work.heads * work.queries, work.width + work.value_width
    io = (rows * widths + work.key_heads * work.keys * widths) * size
    state = 4 * rows * work.width * work.value_width
    chunked = Cost(state + 2 * rows * min(64, work.keys) * widths, io)
    if site.spelled == "pairs":
        return Cost(2 * rows * work.keys * widths, io + 4 * rows * work.keys * size), chunked
    if site.spelled == "chunks":
        return Cost(state + 2 * rows * work.rows * widths, io + 4 * rows * work.rows * size), chunked
    if site.spelled in ("states", "steps"):
        return Cost(state, io + 3 * rows * work.width * work.value_width * size), chunked
    return Cost(state, io), chunked
