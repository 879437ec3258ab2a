"""Blank tensors: zeros, ones and fills made in the image of another tensor, of which only the shape is read.

    mask = torch.zeros_like(scores)      ->      mask = torch.zeros((2, 4, 96, 96))

As the model wrote it, the scores would have to be there for a mask to be made. Where the image's shape is known only
when the graph runs, it stays, but no value of it is read (`sources_of`). The same goes for tensors that are drawn at
random, or that are not filled yet; and for one that is expanded, viewed or converted like another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._prims_common import make_contiguous_strides_for

_FILLS = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1, "full_like": None, "new_full": None}
_MADE: dict[str, Any] = {
    "rand_like": torch.ops.aten.rand.default, "randn_like": torch.ops.aten.randn.default,
    "empty_like": torch.ops.aten.empty.memory_format, "new_empty": torch.ops.aten.empty.memory_format,
}  # fmt: skip
_ALIKE: dict[str, Any] = {
    "expand_as": torch.ops.aten.expand.default, "view_as": torch.ops.aten.view.default,
    "reshape_as": torch.ops.aten.reshape.default, "type_as": torch.ops.aten.to.dtype,
}  # fmt: skip
_NUMBERS = (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_blank(node: fx.Node) -> bool:
    """Whether a tensor is one number throughout, and made in the image of another."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value = node.meta.get("val")
    if _name(node) not in (*_FILLS, "fill") or not isinstance(value, torch.Tensor) or value.is_complex():
        return False
    fill = number_of(node)
    return isinstance(fill.meta.get("val") if isinstance(fill, fx.Node) else fill, _NUMBERS)


def number_of(blank: fx.Node) -> Any:
    """What a blank tensor is filled with."""
    known = _FILLS.get(_name(blank))
    return known if known is not None else blank.kwargs.get("fill_value", blank.kwargs.get("value", blank.args[-1]))


def is_made_alike(node: fx.Node) -> bool:
    """Whether a tensor is drawn at random, or not filled yet, and made in the image of another."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return _name(node) in _MADE and isinstance(node.meta.get("val"), torch.Tensor)


def is_put_alike(node: fx.Node) -> bool:
    """Whether a tensor is another one in the shape or the dtype of a third."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and _name(node) in _ALIKE


def sources_of(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node's value is made of."""
    if is_put_alike(node):
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    if not is_blank(node) and not is_made_alike(node):
        return node.all_input_nodes
    rest: list[fx.Node] = []
    fx.map_arg((node.args[1:], dict(node.kwargs)), rest.append)
    return [n for n in dict.fromkeys(rest) if not isinstance(n.meta.get("val"), torch.Tensor)]


def detach_blanks(gm: fx.GraphModule, permuted: bool = False) -> None:
    """Let blank tensors of known shape be made of numbers alone; those that do not lie in memory in the order of their
    dimensions only with `permuted`, for they become views, which what is written to is better not."""
    for node in list(gm.graph.nodes):
        if is_made_alike(node):
            _make_apart(node)
        elif is_put_alike(node):
            _put_apart(node)
        if not is_blank(node) or _name(node) == "fill" or not isinstance(number_of(node), bool | int | float):
            continue
        value = node.meta["val"]
        order = _order(value)
        if order is None or (not permuted and order != list(range(value.dim()))):
            continue
        fill = bool(number_of(node)) if value.dtype == torch.bool else number_of(node)
        made: Any = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(torch.ops.aten.full.default, ([value.shape[k] for k in order], fill), made)
            new.meta.update(node.meta)
            if order != list(range(value.dim())):
                new.meta["val"] = value.permute(order)
                new = gm.graph.call_function(torch.ops.aten.permute.default, (new, _inverse(order)))
                new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _make_apart(node: fx.Node) -> None:
    """Let what is made in the image of a tensor be made of its shape; numbers are drawn in the order of memory, so that
    only one that lies there in the order of its dimensions is."""
    value = node.meta["val"]
    if _order(value) != list(range(value.dim())) or node.kwargs.get("generator") is not None:
        return
    made: Any = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    with node.graph.inserting_before(node):
        new = node.graph.call_function(_MADE[_name(node)], (list(value.shape),), made)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _put_apart(node: fx.Node) -> None:
    """Let what is put in the image of a tensor be given the shape, or the dtype, itself."""
    source, value = node.args[0], node.meta["val"]
    typed = _name(node) == "type_as"
    if source.meta["val"].device != value.device:  # type: ignore[union-attr]
        return
    if not typed and any(isinstance(size, torch.SymInt) for size in value.shape):
        return
    with node.graph.inserting_before(node):
        new = node.graph.call_function(_ALIKE[_name(node)], (source, value.dtype if typed else list(value.shape)))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _order(value: torch.Tensor) -> list[int] | None:
    """The order in memory of the dimensions of a plain tensor of fixed size and without holes; None for any other."""
    if any(isinstance(size, torch.SymInt) for size in value.shape) or type(value).__name__ != "FakeTensor":
        return None
    if value.layout != torch.strided:
        return None
    if value.is_contiguous():
        return list(range(value.dim()))
    order = sorted(range(value.dim()), key=lambda k: (-int(value.stride()[k]), k))
    dense = value.permute(order)
    return order if tuple(dense.stride()) == tuple(make_contiguous_strides_for(dense.shape)) else None
