"""Find attention whose weights are not normalised: what other families left because weights are functions of pairs.

    relu(q @ k.T).square() @ v        the weights do not come apart into a query's and a key's share, so that there is
                                      no linear form; but no softmax is needed to compute them tile by tile

What such a product lacks for another family is known from these. Keys and values are data: two layers of weights with a
function between them are no attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import networkx as nx
from torch import fx

from refocus.attention import Left, Part, Site
from refocus.candidates import Candidate, reached
from refocus.close_linear import LinearSite
from refocus.closure import nodes_of
from refocus.facts import Facts, contraction_operands
from refocus.ir import Expr, Load
from refocus.lift import op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.linear_candidates import data_of, product_operands
from refocus.recognize import recognize_one

FAMILY = "pairwise"


def recognize_pairwise(facts: Facts, found: Sequence[Site | Left | LinearSite]) -> list[Site | Left | LinearSite]:
    """The same in graph order, with a site for each that was left because its weights are functions of pairs, where it
    is one."""
    sites = [x for x in found if not isinstance(x, Left)]
    taken = set[fx.Node]().union(*((x.root, *x.interior) for x in sites))
    if not any(isinstance(x, Left) and x.declined.pairwise for x in found):
        return list(found)
    data = data_of(facts)
    read = [_read(x, facts, taken, data) if isinstance(x, Left) and x.declined.pairwise else x for x in found]
    return sorted(read, key=lambda x: facts.order[x.root])


def _read(left: Left, facts: Facts, taken: set[fx.Node], data: set[fx.Node]) -> Site | Left:
    """The site, or what was left; with another reason where only what is read elsewhere is between."""
    shared: Left | None = None
    for candidate in _candidates(left, facts):
        if candidate.root in taken or product_operands(candidate.root, data) is None:
            continue
        outcome = recognize_one(candidate, facts)
        if isinstance(outcome, Site) and not _of_data(outcome, facts, data):
            continue
        if isinstance(outcome, Site) and not outcome.shared:
            taken.update((outcome.root, *outcome.interior))
            return _of_family(outcome)
        if isinstance(outcome, Site):
            shared = shared or Left(left.root, left.normaliser, outcome.shared[0][1])
    return shared or left


def _of_data(site: Site, facts: Facts, data: set[fx.Node]) -> bool:
    """Whether queries, keys and values all are made of data."""

    def holds(part: Part, side: Expr) -> bool:
        bound = {o.name: b for o, b in zip(part.region.operands, part.bindings)}
        loads = (side,) if isinstance(side, Load) else side.loads
        made_of = [n for x in loads if x.tensor in bound for n in nodes_of(bound[x.tensor], facts)]
        return any(n in data for n in made_of)

    dots = all(holds(p, side) for p in site.parts for dot in p.region.dots for side in (dot.query, dot.key))
    return dots and holds(site.parts[0], site.parts[0].region.values)


def _candidates(left: Left, facts: Facts) -> Iterator[Candidate]:
    """The products with values that what was left may be, with the weights for a normaliser."""
    roots = dict.fromkeys((left.root, *(c.root for c in reached(left.normaliser, facts))))
    for root in roots:
        if op_name(root) not in CONTRACTIONS:
            continue
        for k, weights in enumerate(contraction_operands(root)):
            if nx.has_path(facts.flow, left.normaliser, weights):
                yield Candidate(root, k, weights, normalised=False)


def _of_family(site: Site) -> Site:
    in_place, over_tokens = (
        x and replace(x, family=FAMILY) for x in (site.readings.in_place, site.readings.over_tokens)
    )
    return replace(site, family=FAMILY, readings=replace(site.readings, in_place=in_place, over_tokens=over_tokens))
