"""Indices that an operation chose among the elements of a dimension: none of them is out of its range."""

from __future__ import annotations

from torch import fx

from refocus.ir import Expr
from refocus.lift import arguments, is_tensor, op_name
from refocus.sizes import shape_of


def chosen_among(node: fx.Node) -> Expr | None:
    """The size of what `topk`, `sort`, `argsort` and their like chose from, for a tensor of the indices that they
    returned, wherever these were moved since, or put in order; None for any other tensor."""
    while True:
        moved = moved_from(node)
        if op_name(moved) in _PARTS:
            node = arguments(moved)[0]
        elif op_name(moved) == "getitem" and arguments(moved)[1] == 0 and op_name(arguments(moved)[0]) == "sort":
            node = arguments(arguments(moved)[0])[0]
        else:
            break
    if op_name(moved) == "getitem":
        producer, which = arguments(moved)
        if which != 1 or not isinstance(producer, fx.Node) or op_name(producer) not in _WITH_VALUES:
            return None
        moved = producer
    elif op_name(moved) not in _ALONE:
        return None
    position = 2 if op_name(moved) in ("topk", "kthvalue") else 1
    dim = moved.kwargs.get("dim", None if op_name(moved) in ("argmax", "argmin") else -1)
    if len(arguments(moved)) > position:
        dim = arguments(moved)[position]
    sizes = shape_of(arguments(moved)[0])
    return sizes[dim] if isinstance(dim, int) and sizes else None


def moved_from(node: fx.Node) -> fx.Node:
    """The tensor whose elements a value holds, each of them, in another order or repeated."""
    while op_name(node) in _MOVES and is_tensor(node):
        node = arguments(node)[0]
    return node


_WITH_VALUES = ("topk", "sort", "max", "min", "kthvalue")
_ALONE = ("argsort", "argmax", "argmin")
_PARTS = ("slice", "select", "narrow")
_MOVES = frozenset(
    ("expand", "expand_as", "broadcast_to", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as",
     "reshape_as", "transpose", "t", "permute", "movedim", "unsqueeze", "squeeze", "contiguous", "clone", "alias",
     "detach", "repeat", "repeat_interleave", "flip")
)  # fmt: skip
