"""Find attention: lift a candidate, read its weight as a softmax over keys, name the axes, build the region.

candidate   matmul(P, V) whose P descends from a normaliser
lift        P[b,h,i,j] and V[b,h,j,e] in index notation            (refocus.lift)
match       P = sum over mixed of factor * softmax_j(logits)        (refocus.patterns.softmax)
axes        key: the summed axis; value: in V and the result only; query: the axis that meets the key in the
            scores; everything else is batch
split       an axis that is only ever used as a // c and a % c is two axes
close       no value that holds scores may be read elsewhere, and nothing it reads may be written meanwhile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import islice

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.attention import Left, Readings, Site, closed_under_sharing, each_told_once
from refocus.bands import Reading, Tensors, to_tokens
from refocus.blocked import blocked, with_given_scores
from refocus.candidates import Candidate, candidates
from refocus.close_site import close_site, read_elsewhere
from refocus.closure import OVERWRITTEN, interior_of, overwritten
from refocus.facts import Facts, contraction_operands, taint_of
from refocus.finite_rows import Above
from refocus.gathers import distinct, gathered
from refocus.ir import Axis, Const, Expr
from refocus.joint import NOTHING, Joint, joints, lift_joint, of_one_key
from refocus.lift import Lifter, Unliftable, op_name
from refocus.lifted import Lifted, all_loads, split_axis, stands_in_pieces, untidy
from refocus.merge import Merge, lift_merge, merges
from refocus.normal_form import in_pieces
from refocus.patterns.declined import Declined, Stop
from refocus.patterns.sdpa import lift_sdpa
from refocus.patterns.softmax import Softmax
from refocus.products import adds, reads_of
from refocus.quotient import Quotient, Rescaled, lift_rescaled, quotients
from refocus.roles import Axes, Summed, all_keys, keys_and_heads
from refocus.running_softmax import lift_chunked
from refocus.sizes import shape_of
from refocus.skews import unskewed
from refocus.weighted import Weighted, loads_of, tainted_like, weighted


def recognize(facts: Facts) -> list[Site | Left]:
    """All attention sites of a graph, in graph order."""
    groups = candidates(facts)
    single = [[*of_one_key(group, facts)] for group in groups]
    facts.roots = {c.root for group in (*groups, *single) for c in group}
    sites: list[Site] = []
    lefts: dict[fx.Node, Left] = {}
    done: set[fx.Node] = set()
    unread: dict[fx.Node, Left] = {}  # why a product is no numerator
    for quotient in quotients(groups, facts):
        facts.roots.add(quotient.root)
        if done.isdisjoint({quotient.root, *(c.root for c in quotient.parts)}):
            outcome = recognize_quotient(quotient, facts)
            if isinstance(outcome, Site):
                sites.append(outcome)
                done.update((quotient.root, *(c.root for c in quotient.parts)))
            else:
                unread.update((c.root, outcome) for c in quotient.parts)
    for merge in merges(groups, facts):
        if not done.isdisjoint({merge.root, *(c.root for c in merge.parts)}):
            continue
        outcome = recognize_merge(merge, facts)
        if isinstance(outcome, Site):
            sites.append(outcome)
            done.update((merge.root, *(c.root for c in merge.parts)))
    for group, of_one in zip(groups, single):
        level: int | None = None
        for joint in joints(group, facts):
            outcome = recognize_joint(joint, facts)
            if isinstance(outcome, Site):
                sites.append(outcome)
                done.update((joint.root, *(c.root for c in joint.products)))
                level = 0
                break
            if "read elsewhere" in outcome.declined.reason:  # all that the products need was understood
                lefts.setdefault(group[0].root, outcome)
        for candidate in (*group, *of_one):
            if candidate.root in done or (level is not None and candidate.mixes != level):
                continue
            if level is None and candidate in of_one:
                continue
            outcome = recognize_one(candidate, facts)
            if isinstance(outcome, Site):
                sites.append(outcome)
                done.add(candidate.root)
                level = candidate.mixes
            elif level is None:
                lefts.setdefault(group[0].root, unread.get(candidate.root, outcome))
    sites, read_elsewhere = closed_under_sharing(sites)
    sites = each_told_once(sites)
    for site, left in read_elsewhere:
        done.discard(site.root)
        if all(x.normaliser is not site.normaliser for x in lefts.values()):  # a softmax is reported once
            lefts[site.root] = unread.get(site.root, left)
    inner = {n for site in sites for n in (*site.interior, site.normaliser)}
    gone = done | inner
    read = {group[0].normaliser for group in groups}
    for mixture, left in blocked(facts):
        if mixture is None and left.normaliser not in read:
            lefts[left.root] = left
        elif mixture is not None and lefts.pop(mixture, None) is not None:  # that was no product with values
            lefts[left.root] = left
    kept = [x for root, x in lefts.items() if not {root, x.root} & gone and x.normaliser not in inner]
    if any(site.results for site in sites):
        # Softmaxes of log-sum-exps weigh the results of attentions, which may be rounds or chunks of one.
        yielded = {n for site in sites for n in (site.root, *(r.node for r in site.results))}
        flow = facts.flow.subgraph(facts.order.keys() - yielded)
        kept = [x for x in kept if any(nx.has_path(flow, n, x.normaliser) for n in taint_of(x.normaliser, facts))]
    kept = [with_given_scores(x, facts) for x in kept]
    return sorted([*sites, *kept], key=lambda x: facts.order[x.root])


def recognize_one(candidate: Candidate, facts: Facts) -> Site | Left:
    """Try one candidate."""
    return _recognize(candidate, facts, lambda axes, far: _attempt(candidate, facts, axes, far))


def recognize_joint(joint: Joint, facts: Facts) -> Site | Left:
    """Try several products with parts of one softmax as one."""
    candidate = replace(joint.products[0], root=joint.root)
    return _recognize(candidate, facts, lambda axes, far: _attempt_joint(joint, candidate, facts, axes, far))


def recognize_merge(merge: Merge, facts: Facts) -> Site | Left:
    """Try two attentions that are merged by their log-sum-exps as one."""
    candidate = replace(merge.parts[0], root=merge.root)
    return _recognize(candidate, facts, lambda axes, far: _attempt_merge(merge, facts, axes, far))


def recognize_quotient(quotient: Quotient, facts: Facts) -> Site | Left:
    """Try sums over keys of exponentials with values and without, that are divided, as one attention."""
    candidate = replace(quotient.parts[0], root=quotient.root)
    return _recognize(candidate, facts, lambda axes, far: _attempt_quotient(quotient, facts, axes, far))


def _recognize(candidate: Candidate, facts: Facts, attempt: _Attempt) -> Site | Left:
    found, visited = _read(candidate, facts, attempt)
    if isinstance(found, Site) and not found.shared:
        return found
    facts.stored = _there_already(candidate, facts, found, visited)
    if not facts.stored:
        return found
    try:
        again, _ = _read(candidate, facts, attempt)
    finally:
        facts.stored = frozenset()
    if not isinstance(again, Site) or again.shared:
        return found
    return replace(found, loading=again) if isinstance(found, Site) else again


def _there_already(candidate: Candidate, facts: Facts, found: Site | Left, visited: set[fx.Node]) -> frozenset[fx.Node]:
    """What is computed whatever becomes of a candidate, and may be loaded instead of what it is made of: products that
    others read, too; and, of a tensor that is written later on (a state that the next step starts from), what was
    made of it before."""
    if not isinstance(found, Left) or found.declined != OVERWRITTEN:
        return read_elsewhere(candidate, facts, visited)
    readers = visited | {*interior_of(candidate, facts, visited), candidate.root}
    early = overwritten(facts, readers, candidate.root)
    return frozenset() if early & facts.pure else early


def _read(candidate: Candidate, facts: Facts, attempt: _Attempt) -> tuple[Site | Left, set[fx.Node]]:
    """What becomes of a candidate, and the nodes that it was lifted through, if it was."""
    visited: set[fx.Node] = set()

    def left(declined: Declined) -> tuple[Left, set[fx.Node]]:
        return Left(candidate.root, candidate.normaliser, declined), visited

    try:
        axes = Axes([[] if d == Const(1) else [Axis(f"o{k}", d)] for k, d in enumerate(shape_of(candidate.root))])
        outcome = attempt(axes, False)
        for _ in range(3):
            if isinstance(outcome, Declined):
                return left(outcome)
            split = split_axis(outcome, axes)
            if split is None:
                break
            again = attempt(split, False)
            if isinstance(again, Declined) or untidy(again) > untidy(outcome):
                break
            outcome, axes = again, split
        if isinstance(outcome, Declined):
            return left(outcome)
        visited = outcome.lifter.visited
        site = close_site(candidate, facts, axes, outcome)
        return replace(site, readings=_other_readings(candidate, facts, axes, outcome, attempt)), visited
    except Unliftable as problem:
        return left(Declined(f"cannot be put in index notation: {problem}"))
    except Stop as stop:
        return left(stop.declined)


def _other_readings(candidate: Candidate, facts: Facts, axes: Axes, near: Lifted, attempt: _Attempt) -> Readings:
    copies = near.lifter.far or any(
        near.key in x.axes and gathered(facts.nodes[x.tensor]) for x in all_loads(near) if x.is_float
    )
    if not copies and not in_pieces(near.values):
        return Readings()
    try:
        far = attempt(axes, True)
        if isinstance(far, Declined):
            return Readings()
        in_place = close_site(candidate, facts, axes, far)
        return Readings(in_place, _over_tokens(candidate, facts, axes, far, in_place) if copies else None, copies)
    except (Unliftable, Stop):
        return Readings()


def _over_tokens(candidate: Candidate, facts: Facts, axes: Axes, far: Lifted, in_place: Site) -> Site | None:
    if not (isinstance(far.rest, Const) and far.rest.value == 0) or far.added != NOTHING or far.heads:
        return None
    softs = tuple(soft for _, _, soft in far.terms)
    reading = Reading(far.key, far.values, softs, tuple(axes.flat()))
    tensors = Tensors(lambda name: shape_of(facts.nodes[name]), lambda load, axis: distinct(load, axis, facts))
    found = to_tokens(reading, frozenset(far.lifter.query_axes), tensors)
    if isinstance(found, Declined):
        return None
    over = found.reading
    terms = [(mixed, factor, soft) for (mixed, factor, _), soft in zip(far.terms, over.softs)]
    banded = replace(far, key=over.key, values=over.values, terms=terms)
    try:
        site = close_site(candidate, facts, axes, banded, over.free, found.places, in_place.results)
    except Stop:
        return None
    # Distinct offsets are distinct tokens: a row that keeps an offset keeps a token.
    rules = [part.region.empty_row for part in in_place.parts]
    parts = [
        replace(part, region=replace(part.region, empty_row=rule)) if rule == "never" else part
        for part, rule in zip(site.parts, rules)
    ]
    return replace(site, parts=tuple(parts))


_Attempt = Callable[[Axes, bool], "Lifted | Declined"]


def _attempt(candidate: Candidate, facts: Facts, axes: Axes, far: bool = False) -> Lifted | Declined:
    lifter = Lifter(facts, far=far)
    outcome = _attempt_at(candidate, facts, axes, lifter)
    if lifter.chooses or (isinstance(outcome, Lifted) and stands_in_pieces(outcome)):
        # Copies of keys that overlap hold one key in several places: only where keys lie may the pieces be the same.
        again = Lifter(facts, far=True, unpads=True)
        through = _attempt_at(candidate, facts, axes, again)
        if isinstance(through, Lifted) and not (again.chooses or stands_in_pieces(through)):
            outcome = through
    return replace(outcome, in_place=far) if isinstance(outcome, Lifted) else outcome


def _attempt_at(candidate: Candidate, facts: Facts, axes: Axes, lifter: Lifter) -> Lifted | Declined:
    root = candidate.root
    index = axes.index()
    if candidate.weights < 0:
        called = lift_sdpa(lifter, root, index)
        if isinstance(called, Declined):
            return called
        return Lifted(
            called.key,
            called.values,
            [((), Const(1.0, "float32"), called.softmax)],
            Const(0.0, "float32"),
            lifter,
            called.zero_rows,
        )
    alone = _product(candidate, facts, axes, lifter, index)
    if isinstance(alone, Lifted):
        return alone
    for summed in _with_heads(candidate, facts, index):
        again = Lifter(facts, far=lifter.far, unpads=lifter.unpads)
        outcome = _product(candidate, facts, axes, again, index, summed=summed)
        if isinstance(outcome, Lifted):
            return replace(outcome, heads=summed.heads)
    return alone


def _with_heads(candidate: Candidate, facts: Facts, index: tuple[Expr, ...]) -> Iterator[Summed]:
    """Ways to read what a product sums over as a key and heads. What weights are normalised from tells nothing more."""
    lifter = Above(facts)
    reads = reads_of(lifter, candidate.root, index)
    if reads is not None and len(reads[1]) > 1:
        weights, at = reads[1].pop(candidate.weights)
        yield from keys_and_heads(reads[0], at, _places(reads[1]), lambda: lifter.at(weights, at))


def _places(operands: Sequence[tuple[fx.Node, tuple[Expr, ...]]]) -> tuple[Expr, ...]:
    return tuple(e for _, index in operands for e in index)


def _product(
    candidate: Candidate,
    facts: Facts,
    axes: Axes,
    lifter: Lifter,
    index: tuple[Expr, ...],
    rescaled: Rescaled | None = None,
    summed: Summed | None = None,
) -> Lifted | Declined:
    """Read weights times values at a position of their product. `rescaled`: what the row is multiplied with after.
    `summed`: what it sums over, where that is not keys alone."""
    root = candidate.root
    if rescaled is not None:
        lifter.visited.add(root)
    reads = reads_of(lifter, root, index, candidate.weights)
    if reads is None:
        reason = "adds a bias of its own" if adds(root) else "has no index notation"
        return Declined(f"the product with the values {reason}", op_name(root))
    over, operands = reads
    weights_node, weights_index = operands.pop(candidate.weights)
    if any(candidate.root is node for node, _ in operands):
        return Declined("the weights meet themselves", op_name(root))
    summed = summed or all_keys(over, weights_index, _places(operands)) or _one_key(root, over, weights_index, operands)
    if summed is None:
        return Declined("the values are not summed over one key axis", op_name(root))
    key, weights_index, values_index = summed.key, summed.weights, summed.values
    skew = unskewed(lifter, weights_node, weights_index, key) if rescaled is None else None
    if skew is not None:
        # What was moved to stand beside its key has no copy of keys to be read from: it is read where keys lie.
        lifter.far = lifter.unpads = True
        values_index = tuple(s.substitute(e, {key: skew.place}) for e in values_index)
        weights_node, weights_index, key = skew.node, skew.index, skew.key
    lifter.unpads |= key.size == Const(1)  # the scores of one key hold no axis for it
    lifter.key_axes.add(key)
    factors: list[Expr] = []
    at = iter(values_index)
    for node, index in operands:
        if _shares_scores(weights_node, node, facts):
            return Declined("the values depend on the weights", node.name)
        factors.append(lifter.at(node, tuple(islice(at, len(index)))))
    values = reduce(lambda a, b: s.call("mul", a, b, dtype=a.dtype), factors)
    return weighted(candidate, facts, axes, lifter, Weighted(key, weights_node, weights_index, values, rescaled))


def _one_key(
    root: fx.Node,
    over: tuple[Axis, ...],
    weights: tuple[Expr, ...],
    operands: Sequence[tuple[fx.Node, tuple[Expr, ...]]],
) -> Summed | None:
    """What is summed over where the weights are those of one key, and its value has no axis for it."""
    if len(over) > 1 or any(a.size != Const(1) for a in over):
        return None
    return Summed(over[0] if over else Axis(f"{root.name}.one", Const(1)), (), weights, _places(operands))


def _shares_scores(weights: fx.Node, values: fx.Node, facts: Facts) -> bool:
    """Whether weights and values come out of one product, which no later product of the weights' own reads (as keys and
    values come out of one projection, whose keys are then multiplied by hand)."""
    sources = taint_of(weights, facts)
    shared = sources & taint_of(values, facts)
    own = sources - shared
    return any(not any(nx.has_path(facts.flow, x, y) for y in own) for x in shared)


def _attempt_joint(joint: Joint, candidate: Candidate, facts: Facts, axes: Axes, far: bool) -> Lifted | Declined:
    lifter = Lifter(facts, far=far)
    after = frozenset(nx.descendants(facts.flow, joint.products[0].normaliser)) | {joint.products[0].normaliser}
    found = lift_joint(joint, lifter, axes.index(), after)
    lifter.key_axes.add(found.key)
    if any(facts.nodes[x.tensor] in after for e in (found.values, found.rest) for x in loads_of(e)):
        return Declined("the values depend on the weights", joint.root.name)
    of_parts = Weighted(found.key, found.weights, found.index, found.values)
    outcome = weighted(candidate, facts, axes, lifter, of_parts)
    if isinstance(outcome, Declined) or found.rest == NOTHING:
        return outcome
    return replace(outcome, added=s.call("add", outcome.added, found.rest, dtype="float32"))


def _attempt_merge(merge: Merge, facts: Facts, axes: Axes, far: bool) -> Lifted | Declined:
    lifter = Lifter(facts, far=far)
    weights = [contraction_operands(c.root)[c.weights] for c in merge.parts]
    lifter.tainted = tainted_like(weights, facts)
    found = lift_merge(merge, facts, lifter, axes.index())
    terms: list[tuple[tuple[Axis, ...], Expr, Softmax]] = [((), Const(1.0, "float32"), found.softmax)]
    return Lifted(found.key, found.values, terms, NOTHING, lifter, False)


def _attempt_quotient(quotient: Quotient, facts: Facts, axes: Axes, far: bool) -> Lifted | Declined:
    lifter = Lifter(facts, far=far)
    rescaled = lift_rescaled(quotient, facts, lifter, axes.index())
    declined: Declined | None = None
    if rescaled is not None:
        outcome = _product(quotient.parts[0], facts, axes, lifter, rescaled.index, rescaled)
        if isinstance(outcome, Lifted) or len(rescaled.rows) < 2:
            return outcome
        declined = outcome
    try:  # one chunk of keys may be spelled like several
        for together in (True, False):
            found, running = lift_chunked(quotient, facts, axes.index(), far, together)
            if found.seamless:
                break
    except Stop:
        if declined is None:
            raise
        return declined
    terms: list[tuple[tuple[Axis, ...], Expr, Softmax]] = [((), Const(1.0, "float32"), found.softmax)]
    return Lifted(found.key, found.values, terms, NOTHING, running, False, log_sum=found.rows.log_sum)
