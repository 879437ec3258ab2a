"""Unrolled loops: the steps of a recurrence, found by laying the last steps over the ones before them.

    for t in range(steps):                      graph: step 0, step 1, ... one after the other, then a stack
        state = f(state, x[:, t])               states    (s0, s1, ..)     what a step hands to the next
        rows.append(g(state, x[:, t]))          parts     (p0, p1, ..)     what it gives out
    torch.stack(rows, 1)                        gather    the stack

Two steps are alike where their operations are, but for numbers: which part of a tensor they read, say. Going up
from p[t] and p[t+1] side by side, everything meets its counterpart, until both sides are the same node, a tensor that
all steps read. The one exception is what the first step starts from: s0 meets s1, which is made in another way. That
the steps are one function of t remains to be proved (`refocus.recognize_loops`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import fx

from refocus import simplify as s
from refocus.facts import Facts
from refocus.ir import Axis, Const, Expr
from refocus.lift import Index, arguments, is_tensor, op_name
from refocus.lift_tables import MOVES
from refocus.sizes import same_shape, shape_of, size_expr

_GATHERS = ("stack", "cat", "concat", "concatenate")
_MOST_STATES = 4
_NEAR = 64  # how far from the last state the state after it is looked for


@dataclass(frozen=True)
class Row:
    """What one step gives out: the row `at` (or from there on) of dimension `dim` of what all give out, which a stack
    put in."""

    node: fx.Node
    dim: int
    stacked: bool
    at: Any

    def of(self, dims: Sequence[Axis | None], value: Expr) -> tuple[tuple[Axis | None, ...], Expr]:
        """Its dimensions and its value, of those of the whole."""
        whole = next(a for a in dims if a is not None and a.name == f"o{self.dim}")
        size = Const(1) if self.stacked else shape_of(self.node)[self.dim]
        own = None if size == Const(1) else Axis(whole.name, size)
        first = size_expr(self.at, 0)
        place = first if own is None else s.add(first, own)
        mine = tuple(own if a == whole else a for a in dims if a != whole or not self.stacked)
        return mine, s.substitute(value, {whole: place})


@dataclass(frozen=True)
class Loop:
    """An unrolled loop. Each state has one value more than there are steps, or as many, where nobody reads the last.
    `firsts`: the counterpart of each node of the body in the earliest step that has one. `tail`: a last part that has
    fewer rows than the others. `from_nothing`: the first value of each state is the one after the first step, which
    adds to nothing. `headed`: the first step, which has no state to read, gives out something of its own. `backwards`:
    the gather has the result of the last step first; `parts` are as steps are."""

    gather: fx.Node
    dim: int
    stacked: bool
    parts: tuple[fx.Node, ...]
    states: tuple[tuple[fx.Node, ...], ...]
    body: frozenset[fx.Node]
    firsts: dict[fx.Node, fx.Node]
    tail: fx.Node | None = None
    from_nothing: bool = False
    headed: bool = False
    backwards: bool = False

    @property
    def steps(self) -> int:
        return len(self.parts)

    def read_elsewhere(self, facts: Facts) -> fx.Node | None:
        """A value of the body that is read outside of the loop, other than by its gather. The last state may be, and
        so may what steps give out, and what is made without a state."""
        return next(iter(self.shared() & depends(self, facts)), None)

    def shared(self) -> set[fx.Node]:
        """What is read outside of the loop, too, but for the last state and what steps give out."""
        return self._read_outside(self.body - {self.final, *self.parts})

    @property
    def apart(self) -> tuple[Row, ...]:
        """What steps give out that is read by itself, too."""
        found = self._read_outside(set(self.parts))
        size = 1 if self.stacked else self.parts[0].meta["val"].shape[self.dim]
        count = len(self.parts)
        return tuple(
            Row(n, self.dim, self.stacked, (count - 1 - t if self.backwards else t) * size)
            for t, n in enumerate(self.parts)
            if n in found
        )

    def carried_by(self, nodes: Set[fx.Node]) -> bool:
        """Whether values of each state are among the nodes."""
        return all(any(n in nodes for n in states) for states in self.states)

    def counterparts(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The values of all steps that are counterparts, by the first of them, in the order of the steps."""
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in sorted(self.firsts):
            found.setdefault(self.firsts[node], []).append(node)
        return {first: tuple(nodes) for first, nodes in found.items()}

    def stacks(self) -> list[dict[fx.Node, tuple[str, Index]]]:
        """For each step, what the graph has together for all of them besides their results: in which tensor, at which
        first index."""
        found: list[dict[fx.Node, tuple[str, Index]]] = [{} for _ in range(self.steps)]
        for first, nodes in self.counterparts().items():
            for user in first.users if len(nodes) == self.steps and first not in self.parts else ():
                own = op_name(user) == "stack" and user is not self.gather and not user.kwargs
                if own and (*arguments(user)[0],) == nodes and arguments(user)[1:] in ([], [0], (), (0,)):
                    for t, node in enumerate(nodes):
                        found[t][node] = (user.name, (Const(t),))
        return found

    @property
    def gives_states(self) -> bool:
        """Whether states are among its results."""
        return any(n in self.parts for states in self.states for n in states)

    def _read_outside(self, nodes: Set[fx.Node]) -> set[fx.Node]:
        inside = self.body | {self.gather}
        return {n for n in nodes if any(user not in inside for user in n.users)}

    @property
    def final(self) -> fx.Node | None:
        """The state after the last step, where it is read."""
        last = self.states[0][-1]
        values = self.steps + (not self.from_nothing)
        known = len(self.states) == 1 and len(self.states[0]) == values and self.tail is None
        return last if known and any(user not in self.body for user in last.users) else None


