"""Lift ATen values to index notation, on demand.

`Lifter.at(node, index)` is the value of `node` at a position: views and gathers rewrite the position, pointwise
operations become scalar operations, a contraction becomes a `Dot`, a softmax becomes exp(x) / sum exp(x). What each
operation does is in the tables of `lift_views`, `lift_pointwise` and `lift_reductions`; one in no table is a leaf.

The rule of the cut decides where lifting stops: an operation belongs inside the region iff its iteration space holds
both a query and a key axis. Anything smaller is a `Load` of a value that the rest of the graph computes as always.
Integers, booleans and what is made of nothing else are always followed to their source, for masks must be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import fx

from refocus import simplify as s
from refocus.convolutions import CHANNEL_PRODUCT, CONVOLUTIONS, is_pointwise
from refocus.held_numbers import held
from refocus.ir import BOOL, INT, Axis, Call, Const, Dot, Expr, Load, Reduce
from refocus.polynomial import to_poly
from refocus.sizes import hint, shape_of, size_expr, whole_number
from refocus.widths import narrowed, recast

Index = tuple[Expr, ...]
Handler = Callable[["Lifter", fx.Node, Index], "Expr | None"]


def op_name(node: fx.Node) -> str:
    """`add` for aten.add.Tensor; the bare name for anything else. What a convolution of kernel size 1 computes has a
    name of its own."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        return CHANNEL_PRODUCT if name in CONVOLUTIONS and is_pointwise(node) else name
    return getattr(target, "__name__", str(target))


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments of an operation; what they are is its schema's business, not the type checker's."""
    return node.args


def dtype_of(node: fx.Node) -> str:
    return str(node.meta["val"].dtype).removeprefix("torch.")


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def kind_of(dtype: str) -> str:
    """The dtype an expression gets: floats keep theirs, integers are all int64."""
    return dtype if dtype.startswith(("float", "bfloat")) else BOOL if dtype == BOOL else INT


def is_mixed_radix(value: Expr) -> bool:
    """Whether an index is a flattening (64*i + j): distinct positions give distinct values, no div or mod hides."""
    terms = []
    for mono, coef in to_poly(value).items():
        if not mono:
            continue
        axes = [a for a in mono if isinstance(a, Axis)]
        if len(axes) != 1 or any(a.axes for a in mono if not isinstance(a, Axis)) or coef < 0:
            return False
        stride = s.mul(coef, *(a for a in mono if not isinstance(a, Axis)))
        terms.append((stride, axes[0]))
    sizes = {s.mul(stride, axis.size) for stride, axis in terms}
    strides = [stride for stride, _ in terms]
    # every stride but the smallest (1) is the extent of another term
    return all(stride == Const(1) or stride in sizes for stride in strides) and len(set(strides)) == len(strides)


@dataclass(frozen=True)
class Standing:
    """Along dimension `dim` of the tensor that is written, `seen` is `place`: what x[.., 0] = x[.., 0] * 2 puts at
    position j is only asked for where j == 0, and what it reads at 0 stands at j."""

    written: fx.Node
    dim: int
    seen: Expr
    place: Expr


class Known(Protocol):
    """What the lift asks about a graph (`refocus.facts.Facts`)."""

    nodes: dict[str, fx.Node]
    pure: set[fx.Node]  # made of integers and literals only
    closed: set[fx.Node]  # depend on no input
    opaque: set[fx.Node]  # written in place somewhere: never looked through
    stored: frozenset[fx.Node]  # products that are there already: loaded
    lifted: dict[tuple[fx.Node, Index], Expr]  # pure values, shared by all sites
    cuts: set[fx.Node]  # no gradient flows through these
    needs_grad: set[fx.Node]  # a gradient flows back to these
    same: dict[fx.Node, fx.Node]  # to the first node of equal value

    def closed_form(self, node: fx.Node) -> Expr | None: ...

    def constant(self, node: fx.Node) -> torch.Tensor | None: ...


@dataclass
class Lifter:
    """Lifts values of one graph for one attention site.

    `key_axes` / `query_axes` are what the cut looks at; softmax-like handlers add the axes they reduce over to the key
    axes. `tainted(node)` says whether a node may hold scores of this site. `visited` collects every node lifted
    through, `blame` is the first operation that stopped a value which may hold scores. With `far`, what an operation
    has copied or repeated (a roll, a gather, overlapping windows) is read where it was before; and while `joining`
    parts of one tensor, so are its parts. `expands`: contractions
    are written out as sums, running sums too, and what is made of literals is followed like anything else. `standing`:
    positions that are known, of a part of a tensor that is being written. `alike`: parts of a stack that are computed
    in the same way are one function of their number. `kept`: values that are loaded wherever they are read. `chooses`:
    the weights were found to be those of several scores.
    """

    known: Known
    tainted: Callable[[fx.Node], bool] = lambda node: False
    key_axes: set[Axis] = field(default_factory=set)
    query_axes: set[Axis] = field(default_factory=set)
    visited: set[fx.Node] = field(default_factory=set)
    blame: fx.Node | None = None
    far: bool = False
    joining: bool = False
    budget: int = 20_000
    expands: bool = False
    unpads: bool = False
    kept: frozenset[fx.Node] = frozenset()
    standing: tuple[Standing, ...] = ()
    alike: bool = False
    chooses: bool = False
    _memo: dict[Any, Expr] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------ the entry

    def at(self, node: fx.Node, index: Iterable[Expr]) -> Expr:
        """The value of a tensor node at a position (one integer expression for each dimension)."""
        index = tuple(index)
        shared = node in self.known.pure and not self.expands
        key: Any = (node, index) if shared else (node, index, self.joining, self.standing)
        memo: dict[Any, Expr] = (
            self.known.lifted if shared else self._memo
        )  # what is made of integers reads the same at every site
        if key not in memo:
            self.budget -= 1
            value = self._at(node, index) if self.budget > 0 else self.leaf(node, index)
            if node in self.known.closed and any(True for _ in _loads(value)):
                # What is made of constants, but not of operations that can be followed: its values tell.
                value = self.constant(node, index) or value
            elif node in self.known.closed and _is_painted(node) and _nodes(value) > _STROKES:
                told = self.constant(node, index)  # one form for all strokes, where the values have one
                if told is not None and not any(True for _ in _loads(told)) and _nodes(told) < _nodes(value):
                    value = told
            if node in self.known.cuts and value.is_float and any(x.tensor != node.name for x in _loads(value)):
                value = s.call("detach", value, dtype=value.dtype)
            memo[key] = value
        return memo[key]

    def _at(self, node: fx.Node, index: Index) -> Expr:
        from refocus.lift_reductions import CONTRACTIONS  # the tables' functions take a Lifter
        from refocus.lift_tables import MOVES, OPERATIONS

        loaded = node in self.known.opaque or node in self.known.stored or node in self.kept
        if loaded or node.op in ("get_attr", "placeholder"):
            return self.constant(node, index) or self.leaf(node, index)
        name = op_name(node)
        move = MOVES.get(name)
        if move is not None:
            value = move(self, node, index)
            if value is not None and name in _CASTS:
                value = recast(value, arguments(node)[0].meta["val"].dtype, node.meta["val"].dtype)
            if value is None:
                return self._stop(node, index)
            self.visited.add(node)
            if not value.is_float and _is_table(node, index, value):
                return self.leaf(node, index)
            return self._choose(node, index, value)
        handler = OPERATIONS.get(name)
        if handler is None or not is_tensor(node):
            return self.constant(node, index) or self._stop(node, index)
        floating = kind_of(dtype_of(node)) not in (INT, BOOL)
        if not floating or node in self.known.pure:
            value = handler(self, node, index)
            if value is not None and value.is_int and node.meta["val"].dtype != torch.bool:
                value = narrowed(value, node.meta["val"].dtype)
            if value is not None and not (floating and any(x.is_float for x in _loads(value))):
                self.visited.add(node)
                return self.leaf(node, index) if _is_table(node, index, value) else value
            if value is None or not floating or not self.within(node, index):
                return self.constant(node, index) or self.leaf(node, index)
            self.visited.add(node)
            return value
        # Of what is put together piece by piece, a piece may stand at one key.
        inside = self.within(node, index) or (self.unpads and name in CONTRACTIONS and self.tainted(node))
        if not inside and (not self.tainted(node) or name in CONTRACTIONS):
            return self.leaf(node, index)
        value = handler(self, node, index)
        if value is None:
            return self._stop(node, index)
        if not inside and not holds_scores(value):
            return self.leaf(node, index)
        self.visited.add(node)
        return value

    def keeping(self, nodes: Iterable[fx.Node]) -> Lifter:
        """The same, with these values loaded wherever they are read, and products read at single keys, too."""
        return replace(self, kept=frozenset(nodes), unpads=True, blame=None, _memo={})

    # ------------------------------------------------------------------------------------------------ the cut

    def inside(self, index: Index) -> bool:
        """Whether a position spans a query and a key axis, each in a dimension of its own (or flattened together).
        A value gathered at a mixture (c2p at clamp(i - j)) has a smaller iteration space, and is loaded."""
        has_key = has_query = False
        for entry in index:
            key, query = bool(entry.axes & self.key_axes), bool(entry.axes & self.query_axes)
            if key and query:
                if is_mixed_radix(entry):
                    return True
            elif key:
                has_key = True
            elif query:
                has_query = True
        return has_key and has_query

    def within(self, node: fx.Node, index: Index) -> bool:
        """`inside`, for one node. Where there is but one query, its axis is gone: scores are told by their source."""
        if self.query_axes:
            return self.inside(index)
        return self.tainted(node) and any(entry.axes & self.key_axes for entry in index)

    def sums_keys(self, node: fx.Node) -> bool:
        """Whether a reduction whose result has no key axis runs over one."""
        return True

    def leaf(self, node: fx.Node, index: Index) -> Load:
        """Stop here: the region loads this value, where it is computed first."""
        node = self.known.same.get(node, node)
        dtype = kind_of(dtype_of(node)) if kind_of(dtype_of(node)) == BOOL else dtype_of(node)
        return Load(node.name, index, dtype)

    def _stop(self, node: fx.Node, index: Index) -> Expr:
        if self.blame is None and self.within(node, index) and self.tainted(node):
            self.blame = node
        return self.leaf(node, index)

    def constant(self, node: fx.Node, index: Index) -> Expr | None:
        """A value that is known now, where its elements follow a rule: one number, a position, a mask's closed form."""
        form = self.known.closed_form(node)
        if form is None or (form.is_int and narrowed(form, node.meta["val"].dtype) is not form):
            return None
        return s.substitute(form, {Axis(f"dim{k}", size): x for k, (size, x) in enumerate(zip(shape_of(node), index))})

    def _choose(self, node: fx.Node, index: Index, below: Expr) -> Expr:
        """After a view: load here, or from what is viewed? The simpler index wins, then the smaller tensor."""
        if not is_tensor(node) or not below.is_float or self.inside(index):
            return below
        if isinstance(below, Load):
            source = self.known.nodes[below.tensor]
            if self.far and (self.joining or self.unpads or not _laid_out(node, source)):
                return below
            # Read far, what was gathered after it was reordered is a gather of blocks there.
            measure = _terms if self.far else complexity
            here, there = measure(index), measure(below.index)
            if here != there:
                return self.leaf(node, index) if here < there else below
            smaller = (_numel(source), source.meta["val"].dim()) < (_numel(node), node.meta["val"].dim())
            return below if smaller else self.leaf(node, index)
        if holds_scores(below) or node in self.known.pure or not any(x.is_float for x in _loads(below)):
            return below  # scores; or what integers and booleans tell: numbers, a mask in floats
        if self.far and isinstance(below, Call) and below.op == "where" and len(below.loads) == 1:
            # Windows with zeros past the border are many times their source; a padded tensor is not.
            if self.unpads or _numel(node) >= 2 * _numel(self.known.nodes[below.loads[0].tensor]):
                return below
        return self.leaf(node, index)

    # ------------------------------------------------------------------------------------------------ for handlers

    def bound(self, node: fx.Node, which: int, size: Any) -> Axis:
        """The axis a node sums over. Its name follows from the node, so that one value lifted at two positions
        compares equal, as does what the model computes twice; a node is never its own ancestor, so the name is never
        captured."""
        node = self.known.same.get(node, node)
        return Axis(f"{node.name}.{which}", size if isinstance(size, Expr) else size_expr(size))

    def broadcast(self, value: Any, index: Index, dtype: str | None = None) -> Expr:
        """An operand of a pointwise operation at the position of its result: right-aligned, size-1 dimensions at 0."""
        if is_tensor(value):
            shape = shape_of(value)
            tail = index[len(index) - len(shape) :] if shape else ()
            return self.at(value, tuple(Const(0) if d == Const(1) else x for d, x in zip(shape, tail)))
        return self.scalar(value, dtype)

    def scalar(self, value: Any, dtype: str | None = None) -> Expr:
        """A Python number, or a node that holds one."""
        if isinstance(value, fx.Node):
            source = value.args[0] if value.args else None
            if op_name(value) in ("item", "_local_scalar_dense") and is_tensor(source):
                return self.at(source, ())  # type: ignore[arg-type]
            whole, tensor = whole_number(value.meta["val"]), held(value)
            if whole is not None:
                return whole
            if tensor is not None:
                return self.leaf(tensor, ())
            value = value.meta["val"]
        if isinstance(value, bool):
            return Const(value, BOOL)
        if isinstance(value, torch.SymInt | int):
            return size_expr(value)
        if isinstance(value, torch.SymFloat | torch.SymBool) or not isinstance(value, float):
            raise Unliftable(f"scalar {value}")
        return Const(value, dtype if dtype and dtype.startswith(("float", "bfloat")) else "float32")

    def factor(self, value: Any, dtype: str) -> Expr:
        """A number that floats of this dtype are multiplied with."""
        number = self.scalar(float(value) if isinstance(value, int) else value, dtype)
        return number if number.dtype == dtype else s.cast(number, dtype)


