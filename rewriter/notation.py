"""Index notation for people: one line for an expression, a few lines for a region.

The text is stable (a pure function of the structure) and is meant to be read, not parsed: casts that lose nothing
are left out, constants show six digits, and linear comparisons are arranged the way a person writes them
(`i - j < 16`, not `i <= j + 15`). Use `repr` and `refocus.ir.parse` for an exact round trip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isinf, isnan

from refocus.ir import BOOL, TRUE, Axis, Call, Const, Dot, Expr, Load, Reduce, Region, Sym

# Binding strength, weakest first. SUM is a `sum_d a * b`: a product that swallows every factor to its right.
OR, AND, NOT, COMPARE, ADD, SUM, MUL, NEG, POWER, ATOM = range(10)

_INFIX = {"eq": "==", "ne": "!=", "le": "<=", "lt": "<", "xor": "!="}
_NEGATED = {"==": "!=", "!=": "==", "<=": ">", "<": ">="}
_MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
_LOWEST = {
    -65504.0: "finfo(float16).min",
    -3.3895313892515355e38: "finfo(bfloat16).min",
    -3.4028234663852886e38: "finfo(float32).min",
    -1.7976931348623157e308: "finfo(float64).min",
}


def notation(item: Expr | Region) -> str:
    """The index notation of an expression (one line) or of a region (one line for each of its parts)."""
    if isinstance(item, Region):
        return _region(item)
    return _Printer(_axis_names(a for a in item.walk() if isinstance(a, Axis))).at(item, OR)


def _region(region: Region) -> str:
    order = [*region.batch, region.query, region.key, *region.value]
    inner = (node for root in region.expressions for node in root.walk())
    for node in inner:
        order.extend([node] if isinstance(node, Axis) else node.over if isinstance(node, Dot) else [])
    names = _axis_names(order)
    plain = _Printer(names)

    def head(symbol: str, *axes: Axis) -> str:
        return f"{symbol}[{','.join(names[a] for a in axes)}]"

    masked, gated = region.mask != TRUE, not (isinstance(region.gate, Const) and region.gate.value == 1.0)
    alike = isinstance(region.score, Const) and gated and not region.extra  # a softmax of equal scores is a mean
    pairs = head("W" if alike else "S", *region.batch, region.query, region.key)
    lines = [(pairs, plain.at(region.gate if alike else region.score, OR))]
    inside = "W" if alike else "S"
    if masked:
        lines.append(("mask", plain.at(region.mask, OR)))
        inside += " | mask"
    if region.extra:
        lines.append(("extra", ", ".join(plain.at(e, OR) for e in region.extra)))
        inside += "; extra"
    key = names[region.key]
    kind = region.normalizer
    weight = {"softmax": f"softmax_{key}", "sum": f"normalize_{key}", "none": ""}.get(kind, kind) + f"({inside})"
    if alike:
        weight = f"mean_{key}({inside})"
    elif gated:
        lines.append(("gate", plain.at(region.gate, OR)))
        weight = f"({weight} * gate)"
    output = head("O", *region.batch, region.query, *region.value)
    lines.append((output, f"{weight} . {plain.at(region.values, NEG)}"))
    if region.row_sums:
        told = f"number_{key}(mask)" if alike else f"logsumexp_{key}({inside})"
        lines.append((head("n" if alike else "L", *region.batch, region.query), told))
    if region.output is not None:
        lines.append(("put at", f"[{', '.join(plain.at(e, OR) for e in region.output.index)}]"))
    if masked and region.empty_row == "zero":
        lines.append(("empty row", "0"))
    elif masked and region.empty_row == "logits":
        short = _Printer(names, {region.score: "S", region.mask: "mask"})
        tail = "; extra" if region.extra else ""
        lines.append(("empty row", f"softmax_{key}({short.at(region.logits, OR)}{tail})"))
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left:<{width}} = {right}" for left, right in lines)


def _axis_names(axes: Iterable[Axis]) -> dict[Axis, str]:
    """Names as they are, with primes where two different axes share one."""
    names: dict[Axis, str] = {}
    taken: set[str] = set()
    for axis in axes:
        if axis not in names:
            name = axis.name
            while name in taken:
                name += "'"
            taken.add(name)
            names[axis] = name
    return names


def _flatten(op: str, expr: Expr) -> Iterator[Expr]:
    if isinstance(expr, Call) and expr.op == op:
        for arg in expr.args:
            yield from _flatten(op, arg)
    else:
        yield expr


def _linear(expr: Expr, scale: int = 1) -> Iterator[tuple[Expr | None, int]]:
    """An integer expression as (atom, coefficient) pairs; the atom None is the constant."""
    if isinstance(expr, Const):
        yield None, scale * int(expr.value)
    elif isinstance(expr, Call) and expr.op in ("add", "sub"):
        for position, arg in enumerate(expr.args):
            yield from _linear(arg, -scale if expr.op == "sub" and position else scale)
    elif isinstance(expr, Call) and expr.op == "neg":
        yield from _linear(expr.args[0], -scale)
    elif isinstance(expr, Call) and expr.op == "mul" and any(isinstance(a, Const) for a in expr.args):
        rest = [a for a in expr.args if not isinstance(a, Const)]
        for arg in expr.args:
            scale *= int(arg.value) if isinstance(arg, Const) else 1
        if len(rest) == 1:
            yield from _linear(rest[0], scale)
        else:
            yield (Call("mul", tuple(rest), expr.dtype) if rest else None), scale
    else:
        yield expr, scale


@dataclass
class _Printer:
    """Prints with the given axis names; `known` replaces whole sub-expressions by a name."""

    names: Mapping[Axis, str]
    known: Mapping[Expr, str] = field(default_factory=dict)

    def at(self, expr: Expr, level: int) -> str:
        """Text of `expr`, parenthesised when it binds weaker than `level`."""
        if expr in self.known and expr != TRUE:
            return self.known[expr]
        text, strength = self.show(expr)
        return text if strength >= level else f"({text})"

    def show(self, expr: Expr) -> tuple[str, int]:
        if isinstance(expr, Const):
            text = _literal(expr)
            return text, NEG if text.startswith("-") else ATOM
        if isinstance(expr, Axis):
            return self.names.get(expr, expr.name), ATOM
        if isinstance(expr, Sym):
            return expr.name, ATOM
        if isinstance(expr, Load):
            inside = ",".join(self.at(e, OR) for e in expr.index)
            return (f"{expr.tensor}[{inside}]" if inside else expr.tensor), ATOM
        if isinstance(expr, Dot):
            over = ",".join(self.names.get(a, a.name) for a in expr.over)
            return f"sum_{over} {self.at(expr.query, MUL)} * {self.at(expr.key, MUL)}", SUM
        if isinstance(expr, Reduce):
            return f"{expr.op}_{self.names.get(expr.axis, expr.axis.name)}({self.at(expr.body, OR)})", ATOM
        assert isinstance(expr, Call)
        return self.call(expr)

    def call(self, expr: Call) -> tuple[str, int]:
        op, args = expr.op, expr.args
        if op in ("and", "or") and expr.dtype == BOOL:
            level = AND if op == "and" else OR
            return f" {op} ".join(self.at(a, level + 1) for a in _flatten(op, expr)), level
        if op == "not" and expr.dtype == BOOL:
            inner = args[0]
            if isinstance(inner, Call) and (inner.op == "eq" or (inner.op == "le" and inner.args[0].is_int)):
                return self.compare(inner, negate=True), COMPARE
            return f"not {self.at(inner, ADD)}", NOT
        if op in _INFIX:
            return self.compare(expr), COMPARE
        if op in ("add", "sub"):
            return self.total(expr)
        if op == "mul":
            return self.product(expr)
        if op == "neg":
            return f"-{self.at(args[0], NEG)}", NEG
        if op == "div":
            return f"{self.at(args[0], MUL)} / {self.at(args[1], NEG)}", MUL
        if op == "reciprocal":
            return f"1 / {self.at(args[0], NEG)}", MUL
        if op in ("floordiv", "mod"):
            left, right = self.at(args[0], NEG), self.at(args[1], NEG)
            sign = "//" if op == "floordiv" else "%"
            return (f"{left} {sign} {right}" if left.startswith("(") else f"{left}{sign}{right}"), MUL
        if op in ("pow", "square"):
            exponent = "2" if op == "square" else self.at(args[1], POWER)
            return f"{self.at(args[0], ATOM)}**{exponent}", POWER
        if op == "cast":
            return self.cast(expr)
        parts = [p for a in args for p in _flatten(op, a)] if op in ("min", "max") else list(args)
        return f"{op}({', '.join(self.at(p, OR) for p in parts)})", ATOM

    def cast(self, expr: Call) -> tuple[str, int]:
        source, target = expr.args[0].dtype, expr.dtype
        digits = _MANTISSA.get(target, 0)
        lossless = digits >= _MANTISSA.get(source, 24) if source != BOOL else False
        # Between integers nothing is lost either as far as positions go.
        if lossless or (expr.is_int and expr.args[0].is_int):
            inner = expr.args[0]
            return (self.known[inner], ATOM) if inner in self.known else self.show(inner)
        name = "int" if expr.is_int else "float" if source == BOOL else target
        return f"{name}({self.at(expr.args[0], OR)})", ATOM

    def total(self, expr: Call) -> tuple[str, int]:
        if expr.is_int:
            return self.terms(_linear(expr)), ADD
        if expr.op == "sub":
            return f"{self.at(expr.args[0], ADD)} - {self.at(expr.args[1], ADD + 1)}", ADD
        text = ""
        for arg in _flatten("add", expr):
            part = self.at(arg, ADD + 1)
            if not text:
                text = part
            elif part.startswith("-"):
                text += f" - {part[1:]}"
            else:
                text += f" + {part}"
        return text, ADD

    def product(self, expr: Call) -> tuple[str, int]:
        if expr.is_int:
            return "*".join(self.at(a, NEG) for a in expr.args), MUL
        # Constants lead and sums over axes come last, where they need no parentheses.
        factors = sorted(_flatten("mul", expr), key=lambda a: (not isinstance(a, Const)) + isinstance(a, Dot))
        last = len(factors) - 1
        text = " * ".join(self.at(a, SUM if n == last else MUL if n == 0 else NEG) for n, a in enumerate(factors))
        return text, SUM if isinstance(factors[last], Dot) else MUL

    def terms(self, pairs: Iterable[tuple[Expr | None, int]]) -> str:
        """A sum of coefficient * atom: positive terms first, the constant last."""
        pairs = [(atom, scale) for atom, scale in pairs if scale]
        pairs.sort(key=lambda p: (p[0] is None, p[1] < 0))
        text = ""
        for atom, scale in pairs:
            size = abs(scale)
            factor = "" if size == 1 else f"{size}*"
            part = str(size) if atom is None else factor + self.at(atom, NEG if factor else MUL)
            sign = "-" if scale < 0 else "+"
            text = f"{text} {sign} {part}" if text else part if scale > 0 else f"-{part}"
        return text or "0"

    def compare(self, expr: Call, negate: bool = False) -> str:
        left, right = expr.args
        if expr.op in ("eq", "le") and left.is_int and right.is_int:
            return self.linear_compare(expr.op, left, right, negate)
        # Two levels up: comparisons do not chain here, and a bool operand is a condition of its own.
        sign = _NEGATED[_INFIX[expr.op]] if negate else _INFIX[expr.op]
        return f"{self.at(left, ADD)} {sign} {self.at(right, ADD)}"

    def linear_compare(self, op: str, left: Expr, right: Expr, negate: bool) -> str:
        """`left <= right` or `left == right` over integers, arranged as (axis terms) against (sizes and constants)."""
        total: dict[Expr | None, int] = {}
        for side, sign in ((left, 1), (right, -1)):
            for atom, scale in _linear(side):
                total[atom] = total.get(atom, 0) + sign * scale
        constant = -total.pop(None, 0)
        if op == "le" and negate:  # a > c is -a <= -c - 1
            total, constant = {a: -s for a, s in total.items()}, -constant - 1
        plus = [(a, s) for a, s in total.items() if a is not None and s > 0 and a.axes]
        minus = [(a, -s) for a, s in total.items() if a is not None and s < 0 and a.axes]
        sizes = [(a, -s) for a, s in total.items() if a is not None and s and not a.axes]
        bound = [*sizes, (None, constant)]
        against = [*sizes, (None, constant + 1)]
        flipped = [(a, -s) for a, s in bound]
        if op == "eq":
            relation = "!=" if negate else "=="
            if not plus or (len(minus) == 1 and len(plus) > 1):
                plus, minus, bound = minus, plus, flipped
            return f"{self.terms(plus)} {relation} {self.terms([*minus, *bound])}"
        if not plus and minus:
            if sizes and constant == -1:
                return f"{self.terms(minus)} > {self.terms([(a, -s) for a, s in sizes])}"
            return f"{self.terms(minus)} >= {self.terms(flipped)}"
        if minus and not sizes and constant < -1:
            return f"{self.terms([*minus, *((a, -s) for a, s in plus)])} >= {-constant}"
        if minus and not sizes and constant > 0:
            plus, minus = [*plus, *((a, -s) for a, s in minus)], []
        if constant == -1 or (constant > 0 and not sizes):
            return f"{self.terms(plus)} < {self.terms([*minus, *against])}"
        return f"{self.terms(plus)} <= {self.terms([*minus, *bound])}"


def _literal(const: Const) -> str:
    value = const.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if value in _LOWEST:
        return _LOWEST[value]
    if isnan(value) or isinf(value):
        return str(value)
    text = f"{value:.6g}"
    return text if "." in text or "e" in text else text + ".0"