def loop_at(gather: fx.Node, facts: Facts) -> Loop | None:
    """The loop whose results a node gathers."""
    if op_name(gather) not in _GATHERS or not is_tensor(gather):
        return None
    parts = tuple(arguments(gather)[0])
    if len(parts) < 2 or len(set(parts)) < len(parts):
        return None
    backwards = facts.order[parts[0]] > facts.order[parts[-1]]
    parts = parts[::-1] if backwards else parts
    tail: fx.Node | None = None
    if op_name(gather) != "stack" and len(parts) > 2 and not _same_kind(parts[-2], parts[-1]):
        *whole, tail = parts
        parts = tuple(whole)
    laid = _Laid.of(parts).joined(facts)
    headed = laid.missing == 1 and len(parts) > 3
    if headed:
        laid = _Laid.of(parts[1:]).joined(facts)
    if not laid.fits:
        return None
    follows, starts = laid.follows, laid.starts
    steps = len(parts) - headed
    states = []
    for start in starts:
        chain = list(_chain(start, follows))
        if len(chain) == steps:
            chain += _after(chain, follows)
        if not steps <= len(chain) <= steps + 1:
            return None
        states.append(tuple(chain))
    body = frozenset(follows).union(follows.values()).difference(starts)
    if steps == 2:
        body |= _updates(states, body, facts)
    if set(starts) & set(follows.values()) or any(n in facts.opaque for n in body):
        return None
    begun = set(follows) - set(follows.values())
    firsts = {n: first for first in begun for n in _chain(first, follows)}
    step = {n for n in begun if sum(1 for _ in _chain(n, follows)) >= steps}
    if not any(step & nx.ancestors(facts.flow, chain[1]) for chain in states):
        return None  # the first step hands nothing to the second: these are branches, beside one another
    dim: Any = arguments(gather)[1] if len(arguments(gather)) > 1 else gather.kwargs.get("dim", 0)
    rank = gather.meta["val"].dim()
    stacked = op_name(gather) == "stack"
    loop = Loop(gather, dim % rank, stacked, parts, tuple(states), body, firsts, headed=headed, backwards=backwards)
    return loop if tail is None else _with_tail(loop, tail, facts)


def beginning(loop: Loop, facts: Facts) -> Loop | None:
    """The loop, if it may be one that begins with nothing (`state = 0` before it): with what only the first step's
    states, and what it alone gives out, are made of."""
    if any(len(states) not in (loop.steps, loop.steps - loop.headed) for states in loop.states):
        return None
    own = {states[0] for states in loop.states} | {*loop.parts[: loop.headed]}
    above = set().union(*(nx.ancestors(facts.flow, n) for n in own)) - loop.body
    for node in sorted(above, key=facts.order.__getitem__, reverse=True):
        if node.op == "call_function" and all(user in own or user in loop.body for user in node.users):
            own.add(node)
    return replace(loop, body=loop.body | own, from_nothing=True)


def _with_tail(loop: Loop, tail: fx.Node, facts: Facts) -> Loop:
    """The loop with a shorter last part, and what was computed for that part alone."""
    own = {tail}
    above = nx.ancestors(facts.flow, tail) - loop.body
    for node in sorted(above, key=facts.order.__getitem__, reverse=True):
        if node.op == "call_function" and all(user in own for user in node.users):
            own.add(node)
    return replace(loop, body=loop.body | own, tail=tail)


