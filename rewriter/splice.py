"""Splice: put the fused form of a site where its root was.

What replaces a root is written as one Python function over the tensors that the site reads: hoisted operands, the
regions (an operator call, or plain operations for engines that are expressed in the graph), the epilogue, and the
layout of the root. The function is traced once for equal sites and inlined into the graph; shapes, dtype and strides
of the root are kept, so that every later view works as before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from refocus.attention import COUNT, ROUNDING, SUM, Site
from refocus.codegen import operator
from refocus.codegen.cotangents import flows_into
from refocus.codegen.plan import Plan
from refocus.codegen.tiled import factors
from refocus.dead_code import remove_dead_code
from refocus.evaluate import arange_env, evaluate, size_of
from refocus.facts import Facts
from refocus.hoist import Hoisted
from refocus.ir import Axis, Expr, Load, Region, Sym
from refocus.normal_form import Binding, Seed
from refocus.patterns.log_sums import LOG_SUM
from refocus.simplify import substitute
from refocus.sizes import memory_order

# Engines that are written into the graph, for Inductor to compile; the others are one operator call.
IN_GRAPH = {"cpp": "refocus.codegen.cpp", "sdpa": "refocus.codegen.sdpa"}


class CannotSplice(Exception):
    """The site cannot be put into the graph; the reason is its text."""


@dataclass
class Splicer:
    """Replaces roots in one graph. Equal sites share one traced body."""

    gm: fx.GraphModule
    facts: Facts
    mode: Any
    _bodies: dict[Any, fx.GraphModule] = field(default_factory=dict)
    _constants: dict[fx.Node, str | None] = field(default_factory=dict)
    _replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def replace(self, site: Site, plans: Sequence[Plan], trained: bool = False) -> list[fx.Node]:
        """Put the fused form of `site` in place of its root; with `trained`, one that has a gradient. Returns what
        stands there now. Raises CannotSplice before anything is changed."""
        inputs = list(dict.fromkeys(n for p in site.parts for b in p.bindings for n in sources(b, self.facts)))
        inputs += [n for n in loads_of(site.epilogue, self.facts) if n not in inputs]
        syms = _syms_of(site)
        # It stands where the first of its results is read.
        readers = [u for r in site.results for u in r.node.users if u not in site.interior]
        place = min([site.root, *readers])
        moved = late(self.current(inputs), place)
        if moved and any(_writes(n) for n in self.gm.graph.nodes if place <= n < moved[-1]):
            raise CannotSplice("its log-sum-exp is read before all that it reads is computed")
        sym_nodes = [self.sym_node(sym, place) for sym in syms]
        values = [n.meta["val"] for n in inputs]
        key = (_body_key(site, plans, inputs), trained)
        function = _function(site, plans, inputs, syms, trained)
        body = self.traced(key, function, values, [n.meta["val"] for n in sym_nodes])
        for node in moved:
            place.prepend(node)
        kept = [self._saved(n, place) if trained else n for n in inputs]
        given = [*(self._kept(n, place) for n in kept), *sym_nodes]
        return self.inline(body, given, [site.root, *(r.node for r in site.results)], place, site.interior)

    def traced(
        self, key: Any, function: Callable[[list[Tensor], list[int]], Any], values: list[Tensor], sizes: list[Any]
    ) -> fx.GraphModule:
        """The graph of a function of these tensors and sizes; the one traced before for an equal `key`."""
        body = self._bodies.get(key)
        if body is None:
            with self.mode, torch.fx.traceback.preserve_node_meta(False), torch.no_grad():
                body = make_fx(function, pre_dispatch=True)([self._like(v) for v in values], sizes)
            _drop_grad_switches(body)
            self._bodies[key] = body
        return body

    def _like(self, value: Tensor) -> Tensor:
        """A stand-in of this graph's fake mode: a constant that was lifted out of the model's code may have another."""
        if getattr(value, "fake_mode", self.mode) is self.mode:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def _saved(self, node: fx.Node, root: fx.Node) -> fx.Node:
        """An operand that a backward finds as it was: a copy of what is written in place later on. The model may have
        kept what it made of it, and no gradient may be taken through memory that was changed."""
        floating = node.meta["val"].is_floating_point()
        if not floating or self.facts.writes_before(node, root) == len(self.facts.writes_to(node)):
            return node
        with self.gm.graph.inserting_before(root):
            copy = self.gm.graph.call_function(torch.ops.aten.clone.default, (self._replaced.get(node, node),))
        copy.meta["val"] = node.meta["val"]
        return copy

    def _kept(self, node: fx.Node, root: fx.Node) -> fx.Node:
        """A constant mask that follows no rule is computed now, once: then it is the same tensor on every call, and
        which tiles it empties is found once, too."""
        fake = node.meta["val"]
        if node.op != "call_function" or node not in self.facts.closed or fake.dtype != torch.bool or fake.dim() < 2:
            return node
        if node not in self._constants:
            value = self.facts.constant(node)
            name = None
            if value is not None:
                held = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
                name = self._held(held.copy_(value), "refocus_constant")
            self._constants[node] = name
        name = self._constants[node]
        if name is None:
            return node
        with self.gm.graph.inserting_before(root):
            kept = self.gm.graph.get_attr(name)
        kept.meta["val"] = fake
        return kept

    def sym_node(self, sym: Sym, root: fx.Node) -> fx.Node:
        """A node of the graph that holds a symbolic size: an input, or the size of an earlier tensor."""
        for node in self.gm.graph.nodes:
            if node is root:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and str(value.node.expr) == sym.name:
                return node
        for node in self.gm.graph.nodes:
            if node is root:
                break
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and str(size.node.expr) == sym.name:
                        with self.gm.graph.inserting_after(node):
                            new = self.gm.graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                        new.meta["val"] = size
                        return new
        raise CannotSplice(f"the size {sym.name} is not at hand in the graph")

    def current(self, inputs: list[fx.Node]) -> list[fx.Node]:
        """What stands in the graph for nodes: of a site before this one, the result that is fused."""
        return [self._replaced.get(n, n) for n in inputs]

    def inline(
        self,
        body: fx.GraphModule,
        inputs: list[fx.Node],
        roots: Sequence[fx.Node],
        place: fx.Node | None = None,
        inside: Set[fx.Node] = frozenset(),
    ) -> list[fx.Node]:
        """Put a body at `place`, or where the first of `roots` stands; its results replace them, in order, for all who
        are not `inside` of what goes. Returns the body's nodes there."""
        root = roots[0]
        graph = self.gm.graph
        inputs = self.current(inputs)
        env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        trace = root.meta.get("stack_trace")
        results: list[fx.Node] = []
        with graph.inserting_before(place or root):
            for node in body.graph.nodes:
                if node.op == "placeholder":
                    continue
                if node.op == "output":
                    found = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                    results = [env[n] for n in found]
                    continue
                if node.op == "get_attr":
                    env[node] = graph.get_attr(self._attribute(body, str(node.target)))
                else:
                    env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = dict(node.meta)
                if trace:
                    env[node].meta["stack_trace"] = trace
        for old, result in zip(roots, results, strict=True):
            result.meta["val"] = result.meta.get("val", old.meta["val"])
            old.replace_all_uses_with(result, delete_user_cb=lambda user: user not in inside)
            self._replaced[old] = result
        return [n for n in map(env.get, body.graph.nodes) if isinstance(n, fx.Node) and n not in inputs]

    def _attribute(self, body: fx.GraphModule, target: str) -> str:
        value: Any = body
        for part in target.split("."):
            value = getattr(value, part)
        for name, held in (*self.gm.named_children(), *self.gm.named_buffers(recurse=False)):
            if held is value:
                return name
        return self._held(value, "refocus_" + target.replace(".", "_"))

    def _held(self, value: Any, base: str) -> str:
        """A name of the graph's module under which it holds a value."""
        name = base
        count = 0
        while hasattr(self.gm, name):
            count += 1
            name = f"{base}_{count}"
        if isinstance(value, torch.nn.Module):
            self.gm.add_module(name, value)
        elif isinstance(value, Tensor):
            self.gm.register_buffer(name, value, persistent=False)
        else:
            setattr(self.gm, name, value)
        return name


