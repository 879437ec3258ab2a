"""Products of weights and values to which the same operation adds something: a product, and a sum.

    torch.baddbmm(residual, probabilities, values)    ->    torch.bmm(probabilities, values) + residual

What an attention is read from, with a softmax or without, is a product, and what is added to it belongs to the rest of
the graph (or is the sum over the keys before, of a softmax in chunks). A layer's product with its own weight, and that
of queries and keys, stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from refocus.facts import NORMALISERS, contraction_operands, is_kept
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES


def split_sums(gm: fx.GraphModule, mode: Any) -> None:
    """Split every such operation whose factors are both computed, one of them from a softmax or another product."""
    weights: dict[fx.Node, bool] = {}
    for node in list(gm.graph.nodes):
        weights[node] = _are_weights(node, weights)
        if op_name(node) not in _SPLIT or not node.meta["val"].is_floating_point():
            continue
        left, right = _factors(node)
        if (weights[left] or weights[right]) and not _is_learned(left) and not _is_learned(right):
            weights[_split(gm, node, mode)] = weights[node]


def _are_weights(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a value is made of exponentials or of a product of two values, past no layer."""
    if node.op != "call_function" or "conv" in op_name(node):
        return False
    if op_name(node) in CONTRACTIONS:
        return not any(map(_is_learned, contraction_operands(node)))
    return op_name(node) in NORMALISERS or any(known[n] for n in node.all_input_nodes)


def _is_learned(node: fx.Node) -> bool:
    while node.op == "call_function" and op_name(node) in MOVES and is_tensor(arguments(node)[0]):
        node = arguments(node)[0]
    return node.op == "get_attr" or (node.op == "placeholder" and is_kept(node))


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    args = arguments(node)
    return (args[0], args[1]) if op_name(node) == "linear" else (args[1], args[2])


def _split(gm: fx.GraphModule, node: fx.Node, mode: Any) -> fx.Node:
    aten = torch.ops.aten

    def call(target: Any, *args: Any) -> fx.Node:
        new = gm.graph.call_function(target, args)
        new.meta.update(node.meta)
        with mode:
            new.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        return new

    with gm.graph.inserting_before(node):
        if op_name(node) == "linear":
            bias = arguments(node)[2] if len(arguments(node)) > 2 else node.kwargs.get("bias")
            if bias is None:
                return node
            summed = call(aten.add.Tensor, call(aten.linear.default, *_factors(node)), bias)
        else:
            alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
            summed = call(aten.mm.default if op_name(node) == "addmm" else aten.bmm.default, *_factors(node))
            if op_name(node) == "addbmm":
                summed = call(aten.sum.dim_IntList, summed, [0])
            if alpha != 1:
                summed = call(aten.mul.Tensor, summed, alpha)
            if beta != 0:
                added = arguments(node)[0]
                summed = call(aten.add.Tensor, summed, added if beta == 1 else call(aten.mul.Tensor, added, beta))
    node.replace_all_uses_with(summed)
    gm.graph.erase_node(node)
    return summed


_SPLIT = ("baddbmm", "addmm", "addbmm", "linear")
