"""The index-notation IR: what an attention region computes, as a scalar program over named axes.

Every value is an `Expr`: a function from axis positions (integers) to one number. There are seven
node kinds, all frozen and compared structurally:

    Const   a literal                        Axis    a named range 0 <= a < size
    Sym     a symbolic size                  Load    an element of an operand tensor
    Call    a pointwise operation            Dot     sum over axes of query-side * key-side
    Reduce  sum / max / ... of a body along one axis

`repr` of any node is Python that rebuilds it (see `parse`); `notation` in `refocus.notation` prints it for
people. Integer arithmetic must be built through `refocus.simplify`, which keeps it canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from math import inf, nan
from typing import Any

INT, BOOL = "int64", "bool"

# op -> arity (None: any number >= 2). Integer `add`/`mul` are n-ary and canonical; `floordiv` rounds towards
# minus infinity and `mod` has the sign of the divisor, as in Python. `cast` truncates a float to an integer. `detach`
# is the identity, through which no gradient flows. `random` (seed, row, column) is uniform in [0, 1): see
# `refocus.counter`.
OPS: dict[str, int | None] = {
    "add": None, "mul": None, "sub": 2, "div": 2, "neg": 1, "floordiv": 2, "mod": 2, "min": 2, "max": 2, "abs": 1,
    "where": 3, "eq": 2, "ne": 2, "le": 2, "lt": 2, "and": 2, "or": 2, "not": 1, "xor": 2, "cast": 1,
    "exp": 1, "exp2": 1, "log": 1, "log2": 1, "log1p": 1, "expm1": 1, "sqrt": 1, "rsqrt": 1, "pow": 2, "reciprocal": 1,
    "tanh": 1, "sigmoid": 1, "relu": 1, "erf": 1, "sin": 1, "cos": 1, "floor": 1, "ceil": 1, "round": 1, "trunc": 1,
    "sign": 1, "softplus": 1, "isnan": 1, "isinf": 1, "square": 1, "logaddexp": 2, "atan": 1, "fmod": 2,
    "detach": 1, "random": 3,
}


class Expr:
    """Base of all nodes. `axes`: the free axes; `loads`: the `Load` nodes inside, in order of first appearance."""

    dtype: str
    axes: frozenset[Axis]
    loads: tuple[Load, ...]
    _hash: int

    def _seal(self, children: tuple[Expr, ...], bound: tuple[Axis, ...] = ()) -> None:
        axes: frozenset[Axis] = frozenset().union(*(c.axes for c in children)) if children else frozenset()
        loads: dict[Load, None] = {}
        for child in children:
            loads.update(dict.fromkeys(child.loads))
        put = object.__setattr__
        put(self, "axes", axes - frozenset(bound) if bound else axes)
        put(self, "loads", tuple(loads))
        put(self, "_hash", hash((type(self).__name__, *(getattr(self, f) for f in self.__dataclass_fields__))))  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        # Hashes of strings differ between processes: a node is made anew rather than copied.
        return type(self), tuple(getattr(self, f) for f in self.__dataclass_fields__)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return self._hash

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def is_int(self) -> bool:
        return not self.is_float and self.dtype != BOOL

    def walk(self) -> Iterator[Expr]:
        """Every distinct node of the tree, parents first."""
        seen: set[Expr] = set()
        stack: list[Expr] = [self]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            yield node
            stack.extend(reversed(node.children))


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A literal; `dtype` keeps 1, 1.0 and True apart."""

    value: int | float | bool
    dtype: str = INT

    def __post_init__(self) -> None:
        if self.value != self.value:
            object.__setattr__(self, "value", nan)  # one object, so that a NaN equals its own parse
        self._seal(())

    def __eq__(self, other: object) -> bool:
        # Written out, because dataclasses compare identical values first up to Python 3.12 only.
        if not isinstance(other, Const):
            return NotImplemented
        return self.dtype == other.dtype and (self.value is other.value or self.value == other.value)

    __hash__ = Expr.__hash__


@dataclass(frozen=True)
class Sym(Expr):
    """A symbolic size, known to be at least `low`. Its value is passed to the operator at run time."""

    name: str
    low: int = 2
    dtype: str = field(default=INT, repr=False)

    def __post_init__(self) -> None:
        self._seal(())

    __hash__ = Expr.__hash__


@dataclass(frozen=True)
class Axis(Expr):
    """An integer ranging over 0 <= axis < size. Two axes are the same iff name and size are."""

    name: str
    size: Expr
    dtype: str = field(default=INT, repr=False)

    def __post_init__(self) -> None:
        self._seal(())
        object.__setattr__(self, "axes", frozenset((self,)))

    __hash__ = Expr.__hash__


@dataclass(frozen=True)
class Load(Expr):
    """tensor[index...]: one integer expression for each dimension, all in range by construction."""

    tensor: str
    index: tuple[Expr, ...]
    dtype: str

    def __post_init__(self) -> None:
        self._seal(self.index)
        object.__setattr__(self, "loads", (*self.loads, self))

    __hash__ = Expr.__hash__

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.index


@dataclass(frozen=True)
class Call(Expr):
    """A pointwise operation out of `OPS`. Floats keep the dtype the eager code computed in."""

    op: str
    args: tuple[Expr, ...]
    dtype: str

    def __post_init__(self) -> None:
        assert self.op in OPS, self.op
        self._seal(self.args)

    __hash__ = Expr.__hash__

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.args


@dataclass(frozen=True)
class Dot(Expr):
    """sum over `axes_` of query * key. `query` holds no key axis, `key` no query axis."""

    over: tuple[Axis, ...]
    query: Expr
    key: Expr
    dtype: str

    def __post_init__(self) -> None:
        self._seal((self.query, self.key), self.over)

    __hash__ = Expr.__hash__

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.query, self.key)