def _chain(start: fx.Node, follows: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    node: fx.Node | None = start
    while node is not None:
        yield node
        node = follows.get(node)


def _aligned(
    earlier: fx.Node, later: fx.Node, follows: dict[fx.Node, fx.Node], starts: list[fx.Node],
    chosen: frozenset[fx.Node] = frozenset(),
) -> bool:  # fmt: skip
    """Lay a node and all that it is made of over its counterpart. False where that does not fit."""
    if not _alike(earlier, later):
        return False
    stack = [(earlier, later)]
    while stack:
        a, b = stack.pop()
        if a is b or follows.get(a) is b:
            continue
        if a in follows:
            return False
        follows[a] = b
        if a not in chosen and _alike(a, b):
            stack.extend(zip(a.all_input_nodes, b.all_input_nodes))
            continue
        starts.append(a)
        if len(starts) > _MOST_STATES or not _same_kind(a, b):
            return False
    return True


@dataclass
class _Laid:
    """Steps laid over one another: what `follows` on what, and the first values of the states. `chosen` are first
    values of states whatever they look like."""

    parts: tuple[fx.Node, ...]
    chosen: frozenset[fx.Node]
    follows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    starts: list[fx.Node] = field(default_factory=list)
    missing: int = 0  # steps that do not fit

    @staticmethod
    def of(parts: tuple[fx.Node, ...], chosen: frozenset[fx.Node] = frozenset()) -> _Laid:
        laid = _Laid(parts, chosen)
        for number, (earlier, later) in reversed(list(enumerate(pairwise(parts)))):
            if not _aligned(earlier, later, laid.follows, laid.starts, chosen):
                laid.missing = number + 1
                break
        return laid

    @property
    def fits(self) -> bool:
        return not self.missing and bool(self.starts) and _ends(self.follows)

    def joined(self, facts: Facts) -> _Laid:
        """What a loop starts from may be made like a state (zeros plus what is handed in). Several values of the first
        step then meet what is no counterpart of theirs, and all of them are for one value that has one: the state."""
        if self.fits and len(self.starts) < 2:
            return self
        found, first = self, set(self.follows) - set(self.follows.values())
        for state in sorted(first.difference(self.starts, self.parts), key=facts.order.__getitem__):
            if nx.has_path(facts.flow, state, self.follows[state]):
                again = _Laid.of(self.parts, frozenset((state,)))
                if again.fits and state in again.starts and (not found.fits or len(again.starts) < len(found.starts)):
                    found = again
        return found


def _ends(follows: dict[fx.Node, fx.Node]) -> bool:
    """Whether every chain of values ends. Those of two results that are made crosswise (`a @ b.T` beside `b @ a.T`)
    follow on one another for ever."""
    return nx.is_directed_acyclic_graph(nx.DiGraph(list(follows.items())))


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two values are tensors of one shape and dtype."""
    if not is_tensor(a) or not is_tensor(b):
        return False
    one, other = a.meta["val"], b.meta["val"]
    return bool(one.dtype == other.dtype and same_shape(one, other))


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes are the same operation, but for numbers and for which nodes they read."""
    if a.op != "call_function" or b.op != "call_function" or a.target is not b.target:
        return False
    if (is_tensor(a) or is_tensor(b)) and not _same_kind(a, b):
        return False
    if len(a.all_input_nodes) != len(b.all_input_nodes) or a.kwargs.keys() != b.kwargs.keys():
        return False
    return _fits(a.args, b.args) and all(_fits(a.kwargs[name], b.kwargs[name]) for name in a.kwargs)


def _fits(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_fits(x, y) for x, y in zip(a, b))
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and isinstance(b, fx.Node)
    numbers = type(a) is type(b) and isinstance(a, int | float) and not isinstance(a, bool)
    return numbers or (type(a) is type(b) and bool(a == b))


def _after(chain: list[fx.Node], follows: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The state after the last step, where no step reads it; it goes into `follows` with what it is made of."""
    last, seen, queue = chain[-1], set[fx.Node](), [chain[-1]]
    while queue and len(seen) < _NEAR:
        for user in queue.pop(0).users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            queue.append(user)
            trial, starts = dict(follows), list[fx.Node]()
            if _alike(last, user) and _aligned(last, user, trial, starts) and not starts and _ends(trial):
                follows.update(trial)
                return [user]
    return []


def _updates(states: list[tuple[fx.Node, ...]], body: frozenset[fx.Node], facts: Facts) -> set[fx.Node]:
    """What makes the states of the second step out of the first: with two steps alone, nothing follows on it."""
    found: set[fx.Node] = set()
    for chain in states:
        inside = {*chain[:1], *body}
        above = {chain[1]} | nx.ancestors(facts.flow, chain[1])
        for node in sorted(above.difference(inside), key=facts.order.__getitem__):
            if any(n in inside for n in node.all_input_nodes):
                inside.add(node)
                found.add(node)
    return found


def depends(loop: Loop, facts: Facts) -> set[fx.Node]:
    """The nodes of the body that depend on a state, but for what the graph has together for all steps, and by way of
    that."""
    found = {n for states in loop.states for n in states}
    held = {n for step in loop.stacks() for n in step}
    for node in sorted(loop.body - held, key=facts.order.__getitem__):
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found & loop.body


def of_channels(loop: Loop, facts: Facts) -> bool:
    """Whether the states are numbers of each channel, and what a step gives out is a quotient of what two of them
    become: a softmax over the steps, one for each channel."""
    if any(states[0].meta["val"].dim() > 2 for states in loop.states):
        return False
    result = loop.parts[-1]
    while op_name(result) in MOVES and result.all_input_nodes:
        result = result.all_input_nodes[0]
    if op_name(result) != "div" or len(result.all_input_nodes) != 2:
        return False
    last = {states[loop.steps - 1] for states in loop.states}
    above, below = (last & (nx.ancestors(facts.flow, n) | {n}) for n in result.all_input_nodes)
    return bool(above - below and below - above)
