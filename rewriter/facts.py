"""What is known about a captured graph before anything is lifted: candidates, taint, purity, writes, constants.

All of it is one forward pass over the nodes, shared by every site of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import fx

from refocus import debug
from refocus.blank import is_blank, is_put_alike, number_of, sources_of
from refocus.bodies import DATA
from refocus.equal_literals import attribute
from refocus.equal_values import equal_values
from refocus.infer import closed_form, constant_form
from refocus.ir import BOOL, Call, Expr
from refocus.lift import arguments, is_tensor, op_name
from refocus.lift_reductions import CONTRACTIONS
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.lift_views import SPLITS
from refocus.masks import MASK_FILL

NORMALISERS = ("softmax", "_softmax", "_safe_softmax", "special_softmax", "exp", "exp2", "log_softmax", "_log_softmax")
ATTENTION_OPS = ("scaled_dot_product_attention",)
_FOLD_LIMIT = 1 << 24  # elements; larger constants are not worth evaluating while compiling
_KEPT = 1 << 20  # elements of constants that are kept for a second look


@dataclass
class Facts:
    """Forward facts about every node of one graph."""

    graph: fx.Graph
    flow: nx.DiGraph = field(default_factory=nx.DiGraph)  # from every node to those that read it
    order: dict[fx.Node, int] = field(default_factory=dict)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    pure: set[fx.Node] = field(default_factory=set)
    closed: set[fx.Node] = field(default_factory=set)
    needs_grad: set[fx.Node] = field(default_factory=set)
    cuts: set[fx.Node] = field(default_factory=set)  # values that no gradient flows through, though one reaches them
    grad_enabled: dict[fx.Node, bool] = field(default_factory=dict)
    writes: list[tuple[int, int]] = field(default_factory=list)  # (position, storage id)
    writers: dict[int, list[fx.Node]] = field(default_factory=dict)
    opaque: set[fx.Node] = field(default_factory=set)
    roots: set[fx.Node] = field(default_factory=set)  # every contraction that may be an attention
    stored: frozenset[fx.Node] = frozenset()  # products that are computed whatever becomes of an attention
    storage: dict[fx.Node, int] = field(default_factory=dict)
    lifted: dict[Any, Any] = field(default_factory=dict)  # pure values in index notation, shared by all sites
    buffers: dict[fx.Node, torch.Tensor] = field(default_factory=dict)  # inputs that the model keeps, as they are now
    assumed: dict[fx.Node, Expr] = field(default_factory=dict)  # buffers that were taken for their closed form
    inferred: set[fx.Node] = field(default_factory=set)  # constants whose closed form was found in their values
    same: dict[fx.Node, fx.Node] = field(default_factory=dict)  # to the first node of equal value
    _constants: dict[fx.Node, torch.Tensor | None] = field(default_factory=dict)
    _forms: dict[fx.Node, Expr | None] = field(default_factory=dict)
    taints: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)  # what `taint_of` has told

    # ------------------------------------------------------------------------------------------------ constants

    def constant(self, node: fx.Node) -> torch.Tensor | None:
        """The value of a closed node (one that depends on no input), evaluated once; None where it cannot be."""
        if node not in self.closed or (node in self.opaque and not self._settled(node)):
            return None
        if node in self._constants:
            return self._constants[node]
        value = self._evaluate(node)
        if value is None or value.numel() <= _KEPT:
            self._constants[node] = value
        return value

    def writes_before(self, source: fx.Node, reader: fx.Node) -> int:
        """How often the memory of a value was written to before it is read."""
        return sum(self.order[w] < self.order[reader] for w in self.writes_to(source))

    def writes_to(self, source: fx.Node) -> Sequence[fx.Node]:
        """What writes to the memory of a value."""
        return self.writers.get(self.storage.get(source, -1), ())

    def closed_form(self, node: fx.Node) -> Expr | None:
        """What a closed node or a buffer is as a function of its dimensions, proved on its values; None where it
        follows no rule. That a buffer was taken for its form is noted in `assumed`."""
        if node not in self._forms:
            with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
                form = self._closed_form(node)
            self._forms[node] = form
            if isinstance(form, Call) and (form.dtype == BOOL or form.op == "where"):
                self.inferred.add(node)
        return self._forms[node]

    def _closed_form(self, node: fx.Node) -> Expr | None:
        if debug.disabled("closed-forms"):
            return None
        held = self.buffers.get(node)
        if held is None:
            value = self.constant(node)
            return None if value is None else constant_form(value)
        if node in self.opaque:
            return None
        # Of floats, only masks and what masks fill with: a bias that happens to be zero today is no mask.
        if held.is_floating_point() and held.numel() == 1:
            form = constant_form(held) if float(held) <= MASK_FILL else None
        elif sum(size > 1 for size in held.shape) < (2 if held.is_floating_point() else 1):
            form = None
        else:
            form = closed_form(held) if held.is_floating_point() else constant_form(held)
        if form is not None:
            self.assumed[node] = form
        return form

    def _settled(self, node: fx.Node) -> bool:
        """Whether all that read this memory do so after the last write to it (a mask filled piece by piece)."""
        storage = self.storage[node]
        writers = self.writers[storage]
        last = max(self.order[w] for w in writers)
        readers = (u for n, at in self.storage.items() if at == storage for u in n.users)
        return all(self.storage[u] == storage or u in writers or self.order[u] > last for u in readers)

    def _evaluate(self, node: fx.Node) -> torch.Tensor | None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or any(isinstance(d, torch.SymInt) for d in value.shape):
            return None
        if value.numel() > _FOLD_LIMIT:
            return None
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            try:
                return self._compute(node)
            except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
                return None

    def _compute(self, node: fx.Node) -> Any:
        env: dict[fx.Node, Any] = {}
        for step in sorted(self._needed(node), key=self.order.__getitem__):
            if step.op == "get_attr":
                value = attribute(self.graph.owning_module, step)
                env[step] = value.detach().cpu() if isinstance(value, torch.Tensor) else value
            elif is_blank(step):
                fill, blank = number_of(step), step.meta["val"]
                if isinstance(fill, fx.Node) or any(isinstance(size, torch.SymInt) for size in blank.shape):
                    raise ValueError("it is filled when the graph runs")
                env[step] = torch.full(blank.shape, fill, dtype=blank.dtype, device="cpu")
            else:
                image = step.args[1] if is_put_alike(step) else None
                given: dict[Any, Any] = env if image is None else {image: _blank_of(image), **env}
                args, kwargs = fx.map_arg((step.args, dict(step.kwargs)), given.__getitem__)
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                env[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return env[node]

    def _needed(self, node: fx.Node) -> set[fx.Node]:
        """What must run to have a closed value: its ancestors, and earlier writes to anything among them (all writes to
        memory that nobody reads before the last of them)."""
        found: set[fx.Node] = set()
        until = len(self.order) if node in self.opaque else self.order[node]
        stack = [node]
        while stack:
            n = stack.pop()
            if n in found:
                continue
            found.add(n)
            stack.extend(sources_of(n))
            stack.extend(w for w in self.writers.get(self.storage[n], ()) if self.order[w] < until)
        return found


def _blank_of(image: Any) -> torch.Tensor:
    """A tensor of the shape and dtype of one whose values are not known."""
    value = image.meta["val"]
    if any(isinstance(size, torch.SymInt) for size in value.shape):
        raise ValueError("its shape is known when the graph runs")
    return torch.empty(value.shape, dtype=value.dtype, device="cpu")


def gather_facts(gm: fx.GraphModule, buffers: dict[fx.Node, torch.Tensor] | None = None) -> Facts:
    """One pass over the graph. `buffers`: the values of inputs that belong to the model."""
    facts = Facts(gm.graph, buffers=buffers or {})
    grad = torch.is_grad_enabled()
    ids = iter(range(1 << 30))
    unrecorded: dict[fx.Node, None] = {}  # computed from what needs a gradient, while none was recorded
    for position, node in enumerate(gm.graph.nodes):
        facts.order[node] = position
        facts.flow.add_node(node)
        sources = sources_of(node)
        facts.flow.add_edges_from((source, node) for source in sources)
        facts.nodes[node.name] = node
        if node.op == "call_function" and getattr(node.target, "__name__", "") == "_set_grad_enabled":
            grad = bool(arguments(node)[0])
        facts.grad_enabled[node] = grad
        value = node.meta.get("val")
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if node.op == "placeholder":
            if isinstance(value, torch.Tensor) and not floating:
                facts.pure.add(node)
            if floating and node.meta.get("requires_grad", value.requires_grad):
                facts.needs_grad.add(node)
        elif node.op == "get_attr":
            # A literal of the model's code. Parameters and buffers are inputs of a graph, not attributes.
            facts.closed.add(node)
            facts.pure.add(node)
        elif node.op == "call_function":
            name = op_name(node)
            if all(n in facts.pure or _is_number(n) for n in sources) and (
                name in MOVES or name in OPERATIONS or name in SEVERAL
            ):
                facts.pure.add(node)
            if all(n in facts.closed for n in sources) and _deterministic(node):
                facts.closed.add(node)
        if node.op.startswith("call_") and (floating or not isinstance(value, torch.Tensor)):
            flows = any(n in facts.needs_grad for n in sources)
            if flows and grad and op_name(node) not in _STOPS and node.target not in _STOPS:
                facts.needs_grad.add(node)
            elif flows and grad:
                facts.cuts.add(node)
            elif not grad and (flows or any(n in unrecorded for n in sources)):
                unrecorded[node] = None
        facts.storage[node] = _storage_of(node, facts, ids)
        for target in _written(node):
            storage = facts.storage.get(target, -1)
            facts.writes.append((position, storage))
            facts.writers.setdefault(storage, []).append(node)
    facts.opaque = {n for n in facts.order if facts.storage[n] in facts.writers}
    # What is written to is read where it stands, which is after its image.
    facts.flow.add_edges_from((source, n) for n in facts.opaque for source in n.all_input_nodes)
    facts.pure -= facts.opaque
    facts.cuts.update(n for n in unrecorded if any(u.op != "output" and facts.grad_enabled[u] for u in n.users))
    _settle(facts)
    facts.same = equal_values(gm.graph, facts.opaque | facts.cuts, facts.grad_enabled, facts.writes_before)
    return facts


def _settle(facts: Facts) -> None:
    """Closed stays what depends on closed values alone, in memory that no open value is written to."""
    changed = True
    while changed:
        dirty = {s for s, writers in facts.writers.items() if any(w not in facts.closed for w in writers)}
        gone = {
            n for n in facts.closed
            if facts.storage[n] in dirty or (n.op == "call_function" and not facts.closed.issuperset(sources_of(n)))
        }  # fmt: skip
        facts.closed -= gone
        changed = bool(gone)
    for node in facts.order:  # purity follows its inputs too
        if (
            node.op == "call_function"
            and node in facts.pure
            and not all(i in facts.pure or i in facts.closed or _is_number(i) for i in sources_of(node))
        ):
            facts.pure.discard(node)


_STOPS = ("detach", "detach_copy", DATA)
SEVERAL = (*SPLITS, "unbind", "meshgrid", "broadcast_tensors")  # what has several tensors for a result


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _deterministic(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return op_name(node) == "getitem"
    return torch.Tag.nondeterministic_seeded not in target.tags


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors an operation writes to."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        for k, arg in enumerate(node.target._schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                value = arguments(node)[k] if k < len(arguments(node)) else node.kwargs.get(arg.name)
                if isinstance(value, fx.Node):
                    yield value
                elif isinstance(value, list | tuple):
                    yield from (v for v in value if isinstance(v, fx.Node))


_MAYBE_VIEWS = {DATA, "reshape", "contiguous", "to", "type_as", "flatten", "expand_as", "getitem", "broadcast_to"}


def _storage_of(node: fx.Node, facts: Facts, ids: Iterator[int]) -> int:
    """Nodes with equal numbers may share memory."""
    if node.op == "call_function" and arguments(node) and isinstance(arguments(node)[0], fx.Node):
        target = node.target
        shares = op_name(node) in _MAYBE_VIEWS
        if isinstance(target, torch._ops.OpOverload):
            returns = target._schema.returns
            shares = (
                shares
                or any(r.alias_info is not None for r in returns)
                or (op_name(node) in MOVES and op_name(node) not in _COPIES)
            )
        if shares:
            return facts.storage[arguments(node)[0]]
    return next(ids)


_COPIES = frozenset(
    (
        "cat", "concat", "concatenate", "stack", "repeat", "tile", "repeat_interleave",
        "index", "index_select", "gather", "take_along_dim", "embedding", "flip", "roll",
        "pad", "constant_pad_nd", "clone", "_to_copy", "lift_fresh_copy", "block_diag", "diag_embed",
        "slice_scatter", "select_scatter", "diagonal_scatter", "copy",
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- operands


def is_kept(node: fx.Node) -> bool:
    """Whether an input of the graph is a parameter or buffer of the model."""
    kept = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return kept or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


_PRODUCTS = ("mul", "multiply")


def is_product_sum(node: fx.Node, facts: Facts) -> bool:
    """Whether a sum is of products that were multiplied by hand, none of whose factors is a mask."""
    source = arguments(node)[0]
    return isinstance(source, fx.Node) and op_name(source) in _PRODUCTS and not _is_masked(source, facts)


def _is_masked(product: fx.Node, facts: Facts) -> bool:
    """Whether a factor is a mask, of zeros and ones: what is summed then is the other one."""
    return any(isinstance(a, fx.Node) and (a in facts.pure or _was_bool(a)) for a in arguments(product)[:2])


def _was_bool(node: fx.Node) -> bool:
    while op_name(node) in MOVES and arguments(node) and is_tensor(arguments(node)[0]):
        node = arguments(node)[0]
    return is_tensor(node) and node.meta["val"].dtype == torch.bool


def contraction_operands(node: fx.Node) -> list[fx.Node]:
    """The multiplied operands of a contraction, in order."""
    name = op_name(node)
    if name == "einsum":
        return list(arguments(node)[1])
    if name in ("baddbmm", "addmm"):
        return list(arguments(node)[1:3])
    if name == "sum":
        source = arguments(node)[0]
        return [a for a in arguments(source)[:2] if isinstance(a, fx.Node)]
    return [a for a in arguments(node)[:2] if isinstance(a, fx.Node)]


def taint_of(node: fx.Node, facts: Facts) -> frozenset[fx.Node]:
    """The contractions, distances and summed products whose results reach `node` through operations the lift knows."""
    if node in facts.taints:
        return facts.taints[node]
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    written: set[int] = set()  # memory whose writers were looked at: many views of it share them
    stack = [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n in facts.taints:
            found |= facts.taints[n]
            continue
        name = op_name(n)
        if name in CONTRACTIONS or name == "cdist" or (name == "sum" and is_product_sum(n, facts)):
            found.add(n)
            continue
        if name in _PRODUCTS and any(op_name(u) == "sum" for u in n.users) and not _is_masked(n, facts):
            found.add(n)  # a product of embeddings, say, of which no matrix is the source
        if n.op == "call_function" and (name in MOVES or name in OPERATIONS) and n not in facts.pure:
            stack.extend(
                a
                for a in sources_of(n)
                if is_tensor(a) or op_name(a) in (*SPLITS, "unbind", "max", "min", "topk", "sort")
            )
        if n.op == "call_function" and n in facts.opaque and facts.storage[n] not in written:
            # What was written there came from somewhere, too.
            written.add(facts.storage[n])
            stack.extend(a for w in facts.writers[facts.storage[n]] for a in w.all_input_nodes if is_tensor(a))
    facts.taints[node] = frozenset(found)
    return facts.taints[node]
