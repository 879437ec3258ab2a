"""Dropout as a gate: which weights stay is a function of a seed and of the weight's position (`refocus.counter`).

    before   y = dropout(x, p)
    after    y[.., i, j] = x[.., i, j] * (1 / (1 - p) where p <= random(seed, row(.., i), j), else 0)

The seed is drawn from PyTorch's generator once for each call and site, so that `torch.manual_seed` and the random state
that activation checkpointing restores keep their meaning; the numbers are not those that eager code would draw.
"""

from __future__ import annotations

from collections.abc import Sequence

from refocus import simplify as s
from refocus.ir import INT, Call, Const, Expr, Load

_SEED = "seed of "


def keep(site: str, p: float, position: Sequence[Expr], shape: Sequence[Expr], dtype: str) -> Expr:
    """The factor at a position of a tensor of this shape. `site`: the name of the node that drops; 0 < p < 1."""
    row: Expr = Const(0)
    for at, size in zip(position[:-1], shape[:-1]):
        row = s.add(s.mul(row, size), at)
    drawn = Call("random", (Load(_SEED + site, (), INT), row, position[-1]), "float32")
    stays = s.call("le", Const(float(p), "float32"), drawn, dtype="bool")
    return s.where(stays, Const(1.0 / (1.0 - p), dtype), Const(0.0, dtype))


def dropping(tensor: str) -> str | None:
    """The name of the node whose seed is loaded from this tensor; None for any other tensor."""
    return tensor[len(_SEED) :] if tensor.startswith(_SEED) else None


def draws(value: Expr) -> bool:
    """Whether random numbers are drawn in an expression."""
    return any(isinstance(node, Call) and node.op == "random" for node in value.walk())
