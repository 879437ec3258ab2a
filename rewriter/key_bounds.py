"""The keys a run of queries needs, solved for from a closed-form mask: loop bounds to write into a kernel.

Every comparison that is linear in the key (also under `//`, min, max and abs) is solved for it, `j >= low(i)` or
`j <= high(i)`; then `i` is replaced by the end of the run that makes the bound weakest (for the range outside which
nothing is allowed) or strongest (for the range inside which everything is).
"""

from __future__ import annotations

from dataclasses import dataclass

from refocus.ir import FALSE, TRUE, Axis, Call, Const, Expr
from refocus.polynomial import Poly, from_poly, poly_add, poly_scale, to_poly
from refocus.simplify import add, bounds, floordiv, is_nonneg, le, maximum, minimum, mul, neg, sub


@dataclass(frozen=True)
class KeyBounds:
    """For the queries first_query..last_query (both included), as expressions of these two, sizes and batch axes:

    `lo`, `hi`: a key below `lo` or from `hi` on is allowed for none of them; None where the mask sets no such bound.
    `full_lo`, `full_hi`: each key in full_lo <= key < full_hi is allowed for all of them (the range may be empty);
    both None where no such range was found. All are clamped to 0 <= bound <= key.size, `lo` and `full_lo` from below,
    `hi` and `full_hi` from above only: a range whose end is not above its start is empty.
    """

    lo: Expr | None = None
    hi: Expr | None = None
    full_lo: Expr | None = None
    full_hi: Expr | None = None


def first_query(query: Axis) -> Axis:
    """The symbol for the first query of the run."""
    return Axis("q_first", query.size)


def last_query(query: Axis) -> Axis:
    """The symbol for the last query of the run (included)."""
    return Axis("q_last", query.size)


def key_bounds(mask: Expr, query: Axis, key: Axis, loads: bool = False) -> KeyBounds:
    """Bounds that hold for any run of queries. `loads`: whether they may read tensors at batch axes (`lengths[b]`)."""
    solver = _Solver(query, key, loads)
    found = solver.bounds(mask)
    lo = None if found.lo is None else maximum(found.lo, 0)
    hi = None if found.hi is None else minimum(found.hi, key.size)
    full_lo = None if found.full is None else maximum(found.full[0], 0)
    full_hi = None if found.full is None else minimum(found.full[1], key.size)
    return KeyBounds(None if lo == Const(0) else lo, None if hi == key.size else hi, full_lo, full_hi)


@dataclass(frozen=True)
class _Range:
    """`lo`, `hi` (excluded) as in `KeyBounds`, without clamps; `full` the range allowed for all queries, or None."""

    lo: Expr | None = None
    hi: Expr | None = None
    full: tuple[Expr, Expr] | None = None


