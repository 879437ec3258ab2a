"""Two symbolic sizes that a reading takes to be one: asked of the tracer, which guards on it.

Dynamo gives the inputs of one function a symbol each once it has seen them at a second length. Where a form of
attention is only one at as many keys as queries, and there are as many in this call, the tracer is told so: it notes
that the graph is for equal sizes, and traces another one for a call in which they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from refocus.attention import Left
from refocus.sizes import hint, size_expr


def made_equal(graph: fx.Graph, found: Iterable[object]) -> bool:
    """Whether sizes that `found` was left alone for are now one size of the graph: what was read of it is to be read
    again."""
    asked = {x.declined.equal for x in found if isinstance(x, Left) and x.declined.equal is not None}
    if not asked:
        return False
    sizes = {size_expr(size, 0): size for size in _sizes(graph)}
    told = [_equal(sizes.get(one), sizes.get(other)) for one, other in asked]  # all of them, before the next reading
    return any(told)


def _sizes(graph: fx.Graph) -> Iterator[int | torch.SymInt]:
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            yield from value.shape


def _equal(one: int | torch.SymInt | None, other: int | torch.SymInt | None) -> bool:
    if not isinstance(one, torch.SymInt) or not isinstance(other, torch.SymInt):
        return False  # a fixed size is the caller's wish, or what a call at another length would not have
    if hint(one, -1) != hint(other, -2):
        return False
    return bool(one == other)