def _drop_grad_switches(body: fx.GraphModule) -> None:
    for node in list(body.graph.nodes):
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            body.graph.erase_node(node)
    remove_dead_code(body.graph)


def _loads(value: Expr) -> tuple[Load, ...]:
    return (value,) if isinstance(value, Load) and not value.loads else value.loads


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def late(inputs: list[fx.Node], first: fx.Node) -> list[fx.Node]:
    """What has to be computed earlier, so that all that is read is there before the first result."""
    found: set[fx.Node] = set()
    stack = [n for n in inputs if n >= first]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        target = node.target
        known = isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable
        drawn = known and torch.Tag.nondeterministic_seeded in target.tags  # type: ignore[union-attr]
        if node is first or drawn or not (known or node.op == "get_attr"):
            raise CannotSplice("what it is multiplied with comes after its first result")
        found.add(node)
        stack.extend(n for n in node.all_input_nodes if n >= first)
    return sorted(found)


def loads_of(value: Expr, facts: Facts) -> list[fx.Node]:
    """The nodes that an expression loads."""
    return [facts.nodes[x.tensor] for x in _loads(value) if x.tensor in facts.nodes]


def sources(binding: Binding, facts: Facts) -> list[fx.Node]:
    """The nodes that an operand is made of."""
    if isinstance(binding, Seed):
        return []
    return loads_of(binding.value, facts) if isinstance(binding, Hoisted) else [binding]


