"""scaled_dot_product_attention, read as what its documentation says it computes.

O[.., i, e] = softmax_j(scale * q . k + bias | mask) . v       rows without any key are zero
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from refocus import simplify as s
from refocus.dropout import keep
from refocus.ir import BOOL, Axis, Const, Dot, Expr
from refocus.patterns.declined import Declined
from refocus.patterns.softmax import Softmax


@dataclass(frozen=True)
class Sdpa:
    key: Axis
    values: Expr
    softmax: Softmax
    zero_rows: bool


def lift_sdpa(lifter: Any, node: Any, index: tuple[Expr, ...]) -> Sdpa | Declined:
    """Lift one call at a position of its result (*batch, i, e)."""
    from refocus.lift import dtype_of
    from refocus.sizes import shape_of

    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    args = dict(zip(names, node.args)) | dict(node.kwargs)
    query, keys, values = args["query"], args["key"], args["value"]
    p = args.get("dropout_p", 0.0)
    if not isinstance(p, int | float) or not 0 <= p < 1:
        return Declined("the dropout rate is not known while compiling, or nothing is kept", "dropout_p")
    qs, ks, vs = shape_of(query), shape_of(keys), shape_of(values)
    dtype = dtype_of(node)
    *lead, row, column = index
    key, dot = lifter.bound(node, 0, ks[-2]), lifter.bound(node, 1, qs[-1])
    lifter.key_axes.add(key)

    def at(tensor: Any, shape: tuple[Expr, ...], *tail: Expr) -> Expr:
        batch = list(lead[len(lead) - (len(shape) - 2) :])
        if args.get("enable_gqa") and len(batch) and shape[-3] != qs[-3]:
            batch[-1] = s.floordiv(batch[-1], s.floordiv(qs[-3], shape[-3]))
        return lifter.at(tensor, [Const(0) if d == Const(1) else x for d, x in zip(shape, (*batch, *tail))])

    value = at(values, vs, key, column)
    lifter.query_axes = {a for x in (*lead, row) for a in x.axes if a not in value.axes}
    logits: Expr = Dot((dot,), at(query, qs, row, dot), at(keys, ks, key, dot), dtype)
    scale = args.get("scale")
    if scale is not None:
        logits = s.call("mul", logits, lifter.factor(scale, dtype), dtype=dtype)
    elif isinstance(qs[-1], Const):
        logits = s.call("mul", logits, Const(1 / math.sqrt(qs[-1].value), dtype), dtype=dtype)
    else:
        logits = s.call("div", logits, s.call("sqrt", qs[-1], dtype=dtype), dtype=dtype)
    lowest = Const(-math.inf, dtype)
    zero_rows = True
    if args.get("is_causal"):
        logits = s.where(s.le(key, row), logits, lowest)
    mask = args.get("attn_mask")
    if mask is not None:
        entry = lifter.broadcast(mask, (*lead, row, key))
        if entry.dtype == BOOL:
            logits = s.where(entry, logits, lowest)
        else:
            logits = s.call("add", logits, entry, dtype=dtype)
            # a finite fill is kept by the kernel as it is; only -inf everywhere gives zero
            zero_rows = not any(
                isinstance(n, Const) and n.is_float and -math.inf < n.value <= -1e4 for n in entry.walk()
            )
    gate: Expr = Const(1.0, "float32")
    if p:
        gate = keep(node.name, p, (*lead, row, key), (*shape_of(node)[:-1], key.size), dtype)
    return Sdpa(key, value, Softmax(logits, (), gate), zero_rows)