class Unliftable(Exception):
    """A value that has no index notation; the node is a leaf."""


def holds_scores(value: Expr) -> bool:
    return any(isinstance(n, Dot) for n in value.walk())


def _loads(value: Expr) -> Iterable[Load]:
    return value.loads if not isinstance(value, Load) else (value,)


def complexity(index: Index) -> int:
    """How far the entries of an index are from plain axes: 0 for a view, more for divisions and mixtures."""
    cost = 0
    for entry in index:
        if isinstance(entry, Const | Axis) or _is_moved(entry):
            continue
        simple = (
            isinstance(entry, Call)
            and entry.op == "floordiv"
            and isinstance(entry.args[0], Axis)
            and isinstance(entry.args[1], Const)
        )
        cost += 1 if simple else 4
    axes = [a for a in index if isinstance(a, Axis)]
    return (cost // 4) + (len(axes) - len(set(axes)))


def _is_moved(entry: Expr) -> bool:
    """Whether an entry is an axis that starts at a constant: the steps of a loop stand at one each, the first at 0."""
    plain = isinstance(entry, Call) and entry.op == "add" and all(isinstance(a, Axis | Const) for a in entry.args)
    return plain and len(entry.axes) == 1


def _laid_out(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is its source, each element at most once, in another layout."""
    while node is not source:
        if op_name(node) not in _LAYOUTS:
            return False
        node = arguments(node)[0]
    return True


_CASTS = frozenset(("to", "_to_copy", "type_as"))

_LAYOUTS = frozenset(
    (
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "transpose", "swapaxes",
        "swapdims", "t", "numpy_T", "movedim", "moveaxis", "mT", "matrix_H", "adjoint", "contiguous", "clone", "alias",
        "squeeze", "unsqueeze", "permute", "select", "slice", "narrow", "getitem", "split", "chunk", "unbind",
        "split_with_sizes", "tensor_split", "unsafe_split", "unsafe_chunk", "detach", "diagonal", *_CASTS,
    )
)  # fmt: skip


def _terms(index: Index) -> int:
    return sum(_nodes(entry) for entry in index if not isinstance(entry, Axis | Const))


def _numel(node: fx.Node) -> int:
    total = 1
    for size in node.meta["val"].shape:
        total *= hint(size)
    return total


def _is_table(node: fx.Node, index: Index, value: Expr) -> bool:
    """Whether a value that tensors decide, and that takes long to work out, is better read: it has far fewer elements
    than the positions it is read at (a layout of blocks, read at i // 64 and j // 64)."""
    if not value.loads or isinstance(value, Load):
        return False
    positions = 1
    for axis in frozenset().union(*(e.axes for e in index)):
        if not isinstance(axis.size, Const):
            return False
        positions *= int(axis.size.value)
    return _numel(node) * 16 <= positions and _nodes(value) > _TABLE_NODES


_TABLE_NODES, _STROKES = 24, 12


def _nodes(value: Expr) -> int:
    return sum(1 for _ in value.walk())


def _is_painted(node: fx.Node) -> bool:
    """Whether a node is a tensor after the last write to a part of it, or after the last of several that are added, or
    rows that were stacked."""
    return op_name(node) == "stack" or any(
        op_name(node) in strokes and not any(op_name(u) in strokes and node in u.args for u in node.users)
        for strokes in (("slice_scatter", "select_scatter"), ("add", "add_", "sub", "sub_"))
    )


def contract(axes: tuple[Axis, ...], factors: list[Expr], lifter: Lifter, dtype: str) -> Expr | None:
    """sum over `axes` of a product: a `Dot` with its query and key sides told apart. None for a sum whose factors do
    not come apart like that (a pair bias projected from a pair representation): it is a leaf.

    A mixture of scores over heads (talking heads: one factor has no key, the other holds scores) is again one Dot
    over both axes, for sum_c w_c * sum_d q_cd k_cd = sum_(c,d) (w_c q_cd) k_cd. A sum over a few maps of scores that
    were stacked, or lie side by side, is written out: they are added up.
    """
    if lifter.expands:
        return _summed(axes, _product(factors, dtype), dtype)
    scores = [f for f in factors if holds_scores(f)]
    if len(axes) == 1 and any(_differs_along(axes[0], f) for f in scores):
        body = _product(factors, dtype)
        parts = (s.substitute(body, {axes[0]: Const(k)}) for k in range(int(axes[0].size.value)))  # type: ignore[attr-defined]
        return reduce(lambda a, b: s.call("add", a, b, dtype=dtype), parts)
    if scores:
        weight = _product([f for f in factors if not holds_scores(f)], dtype)
        return _mix(axes, weight, _product(scores, dtype), dtype)
    key = [f for f in factors if f.axes & lifter.key_axes]
    query = [f for f in factors if not f.axes & lifter.key_axes]
    if not axes:
        return _product(factors, dtype)
    if (not key and not lifter.unpads) or any(f.axes & lifter.query_axes for f in key):
        return None
    return Dot(axes, _product(query, dtype), _product(key, dtype), dtype)


def _differs_along(axis: Axis, scores: Expr) -> bool:
    """Whether a position along a short axis chooses among several maps of scores."""
    few = isinstance(axis.size, Const) and 0 < axis.size.value <= _MAPS
    choices = (n for n in scores.walk() if isinstance(n, Call) and n.op == "where" and axis in n.args[0].axes)
    return few and any(map(holds_scores, choices))


_MAPS = 8


def _product(factors: list[Expr], dtype: str) -> Expr:
    out: Expr = Const(1.0, dtype)
    for factor in factors:
        out = s.call("mul", out, factor, dtype=dtype)
    return out


def _summed(axes: tuple[Axis, ...], body: Expr, dtype: str) -> Expr:
    for axis in reversed(axes):
        one = axis.size == Const(1)
        body = s.substitute(body, {axis: Const(0)}) if one else Reduce("sum", axis, body, dtype)
    return body


def _mix(axes: tuple[Axis, ...], weight: Expr, scores: Expr, dtype: str) -> Expr:
    if isinstance(scores, Dot) and not holds_scores(weight):
        return Dot((*axes, *scores.over), s.call("mul", weight, scores.query, dtype=dtype), scores.key, dtype)
    if isinstance(scores, Call) and scores.op == "add":
        return s.call("add", *(_mix(axes, weight, a, dtype) for a in scores.args), dtype=dtype)
    if isinstance(scores, Call) and scores.op in ("mul", "div"):
        a, b = scores.args
        if not holds_scores(b) and holds_scores(a):
            factor = b if scores.op == "mul" else s.call("reciprocal", b, dtype=dtype)
            return _mix(axes, s.call("mul", weight, factor, dtype=dtype), a, dtype)
        if scores.op == "mul" and not holds_scores(a):
            return _mix(axes, s.call("mul", weight, a, dtype=dtype), b, dtype)
    return _summed(axes, s.call("mul", weight, scores, dtype=dtype), dtype)
