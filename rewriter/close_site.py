"""Close a lifted candidate: its regions, what is read of it elsewhere, and what stands for its root."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.attention import COUNT, ROUNDING, SUM, Part, Site
from refocus.candidates import Candidate
from refocus.closure import (
    check_no_writes,
    check_reads,
    interior_of,
    is_product,
    is_returned,
    only_roots_after,
    reads_shape,
)
from refocus.empty_rows import UNPLAIN_FILLS
from refocus.facts import Facts
from refocus.ir import Axis, Call, Const, Dot, Expr, Load, Reduce, Region
from refocus.joint import NOTHING
from refocus.lift import dtype_of, op_name
from refocus.lifted import Lifted
from refocus.normal_form import Draft, finish
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.softmax import TOTAL
from refocus.roles import Axes
from refocus.row_results import RowReader, RowResult, settled


def _escapes(interior: set[fx.Node], root: fx.Node, facts: Facts) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Values inside that are read elsewhere, and who reads them."""
    for node in sorted(interior, key=facts.order.__getitem__):
        for user in node.users:
            if user not in interior and user is not root and not reads_shape(user, node):
                yield node, user


def read_elsewhere(candidate: Candidate, facts: Facts, visited: set[fx.Node]) -> frozenset[fx.Node]:
    """Of the products that scores are made of, those that others read as well, and that are there for these whatever
    becomes of the attention (scores of blocks, that choose blocks, too). None, if that is all of them."""
    interior = interior_of(candidate, facts, visited)
    flow = facts.flow.subgraph(interior)
    products = frozenset(n for n in interior if is_product(n))
    before = facts.order[candidate.normaliser]
    read: set[fx.Node] = set()
    for node, _ in _escapes(interior, candidate.root, facts):
        if facts.order[node] < before:
            read |= products & {node, *nx.ancestors(flow, node)}
    return frozenset(read) if read < products else frozenset()


def close_site(
    candidate: Candidate,
    facts: Facts,
    axes: Axes,
    lifted: Lifted,
    free: tuple[Axis, ...] = (),
    places: Mapping[Axis, Expr] | None = None,
    told: tuple[RowResult, ...] = (),
) -> Site:
    """The site of a lifted candidate. `free`: the axes of the result, where they are not those of the root; `places`:
    where the root reads the result along those that are several of its own. `told`: results of its rows that are known
    already, of another reading."""
    root = candidate.root
    interior = interior_of(candidate, facts, lifted.lifter.visited)
    reader = RowReader(facts, lifted, axes, {result.node: result for result in told})
    shared: list[tuple[frozenset[fx.Node], Declined]] = []
    for node, user in _escapes(interior, root, facts):
        if not any(soft.unnormalised for _, _, soft in lifted.terms) and reader.follows(node, user):
            continue
        if not facts.order[node] >= facts.order[candidate.normaliser]:
            reason = f"a score is read elsewhere (by `{op_name(user)}`)"
            shared.append((frozenset((user,)), Declined(reason, node.name)))
        elif user not in facts.roots:  # the same weights applied to other values are a site of its own
            reason = f"the probabilities are read elsewhere (by `{op_name(user)}`)"
            declined = Declined(reason + ", and the graph returns them" * is_returned(user), node.name)
            roots = only_roots_after(user, facts)
            if not roots:
                raise Stop(declined)
            shared.append((roots, declined))
    check_no_writes(facts, interior | lifted.lifter.visited | {root}, root)
    result, one_query = list(free) or axes.flat(), not lifted.lifter.query_axes
    drafts = [
        Draft(result, of_heads + lifted.heads, lifted.key, soft, lifted.values, lifted.uncopied, one_query)
        for of_heads, _, soft in lifted.terms
    ]
    parts: list[Part] = []
    orders: list[tuple[Axis, ...]] = []
    results: tuple[RowResult, ...] = ()
    row_index: tuple[Expr, ...] = ()
    epilogue: Expr | None = None
    dtype = dtype_of(root)
    wide = dtype if dtype == "float64" else "float32"

    def read_part(draft: Draft, dtype: str) -> tuple[Load, Expr | None]:
        """One part more: what it gives out, and what its rows are multiplied with."""
        nonlocal results, row_index
        region, bindings, order = finish(draft, facts, dtype, lifted.zero_rows)
        results = tuple(settled(r, draft.softmax, region) for r in reader.results.values())
        index = tuple((places or {}).get(a, a) for a in order)
        row_index = index[: len(index) - len(region.value)]
        of_row = _of_row(len(parts), draft, region, row_index)
        read = Load(f"part{len(parts)}", index, dtype)
        parts.append(Part(replace(region, row_sums=region.row_sums or bool(results)), bindings))
        check_reads(facts, interior, parts[-1])
        orders.append(order)
        return read, of_row

    for draft, (mixed, factor, soft) in zip(drafts, lifted.terms):
        # A mean over many keys may be smaller than float16 holds.
        read, of_row = read_part(draft, wide if soft.unnormalised and dtype == "float16" else dtype)
        term: Expr = read
        if of_row is not None:
            if mixed:
                raise Stop(UNPLAIN_FILLS)
            term = s.call("mul", of_row, term, dtype="float32")
        if soft.divisor is not None:
            rows = [a for a in draft.free if a in soft.gate.axes | soft.logits.axes]
            total: Expr
            total, times = read_part(replace(draft, free=rows, values=Const(1.0, wide)), wide)
            total = total if times is None else s.call("mul", times, total, dtype="float32")
            term = s.call("div", term, s.substitute(soft.divisor, {TOTAL: total}), dtype="float32")
        plain_factor = isinstance(factor, Const) and factor.value == 1.0
        if not plain_factor:
            term = s.call("mul", factor, term, dtype="float32")
        for axis in reversed(mixed):
            term = _sum(axis, factor, read, term)
        epilogue = term if epilogue is None else s.call("add", epilogue, term, dtype="float32")
    assert epilogue is not None
    plain = isinstance(epilogue, Load) and not places
    if not (isinstance(lifted.rest, Const) and lifted.rest.value == 0):
        epilogue = s.call(
            "add",
            epilogue,
            s.call("mul", lifted.rest, Reduce("sum", lifted.key, lifted.values, "float32"), dtype="float32"),
            dtype="float32",
        )
        plain = False
    if lifted.added != NOTHING:
        epilogue, plain = s.call("add", epilogue, lifted.added, dtype="float32"), False
    for axis in reversed(lifted.heads):
        epilogue, plain = Reduce("sum", axis, epilogue, "float32"), False
    return Site(
        root,
        candidate.normaliser,
        tuple(parts),
        epilogue,
        plain,
        tuple(tuple(g) for g in axes.dims),
        tuple(orders),
        frozenset(interior),
        shared=tuple(shared),
        results=results,
        rows=row_index,
    )


def _of_row(k: int, draft: Draft, region: Region, row: tuple[Expr, ...]) -> Expr | None:
    """What the rows of a part's result are multiplied with, by name where it comes from row sums; None for one."""
    whole = draft.softmax.unnormalised
    if not region.row_sums:
        return s.cast(region.key.size, "float32") if whole else None
    name = ROUNDING if not whole else COUNT if isinstance(region.score, Const) else SUM
    return Load(f"{name}{k}", row, "float32")


def _sum(axis: Axis, factor: Expr, part: Load, term: Expr) -> Expr:
    return (
        Dot((axis,), factor, part, "float32")
        if axis in factor.axes and isinstance(term, Call)
        else Reduce("sum", axis, term, "float32")
    )