def _syms_of(site: Site) -> list[Sym]:
    found: set[Sym] = set()
    for part in site.parts:
        found.update(part.region.syms)
    exprs = [site.epilogue, *(a.size for g in site.dims for a in g)]
    exprs += [a.size for r in site.results for g in r.dims for a in g]
    for part in site.parts:
        exprs += [b.value for b in part.bindings if isinstance(b, Hoisted)]
    for e in exprs:
        for node in e.walk():
            if isinstance(node, Sym):
                found.add(node)
            elif isinstance(node, Axis):
                found.update(n for n in node.size.walk() if isinstance(n, Sym))
    return sorted(found, key=lambda x: x.name)


def _body_key(site: Site, plans: Sequence[Plan], inputs: list[fx.Node]) -> Any:
    """Sites with equal keys have equal bodies: everything that the function closes over, with inputs by position."""
    where = {n.name: k for k, n in enumerate(inputs)}

    def text(value: Any) -> str:
        out = repr(value)
        for name in sorted(where, key=len, reverse=True):
            out = out.replace(f"'{name}'", f"<{where[name]}>")
        return out

    seeds: dict[str, int] = {}

    def bound(binding: Binding) -> Any:
        if isinstance(binding, Seed):
            return "seed", seeds.setdefault(binding.site, len(seeds))
        return where[binding.name] if isinstance(binding, fx.Node) else text(binding.value)

    bindings = tuple(tuple(bound(b) for b in p.bindings) for p in site.parts)
    metas = tuple(map(_layout, inputs))
    layouts = tuple(_layout(n) for n in (site.root, *(r.node for r in site.results)))
    results = text([(r.value.value, r.dims) for r in site.results]), text(site.rows)
    regions = tuple(p.region for p in site.parts)
    # axes of the result carry the root's own position, not its name, so equal layers agree
    return regions, tuple(plans), bindings, metas, layouts, results, text(site.epilogue), site.dims, site.axes


