"""Splice a linear attention: operands are computed in the graph, one operator call stands for the sums of products,
and what the model did with them afterwards follows.

Feature maps, gates and normalisers thus stay operations of the graph, with their own gradients, for Inductor to fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from refocus import grid
from refocus import simplify as s
from refocus.close_linear import LinearSite, Output, sources_of
from refocus.codegen import linear_operator
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.plan import Plan
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.hoist import Hoisted
from refocus.ir import Axis, Expr, Load, Sym
from refocus.linear_ir import LinearRegion
from refocus.sizes import shape_of
from refocus.splice import Splicer, laid_out, late

_GONE = -1.0e4  # exp of it is 0 in every dtype


def form_of(region: LinearRegion) -> LinearForm:
    """What the kernels are asked for."""
    return LinearForm(
        causal=region.causal, strict=region.strict, gate=region.gate, erase=region.erase, sums=region.sums,
        initial=region.initial, final=region.final, lookup=region.lookup,
    )  # fmt: skip


def replace_linear(splicer: Splicer, site: LinearSite, plan: Plan) -> None:
    """Put the fused form in place of the site's outputs. Raises CannotSplice before anything is changed."""
    inputs = sources_of(site, splicer.facts)
    first = site.outputs[0].node
    syms = _syms_of(site)
    sym_nodes = [splicer.sym_node(sym, first) for sym in syms]
    function = _function(site, plan, inputs, syms)
    values = [_like(n, splicer.mode) for n in inputs]
    moved = late(splicer.current(inputs), first)
    body = splicer.traced(_key(site, plan, inputs), function, values, [n.meta["val"] for n in sym_nodes])
    for node in moved:
        first.prepend(node)
    splicer.inline(body, [*inputs, *sym_nodes], [o.node for o in site.outputs])


def _like(node: fx.Node, mode: Any) -> Tensor:
    """A fake tensor of the graph's mode. That of a literal in the model's code may be of another one."""
    value: Tensor = node.meta["val"]
    if node.op != "get_attr":
        return value
    with mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def _syms_of(site: LinearSite) -> list[Sym]:
    exprs: list[Expr] = [*(b.value for b in site.bindings), *(o.value for o in site.outputs)]
    exprs += [a.size for o in site.outputs for a in o.dims if a is not None]
    found = set(site.region.syms)
    for e in exprs:
        for node in e.walk():
            if isinstance(node, Sym):
                found.add(node)
            elif isinstance(node, Axis):
                found.update(n for n in node.size.walk() if isinstance(n, Sym))
    return sorted(found, key=lambda x: x.name)


def _key(site: LinearSite, plan: Plan, inputs: list[fx.Node]) -> Any:
    """Sites with equal keys have equal bodies: inputs by position, summed axes by place."""
    names = {n.name: f"<{k}>" for k, n in enumerate(inputs)}
    axes = [a for b in site.bindings for a in b.axes]
    names |= {a.name: f"<axis {k}>" for k, a in enumerate(dict.fromkeys(axes))}

    def text(value: Any) -> str:
        out = repr(value)
        for name in sorted(names, key=len, reverse=True):
            out = out.replace(f"'{name}'", names[name])
        return out

    def meta(node: fx.Node) -> Any:
        value = node.meta["val"]
        return tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype, str(value.device)

    bindings = tuple(text((b.value, b.axes)) for b in site.bindings)
    outputs = tuple((text((o.value, o.dims)), meta(o.node)) for o in site.outputs)
    return site.region, plan, bindings, outputs, tuple(meta(n) for n in inputs)


def _function(
    site: LinearSite, plan: Plan, inputs: list[fx.Node], syms: list[Sym]
) -> Callable[[list[Tensor], list[int]], list[Tensor]]:
    """What stands in for the outputs, as a function of the tensors that are read and the symbolic sizes."""
    region, form = site.region, form_of(site.region)

    def replacement(tensors: list[Tensor], numbers: list[int]) -> list[Tensor]:
        named = {n.name: t for n, t in zip(inputs, tensors)}
        sizes = dict(zip(syms, numbers))
        device = tensors[0].device
        operands = {
            o.name: _operand(region, o.name, getattr(torch, o.dtype), b, named, sizes, device)
            for o, b in zip(region.operands, site.bindings)
        }
        given = [operands.get(name) for name in linear_operator.NAMES]
        out, sums, final = linear_operator.call(form, plan, given)
        results = {"out": out.reshape([size_of(a.size, sizes) for a in region.out_axes])}
        if form.sums:
            results["sums"] = sums.reshape([size_of(a.size, sizes) for a in region.sums_axes])
        if form.final:
            results["final"] = final.reshape([size_of(a.size, sizes) for a in region.state_axes])
        found = []
        for output in site.outputs:
            flat = [a for a in output.dims if a is not None]
            value = _valued(output.value, flat, {**named, **results}, sizes)
            value = value.expand([size_of(a.size, sizes) for a in flat])
            found.append(laid_out(value, output.node, _by_dimension(output), sizes))
        return found

    return replacement


def _by_dimension(output: Output) -> list[list[Axis]]:
    """The axes of each dimension of an output: heads that a loop merges in every step are several of one."""
    single = [[] if a is None else [a] for a in output.dims]
    shape = shape_of(output.node)
    if len(single) == len(shape):
        return single
    found: list[list[Axis]] = []
    for size in shape:
        group = single.pop(0)
        while single and s.mul(1, *(a.size for a in group)) != size:
            group = [*group, *single.pop(0)]
        found.append(group)
    return found


def _valued(value: Expr, axes: list[Axis], tensors: dict[str, Tensor], sizes: dict[Sym, int]) -> Tensor:
    """An expression over whole axes; what only loads keeps its dtype."""
    env = arange_env(axes, sizes)
    if isinstance(value, Load) and all(isinstance(x, Axis) for x in value.index):
        tensor = tensors[value.tensor]
        found: Tensor = grid.read(tensor, [env[x] for x in value.index], tensor.device)  # type: ignore[index]
    else:
        found = evaluate(value, env, tensors, sizes)
    return found.reshape((1,) * (len(axes) - found.dim()) + tuple(found.shape))


def _operand(
    region: LinearRegion, name: str, dtype: torch.dtype, binding: Hoisted, named: dict[str, Tensor],
    sizes: dict[Sym, int], device: torch.device,
) -> Tensor:  # fmt: skip
    """An operand as the operator takes it: all heads, positions, features."""
    value = _valued(binding.value, list(binding.axes), named, sizes).to(device=device, dtype=dtype)
    if name == "gate":
        # What forgets all at once: its logarithm is kept small, for sums of it are subtracted from one another.
        value = value.clamp(min=_GONE)
    lengths = [size_of(a.size, sizes) for a in binding.axes]
    heads = len(region.batch) + (len(region.share) if name == "q" else 0)
    if name == "initial":
        first = heads + len(region.dot)
        shape = [math.prod(lengths[a:b]) for a, b in ((0, heads), (heads, first), (first, len(lengths)))]
        return value.expand(lengths).reshape(shape)
    # A decay that is the same at every step stays one number a head.
    steady = name == "gate" and value.shape[heads] == 1 and lengths[heads] != 1
    given = [*lengths[:heads], 1 if steady else lengths[heads], *lengths[heads + 1 :]]
    shape = [math.prod(lengths[:heads]), given[heads]]
    plain = (name == "erase" and not region.lookup) or (name == "gate" and region.gate == "head")
    shape += [] if plain else [math.prod(lengths[heads + 1 :])]
    value = value.expand(given).reshape(shape)
    return value.expand(shape[0], lengths[heads], *shape[2:]) if steady else value