@dataclass(frozen=True)
class Reduce(Expr):
    """op ("sum", "max", "min", "prod", "any", "all") of body along one axis."""

    op: str
    axis: Axis
    body: Expr
    dtype: str

    def __post_init__(self) -> None:
        self._seal((self.body,), (self.axis,))

    __hash__ = Expr.__hash__

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.body,)


TRUE, FALSE = Const(True, BOOL), Const(False, BOOL)
ZERO, ONE = Const(0), Const(1)


@dataclass(frozen=True)
class Operand:
    """A tensor the region reads: canonical name, dtype and shape (Const or expressions over Sym)."""

    name: str
    dtype: str
    shape: tuple[Expr, ...]


@dataclass(frozen=True)
class Output:
    """Where a result is put: its element at (*batch, query, *value) at `index` of a contiguous tensor of `shape`, each
    place taken once."""

    shape: tuple[Expr, ...]
    index: tuple[Expr, ...]


@dataclass(frozen=True)
class Region:
    """One attention, in index notation.

        logits[batch, query, key]  = score where mask else <masked>
        weight[batch, query, key]  = softmax over key (and over `extra` logits, whose values are zero)
        out[batch, query, value]   = sum_key weight * gate * values

    `batch` are all axes but query, key and value; a tensor need not depend on all of them (GQA, shared masks).
    `score` holds the `Dot`s; `mask` is the predicate that keeps a pair (TRUE when there is none).
    `logits` is the unreduced, faithful float expression with every finite fill and additive mask as the model
    wrote it: rows that `mask` empties are computed from it, so that they come out as in eager code.
    `empty_row`: "never" (proved that no row is empty), "logits" (as above), "zero" (SDPA's rule: a row is zero, too,
    whose logits are all -inf by what a tensor adds to them).
    `extra`: further logits without key axis (sinks), each a column that is dropped after the softmax.
    `gate` multiplies the normalised weight (Const 1.0 when there is none).
    `out_dtype`: dtype of the result; accumulation is always float32 (float64 for float64 inputs).
    The operator's result is contiguous with dimensions (*batch, query, *value), or what `output` says.
    `row_sums`: the logarithm of a row's normaliser, log(sum_key exp(logits) + sum exp(extra)), is a result, too.
    """

    batch: tuple[Axis, ...]
    query: Axis
    key: Axis
    value: tuple[Axis, ...]
    score: Expr
    mask: Expr
    logits: Expr
    values: Expr
    operands: tuple[Operand, ...]
    out_dtype: str
    normalizer: str = "softmax"
    extra: tuple[Expr, ...] = ()
    gate: Expr = Const(1.0, "float32")
    empty_row: str = "logits"
    output: Output | None = None
    row_sums: bool = False

    def __repr__(self) -> str:
        # What is rare is told only where it is there: kernels are known by this text.
        shown = (f.name for f in fields(self) if f.name != "row_sums" or self.row_sums)
        return f"Region({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @property
    def dots(self) -> tuple[Dot, ...]:
        """The products of queries and keys that the weights are made of."""
        return tuple(dict.fromkeys(n for e in (self.score, self.gate) for n in e.walk() if isinstance(n, Dot)))

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return (self.score, self.mask, self.logits, self.values, self.gate, *self.extra)

    @property
    def syms(self) -> tuple[Sym, ...]:
        """The symbolic sizes, sorted by name: the order in which the operator takes their values."""
        found: set[Sym] = set()
        axes: set[Axis] = {*self.batch, self.query, self.key, *self.value}
        places = () if self.output is None else (*self.output.shape, *self.output.index)
        for root in (*self.expressions, *(d for o in self.operands for d in o.shape), *places):
            for node in root.walk():
                if isinstance(node, Sym):
                    found.add(node)
                elif isinstance(node, Axis):
                    axes.add(node)
                elif isinstance(node, Dot):
                    axes.update(node.over)
        for axis in axes:
            found.update(n for n in axis.size.walk() if isinstance(n, Sym))
        return tuple(sorted(found, key=lambda s: s.name))

    def operand(self, name: str) -> Operand:
        return next(o for o in self.operands if o.name == name)


def rewrite(expr: Expr, visit: Callable[[Expr], Expr | None], build: Callable[[Expr, tuple[Expr, ...]], Expr]) -> Expr:
    """Bottom-up rewrite: `visit(node)` may replace a node outright; else its children are rewritten and
    `build(node, children)` puts it together again (use `refocus.simplify.rebuild` to keep it canonical)."""
    memo: dict[Expr, Expr] = {}
    stack = [(expr, False)]  # not calls of itself: loops make expressions hundreds of nodes deep
    while stack:
        node, entered = stack.pop()
        if entered:
            children = tuple(memo[c] for c in node.children)
            memo[node] = node if all(a is b for a, b in zip(children, node.children)) else build(node, children)
        elif node not in memo:
            done = visit(node)
            if done is not None:
                memo[node] = done
            else:
                stack.append((node, True))
                stack.extend((c, False) for c in reversed(node.children))
    return memo[expr]


_NAMES: dict[str, Any] = {
    c.__name__: c for c in (Const, Sym, Axis, Load, Call, Dot, Reduce, Operand, Output, Region)
} | {"inf": inf, "nan": nan, "__builtins__": {}}


@lru_cache(maxsize=512)
def parse(text: str) -> Any:
    """Rebuild a node or a `Region` from its `repr`. The text only ever comes from `repr` of our own values."""
    return eval(text, dict(_NAMES))
