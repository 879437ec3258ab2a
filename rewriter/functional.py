"""In-place operations on values that only the graph sees become functional ones, so that the lift can read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import make_contiguous_strides_for

from refocus.sizes import hint, memory_order, same_shape, size_expr


def make_functional(gm: fx.GraphModule, mode: Any) -> None:
    """Replace in-place operations on values that only the graph sees by their functional forms.

        scores.masked_fill_(mask, v); use(scores)    ->    new = masked_fill(scores, mask, v); use(new)

    A write through a view, as to a part of a mask, becomes the whole tensor with that part replaced (`_Written`). A
    write to an input, or to memory seen in other ways, is left as it is (the lift never reads across it).
    """
    drop_unread_writes(gm)
    _open_diagonals(gm, mode)
    order = {n: k for k, n in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        functional = functional_overload(node)
        if functional is None:
            continue
        target = node.args[0]
        if not isinstance(target, fx.Node):
            continue
        written = None
        if not _only_seen_here(target, node, order):
            written = _written_part(target, node, order)
            if written is None:
                continue
        before = target.meta["val"]
        readers = (*node.users, *(u for u in target.users if order[u] > order[node]))
        if any(_name(u) == "as_strided" for u in readers) and not _is_dense(before):
            continue  # what lies between its elements may be read, too
        with mode:
            try:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                after = functional(*args, **kwargs)
            except (RuntimeError, TypeError):
                continue
        if not isinstance(after, torch.Tensor) or after.dtype != before.dtype or not same_shape(after, before):
            continue
        copied = _copy_of(gm, mode, node, order) if _name(node) == "copy_" else None
        if copied is None:
            with gm.graph.inserting_before(node):
                copied = gm.graph.call_function(functional, node.args, dict(node.kwargs))
            copied.meta.update(node.meta)
            copied.meta["val"] = after
        new = copied
        position = order[node]
        order[new] = position
        new = _laid_out(gm, mode, new, before, node, order)
        if written is not None:
            new = written.put_back(gm, mode, node, new, order)
        else:
            _replace_after(target, new, position, order)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    for node in reversed(gm.graph.nodes):
        if node.op == "call_function" and not node.users and _is_exact_view(node):
            gm.graph.erase_node(node)  # a view that was made anew, and that nobody reads after the write


def _open_diagonals(gm: fx.GraphModule, mode: Any) -> None:
    """Of a matrix, x.fill_diagonal_(v) is x.diagonal().fill_(v)."""
    aten = torch.ops.aten
    for node in gm.graph.find_nodes(op="call_function", target=aten.fill_diagonal_.default):
        target, value, wraps = (*node.args, False)[:3]
        if _rank(target) != 2 or wraps:
            continue
        with gm.graph.inserting_before(node):
            view = gm.graph.call_function(aten.diagonal.default, (target,))
            fill = gm.graph.call_function(aten.fill_.Scalar, (view, value))
        for new in (view, fill):
            new.meta.update(node.meta)
            with mode:
                new.meta["val"] = aten.diagonal.default(target.meta["val"])  # type: ignore[union-attr]
        node.replace_all_uses_with(target)  # type: ignore[arg-type]
        gm.graph.erase_node(node)


def drop_unread_writes(gm: fx.GraphModule) -> None:
    """Remove writes to memory of the graph's own that nobody reads, or only what is written there next: a map of all
    probabilities, filled part by part, that is returned only on demand; a matrix inverted row by row whose inverse is
    not needed. A write has an effect, so no other pass takes it for dead code."""
    base: dict[fx.Node, fx.Node] = {}  # of each node, what made the memory that it may be in
    writes: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        shares = isinstance(source, fx.Node) and (aliases(node) or functional_overload(node) is not None)
        base[node] = base[source] if shares else node  # type: ignore[index]
        if functional_overload(node) is not None and base[node].op == "call_function":
            writes.setdefault(base[node], []).append(node)
    theirs = {node for found in writes.values() for node in found}
    read: set[fx.Node] = set()
    stack = [n for n in gm.graph.nodes if n.op != "call_function" or (n.is_impure() and n not in theirs)]
    while stack:
        node = stack.pop()
        if node not in read:
            read.add(node)
            stack.extend((*node.all_input_nodes, *writes.get(base[node], ())))
    if theirs <= read:
        return
    for node in reversed(gm.graph.nodes):
        known = node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if node not in read and known and not node.users:
            gm.graph.erase_node(node)


def _copy_of(gm: fx.GraphModule, mode: Any, write: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """What x.copy_(y) leaves in x: a copy of y in the shape and dtype of x. `aten.copy` says the same, but has no
    derivative. None where the shape is symbolic and not y's own."""
    target, source = write.args[:2]
    if not isinstance(target, fx.Node) or not isinstance(source, fx.Node) or "val" not in source.meta:
        return None
    wanted, value = target.meta["val"], source.meta["val"]
    steps: list[_Step] = []
    if value.dtype != wanted.dtype or value.device != wanted.device:
        steps.append((torch.ops.aten._to_copy.default, (), {"dtype": wanted.dtype, "device": wanted.device}))
    if not same_shape(value, wanted):
        if any(isinstance(size, torch.SymInt) for size in wanted.shape):
            return None
        steps.append((torch.ops.aten.expand.default, (list(wanted.shape),), {}))
    steps.append((torch.ops.aten.clone.default, (), {"memory_format": torch.contiguous_format}))
    return _through(gm, mode, source, steps, write, order)


