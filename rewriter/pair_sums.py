"""Scores of pairs that are no products: a sum over features of what is made of a query and a key.

    (q[:, None] - k[None]).square().sum(-1)          a distance
    (w * (q[:, None] + k[None]).tanh()).sum(-1)      an additive score (Bahdanau et al. 2015)

No engine has them; the report tells that an attention was left.
"""

from __future__ import annotations

from torch import fx

from refocus.ir import Const
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_pointwise import POINTWISE
from refocus.sizes import shape_of


def is_pair_sum(node: fx.Node) -> bool:
    """Whether a node sums a function of two tensors, each of which is repeated for the other."""
    if op_name(node) not in _SUMS:
        return False
    node = arguments(node)[0]
    while op_name(node) in POINTWISE and len(_tensors(node)) == 1:
        node = _tensors(node)[0]
    if op_name(node) not in POINTWISE or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return False
    if len(_tensors(node)) != 2:
        return False
    whole = shape_of(node)
    shapes = [shape_of(n) for n in _tensors(node)]
    one, other = ((Const(1),) * (len(whole) - len(x)) + x for x in shapes)
    repeated = [{k for k, (a, b) in enumerate(zip(x, whole)) if a != b} for x in (one, other)]
    return bool(repeated[0] - repeated[1]) and bool(repeated[1] - repeated[0])


_SUMS = ("sum", "mean", "norm", "linalg_vector_norm")


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The operands of a pointwise operation that have more than one element; a weight of each feature is none."""
    return [n for n in node.all_input_nodes if is_tensor(n) and sum(d != Const(1) for d in shape_of(n)) > 1]
