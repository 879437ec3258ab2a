"""The index-notation form of a linear attention: what is multiplied, over which axes, and how far a query sees.

    W[batch, share, i, j]       = (sum over dot of q[batch, share, i, dot] * k[batch, j, dot] * decay) if j <= i
    decay                       = exp(sum over j < t <= i of gate[batch, t])       or gate[batch, t, dot]
    out[batch, share, i, value] = sum over j of W * v[batch, j, value]
    sums[batch, share, i]       = sum over j of W                                  (what a normaliser divides by)

With `erase`, the delta rule: what a key finds in the sums is taken away before its value is added, both to a share,

    S[t] = exp(gate[t]) * (S[t-1] - erase[t] * k[t] (k[t]^T S[t-1])) + erase[t] * k[t] v[t]^T,     out[t] = q[t]^T S[t]

and with `lookup`, any change of rank one: what another key finds in the sums, before the step, is taken away times
`erase`,

    S[t] = exp(gate[t]) * S[t-1] - erase[t] (lookup[t]^T S[t-1]) + k[t] v[t]^T

Unlike those of a softmax region, its operands are plain: what has no query and key axes together stays outside, feature
maps, gates and all, and keeps its own gradient. What is done with `out` and `sums` afterwards stays outside as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from refocus import ir
from refocus.ir import Axis, Expr, Operand, Sym


@dataclass(frozen=True)
class LinearRegion:
    """One linear attention. `operands` are "q", "k", "v" and, where there are, "gate", "erase", "initial" (the state
    before the first step) and "lookup", in this order; their dimensions are the axes above. `batch` are the axes that
    keys, values or gates have, `share` those that only queries have. `strict`: a position does not see itself. `gate`
    is "none", "head" or "channel". `sums`: they are asked for. `final`: so is the state after the last step.
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
    erase: bool = False
    final: bool = False

    @property
    def initial(self) -> bool:
        return any(o.name == "initial" for o in self.operands)

    @property
    def lookup(self) -> bool:
        return any(o.name == "lookup" for o in self.operands)

    def axes_of(self, operand: str) -> tuple[Axis, ...]:
        """The axes of an operand's dimensions."""
        return {
            "q": (*self.batch, *self.share, self.query, *self.dot),
            "k": (*self.batch, self.key, *self.dot),
            "v": (*self.batch, self.key, *self.value),
            "gate": (*self.batch, self.key, *(self.dot if self.gate == "channel" else ())),
            "erase": (*self.batch, self.key, *(self.dot if self.lookup else ())),
            "lookup": (*self.batch, self.key, *self.dot),
            "initial": self.state_axes,
        }[operand]

    @property
    def out_axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.share, self.query, *self.value)

    @property
    def state_axes(self) -> tuple[Axis, ...]:
        return (*self.batch, *self.dot, *self.value)

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

    if region.erase:
        return _delta_rule(region, load)
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
    out = f"W . {load('v')}"
    if region.initial:
        passed = f" * exp(sum_{{t<={query}}} {step})" if region.gate != "none" else ""
        out += f" + sum_{dots} {load('q')} * {load('initial')}{passed}"
    lines.append((f"O[{','.join(a.name for a in region.out_axes)}]", out))
    if region.final:
        lines.append((f"S[{','.join(a.name for a in region.state_axes)}]", f"the state after the last {key}"))
    if region.sums:
        lines.append((f"Z[{','.join(a.name for a in region.sums_axes)}]", f"sum_{key} W"))
    width = max(len(left) for left, _ in lines)
    return "\n".join(f"{left:<{width}} = {right}" for left, right in lines)


def _delta_rule(region: LinearRegion, load: Callable[[str], str]) -> str:
    """The recurrence of the delta rule; it has no weights."""
    q, k, v, erase = (load(name).replace(f",{region.key.name}", ",t") for name in ("q", "k", "v", "erase"))
    gate = load("gate").replace(f",{region.key.name}", ",t") if region.gate != "none" else ""
    dot = ",".join(a.name for a in region.dot)
    before = f"exp({gate}) * S[t-1]" if gate else "S[t-1]"
    out = f"O[{','.join(a.name for a in region.out_axes)}]".replace(f",{region.query.name}", ",t")
    read = "R[t-1]" if region.strict else "S[t]"
    written = f"{erase} * {k} * ({v} - sum_{dot} {k} * R[t-1])"
    if region.lookup:
        lookup = load("lookup").replace(f",{region.key.name}", ",t")
        written = f"{k} * {v} - {erase} * (sum_{dot} {lookup} * S[t-1])"
    first = (f"S[-1] = {load('initial')}",) if region.initial else ()
    last = (f"S[{','.join(a.name for a in region.state_axes)}] = S after the last t",) if region.final else ()
    return "\n".join((
        *first,
        f"R[t-1] = {before}",
        f"S[t] = R[t-1] + {written}",
        f"{out} = sum_{dot} {q.replace(f',{region.query.name}', ',t')} * {read}",
        *last,
    ))  # fmt: skip


def mask_of(region: LinearRegion) -> str:
    """The mask as the report prints it; empty where every pair is kept."""
    if not region.causal:
        return ""
    return f"{region.key.name} {'<' if region.strict else '<='} {region.query.name}"