_Step = tuple[Any, tuple[Any, ...], dict[str, Any]]  # an operation, and its arguments after the first


def _through(
    gm: fx.GraphModule, mode: Any, node: fx.Node, steps: Iterable[_Step], write: fx.Node, order: dict[fx.Node, int]
) -> fx.Node:
    """What operations make of a value, one after the other, where a write stands."""
    for operation, args, kwargs in steps:
        with gm.graph.inserting_before(write):
            step = gm.graph.call_function(operation, (node, *args), kwargs)
        step.meta.update(write.meta)
        with mode:
            step.meta["val"] = operation(node.meta["val"], *args, **kwargs)
        order[step] = order[write]
        node = step
    return node


def _is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor takes up all of the memory between its first and its last element, each place once."""
    within = value.permute(memory_order(value))
    dense = make_contiguous_strides_for(within.shape)
    return all(hint(n) == 1 or size_expr(a) == size_expr(b) for n, a, b in zip(within.shape, within.stride(), dense))


def _laid_out(
    gm: fx.GraphModule, mode: Any, new: fx.Node, old: torch.Tensor, write: fx.Node, order: dict[fx.Node, int]
) -> fx.Node:
    """What a write leaves, with its dimensions in memory as those of what was written: views that come later ask for
    that, and so may who gets the result."""
    wanted = memory_order(old)
    told = [d for d in wanted if hint(old.shape[d]) != 1]
    if [d for d in memory_order(new.meta["val"]) if d in told] == told:
        return new
    back = sorted(range(len(wanted)), key=wanted.__getitem__)
    steps: list[_Step] = [
        (torch.ops.aten.permute.default, (wanted,), {}),
        (torch.ops.aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (torch.ops.aten.permute.default, (back,), {}),
    ]
    return _through(gm, mode, new, steps, write, order)


_FRESH_ALIASING = frozenset(
    (
        "view", "reshape", "permute", "transpose", "expand", "slice", "select",
        "unsqueeze", "squeeze", "t", "detach", "alias", "contiguous", "to",
        "split", "chunk", "unbind", "getitem", "flatten", "as_strided", "diagonal",
    )
)  # fmt: skip


def _replace_after(old: fx.Node, new: fx.Node, position: int, order: dict[fx.Node, int]) -> None:
    """Let everything past a position read `new` instead of `old`."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > position)


_OPERATORS = {"__iand__": "bitwise_and", "__ior__": "bitwise_or", "__ixor__": "bitwise_xor"}  # m |= ..


def functional_overload(node: fx.Node) -> Any:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    namespace, name = node.target._schema.name.split("::")
    if namespace != "aten":
        return None
    if name in _OPERATORS:
        name = _OPERATORS[name]
    elif not name.endswith("_") or name.endswith("__") or name.startswith("_"):
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None


def _name(node: fx.Node) -> str:
    return (
        node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
    )


