"""What an index expression can be on a tile of (query, key) positions: interval arithmetic on whole grids of tiles.

`TileGrid.interval(expr)` gives an `Interval` whose ends are tensors over (*batch, query tile, key tile), with
dimensions of size one where the expression does not vary. Each end is a proof: no position of the tile is below `lo`
or above `hi`.

Three rules keep the ends tight:

  * an expression of the query axis alone (or the key axis alone) is exact: either it is monotone and its ends are
    those of the axis, or it is evaluated at all N positions and reduced over each tile, loads included;
  * a sum is split into its query part, its key part and what mixes both; query and key are independent, so the
    ends of the first two add exactly, and a comparison is decided on the difference of its sides;
  * a load at [.., i, j] is reduced over tiles where it lies: O(N^2) read once, nothing of size N^2 kept.

Everything is plain tensor operations without a look at any value, so it can be traced with symbolic sizes.
Floats are trusted only where no rounding is involved (loads, constants, comparisons, min, max, ...): a computed
float may round differently in a kernel, so it proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from refocus import intervals as iv
from refocus import simplify
from refocus.evaluate import Scope, arange_env, size_of
from refocus.grid import Term, grid
from refocus.intervals import MAYBE, UNKNOWN, End, Interval
from refocus.ir import BOOL, Axis, Call, Const, Expr, Load, Reduce, Sym
from refocus.polynomial import Mono, Poly, from_poly, poly_add, poly_scale, poly_sub, squares, to_poly
from refocus.simplify import bounds, conjuncts
from refocus.tile_cache import CACHE
from refocus.tile_reads import Reads, reduce_tiles, runs
from refocus.tiling import Tiling

QUERY, KEY = 1, 2

# Operations on floats that do not round; all operations on integers and booleans are exact anyway.
_EXACT_ON_FLOATS = frozenset(
    ("neg", "abs", "min", "max", "where", "eq", "ne", "le", "lt", "isnan", "isinf", "cast", "floor", "ceil", "trunc",
     "round", "sign", "relu")
)  # fmt: skip


@dataclass
class TileGrid:
    """The grid of tiles of one tiling.

    Its batch axes name the leading dimensions of every end. The last tile of a row may be short: positions past the end
    of an axis are not part of any tile. `_known`: what another grid found, which holds here too.
    """

    tiling: Tiling
    _known: Mapping[Expr, Interval] = field(default_factory=dict)
    _memo: dict[Expr, Interval] = field(default_factory=dict)
    _scopes: dict[tuple[Axis, ...], Scope] = field(default_factory=dict)

    def __post_init__(self) -> None:
        space = self.tiling
        self.batch, self.query, self.key, self.sizes = space.batch, space.query, space.key, space.sizes
        self.block_q, self.block_k, self.tensors = space.block_q, space.block_k, space.tensors
        self.device: torch.device | str = "cpu" if space.device is None else space.device
        self.n_query, self.n_key, self.first = space.queries, space.keys, space.first
        self.q_tiles = (self.n_query + self.block_q - 1) // self.block_q
        self.k_tiles = (self.n_key + self.block_k - 1) // self.block_k

    @property
    def shape(self) -> tuple[int, ...]:
        return (*(self.size(b.size) for b in self.batch), self.q_tiles, self.k_tiles)

    def of_rows(self, tiling: Tiling) -> TileGrid:
        """The grid of other queries over the same keys, with what was found here of these alone."""
        known = {e: found for e, found in self._memo.items() if not self.sides(e) & QUERY}
        return TileGrid(tiling, known if tiling.batch == self.batch else {})

    def states(self, mask: Expr) -> Tensor:
        """int8 [*batch, query tiles, key tiles]: 0 no pair is allowed, 1 perhaps some, 2 all are."""
        found = self.interval(mask)
        if not isinstance(found.lo, Tensor) and not isinstance(found.hi, Tensor):
            return torch.full(self.shape, int(found.lo) + int(found.hi), dtype=torch.int8, device=self.device)
        lo, hi = (end.to(torch.int8) if isinstance(end, Tensor) else int(end) for end in (found.lo, found.hi))
        state: Any = lo + hi
        return state.expand(self.shape).contiguous()

    # -------------------------------------------------------------------------------------------- expressions

    def interval(self, expr: Expr) -> Interval:
        found = self._memo.get(expr)
        if found is None:
            found = self._memo[expr] = self._known.get(expr) or self._interval(expr)
        return found

    def _interval(self, expr: Expr) -> Interval:
        if isinstance(expr, Const):
            return Interval(expr.value, expr.value)
        if isinstance(expr, Axis) and expr in (self.query, self.key):
            return self._axis(self.sides(expr))
        sides = self.sides(expr)
        if not expr.axes and not expr.loads and expr.is_int:
            value = self.size(expr)
            return Interval(value, value)
        if sides == 0:
            return self._on_batch(expr)
        if sides != QUERY | KEY and not self._ends_are_exact(expr) and is_exact(expr):
            return self._reduced(expr, sides)
        if isinstance(expr, Load):
            return self._load(expr)
        if isinstance(expr, Call):
            return self._predicate(expr) if expr.dtype == BOOL else self._number(expr)
        return _nothing_known(expr)

    def sides(self, expr: Expr) -> int:
        """Which of the two tiled axes an expression depends on: a set of QUERY and KEY."""
        return (QUERY if self.query in expr.axes else 0) | (KEY if self.key in expr.axes else 0)

    def _sides_of(self, atoms: Mono) -> int:
        return self.sides(atoms[0]) | self._sides_of(atoms[1:]) if atoms else 0

    def size(self, expr: Expr) -> int:
        """The value of an expression of sizes, as a number (or traced number)."""
        return size_of(expr, self.sizes)

    def _axis(self, side: int) -> Interval:
        _, block, size = self._side(side)
        count, shape = (self.q_tiles, (-1, 1)) if side == QUERY else (self.k_tiles, (1, -1))
        first = torch.arange(count, device=self.device).reshape(shape) * block
        start = self._start(side)
        if start:
            first, size = first + start, size + start
        return Interval(first, iv.least(first + (block - 1), size - 1))

    def _on_batch(self, expr: Expr) -> Interval:
        """An expression that is one number on a tile."""
        if not is_exact(expr):
            return _nothing_known(expr)
        value = self._scope().tensor(expr)[..., None, None]
        return Interval(value, value)

    def _reduced(self, expr: Expr, side: int) -> Interval:
        """An expression of one tiled axis, evaluated at each of its positions."""
        _, block, size = self._side(side)
        values = self._values(expr, side)
        dim = -1 if side == QUERY else -2
        lo, hi = reduce_tiles(values, {values.dim() - 1: Reads(side, block, size)})
        return Interval(lo.unsqueeze(dim), hi.unsqueeze(dim))

    def _values(self, expr: Expr, side: int) -> Tensor:
        """An expression at each position of the batch axes that it varies along and of one tiled axis."""
        axis, _, size = self._side(side)
        values = self._scope(axis).tensor(expr)
        # Where ranges decide it, the value does not vary after all.
        return (values if values.dim() else values.reshape(1)).expand(*values.shape[:-1], size)

    def _scope(self, *axis: Axis) -> Scope:
        """Where expressions are evaluated at every position of the batch axes and of one tiled axis."""
        if axis not in self._scopes:
            device = torch.device(self.device)
            env = arange_env((*self.batch, *axis), self.sizes, device)
            if axis == (self.query,) and self.tiling.rows is not None:
                env[self.query] = grid(self.first, (Term(-1, self.n_query, 1),), device)
            self._scopes[axis] = Scope(env, self.tensors, self.sizes)
        return self._scopes[axis]

    def _start(self, side: int) -> int:
        """The first position of the query or of the key."""
        return self.first if side == QUERY else 0

    def _side(self, side: int) -> tuple[Axis, int, int]:
        """Axis, block and size of the query or of the key."""
        return (self.query, self.block_q, self.n_query) if side == QUERY else (self.key, self.block_k, self.n_key)

    def _ends_are_exact(self, expr: Expr) -> bool:
        """Whether interval arithmetic loses nothing on an expression of one tiled axis: it is monotone in it."""
        if isinstance(expr, Axis) or not self.sides(expr):
            return True
        if not isinstance(expr, Call):
            return False
        if expr.op == "le" and expr.args[0].is_int and expr.args[1].is_int:
            return self._separated(expr) and all(self._ends_are_exact(a) for a in expr.args)
        moving = [a for a in expr.args if self.sides(a)]
        if len(moving) > 1 or expr.op not in ("add", "mul", "floordiv", "min", "max"):
            return False
        if expr.op == "floordiv" and (self.sides(expr.args[1]) or not _positive(expr.args[1])):
            return False
        return expr.is_int and self._ends_are_exact(moving[0])

    # ------------------------------------------------------------------------------------------------ numbers

    def _number(self, expr: Call) -> Interval:
        if expr.op == "where":
            cond, yes, no = (self.interval(a) for a in expr.args)
            return iv.choose(cond, yes, no)
        if expr.op in ("min", "max"):
            a, b = (self.interval(x) for x in expr.args)
            if expr.op == "min":  # either upper end is one of the minimum, too
                return Interval(iv.least(a.lo, b.lo), iv.least(a.hi, b.hi, either=True))
            return Interval(iv.most(a.lo, b.lo, either=True), iv.most(a.hi, b.hi))
        if not expr.is_int:
            return UNKNOWN
        if expr.op == "add":
            return self._sum(to_poly(expr))
        if expr.op == "mul":
            total = self.interval(expr.args[0])
            for arg in expr.args[1:]:
                total = iv.times(total, self.interval(arg))
            return total
        if expr.op == "abs":
            a = self.interval(expr.args[0])
            if a.lo is None or a.hi is None:
                return Interval(0, None)
            return Interval(iv.most(iv.most(a.lo, -a.hi), 0), iv.most(-a.lo, a.hi))
        if expr.op in ("floordiv", "mod") and _positive(expr.args[1]) and not self.sides(expr.args[1]):
            a, size = self.interval(expr.args[0]), self.interval(expr.args[1]).lo
            if expr.op == "floordiv":
                return Interval(*(None if end is None else end // size for end in (a.lo, a.hi)))
            if a.lo is None or a.hi is None:
                return Interval(0, size - 1)
            inside = iv.as_tensor(a.lo // size) == iv.as_tensor(a.hi // size)  # no multiple of the size is crossed
            return Interval(torch.where(inside, a.lo % size, 0), torch.where(inside, a.hi % size, size - 1))
        return UNKNOWN

    def _sum(self, poly: Poly) -> Interval:
        """Ends of a polynomial: exact for its query part and its key part, monomial by monomial for the rest."""
        total: Interval | None = None
        found, poly = squares(poly)
        for coef, root in found:
            one = iv.times(Interval(coef, coef), iv.square(self._sum(root)))
            total = one if total is None else iv.plus(total, one)
        for part in self._parts(poly):
            one = self.interval(from_poly(part)) if len(part) > 1 else self._monomial(part)
            total = one if total is None else iv.plus(total, one)
        return total or Interval(0, 0)

    def _monomial(self, part: Poly) -> Interval:
        [(atoms, coef)] = part.items()
        whole = from_poly({atoms: 1})
        if len(atoms) > 1 and is_exact(whole) and self.sides(whole) not in (0, QUERY | KEY):
            return iv.times(Interval(coef, coef), self.interval(whole))
        total = Interval(coef, coef)
        for atom in atoms:
            total = iv.times(total, self.interval(atom))
        return total

    def _parts(self, poly: Poly) -> list[Poly]:
        """The query part and the key part, where their ends can be exact; the rest of them monomial by monomial."""
        groups: dict[int, Poly] = {QUERY: {}, KEY: {}}
        rest: list[Poly] = []
        for atoms, coef in poly.items():
            sides = self._sides_of(atoms)
            if sides in groups and all(is_exact(a) for a in atoms):
                groups[sides][atoms] = coef
            else:
                rest.append({atoms: coef})
        return [g for g in groups.values() if g] + rest

    # --------------------------------------------------------------------------------------------- predicates

    def _predicate(self, expr: Call) -> Interval:
        if expr.op in ("and", "or"):
            return self._chain(expr)
        if expr.op == "not":
            a = self.interval(expr.args[0])
            return Interval(iv.not_(a.hi), iv.not_(a.lo))
        if expr.op == "xor":
            a, b = (self.interval(x) for x in expr.args)
            lo = iv.or_(iv.and_(a.lo, iv.not_(b.hi)), iv.and_(iv.not_(a.hi), b.lo))
            return Interval(lo, iv.not_(iv.or_(iv.and_(a.lo, b.lo), iv.and_(iv.not_(a.hi), iv.not_(b.hi)))))
        if expr.op in ("le", "lt", "eq", "ne"):
            found = self._comparison(expr)
            return Interval(iv.not_(found.hi), iv.not_(found.lo)) if expr.op == "ne" else found
        return MAYBE

    def _chain(self, expr: Call) -> Interval:
        """and / or: the parts of one tiled axis are taken together, because they are exact together."""
        groups: dict[int, list[Expr]] = {QUERY: [], KEY: []}
        parts: list[Expr] = []
        for part in conjuncts(expr, expr.op):
            groups.get(self.sides(part), parts).append(part)
        for group in groups.values():
            joined = (simplify.and_ if expr.op == "and" else simplify.or_)(*group)
            if all(is_exact(p) for p in group) and len(group) > 1 and joined != expr:
                parts.append(joined)
            else:
                parts.extend(group)
        join = iv.and_ if expr.op == "and" else iv.or_
        total = Interval(expr.op == "and", expr.op == "and")
        for part in parts:
            one = self.interval(part)
            total = Interval(join(total.lo, one.lo), join(total.hi, one.hi))
        return total

    def _separated(self, expr: Call) -> bool:
        """One side of a comparison moves with the query at most, the other one with the key at most."""
        left, right = (self.sides(a) for a in expr.args)
        return not left & right and QUERY | KEY not in (left, right)

    def _comparison(self, expr: Call) -> Interval:
        left, right = expr.args
        if left.is_float or right.is_float:
            if not (is_exact(left) and is_exact(right)):
                return MAYBE
            return iv.compare(expr.op, self.interval(left), self.interval(right), floats=True)
        if left.dtype == BOOL or right.dtype == BOOL:
            return MAYBE
        if self._separated(expr):
            # No subtraction: it could overflow for loads near the ends of int64.
            return iv.compare(expr.op, self.interval(left), self.interval(right))
        difference = poly_sub(to_poly(right), to_poly(left))
        if expr.op in ("le", "lt"):
            return self._sign(difference, expr.op)
        found, hit = self._against_zero(difference, "eq"), self._residue_hit(difference)
        return Interval(found.lo, iv.and_(found.hi, hit))

    def _sign(self, poly: Poly, op: str) -> Interval:
        """0 <= poly or 0 < poly."""
        for atoms, coef in poly.items():
            inside = atoms[0] if len(atoms) == 1 and self._sides_of(atoms) == QUERY | KEY else None
            if coef < 0 and isinstance(inside, Call) and inside.op == "abs":
                # Either sign of what the absolute value is of: sums, whose parts need not be joined (below).
                rest, inner = poly_sub(poly, {atoms: coef}), poly_scale(to_poly(inside.args[0]), coef)
                total = Interval(True, True)
                for part in (rest, poly_add(rest, inner), poly_sub(rest, inner)):
                    one = self._sign(part, op)
                    total = Interval(iv.and_(total.lo, one.lo), iv.and_(total.hi, one.hi))
                return total
        return self._against_zero(poly, op)

    def _against_zero(self, poly: Poly, op: str) -> Interval:
        """0 <= poly, 0 < poly or 0 == poly. Where each of its terms has one of the axes, what has the key is brought to
        the other side: comparing a column with a row takes a byte for each tile, adding them up takes eight."""
        sides = {atoms: self._sides_of(atoms) for atoms in poly}
        if QUERY | KEY in sides.values():
            return iv.compare(op, Interval(0, 0), self._sum(poly))
        keys = {atoms: -coef for atoms, coef in poly.items() if sides[atoms] == KEY}
        return iv.compare(op, self._sum(keys), self._sum({a: c for a, c in poly.items() if a not in keys}))

    def _residue_hit(self, poly: Poly) -> End:
        """For x % m + c == 0 with c constant: whether x passes a place where that holds (a stride across a tile)."""
        atoms = [a for a in poly if a]
        if len(atoms) != 1 or len(atoms[0]) != 1 or abs(poly[atoms[0]]) != 1:
            return True
        atom = atoms[0][0]
        if not (isinstance(atom, Call) and atom.op == "mod") or self.sides(atom.args[1]) or not _positive(atom.args[1]):
            return True
        wanted = -poly.get((), 0) * poly[atoms[0]]
        x, size = self.interval(atom.args[0]), self.interval(atom.args[1]).lo
        if x.lo is None or x.hi is None:
            return True
        return iv.as_tensor((x.hi - wanted) // size) > iv.as_tensor((x.lo - 1 - wanted) // size)

    # -------------------------------------------------------------------------------------------------- loads

    def _load(self, load: Load) -> Interval:
        """A load at [.., query index, key index]: the tensor is reduced over tiles first, then read by tile."""
        reads: dict[int, Reads] = {}
        for dim, index in enumerate(load.index):
            sides = self.sides(index)
            if sides:
                one = None if sides == QUERY | KEY else self._tile_reads(index, sides)
                if one is None or any(sides == other.side for other in reads.values()):
                    return _nothing_known(load)
                reads[dim] = one
            elif not is_exact(index):
                return _nothing_known(load)
        tensor = self.tensors[load.tensor]
        if all(how.block == 1 and how.rows is None for how in reads.values()):
            lo = hi = runs(tensor, reads)  # each tile reads one element; a view, which nothing must keep
        elif any(how.rows is not None for how in reads.values()):
            lo, hi = reduce_tiles(tensor, reads)
        else:
            key = tuple((d, how.side, how.block, how.size, how.start) for d, how in reads.items())
            lo, hi = CACHE.ends(tensor, key, lambda: reduce_tiles(tensor, reads))
        spread, same = self._spread(load, reads), hi is lo  # one tensor, where all ends are one
        lo = spread(lo).to(torch.int64) if load.is_int else spread(lo)
        if same:
            return Interval(lo, lo)
        return Interval(lo, spread(hi).to(torch.int64) if load.is_int else spread(hi))

    def _spread(self, load: Load, reads: Mapping[int, Reads]) -> Callable[[Tensor], Tensor]:
        """What lays a tensor like the loaded one, with tiles along the dimensions of `reads`, out over the grid."""
        rank, spots = len(self.batch) + 2, {}
        fixed: list[Any] = []
        for dim, index in enumerate(load.index):
            fixed.append(index.value if isinstance(index, Const) else slice(None))
            if dim in reads:
                spots[dim] = rank - (2 if reads[dim].side == QUERY else 1)
            elif isinstance(index, Axis) and self._covers(index, self.tensors[load.tensor].shape[dim]):
                spots[dim] = self.batch.index(index)
            elif not isinstance(index, Const):
                break
        else:
            order = sorted(spots, key=spots.__getitem__)
            kept = [sorted(spots).index(dim) for dim in order]
            if len(set(spots.values())) == len(spots):
                apart = tuple(slice(None) if k in spots.values() else None for k in range(min(spots.values()), rank))
                return lambda end: end[tuple(fixed)].permute(kept)[apart]
        at: list[Any] = []
        for dim, index in enumerate(load.index):
            if dim in reads:
                query = reads[dim].side == QUERY
                tiles = torch.arange(self.q_tiles if query else self.k_tiles, device=self.device)
                at.append(tiles.reshape((-1, 1) if query else (1, -1)))
            else:
                at.append(self.interval(index).lo)
        return lambda end: end[tuple(at)]

    def _covers(self, axis: Axis, size: int) -> bool:
        """Whether a dimension of this size is the whole of a batch axis, as far as known sizes tell."""
        if axis not in self.batch or type(size) is not int:
            return False
        known = self.size(axis.size)
        return type(known) is int and known == size

    def _tile_reads(self, index: Expr, side: int) -> Reads | None:
        """How the tiles of one side read a dimension at `index`: a run of it, or blocks of it (`i // 16`)."""
        axis, block, size = self._side(side)
        start = from_poly(poly_add(to_poly(index), {(axis,): -1}))
        if not start.axes and not start.loads:
            return Reads(side, block, size, start=self.size(start) + self._start(side))
        if index.axes != {axis} or not is_exact(index):
            return None
        moving = [atoms for atoms in to_poly(index) if any(axis in a.axes for a in atoms)]
        if len(moving) != 1 or len(moving[0]) != 1 or to_poly(index)[moving[0]] != 1:
            return self._listed(index, side)
        [[quotient]] = moving
        if not (isinstance(quotient, Call) and quotient.op == "floordiv" and isinstance(quotient.args[1], Const)):
            return self._listed(index, side)
        slope = to_poly(quotient.args[0]).get((axis,)) if self._ends_are_exact(index) else None
        if slope is None:
            return self._listed(index, side)
        run = self._run(index, quotient, side)
        if run is not None:
            return run
        ends = self.interval(index)
        ahead = torch.arange(abs(slope) * (block - 1) // int(quotient.args[1].value) + 2, device=self.device)
        return Reads(side, block, size, rows=torch.minimum(ends.lo.reshape(-1, 1) + ahead, ends.hi.reshape(-1, 1)))

    def _run(self, index: Expr, quotient: Call, side: int) -> Reads | None:
        """A run of blocks that begin where tiles do: `(i + 64) // 16 + 3` for tiles of 128."""
        axis, block, size = self._side(side)
        start = poly_sub(to_poly(quotient.args[0]), {(axis,): 1})
        divisor = int(quotient.args[1].value)  # type: ignore[attr-defined]
        known = all(type(n) is int for n in (size, self._start(side))) and not set(start) - {()}
        if not known or block % divisor:
            return None
        first = start.get((), 0) + self._start(side)
        offset = poly_sub(to_poly(index), {(quotient,): 1})
        if first % divisor or set(offset) - {()}:
            return None
        return Reads(side, block // divisor, -(-size // divisor), start=first // divisor + offset.get((), 0))

    def _listed(self, index: Expr, side: int) -> Reads | None:
        """Rows that a vector names, position by position: those of each tile are gathered."""
        _, block, size = self._side(side)
        if not isinstance(size, int):
            return None
        values = self._values(index, side).reshape(-1)
        last = torch.arange(-(-size // block) * block, device=self.device).clamp(max=size - 1)
        return Reads(side, block, size, rows=values[last].unflatten(0, (-1, block)))


def tile_states(mask: Expr, tiling: Tiling) -> Tensor:
    """int8 [*batch axes the mask depends on, query tiles, key tiles]: 0 empty, 1 partial, 2 full.

    Only plain tensor operations: traceable, with symbolic sizes too. Empty and full are proofs.
    """
    return TileGrid(tiling.seen_by(mask)).states(mask)


@lru_cache(maxsize=4096)
def is_exact(expr: Expr) -> bool:
    """Whether evaluating `expr` gives the same bits everywhere: nothing in it rounds."""
    if isinstance(expr, Call):
        floats = expr.is_float or any(a.is_float for a in expr.args)
        return (not floats or expr.op in _EXACT_ON_FLOATS) and all(is_exact(a) for a in expr.args)
    if isinstance(expr, Reduce):
        return (not expr.is_float or expr.op in ("min", "max")) and is_exact(expr.body)
    return isinstance(expr, (Const, Sym, Axis)) or (isinstance(expr, Load) and all(is_exact(i) for i in expr.index))


@lru_cache(maxsize=4096)
def _positive(expr: Expr) -> bool:
    low = bounds(expr)[0]
    return low is not None and low > 0


def _nothing_known(expr: Expr) -> Interval:
    return MAYBE if expr.dtype == BOOL else UNKNOWN
