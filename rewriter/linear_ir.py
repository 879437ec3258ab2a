"""The index-notation form of a linear attention: what is multiplied, over which axes, and how far a query sees.

    W[batch, share, i, j]       = (sum over dot of q[batch, share, i, dot] * k[batch, j, dot] * decay) if j <= i
    decay                       = exp(sum over j < t <= i of gate[batch, t])       or gate[batch, t, dot]
    out[batch, share, i, value] = sum over j of W * v[batch, j, value]
    sums[batch, share, i]       = sum over j of W                                  (what a normaliser divides by)

Unlike those of a softmax region, its operands are plain: what has no query and key axes together stays outside, feature
maps, gates and all, and keeps its own gradient. What is done with `out` and `sums` afterwards stays outside as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from refocus import ir
from refocus.ir import Axis, Expr, Operand, Sym


@dataclass(frozen=True)
class LinearRegion:
    """One linear attention. `operands` are "q", "k", "v" and, where there is one, "gate", in this order; their
    dimensions are the axes above. `batch` are the axes that keys, values or gates have, `share` those that only queries
    have. `strict`: a position does not see itself. `gate` is "none", "head" or "channel". `sums`: they are asked for.
    """

    batch: tuple[Axis, ...]
    share: tuple[Axis, ...]
    query: Axis
    key: Axis
    dot: tuple[Axis, ...]
    value: tuple[Axis, ...]
    operands: tuple[Operand, ...]
    out_dtype: str
    causal: bool = True
    strict: bool = False
    gate: str = "none"
    sums: bool = False

    def axes_of(self, operand: str) -> tuple[Axis, ...]:
        """The axes of an operand's dimensions."""
        return {
            "q": (*self.batch, *self.share, self.query, *self.dot),
            "k": (*self.batch, self.key, *self.dot),
            "v": (*self.batch, self.key, *self.value),
            "gate": (*self.batch, self.key, *(self.dot if self.gate == "channel" else ())),
        }[operand]

    @property
    def out_axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.share, self.query, *self.value)

    @property
    def sums_axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.share, self.query)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.share, self.query, self.key, *self.dot, *self.value)

    @property
    def syms(self) -> tuple[Sym, ...]:
        """The symbolic sizes, sorted by name."""
        sizes: list[Expr] = [a.size for a in self.axes]
        found = {n for size in sizes for n in size.walk() if isinstance(n, Sym)}
        return tuple(sorted(found, key=lambda s: s.name))

    def operand(self, name: str) -> Operand:
        return next(o for o in self.operands if o.name == name)


@lru_cache(maxsize=512)
def parse(text: str) -> LinearRegion:
    """Rebuild a region from its `repr`. The text only ever comes from `repr` of our own values."""
    region = eval(text, {**ir._NAMES, "LinearRegion": LinearRegion})
    assert isinstance(region, LinearRegion)
    return region


def notation(region: LinearRegion) -> str:
    """The region in index notation, one line for each of its parts."""

    def load(name: str) -> str:
        return f"{name}[{','.join(a.name for a in region.axes_of(name))}]"

    query, key = region.query.name, region.key.name
    dots = ",".join(a.name for a in region.dot)
    weight = f"sum_{dots} {load('q')} * {load('k')}"
    if region.gate != "none":
        step = load("gate").replace(f",{key}", ",t").replace(f"[{key}", "[t")
        decay = f"exp(sum_{{{key}<t<={query}}} {step})"
        weight = f"({weight}) * {decay}" if region.gate == "head" else f"{weight} * {decay}"
    lines = [(f"W[{','.join(a.name for a in (*region.sums_axes, region.key))}]", weight)]
    if region.causal:
        lines.append(("mask", mask_of(region)))
    lines.append((f"O[{','.join(a.name for a in region.out_axes)}]", f"W . {load('v')}"))
    if region.sums:
        lines.append((f"Z[{','.join(a.name for a in region.sums_axes)}]", f"sum_{key} W"))
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left:<{width}} = {right}" for left, right in lines)


def mask_of(region: LinearRegion) -> str:
    """The mask as the report prints it; empty where every pair is kept."""
    if not region.causal:
        return ""
    return f"{region.key.name} {'<' if region.strict else '<='} {region.query.name}"
