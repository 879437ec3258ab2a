"""Expressions as Triton source text.

A `Place` is a spot in the kernel where text can be written: a block of lines, and how each axis is laid out there,

    scores, one tile      i[:, None]  j[None, :]        query tile     i[:, None]  d[None, :]
    key tile              j[:, None]  d[None, :]        value tile     j[:, None]  e[None, :]
    one value a row       i

while an axis that a place does not lay out is a number (one program has one `b`, one `h`). Everything in a place is of
full rank, so Triton broadcasts it without further ado. Places nest: what does not depend on the axes that an inner
place adds is computed in the outer one, so loads and dots that do not change leave the loop over keys.

Floats are float32 whatever they were loaded as; integers are int32 unless a loaded int64 widens them (or the whole
kernel is `wide`, for tensors of 2**31 elements and more). Float casts are the identity. The argument of a cast to an
integer is computed in its own dtype and with correctly rounded operations: its boundaries must not move.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from refocus.codegen.functions import FUNCTIONS
from refocus.codegen.writer import Block, Names
from refocus.ir import BOOL, Axis, Call, Const, Dot, Expr, Load, Region, Sym
from refocus.simplify import is_nonneg

# Binding strength of Python's operators, weakest first.
COMPARE, OR, XOR, AND, SHIFT, ADD, MUL, UNARY, ATOM = range(9)

_INFIX = {"eq": "==", "ne": "!=", "le": "<=", "lt": "<"}
_BITWISE = {"or": ("|", OR), "xor": ("^", XOR), "and": ("&", AND)}
# Operations of Triton's language, and of `refocus.codegen.functions`, that take floats.
_BUILTIN = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sqrt": "tl.sqrt_rn", "rsqrt": "tl.rsqrt",
    "erf": "tl.erf", "sin": "tl.sin", "cos": "tl.cos", "floor": "tl.floor", "ceil": "tl.ceil", "abs": "tl.abs",
    "round": "round_even", "pow": "power", "mod": "float_mod", "log1p": "log1p", "expm1": "expm1", "tanh": "tanh",
    "sigmoid": "sigmoid", "relu": "relu", "trunc": "trunc", "sign": "sign", "softplus": "softplus", "isnan": "isnan",
    "isinf": "isinf", "square": "square", "logaddexp": "logaddexp", "atan": "atan",
}  # fmt: skip
_NARROW = ("float16", "bfloat16")
_SMALLEST, _LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class Argument:
    """A kernel argument: `kind` "tensor" (operand `index`), "stride" (its dimension `dim`), "size", "list" (counts and
    indices of tiles, see `refocus.codegen.tile_lists`), "saved" (what a kernel before this one left for it), "count" (a
    number that the launch chooses) or "output". `dtype`: of what is saved and of an output."""

    name: str
    kind: str
    index: int = 0
    dim: int = 0
    dtype: str = ""


class Scope:
    """What all places of one kernel share: names, arguments, axis variables and the functions that it calls."""

    def __init__(self, region: Region, reserved: Iterable[str]) -> None:
        self.region = region
        self.names = Names((*reserved, *FUNCTIONS, "tl", "triton", "range", "float"))
        self.functions: set[str] = set()
        self.axes: dict[Axis, str] = {}
        self.used_axes: set[Axis] = set()
        self.limits: dict[Axis, tuple[str, str]] = {}
        self._arguments: dict[str, Argument] = {}
        self._index = {o.name: n for n, o in enumerate(region.operands)}
        stems = Names()
        self._stems = {o.name: stems.take(o.name, f"operand_{n}") for n, o in enumerate(region.operands)}
        for operand in region.operands:
            stem = self._stems[operand.name]
            self.names.reserve(f"{stem}_ptr", *(f"{stem}_stride_{k}" for k in range(len(operand.shape))))
        self._sizes = {s: self.names.take(s.name, f"size_{n}") for n, s in enumerate(region.syms)}
        self._loads = Counter(load.tensor for load in {x for e in region.expressions for x in e.loads})

    def declare(self, axis: Axis, otherwise: str) -> str:
        """The variable that holds the positions along `axis`."""
        if axis not in self.axes:
            self.axes[axis] = self.names.take(axis.name, otherwise)
        return self.axes[axis]

    def limit(self, axis: Axis, variable: str, size: str) -> None:
        """Lanes of `variable` at or past `size` lie outside of `axis`: loads and results there are masked."""
        self.limits[axis] = (variable, size)

    def argument(self, name: str, kind: str, index: int = 0, dim: int = 0, dtype: str = "") -> str:
        self._arguments.setdefault(name, Argument(name, kind, index, dim, dtype))
        return name

    def stem(self, tensor: str) -> str:
        """What the names of everything about an operand begin with."""
        return self._stems[tensor]

    def pointer(self, tensor: str) -> str:
        return self.argument(f"{self._stems[tensor]}_ptr", "tensor", self._index[tensor])

    def stride(self, tensor: str, dim: int) -> str:
        return self.argument(f"{self._stems[tensor]}_stride_{dim}", "stride", self._index[tensor], dim)

    def size(self, sym: Sym) -> str:
        return self.argument(self._sizes[sym], "size", self.region.syms.index(sym))

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """All arguments that the text mentions: tensors first, then strides, then sizes."""
        order = ("tensor", "saved", "list", "output", "stride", "size", "count")
        return tuple(sorted(self._arguments.values(), key=lambda a: (order.index(a.kind), a.index, a.dim)))

    def load_name(self, load: Load, layout: Iterable[Axis]) -> str:
        """What to call a loaded value: its operand and, if that is read in several places, where in it."""
        axes = layout if self._loads[load.tensor] > 1 else ()
        return "_".join([self._stems[load.tensor], *(self.axes[a] for a in axes if a in load.axes)])


@dataclass(eq=False)
class Place:
    """A spot in the kernel where expressions are computed; see the module's docstring.

    `layout`: the suffix of each axis laid out here. `outer`: the places around this one; an expression is computed in
    the first of them that lays out all its axes. `in_loop`: whether names here end with a loop. `unmasked`: axes all
    of whose lanes are in range here. `dots`: how to compute a Dot here (None: none can occur). `unknown`: axes along
    which a loop further in moves, so that nothing that depends on them can be computed here.
    """

    scope: Scope
    block: Block
    layout: Mapping[Axis, str] = field(default_factory=dict)
    outer: tuple[Place, ...] = ()
    in_loop: bool = False
    unmasked: frozenset[Axis] = frozenset()
    dots: Dots | None = None
    unknown: frozenset[Axis] = frozenset()
    uses: Counter[Expr] = field(default_factory=Counter)
    known: dict[tuple[Expr, bool], str] = field(default_factory=dict)
    tiles: dict[tuple[Expr, str], str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)

    def expect(self, *roots: Expr) -> None:
        """Count how often each part of `roots` is used, so that what is used twice is computed once."""
        for root in roots:
            self.uses[root] += 1
            for node in root.walk():
                self.uses.update(set(node.children))

    def text(self, expr: Expr, level: int = COMPARE, exact: bool = False) -> str:
        """`expr` as an operand of an operator that binds at `level`. May write lines that compute parts of it."""
        text, strength = self._text(expr, exact)
        return text if strength >= level else f"({text})"

    def number(self, expr: Expr, level: int = COMPARE, exact: bool = False) -> str:
        """`text` of a float, or of an integer or condition made one."""
        return self.text(expr, level, exact) if expr.is_float else f"tl.cast({self.text(expr)}, tl.float32)"

    def named(self, expr: Expr, wish: str) -> str:
        """A variable that holds `expr`, computed once."""
        home = self._home(expr)
        return home.known.get((expr, False)) or home._bind(expr, False, wish)

    def assign(self, name: str, expr: Expr) -> None:
        """Write `name = expr`."""
        shared = self.uses[expr] > 1
        text = self.text(expr) if shared or (expr, False) in self.known else self._show(expr, False)[0]
        self.block.line(f"{name} = {text}")

    def guards(self, axes: Iterable[Axis]) -> list[str]:
        """The conditions under which lanes lie within those of `axes` that are laid out here."""
        found: dict[str, None] = {}
        for axis, (variable, size) in self.scope.limits.items():
            if axis in axes and axis in self.layout and axis not in self.unmasked:
                found[f"{variable}{self.layout[axis]} < {size}"] = None
        return list(found)

    def tile(self, expr: Expr, dtype: str, shape: str, wish: str) -> str:
        """`expr` as an operand of tl.dot: full `shape`, of `dtype`, zero outside of its axes. Named `wish`."""
        home = self._home(expr)
        key = (expr, dtype)
        if key in home.tiles:
            return home.tiles[key]
        guards = home.guards(expr.axes)
        if isinstance(expr, Load):
            text = home._load(expr)
            text = f"{text}.to(tl.{dtype})" if expr.dtype != dtype else text
        else:
            text = home.number(expr, COMPARE if guards else ATOM)
            if guards:
                text = f"tl.where({conjunction(guards)}, {text}, 0.0)"
            text = f"{text}.to(tl.{dtype})" if dtype != "float32" else text
        suffixes = {self.layout[a] for a in expr.axes if a in self.layout}
        if len(suffixes) < 2:
            text = f"tl.zeros({shape}, tl.{dtype}) + {text}"
        name = home.scope.names.take(wish, in_loop=home.in_loop)
        home.block.line(f"{name} = {text}")
        home.tiles[key] = name
        return name

    def _home(self, expr: Expr) -> Place:
        """The outermost place that lays out all axes of `expr` that this one does. Dots stay where they are."""
        needed = [a for a in expr.axes if a in self.layout]
        if any(isinstance(n, Dot) for n in expr.walk()):
            return self
        for place in self.outer:
            if all(a in place.layout for a in needed) and not place.unknown & expr.axes:
                return place._home(expr)
        return self

    def _text(self, expr: Expr, exact: bool) -> tuple[str, int]:
        home = self._home(expr)
        exact = exact and not expr.is_int and not isinstance(expr, Load)
        key = (expr, exact)
        if key in home.known:
            return home.known[key], ATOM
        if isinstance(expr, (Load, Dot)):
            return home._bind(expr, exact), ATOM
        if home is not self and expr.loads:
            return home._bind(expr, exact), ATOM
        if isinstance(expr, Call) and expr.op == "cast" and expr.is_int and expr.args[0].is_float:
            return home._bind(expr, exact), ATOM
        if self.uses[expr] > 1 and isinstance(expr, Call) and any(isinstance(a, (Call, Load, Dot)) for a in expr.args):
            return home._bind(expr, exact), ATOM
        return self._show(expr, exact)

    def _bind(self, expr: Expr, exact: bool, wish: str = "") -> str:
        """Compute `expr` here, into a variable of its own."""
        text = self._show(expr, exact)[0]
        if isinstance(expr, Load):
            wish = self.scope.load_name(expr, self.layout)
        kind = "dot" if isinstance(expr, Dot) else "kept" if expr.dtype == BOOL else "index" if expr.is_int else "term"
        name = self.scope.names.take(wish or kind, kind, self.in_loop)
        self.block.line(f"{name} = {text}")
        self.known[expr, exact] = name
        return name

    # ------------------------------------------------------------------------------------------------- by node kind

    def _show(self, expr: Expr, exact: bool) -> tuple[str, int]:
        if isinstance(expr, Const):
            return literal(expr)
        if isinstance(expr, Sym):
            return self.scope.size(expr), ATOM
        if isinstance(expr, Axis):
            self.scope.used_axes.add(expr)
            return self.scope.axes[expr] + self.layout.get(expr, ""), ATOM
        if isinstance(expr, Load):
            text = self._load(expr)
            return (f"{text}.to(tl.float32)" if expr.dtype in _NARROW else text), ATOM
        if isinstance(expr, Dot):
            assert self.dots is not None, "a Dot where none can be"
            return self.dots.text(self, expr), ATOM
        assert isinstance(expr, Call), type(expr).__name__
        text, level = self._call(expr, exact)
        if exact and expr.dtype in _NARROW:
            return f"tl.cast({text}, tl.{expr.dtype}).to(tl.float32)", ATOM
        return text, level

    def _load(self, load: Load) -> str:
        """tl.load(pointer + offsets, mask): the part of the address without lanes is computed once, outside."""
        fixed = self._root(load)
        base = [self.scope.pointer(load.tensor)]
        lanes: list[str] = []
        for dim, index in enumerate(load.index):
            if isinstance(index, Const) and index.value == 0:
                continue
            laid_out = any(a in self.layout for a in index.axes)
            if laid_out and isinstance(index, Call) and any(isinstance(a, Call) and a.op != "mul" for a in index.args):
                home, wish = self._home(index), f"{self.scope.stem(load.tensor)}_{dim}"
                text = home.known.get((index, False)) or home._bind(index, False, wish)
            else:
                text = (self if laid_out else fixed).text(index, MUL)
            (lanes if laid_out else base).append(f"{text} * {self.scope.stride(load.tensor, dim)}")
        if not lanes:
            return f"tl.load({' + '.join(base)})"
        if len(base) > 1:
            base = [fixed._base(self.scope.stem(load.tensor), " + ".join(base))]
        return f"tl.load({' + '.join((*base, *lanes))}{where_kept(self.guards(load.axes), '0')})"

    def _root(self, expr: Expr) -> Place:
        """The outermost place where the positions of `expr` along axes without lanes are known."""
        return next((place._root(expr) for place in self.outer if not place.unknown & expr.axes), self)

    def _base(self, stem: str, pointer: str) -> str:
        if pointer not in self.bases:
            self.bases[pointer] = self.scope.names.take(f"{stem}_base", "base", self.in_loop)
            self.block.line(f"{self.bases[pointer]} = {pointer}")
        return self.bases[pointer]

    def _call(self, expr: Call, exact: bool) -> tuple[str, int]:
        op, args = expr.op, expr.args
        if expr.is_float and not exact:
            scale, rest = split_scale(expr)
            if scale != 1.0:
                return f"{self.text(rest, MUL)} * {scale!r}", MUL
        if op == "cast":
            return self._cast(expr, exact)
        if op in ("add", "sub"):
            return self._sum(expr, exact), ADD
        if op == "mul":
            minus = args[0] == Const(-1)
            factors = args[1:] if minus else args
            text = " * ".join(self.text(a, MUL if n == 0 else UNARY, exact) for n, a in enumerate(factors))
            return f"-{text}" if minus else text, MUL
        if op in _BITWISE:
            sign, level = _BITWISE[op]
            return f" {sign} ".join(self.text(a, level + (n > 0), exact) for n, a in enumerate(args)), level
        if op == "not":
            return self._not(args[0], exact)
        if op in _INFIX:
            return f"{self.text(args[0], OR, exact)} {_INFIX[op]} {self.text(args[1], OR, exact)}", COMPARE
        if op == "neg":
            return f"-{self.text(args[0], UNARY, exact)}", UNARY
        if op == "where":
            return f"tl.where({', '.join(self.text(a, exact=exact) for a in args)})", ATOM
        if op in ("min", "max"):
            inner = f"{self.text(args[0], exact=exact)}, {self.text(args[1], exact=exact)}"
            # Eager minima and maxima keep a NaN.
            nan = ", propagate_nan=tl.PropagateNan.ALL" if any(a.is_float for a in args) else ""
            return f"tl.{op}imum({inner}{nan})", ATOM
        if op in ("floordiv", "mod") and all(a.is_int for a in args):
            return self._divide(op, args[0], args[1])
        if op == "abs" and expr.is_int:
            return f"tl.abs({self.text(args[0])})", ATOM
        return self._float_call(op, args, exact)

    def _sum(self, expr: Call, exact: bool) -> str:
        args = expr.args
        if expr.is_int and expr.op == "add":
            args = tuple(sorted(args, key=_term_rank))
        text = self.text(args[0], ADD, exact)
        for arg in args[1:]:
            if expr.op == "sub":
                text += f" - {self.text(arg, MUL, exact)}"
                continue
            term = self.text(arg, ADD, exact)
            # A leading minus belongs to a product, so it can become the operator.
            text += f" - {term[1:]}" if term.startswith("-") else f" + {term}"
        return text

    def _not(self, arg: Expr, exact: bool) -> tuple[str, int]:
        if isinstance(arg, Call) and arg.op in ("eq", "le") and (arg.op == "eq" or arg.args[0].is_int):
            left, right = (self.text(a, OR, exact) for a in arg.args)
            return f"{left} {'!=' if arg.op == 'eq' else '>'} {right}", COMPARE
        return f"~{self.text(arg, UNARY, exact)}", UNARY

    def _divide(self, op: str, a: Expr, b: Expr) -> tuple[str, int]:
        """Triton truncates: that is the floor where nothing is negative, and a shift or a mask is one always."""
        sign = "//" if op == "floordiv" else "%"
        if is_nonneg(a) and (not isinstance(b, Const) or b.value > 0):
            return f"{self.text(a, MUL)} {sign} {self.text(b, UNARY)}", MUL
        size = int(b.value) if isinstance(b, Const) else 0
        if size > 0 and size & (size - 1) == 0:
            if op == "floordiv":
                return f"{self.text(a, SHIFT)} >> {size.bit_length() - 1}", SHIFT
            return f"{self.text(a, AND)} & {size - 1}", AND
        name = "floor_div" if op == "floordiv" else "floor_mod"
        self.scope.functions.add(name)
        return f"{name}({self.text(a)}, {self.text(b)})", ATOM

    def _cast(self, expr: Call, exact: bool) -> tuple[str, int]:
        (arg,) = expr.args
        if expr.dtype == BOOL:
            return f"{self.text(arg, OR, exact)} != 0", COMPARE
        if expr.is_float:
            return (self._text(arg, exact) if arg.is_float else (self.number(arg), ATOM))
        if arg.is_float:
            # A cast float is a position; positions fit.
            return f"tl.cast({self.text(arg, exact=True)}, tl.int32)", ATOM
        return (f"tl.cast({self.text(arg)}, tl.int32)", ATOM) if arg.dtype == BOOL else self._text(arg, exact)

    def _float_call(self, op: str, args: tuple[Expr, ...], exact: bool) -> tuple[str, int]:
        if op == "div" and exact:
            return f"tl.div_rn({self.number(args[0], exact=True)}, {self.number(args[1], exact=True)})", ATOM
        if op == "div":
            return f"{self.text(args[0], MUL)} / {self.text(args[1], UNARY)}", MUL
        if op == "reciprocal":
            return f"1.0 / {self.text(args[0], UNARY, exact)}", MUL
        if op == "fmod":
            return f"{self.text(args[0], MUL, exact)} % {self.text(args[1], UNARY, exact)}", MUL
        if op == "floordiv":
            return f"tl.floor({self.text(args[0], MUL, exact)} / {self.text(args[1], UNARY, exact)})", ATOM
        if op == "random":
            self.scope.functions.add("counter_random")
            return f"counter_random({', '.join(self.text(a) for a in args)})", ATOM
        if op == "detach":
            return self._text(args[0], exact)
        inner = ", ".join(self.number(a, exact=exact) for a in args)
        name = _BUILTIN[op]
        if name in FUNCTIONS:
            self.scope.functions.add(name)
        return f"{name}({inner})", ATOM


def _term_rank(term: Expr) -> int:
    """The terms of a sum of integers as people write them: what is added, what is taken off, a number."""
    if isinstance(term, Const):
        return 2
    first = term.args[0] if isinstance(term, Call) and term.op == "mul" else term
    return int(isinstance(first, Const) and first.value < 0)


class Dots:
    """How a schedule computes a Dot: it owns the tiles that take part."""

    def text(self, place: Place, dot: Dot) -> str:
        raise NotImplementedError


def split_scale(expr: Expr) -> tuple[float, Expr]:
    """expr = scale * rest with a constant scale > 0: the constants of nested products and quotients of floats."""
    if isinstance(expr, Call) and expr.is_float and expr.op in ("mul", "div"):
        numbers = [a.value for a in expr.args if isinstance(a, Const)]
        rest = tuple(a for a in expr.args if not isinstance(a, Const))
        factor = math.prod(numbers)
        if numbers and 0 < factor < math.inf and ((expr.op == "mul" and rest) or rest == expr.args[:1]):
            scale, inner = split_scale(rest[0] if len(rest) == 1 else Call("mul", rest, expr.dtype))
            return (scale * factor if expr.op == "mul" else scale / factor), inner
    return 1.0, expr


def conjunction(conditions: Iterable[str]) -> str:
    """Conditions joined by &; a single one stands alone."""
    conditions = list(conditions)
    return conditions[0] if len(conditions) == 1 else " & ".join(f"({c})" for c in conditions)


def where_kept(conditions: Sequence[str], other: str = "") -> str:
    """The end of the arguments of a load or a store: the pairs it is for, and what a load finds elsewhere."""
    if not conditions:
        return ""
    return f", mask={conjunction(conditions)}" + (f", other={other}" if other else "")


def literal(const: Const) -> tuple[str, int]:
    """A constant, with its binding strength. Triton would make a float that float32 cannot hold a float64, and
    everything that meets it."""
    value = const.value
    if isinstance(value, float):
        if abs(value) > _LARGEST or math.isnan(value):
            return f'float("{math.copysign(math.inf, value) if abs(value) > _LARGEST else value}")', ATOM
        if abs(value) < _SMALLEST:
            return "0.0", ATOM
    return repr(value), UNARY if value < 0 else ATOM