@dataclass(frozen=True)
class _Solver:
    query: Axis
    key: Axis
    loads: bool

    def bounds(self, mask: Expr) -> _Range:
        if mask == TRUE:
            return _Range(full=(Const(0), self.key.size))
        if mask == FALSE:
            return _Range(hi=Const(0))
        if not isinstance(mask, Call):
            return _Range()
        if mask.op == "and":
            return self._both(*(self.bounds(a) for a in mask.args))
        if mask.op == "or":
            return self._either(*(self.bounds(a) for a in mask.args))
        if mask.op in ("le", "eq") and all(a.is_int for a in mask.args):
            difference = poly_add(to_poly(mask.args[1]), poly_scale(to_poly(mask.args[0]), -1))
            at_least = self._nonneg(difference)
            return at_least if mask.op == "le" else self._both(at_least, self._nonneg(poly_scale(difference, -1)))
        return _Range()

    def _both(self, a: _Range, b: _Range) -> _Range:
        lo = a.lo if b.lo is None else b.lo if a.lo is None else maximum(a.lo, b.lo)
        hi = a.hi if b.hi is None else b.hi if a.hi is None else minimum(a.hi, b.hi)
        full = None
        if a.full is not None and b.full is not None:
            full = (maximum(a.full[0], b.full[0]), minimum(a.full[1], b.full[1]))
        return _Range(lo, hi, full)

    def _either(self, a: _Range, b: _Range) -> _Range:
        lo = None if a.lo is None or b.lo is None else minimum(a.lo, b.lo)
        hi = None if a.hi is None or b.hi is None else maximum(a.hi, b.hi)
        full = a.full or b.full
        if a.full is not None and b.full is not None:
            # The union where it is one range for sure; either of the two would do as well.
            if a.full[0] == b.full[0]:
                full = (a.full[0], maximum(a.full[1], b.full[1]))
            elif a.full[1] == b.full[1]:
                full = (minimum(a.full[0], b.full[0]), a.full[1])
        return _Range(lo, hi, full)

    def _nonneg(self, poly: Poly) -> _Range:
        """The keys for which poly >= 0."""
        split = self._split(poly)
        if split is not None:
            return split
        solved = self._solve(poly)
        if solved is None:
            return _Range()
        at, is_low = solved
        weak, strong = self._over_run(at, not is_low), self._over_run(at, is_low)
        if is_low:
            return _Range(lo=weak, full=None if strong is None else (strong, self.key.size))
        return _Range(
            hi=None if weak is None else add(weak, 1), full=None if strong is None else (Const(0), add(strong, 1))
        )

    def _split(self, poly: Poly) -> _Range | None:
        """min, max and abs of the key are two comparisons in one."""
        for atoms, coef in poly.items():
            if len(atoms) == 1 and isinstance(atoms[0], Call) and self.key in atoms[0].axes:
                atom = atoms[0]
                if atom.op == "abs":
                    choices = (atom.args[0], neg(atom.args[0]))
                elif atom.op in ("min", "max"):
                    choices = (atom.args[0], atom.args[1])
                else:
                    continue
                rest = from_poly({m: c for m, c in poly.items() if m != atoms})
                parts = (self.bounds(le(0, add(rest, mul(coef, choice)))) for choice in choices)
                return (self._both if (atom.op == "min") == (coef > 0) else self._either)(*parts)
        return None

    def _solve(self, poly: Poly) -> tuple[Expr, bool] | None:
        """poly >= 0 solved for the key: (bound, True) is key >= bound, (bound, False) is key <= bound."""
        terms = [(atoms, coef) for atoms, coef in poly.items() if any(self.key in a.axes for a in atoms)]
        if len(terms) != 1 or len(terms[0][0]) != 1:
            return None
        [((atom,), coef)] = terms
        rest = from_poly({m: c for m, c in poly.items() if m != (atom,)})
        # coef * atom + rest >= 0
        bound = neg(floordiv(rest, coef)) if coef > 0 else floordiv(rest, -coef)
        if atom == self.key:
            return bound, coef > 0
        if not (isinstance(atom, Call) and atom.op == "floordiv" and self.key not in atom.args[1].axes):
            return None
        inner, size = atom.args
        if (bounds(size)[0] or 0) <= 0:
            return None
        if coef > 0:  # inner // size >= bound
            return self._solve(to_poly(sub(inner, mul(bound, size))))
        return self._solve(to_poly(sub(add(mul(bound, size), size, -1), inner)))

    def _over_run(self, at: Expr, upper: bool) -> Expr | None:
        """A bound on `at` from above (below) over all queries of the run; None where it is not known."""
        if self.query not in at.axes:
            return at if self.loads or not at.loads else None
        if at == self.query:
            return (last_query if upper else first_query)(self.query)
        if not isinstance(at, Call) or not at.is_int:
            return None
        if at.op in ("add", "mul"):
            total: list[Expr] = []
            for atoms, coef in to_poly(at).items():
                end = self._term(atoms, coef, upper)
                if end is None:
                    return None
                total.append(end)
            return add(*total)
        if at.op in ("min", "max"):
            a, b = (self._over_run(x, upper) for x in at.args)
            if a is None or b is None:
                return (b if a is None else a) if (at.op == "min") == upper else None
            return (minimum if at.op == "min" else maximum)(a, b)
        if at.op in ("floordiv", "mod") and self.query not in at.args[1].axes and (bounds(at.args[1])[0] or 0) > 0:
            size = self._over_run(at.args[1], upper)
            if size is None:
                return None
            if at.op == "mod":
                return sub(size, 1) if upper else Const(0)
            end = self._over_run(at.args[0], upper)
            return None if end is None else floordiv(end, size)
        return None

    def _term(self, atoms: tuple[Expr, ...], coef: int, upper: bool) -> Expr | None:
        moving = [a for a in atoms if self.query in a.axes]
        fixed = mul(1, *(a for a in atoms if self.query not in a.axes))
        if fixed.loads and not self.loads:
            return None
        if not moving:
            return mul(coef, fixed)
        if len(moving) > 1 or not is_nonneg(fixed):
            return None
        end = self._over_run(moving[0], upper == (coef > 0))
        return None if end is None else mul(coef, fixed, end)
