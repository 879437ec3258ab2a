"""Capture: a Dynamo graph becomes an ATen graph before autograd, composite operations kept whole.

The graph is re-traced under the fake mode of its own inputs, so symbolic sizes survive, every node keeps the user's
stack trace, and `aten.einsum`, `aten.softmax.int`, `aten.linear` and `aten.scaled_dot_product_attention` stay one node
each. In-place operations on values made in the graph are then made functional, where nothing else sees the write.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.blank import detach_blanks
from refocus.bodies import Retrace, changes_casts
from refocus.composites import definitions
from refocus.conversions import drop_idle_conversions
from refocus.dead_code import remove_dead_code
from refocus.equal_literals import attribute, merge_equal_literals
from refocus.forwarded import forward_writes
from refocus.functional import make_functional
from refocus.fused_sums import split_sums
from refocus.held_numbers import hold_numbers
from refocus.strokes import join_strokes
from refocus.vmaps import without_vmaps


class CaptureFailed(Exception):
    """The graph holds something that cannot be re-traced; it is compiled as it was."""


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """Re-trace a Dynamo graph. The result has the same inputs in the same order, and the same outputs.

    Raises CaptureFailed when the graph has no usable example values or re-tracing fails.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [n.meta.get("example_value", n.meta.get("val")) for n in placeholders]
    made = (n.meta.get("example_value") for n in gm.graph.nodes)  # a graph may make all that it computes with
    mode = next((v.fake_mode for v in (*values, *made) if hasattr(v, "fake_mode")), None)
    if mode is None:
        raise CaptureFailed("no value carries a fake tensor")
    # Above the dispatcher an autocast region of the graph is only recorded, and its casts would be missing; below it,
    # they are operations like any other (and composite operations are taken apart, which the lift does not mind;
    # attention stays whole). A region that switches off what is off anyway (rotary tables are made in one) is none.
    casts = any(changes_casts(n) for n in gm.graph.nodes)
    called = {getattr(n.target, "__name__", "") for n in gm.graph.nodes}
    if casts and "_set_grad_enabled" in called and torch.is_grad_enabled():
        # ... where what runs under torch.no_grad() could not be told from the rest.
        raise CaptureFailed("autocast and torch.no_grad() meet in a graph that trains")
    # Compiling inside an activation checkpoint: its hooks count every tensor that is saved, and must not see ours.
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    try:
        with mode, own, torch.fx.traceback.preserve_node_meta():
            graph = Retrace(without_vmaps(gm, mode), casts)
            given = [graph.values[n] for n in graph.graph.find_nodes(op="placeholder")]
            traced = make_fx(graph.run, definitions(), pre_dispatch=not casts)(*given)
    except Exception as problem:  # anything may go wrong while tracing foreign code; the caller falls back
        raise CaptureFailed(f"{type(problem).__name__}: {problem}") from problem
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(attribute(traced, node), FakeTensor):
            # Values were made that the tracer does not follow: it took one for a constant.
            raise CaptureFailed("a value of the graph was lost when it was traced again")
    traced.meta.update(gm.meta)
    remove_dead_code(traced.graph)
    for old, new, value in zip(placeholders, traced.graph.find_nodes(op="placeholder"), values):
        new.meta["requires_grad"] = bool(getattr(value, "requires_grad", False))
        for key in ("tensor_dict", "grapharg", "_dynamo_source", "example_value"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        source = getattr(old, "_dynamo_source", None)
        if source is not None:
            new._dynamo_source = source  # type: ignore[attr-defined]
    for node in traced.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = attribute(traced, node)
    merge_equal_literals(traced)
    drop_idle_conversions(traced)
    detach_blanks(traced)
    join_strokes(traced, mode)
    make_functional(traced, mode)
    forward_writes(traced, mode)
    detach_blanks(traced, permuted=True)
    hold_numbers(traced, mode)
    split_sums(traced, mode)
    return traced

