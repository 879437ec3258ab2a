"""Search for a predicate of row i and column j that a boolean matrix is.

A matrix is given by two sets of elements: those that are `on` and those that are `off`; all others may be either. That
is what makes the search recursive: whatever part has been explained is left open for what explains the rest.

    a function of j - i                     causal, windows, dilated windows, strides
    constant on tiles                       block diagonals, chunks: the same question for one element of each tile
    one range of keys a row                 prefixes, documents, windows pushed inwards at the borders
    rows or columns that are all on, off    global tokens, padding, rectangles; then the rest
    product of two grids                    i // W with j // W, and i % W with j % W: neighbourhoods in 2-D and 3-D
    all on the diagonals lo .. hi           only these; then the rest (causal and ..., window and ...)

Strategies guess; `refocus.infer` proves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from refocus import simplify as s
from refocus.bits import Rows, every, full, pack, smear, union
from refocus.evaluate import evaluate
from refocus.infer_ranges import ranges_form
from refocus.infer_sets import set_form
from refocus.ir import FALSE, TRUE, Axis, Const, Expr

_DEEPEST, _MOST_STEPS, _MOST_KINDS = 6, 40, 6


@dataclass(frozen=True)
class Matrix:
    """`on` and `off`: one integer for each row, of `width` bits; no bit is in both."""

    on: Rows
    off: Rows
    width: int

    @property
    def height(self) -> int:
        return len(self.on)

    def flipped(self) -> Matrix:
        return Matrix(self.off, self.on, self.width)


def search(matrix: Matrix, i: Expr, j: Expr) -> Expr | None:
    """A predicate that holds on `matrix.on` and not on `matrix.off`, not yet proved; None where none was found."""
    return _Search().find(matrix, i, j, 0)


@dataclass
class _Search:
    steps: int = 0
    reduced: bool = False  # the last search for tiles found some, and no form for them

    def find(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        if not any(m.on):
            return FALSE
        if not any(m.off):
            return TRUE
        self.steps += 1
        if depth > _DEEPEST or self.steps > _MOST_STEPS:
            return None
        # What is left open by what was found before looks like tiles by chance.
        known = all(yes | no == full(m.width) for yes, no in zip(m.on, m.off))
        lines = (self._ranges, self._causal, self._with)
        early = (self._tiles, *lines) if known else (*lines, self._tiles)
        for strategy in (
            self._diagonals, self._without, *early, self._grids, self._rectangles, self._band, self._with_any,
        ):  # fmt: skip
            found = strategy(m, i, j, depth)
            if found is not None:
                return found
            if known and strategy == self._tiles and self.reduced:
                self.reduced = False
                return None  # one of each tile said it all
        return None

    # ------------------------------------------------------------------------------------------------ strategies

    def _diagonals(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """A set of j - i."""
        last = m.height - 1
        on = off = 0
        for k, (yes, no) in enumerate(zip(m.on, m.off)):
            on |= yes << (last - k)
            off |= no << (last - k)
            if k % 64 == 0 and on & off:
                return None
        return None if on & off else set_form(on, off, s.sub(j, i), last)

    def _tiles(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Rows, or columns, of a tile are alike: one of each is enough."""
        tall, first_row = _spacing((k for k in range(1, m.height) if _differ(m, k)), m.height)
        edges = 0
        for yes, no in zip(m.on, m.off):
            edges |= (yes & (no >> 1)) | (no & (yes >> 1))
        wide, first_column = _spacing((k + 1 for k in _places(edges)), m.width)
        self.reduced = False
        if tall == wide == 1:
            return None
        on, off = m.on, m.off
        if tall > 1:
            starts = [0, *range(first_row or tall, m.height, tall)]
            stops = [*starts[1:], m.height]
            on = [union(on[a:b]) for a, b in zip(starts, stops)]
            off = [union(off[a:b]) for a, b in zip(starts, stops)]
            i = s.floordiv(s.add(i, (tall - first_row) % tall), tall)
        width = m.width
        if wide > 1:
            shift = (wide - first_column) % wide
            width = -(-(m.width + shift) // wide)
            on, off = ([every(smear(r << shift, wide), 0, wide, width) for r in rows] for rows in (on, off))
            j = s.floordiv(s.add(j, shift), wide)
        if any(yes & no for yes, no in zip(on, off)):
            return None
        found = self.find(Matrix(on, off, width), i, j, depth + 1)
        self.reduced = found is None
        return found

    def _ranges(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        return ranges_form(m.on, m.off, i, j)

    def _without(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Rows and columns with nothing on."""
        live_columns = union(m.on)
        dead_columns = union(m.off) & ~live_columns
        live_rows = sum(1 << k for k, yes in enumerate(m.on) if yes)
        dead_rows = sum(1 << k for k, (yes, no) in enumerate(zip(m.on, m.off)) if no and not yes)
        rows = set_form(live_rows, dead_rows, i) if dead_rows else TRUE
        columns = set_form(live_columns, dead_columns, j) if dead_columns else TRUE
        rows, columns = rows or TRUE, columns or TRUE
        if rows == TRUE and columns == TRUE:
            return None
        gone = dead_columns if columns != TRUE else 0
        off = [0 if rows != TRUE and not yes else no & ~gone for yes, no in zip(m.on, m.off)]
        rest = self.find(Matrix(m.on, off, m.width), i, j, depth + 1)
        return None if rest is None else s.and_(rows, columns, rest)

    def _with(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Rows and columns with nothing off, of which enough is known."""
        return self._but(m, i, j, depth, (0.51, 0.26))

    def _with_any(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """The same, even if it may be so by chance: next to nothing is known of them."""
        return self._but(m, i, j, depth, (0,))

    def _but(self, m: Matrix, i: Expr, j: Expr, depth: int, shares: tuple[float, ...]) -> Expr | None:
        open_columns = union(m.off)
        whole_columns = union(m.on) & ~open_columns
        open_rows = sum(1 << k for k, no in enumerate(m.off) if no)
        sure = [yes.bit_count() if not no else 0 for yes, no in zip(m.on, m.off)]
        tried: set[tuple[int, int]] = set()
        for least in shares:
            some = int(least * m.width)
            rows_on = sum(1 << k for k, count in enumerate(sure) if count > some)
            columns_on = whole_columns & _seen_more(m.on, whole_columns, int(least * m.height))
            if (rows_on, columns_on) in tried or not (rows_on or columns_on):
                continue
            tried.add((rows_on, columns_on))
            rows, row_bits = _chosen(rows_on, open_rows, i, m.height)
            columns, column_bits = _chosen(columns_on, open_columns, j, m.width)
            if rows == FALSE and columns == FALSE:
                continue
            on = [0 if row_bits >> k & 1 else yes & ~column_bits for k, yes in enumerate(m.on)]
            rest = self.find(Matrix(on, m.off, m.width), i, j, depth + 1)
            if rest is not None:
                return s.or_(rows, columns, rest)
        return None

    def _rectangles(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Few kinds of rows, each with columns of its own."""
        kinds: dict[tuple[int, int], int] = {}
        for k, pair in enumerate(zip(m.on, m.off)):
            kinds[pair] = kinds.get(pair, 0) | 1 << k
            if len(kinds) > _MOST_KINDS:
                return None
        parts = []
        for (yes, no), rows in kinds.items():
            inside, columns = set_form(rows, full(m.height) & ~rows, i), set_form(yes, no, j)
            if inside is None or columns is None:
                return None
            parts.append(s.and_(inside, columns))
        return s.or_(*parts)

    def _grids(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """on where A[i // w, j // w] and B[i % w, j % w]; or off where two such are."""
        both = math.gcd(m.height, m.width)
        widths = (w for w in range(2, both // 2 + 1) if both % w == 0)
        for w in sorted(widths, key=lambda w: abs(math.log(w * w / both))):  # images are about square
            for flip in (False, True):
                found = self._grid(m.flipped() if flip else m, i, j, w, depth)
                if found is not None:
                    return s.not_(found) if flip else found
            found = _ball(m, i, j, w)
            if found is not None:
                return found
        return None

    def _grid(self, m: Matrix, i: Expr, j: Expr, w: int, depth: int) -> Expr | None:
        columns = m.width // w
        if not all(_repeats(m.on[k], m.off[k], w, columns) for k in (0, m.height // 2, m.height - 1)):
            return None
        inner = [_fold(union(m.on[b::w]), w) for b in range(w)]
        outer = [every(smear(union(m.on[a : a + w]), w), 0, w, columns) for a in range(0, m.height, w)]
        for a, blocks in enumerate(outer):
            at = _spread(blocks, w, columns)
            if any(at * inner[b] & m.off[a * w + b] for b in range(w)):
                return None
        every_block, every_place = full(columns), full(w)
        large = Matrix(outer, [every_block & ~r for r in outer], columns)
        small = Matrix(inner, [every_place & ~r for r in inner], w)
        first = self.find(large, s.floordiv(i, w), s.floordiv(j, w), depth + 1)
        if first is None:
            return None
        second = self.find(small, s.mod(i, w), s.mod(j, w), depth + 1)
        return None if second is None else s.and_(first, second)

    def _causal(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Nothing is on above the diagonal."""
        high = max(yes.bit_length() - 1 - k for k, yes in enumerate(m.on) if yes)
        if high not in (0, -1):
            return None
        off = [no & full(max(0, k + high + 1)) for k, no in enumerate(m.off)]
        if off == m.off:
            return None
        rest = self.find(Matrix(m.on, off, m.width), i, j, depth + 1)
        return None if rest is None else s.and_(s.le(s.sub(j, i), high), rest)

    def _band(self, m: Matrix, i: Expr, j: Expr, depth: int) -> Expr | None:
        """Everything that is on (or everything that is off) lies within some diagonals."""
        for flip in (False, True):
            t = m.flipped() if flip else m
            low = min((yes & -yes).bit_length() - 1 - k for k, yes in enumerate(t.on) if yes)
            high = max(yes.bit_length() - 1 - k for k, yes in enumerate(t.on) if yes)
            off = [no & full(max(0, k + high + 1)) & ~full(max(0, k + low)) for k, no in enumerate(t.off)]
            if off == t.off:
                continue
            above, below = (
                any(no >> max(0, k + high + 1) for k, no in enumerate(t.off)),
                any(no & full(max(0, k + low)) for k, no in enumerate(t.off)),
            )
            band = s.and_(
                s.le(s.sub(j, i), high) if above else TRUE, s.le(low, s.sub(j, i)) if below else TRUE
            )  # fmt: skip
            rest = self.find(Matrix(t.on, off, m.width), i, j, depth + 1)
            if rest is not None:
                found = s.and_(band, rest)
                return s.not_(found) if flip else found
        return None


# -------------------------------------------------------------------------------------------------------- pieces


def _chosen(on: int, off: int, x: Expr, size: int) -> tuple[Expr, int]:
    """A form of a set of 0 <= x < size, and all that it holds; FALSE and nothing where there is none."""
    axis = Axis("place", Const(size))
    form = set_form(on, off, axis)
    if form is None or form == FALSE:
        return FALSE, 0
    held = evaluate(form, {axis: torch.arange(size)}, {}, {}).expand(size)
    return s.substitute(form, {axis: x}), pack(held[None])[0]


def _differ(m: Matrix, k: int) -> bool:
    return bool(m.on[k] & m.off[k - 1] | m.off[k] & m.on[k - 1])


def _places(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _spacing(edges: Iterator[int], size: int) -> tuple[int, int]:
    """The largest tiles that have edges only where given: their size, and the first edge (modulo that size)."""
    first, step = None, 0
    for at in edges:
        if first is None:
            first = at
        step = math.gcd(step, at - first)
        if step == 1:
            return 1, 0
    if first is None:
        return size, 0
    if step == 0:
        return (first, 0) if 2 * first == size else (1, 0)
    return step, first % step


def _seen_more(rows: Rows, of: int, than: int) -> int:
    """Which columns of `of` are on in more than so many rows: a counter for each column, one integer for each digit."""
    if than <= 0:
        return of
    digits: list[int] = []
    for row in rows:
        carry = row & of
        for k, digit in enumerate(digits):
            if not carry:
                break
            digits[k], carry = digit ^ carry, digit & carry
        if carry:
            digits.append(carry)
    more, equal = 0, of
    for k in range(max(len(digits), than.bit_length()) - 1, -1, -1):
        digit = digits[k] if k < len(digits) else 0
        if than >> k & 1:
            equal &= digit
        else:
            more |= equal & digit
            equal &= ~digit
    return more


def _repeats(yes: int, no: int, w: int, columns: int) -> bool:
    """Whether those blocks of a row that hold anything may all be the same: quickly said of most rows."""
    on = off = 0
    for k in range(columns):
        block = yes >> k * w & full(w)
        if block:
            on, off = on | block, off | (no >> k * w & full(w))
            if on & off:
                return False
    return True


def _fold(bits: int, w: int) -> int:
    out = 0
    while bits:
        out |= bits & full(w)
        bits >>= w
    return out


def _spread(bits: int, step: int, count: int) -> int:
    """Bit k of the argument at k * step."""
    out = 0
    for k in _places(bits):
        out |= 1 << k * step
    return out


def _ball(m: Matrix, i: Expr, j: Expr, w: int) -> Expr | None:
    """A neighbourhood on a grid of rows of w: |dy| <= a and |dx| <= b for some (a, b); circles are such staircases."""
    height = m.height // w
    if m.height != m.width or any(yes | no != full(m.width) for yes, no in zip(m.on, m.off)):
        return None
    # From the corners every distance is seen.
    reach = [0] * height
    for dy in range(height):
        run = m.on[0] >> dy * w & full(w)
        length = (~run & (run + 1)).bit_length() - 1
        if run != full(length):
            return None
        reach[dy] = length
    if any(b > a for a, b in itertools.pairwise(reach)) or not reach[0]:
        return None
    steps = [(dy, now - 1) for dy, (now, then) in enumerate(zip(reach, [*reach[1:], 0])) if then < now]
    if not 0 < len(steps) <= 12:
        return None
    # The middle row of the matrix must be the ball around its place, before the proof is worth its time.
    y, x = height // 2, w // 2
    ball = 0
    for dy in range(-height + 1, height):
        if 0 <= y + dy < height and reach[abs(dy)]:
            lo, hi = max(0, x - reach[abs(dy)] + 1), min(w, x + reach[abs(dy)])
            ball |= (full(hi) ^ full(lo)) << (y + dy) * w
    if ball != m.on[y * w + x]:
        return None
    down = s.call("abs", s.sub(s.floordiv(i, w), s.floordiv(j, w)), dtype="int64")
    aside = s.call("abs", s.sub(s.mod(i, w), s.mod(j, w)), dtype="int64")
    return s.or_(*(s.and_(s.le(down, a), s.le(aside, b)) for a, b in steps))

