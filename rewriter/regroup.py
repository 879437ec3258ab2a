"""The sites of a graph, some of which come to light only once the graph puts together what belongs together.

Where a reading was left alone, the graph is changed so that it says the same in another way, and read again. What did
not help is undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from refocus.added_states import Split, split_apart
from refocus.attention import Left, Site
from refocus.close_linear import LinearSite
from refocus.cut_steps import Cut, cut_steps
from refocus.equal_sizes import made_equal
from refocus.facts import Facts, gather_facts
from refocus.following_steps import Run, joined_steps
from refocus.recognize import recognize
from refocus.recognize_linear import recognize_linear
from refocus.recognize_pairwise import recognize_pairwise

Found = list[Site | Left | LinearSite]
_Change = Split | Run | Cut


def recognized(traced: fx.GraphModule, buffers: dict[fx.Node, torch.Tensor]) -> tuple[Facts, Found]:
    """What is known about a graph, and its sites, in graph order. The graph may be changed."""
    facts, found = _read(traced, buffers)
    if made_equal(traced.graph, found):
        facts, found = _read(traced, buffers)
    for change in (split_apart, cut_steps, joined_steps):
        changes: list[_Change] = [*change(found, facts)]
        if not changes:
            continue
        before = set(facts.order)
        facts, found = _read(traced, buffers)
        # What was put together may have to be cut; and what one state of a loop gave is known to the next one's steps.
        roots = {x.root for x in found if isinstance(x, LinearSite)}
        known = {x.loop for x in changes if isinstance(x, Cut) and x.helped(roots)}
        left = [x for x in found if isinstance(x, Left) and (x.root in known or x.root not in before)]
        cuts = cut_steps(left, facts)
        if cuts:
            facts, found = _read(traced, buffers)
        if _undone([*changes, *cuts], found):
            facts, found = _read(traced, buffers)
    return facts, recognize_pairwise(facts, found)


def _undone(changes: Sequence[_Change], found: Found) -> bool:
    """Undo what did not help, the last change first. Whether there was any."""
    roots = {x.root for x in found if isinstance(x, LinearSite)}
    # A loop that was cut is there where its reads are.
    roots |= {x.loop for x in changes if isinstance(x, Cut) and x.helped(roots)}
    left = [x for x in changes if not x.helped(roots)]
    for x in reversed(left):
        x.undo()
    return bool(left)


def _read(traced: fx.GraphModule, buffers: dict[fx.Node, torch.Tensor]) -> tuple[Facts, Found]:
    facts = gather_facts(traced, buffers)
    return facts, recognize_linear(facts, recognize(facts))