def _layout(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype


def _function(
    site: Site, plans: Sequence[Plan], inputs: list[fx.Node], syms: list[Sym], trained: bool
) -> Callable[[list[Tensor], list[int]], list[Tensor]]:
    """What stands in for the root, and for the results of rows, as a function of the tensors that are read and the
    symbolic sizes."""
    root = site.root.meta["val"]
    flat = [a for group in site.dims for a in group]

    def replacement(tensors: list[Tensor], numbers: list[int]) -> list[Tensor]:
        named = {n.name: t for n, t in zip(inputs, tensors)}
        sizes = dict(zip(syms, numbers))
        results: dict[str, Tensor] = {}
        drawn = {b.site: _draw(root.device) for p in site.parts for b in p.bindings if isinstance(b, Seed)}
        for k, (part, plan, axes) in enumerate(zip(site.parts, plans, site.axes)):
            operands = [drawn[b.site] if isinstance(b, Seed) else _operand(b, named, sizes) for b in part.bindings]
            out, sums = _attend(part.region, plan, operands, [sizes[x] for x in part.region.syms], trained)
            results[f"part{k}"] = out if any(a.name == "one" for a in axes) else _without_dummy(out, part.region, axes)
            if sums is not None:
                rows = len(axes) - len(part.region.value)
                sums = sums if sums.dim() == rows + 1 else sums.squeeze(-1)
                results[_LOG_SUM], results[f"{ROUNDING}{k}"] = _of_rows(*sums)
                results[f"{SUM}{k}"] = results[_LOG_SUM].exp()
                results[f"{COUNT}{k}"] = results[f"{SUM}{k}"].detach().round()  # of logits that are zero
        if site.plain:
            value = results["part0"].permute([site.axes[0].index(a) for a in flat])
        else:
            value = evaluate(site.epilogue, arange_env(flat, sizes), {**named, **results}, sizes)
            value = value.expand([size_of(a.size, sizes) for a in flat])
        found = [laid_out(value, site.root, site.dims, sizes)]
        for result in site.results:
            own = [a for group in result.dims for a in group]
            told = substitute(result.value.value, {LOG_SUM: Load(_LOG_SUM, site.rows, LOG_SUM.dtype)})
            value = evaluate(told, arange_env(own, sizes), results, sizes).expand([size_of(a.size, sizes) for a in own])
            found.append(laid_out(value, result.node, result.dims, sizes))
        return found

    return replacement


_LOG_SUM = "log_sum"


def _of_rows(top: Tensor, log_total: Tensor) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of rows, from their largest logits and the logarithms of the sums beyond these; and by what
    exponentials of logits less that are too large, as it is rounded: -1e9 + log(64) is -1e9."""
    log_sum = top + log_total
    return log_sum, (log_total - (log_sum - top)).detach().exp()


def laid_out(value: Tensor, root: fx.Node, dims: Sequence[Sequence[Axis]], sizes: dict[Sym, int]) -> Tensor:
    """A value with the shape, dtype and order of strides of the node that it replaces, whose dimensions have these
    axes. Their sizes are asked for, not its own: what is known of a symbol grows while the graph is rewritten."""
    old = root.meta["val"]
    order = memory_order(old)
    value = value.to(old.dtype).reshape([math.prod(size_of(a.size, sizes) for a in group) for group in dims])
    return value.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))


def _without_dummy(out: Tensor, region: Any, axes: Sequence[Axis]) -> Tensor:
    """A region always has a query dimension; drop the one that stands for none."""
    return out if out.dim() == len(axes) else out.squeeze(len(region.batch))


def _draw(device: torch.device) -> Tensor:
    """A seed from PyTorch's generator."""
    return torch.randint(0, 1 << 62, (), device=device, dtype=torch.int64)


def _operand(binding: fx.Node | Hoisted, named: dict[str, Tensor], sizes: dict[Sym, int]) -> Tensor:
    if isinstance(binding, Hoisted):
        lengths = [size_of(a.size, sizes) for a in binding.axes]
        parts = {a: factors(a, n, [binding.value]) for a, n in zip(binding.axes, lengths)}
        value = evaluate(binding.value, arange_env(binding.axes, sizes, split=parts), named, sizes)
        whole = value.expand([n for a in binding.axes for n in parts[a]])
        return whole.reshape(lengths).to(getattr(torch, binding.dtype)).contiguous()
    return named[binding.name]


def _attend(
    region: Region, plan: Plan, operands: list[Tensor], sizes: list[int], trained: bool
) -> tuple[Tensor, Tensor | None]:
    """The result, and the row sums, if these are one."""
    if trained:
        flows = flows_into(region)
        operands = [t if o.name in flows else t.detach() for o, t in zip(region.operands, operands)]
    if region.row_sums:
        return operator.call_with_sums(region, plan, operands, sizes)
    if trained:
        return operator.call_saving(region, plan, operands, sizes), None
    if plan.engine in IN_GRAPH:
        result: Tensor = importlib.import_module(IN_GRAPH[plan.engine]).attend(region, plan, operands, sizes)
        return result, None
    return operator.call(region, plan, operands, sizes), None