def aliases(node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return _name(node) in _FRESH_ALIASING or any(r.alias_info is not None for r in node.target._schema.returns)


def _only_seen_here(target: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether a write to `target` changes nothing else that is read later: its memory was made in this graph, and no
    other view of it is read after the write."""
    base = target
    while base.op == "call_function" and aliases(base):
        source = base.args[0] if base.args else None
        if not isinstance(source, fx.Node):
            return False
        base = source
    if base.op != "call_function":
        return False
    stack, group = [base], {base}
    while stack:
        for user in stack.pop().users:
            if user not in group and user.op == "call_function" and order[user] < order[write] and aliases(user):
                group.add(user)
                stack.append(user)
    return all(order[user] <= order[write] for member in group - {target} for user in member.users)


# ---------------------------------------------------------------------------------------------- writes through views

# Views that can be put back into what they view, by these operations.
_SCATTERS = {
    "slice": torch.ops.aten.slice_scatter.default, "select": torch.ops.aten.select_scatter.default,
    "diagonal": torch.ops.aten.diagonal_scatter.default,
}  # fmt: skip
_EXACT_VIEWS = frozenset((*_SCATTERS, "squeeze", "unsqueeze", "transpose", "view", "alias", "detach"))

# A tensor painted in more strokes than this is left to be evaluated as a constant.
_STROKES = 32


@dataclass(frozen=True)
class _Written:
    """A write through a chain of views of `base`, and the other views of it that are read later.

    mask[2:, :p].fill_(1); use(mask)     ->    row = slice(mask, 0, 2); part = fill(slice(row, 1, 0, p), 1)
                                               new = slice_scatter(mask, slice_scatter(row, part, ..), ..); use(new)
    """

    base: fx.Node
    chain: tuple[fx.Node, ...]  # from the base's own view to the one that is written
    later: tuple[fx.Node, ...]  # views made before the write and read after it, in graph order

    def put_back(self, gm: fx.GraphModule, mode: Any, write: fx.Node, part: fx.Node, order: dict[fx.Node, int]) -> Any:
        """Insert the whole tensor and its views as they are after the write; the node for the part written."""
        position = order[write]

        def insert(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
            with mode:
                values, options = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
                result = target(*values, **options)
            with gm.graph.inserting_before(write):
                new = gm.graph.call_function(target, args, kwargs)
            new.meta.update(write.meta)
            new.meta["val"] = result
            order[new] = position
            return new

        def seen_as(source: fx.Node, shape: Any) -> fx.Node:
            try:
                return insert(torch.ops.aten.view.default, (source, shape), {})
            except (RuntimeError, ValueError):  # it does not lie in memory as that takes
                options = {"memory_format": torch.contiguous_format}
                return insert(
                    torch.ops.aten.view.default, (insert(torch.ops.aten.clone.default, (source,), options), shape), {}
                )

        whole = part
        for view in reversed(self.chain):
            name, source = _name(view), view.args[0]
            if name in _SCATTERS:
                whole = insert(_SCATTERS[name], (source, whole, *view.args[1:]), dict(view.kwargs))
            elif name == "squeeze" and _rank(source) > _rank(view):
                whole = insert(torch.ops.aten.unsqueeze.default, (whole, *view.args[1:]), {})
            elif name == "unsqueeze":
                whole = insert(torch.ops.aten.squeeze.dim, (whole, *view.args[1:]), {})
            elif name == "transpose":
                whole = insert(torch.ops.aten.transpose.int, (whole, *view.args[1:]), {})
            elif name == "view":
                whole = seen_as(whole, list(source.meta["val"].shape))  # type: ignore[union-attr]
        renewed = {self.base: _laid_out(gm, mode, whole, self.base.meta["val"], write, order)}
        for view in dict.fromkeys((*self.chain, *self.later)):
            source = view.args[0]
            assert isinstance(source, fx.Node)
            if _name(view) == "view":
                renewed[view] = seen_as(renewed[source], *view.args[1:])
            else:
                renewed[view] = insert(view.target, (renewed[source], *view.args[1:]), dict(view.kwargs))
        for old, new in renewed.items():
            _replace_after(old, new, position, order)
        return renewed[self.chain[-1]]


def _is_exact_view(node: fx.Node) -> bool:
    if _name(node) == "squeeze" and (len(node.args) < 2 or not isinstance(node.args[1], int)):
        return False  # of all dimensions, or of several
    if _name(node) == "view" and not all(type(n) is int for n in node.args[0].meta["val"].shape):  # type: ignore[union-attr]
        return False
    return _name(node) in _EXACT_VIEWS


def _rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def _written_part(target: fx.Node, write: fx.Node, order: dict[fx.Node, int]) -> _Written | None:
    """How to put a write through a view back; None where that is not possible, or not worth it: what is made of
    products is no mask, and copying it costs more than it tells; but for scores and weights, and for what is put
    together part by part in memory that was made for it."""
    chain: list[fx.Node] = []
    base = target
    while base.op == "call_function" and aliases(base):
        source = base.args[0] if base.args else None
        if not _is_exact_view(base) or not isinstance(source, fx.Node):
            return None
        chain.insert(0, base)
        base = source
    if base.op != "call_function" or not chain:
        return None
    made_for_it = _name(_first_of(base)) in _CREATIONS
    if _takes_many_strokes(base):
        return None
    if not made_for_it and _made_of_products((base, *write.all_input_nodes)) and not _meets_softmax(base):
        return None
    views: list[fx.Node] = []
    stack = [base]
    while stack:
        for user in stack.pop().users:
            if user.op != "call_function" or order[user] >= order[write] or not aliases(user) or user in views:
                continue
            views.append(user)
            stack.append(user)
    read_later = {v for v in views if any(order[u] > order[write] for u in v.users)}
    if any(u.op == "output" for v in views for u in v.users):
        return None  # who gets it may see that it shares memory
    for view in [*read_later]:  # what they are views of has to be made anew, too
        while view is not base:
            if not _is_exact_view(view) or not isinstance(view.args[0], fx.Node):
                return None
            read_later.add(view)
            view = view.args[0]
    later = sorted(read_later - set(chain), key=order.__getitem__)
    return _Written(base, tuple(chain), tuple(later))


def _first_of(node: fx.Node) -> fx.Node:
    """The tensor as it was before the writes to it that were made functional."""
    while _name(node) in _PAINTED and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_PAINTED = frozenset(("slice_scatter", "select_scatter", "view", "transpose", "squeeze", "unsqueeze", "clone", "fill"))
_CREATIONS = frozenset(
    ("zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "empty",
     "empty_like", "new_empty")
)  # fmt: skip


def _takes_many_strokes(node: fx.Node) -> bool:
    strokes = 0
    while _name(node) in _PAINTED and isinstance(node.args[0], fx.Node):
        strokes += _name(node) in ("slice_scatter", "select_scatter")
        node = node.args[0]
    return strokes > _STROKES


def _made_of_products(nodes: Iterable[fx.Node]) -> bool:
    """Whether anything here comes out of a matrix product, spelled as one or as a sum of products, or a module's
    weights, or took too many strokes to paint."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    strokes = 0
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        name = _name(node)
        strokes += name in ("slice_scatter", "select_scatter")
        if strokes > 2 * _STROKES or name in _PRODUCTS or _sums_products(node):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _sums_products(node: fx.Node) -> bool:
    """Whether a node is the sum of what two tensors of floats give when they are multiplied."""
    source = node.args[0] if _name(node) == "sum" and node.args else None
    if not isinstance(source, fx.Node) or source.op != "call_function" or _name(source) != "mul":
        return False
    factors = [n for n in source.args if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)]
    return len(factors) == 2 and all(n.meta["val"].is_floating_point() for n in factors)


def _meets_softmax(base: fx.Node) -> bool:
    """Whether a value is one of scores, that a softmax is taken of, or of weights, that come out of one."""
    if _name(base) in _SOFTMAX:
        return True
    for towards in (lambda n: n.users, lambda n: n.all_input_nodes):
        seen, stack = {base}, [base]
        while stack:
            for node in towards(stack.pop()):
                if node.op != "call_function" or node in seen or _name(node) in _PRODUCTS - _SOFTMAX:
                    continue
                if _name(node) in _SOFTMAX:
                    return True
                seen.add(node)
                stack.append(node)
    return False


_SOFTMAX = frozenset(("softmax", "_softmax"))
_PRODUCTS = frozenset(
    ("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "einsum", "convolution", "conv1d", "conv2d", "conv3d",
     "scaled_dot_product_attention", "embedding", "layer_norm", "native_layer_norm", "rms_norm", "softmax", "_softmax")
)  # fmt: skip
