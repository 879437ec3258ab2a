"""Values that were copied together from others, and indices of which no two are equal."""

from __future__ import annotations

from torch import fx

from refocus.facts import Facts
from refocus.ir import Axis, Load
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_tables import MOVES
from refocus.lift_views import SPLITS, dimension


def distinct(load: Load, axis: Axis, facts: Facts) -> bool:
    """Whether a tensor of indices holds different ones along the dimension that this axis alone runs along."""
    node = facts.nodes[load.tensor]
    along = [d for d, e in enumerate(load.index) if axis in e.axes]
    if len(along) != 1 or load.index[along[0]] != axis:
        return False
    if op_name(node) == "argsort":
        return dimension(_option(node, 1, "dim", -1), len(load.index)) == along[0]
    if op_name(node) != "getitem" or arguments(node)[1] != 1:
        return False
    producer, position = arguments(node)[0], {"topk": 2, "sort": 1}
    name = op_name(producer)
    return name in position and dimension(_option(producer, position[name], "dim", -1), len(load.index)) == along[0]


def _option(node: fx.Node, position: int, name: str, default: int) -> int:
    found: int = arguments(node)[position] if len(arguments(node)) > position else node.kwargs.get(name, default)  # type: ignore[assignment]
    return found


def gathered(node: fx.Node) -> bool:
    """Whether a value was read from others at several places at once, without being computed with."""
    while (op_name(node) in MOVES and is_tensor(node)) or op_name(node) in (*SPLITS, "unbind"):
        source = arguments(node)[0]
        if op_name(node) in _GATHERS:
            return True
        if not isinstance(source, fx.Node):
            return False
        node = source
    return False


_GATHERS = frozenset(
    (
        "unfold", "index", "index_select", "gather", "take_along_dim", "roll", "as_strided", "im2col", "stack", "cat",
        "slice_scatter", "flip",
    )
)  # fmt: skip
