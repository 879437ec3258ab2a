"""What recognition finds: attention that was read, attention that was left, and what becomes of scores they share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from refocus.ir import Axis, Expr, Region
from refocus.normal_form import Binding
from refocus.notation import notation
from refocus.patterns.declined import Declined
from refocus.row_results import RowResult

# What the epilogue loads of the rows of a part: what rounding leaves of their weights, how many keys they keep, and the
# sums of their exponentials.
ROUNDING, COUNT, SUM = "rounding", "count", "exponentials"


@dataclass(frozen=True)
class Part:
    """One region of a site with what it reads, in operand order."""

    region: Region
    bindings: tuple[Binding, ...]


@dataclass(frozen=True)
class Site:
    """A recognised attention: `root` is replaced by `epilogue`, an expression over the results of the parts.

    A part's result is loaded as Load("part0", (*batch, query, *value)). `plain`: the epilogue is that load itself.
    `dims` are the axes of each dimension of the root (flattened when several)."""

    root: fx.Node
    normaliser: fx.Node
    parts: tuple[Part, ...]
    epilogue: Expr
    plain: bool
    dims: tuple[tuple[Axis, ...], ...]
    axes: tuple[tuple[Axis, ...], ...]  # per part: the site's axes in the order of the part's result
    interior: frozenset[fx.Node] = frozenset()
    family: str = "softmax"
    readings: Readings = field(default_factory=lambda: Readings())
    shared: tuple[tuple[frozenset[fx.Node], Declined], ...] = ()  # who else reads scores or weights: fine if all fuse
    loading: Site | None = None  # the same where these are not: of several products, those that others read are loaded
    results: tuple[RowResult, ...] = ()  # what else the region's only part yields, of its rows
    rows: tuple[Expr, ...] = ()  # where the site's axes read a row of the last part

    def __str__(self) -> str:
        return f"{self.root}:\n" + "\n".join(notation(part.region) for part in self.parts)


@dataclass(frozen=True)
class Readings:
    """The same attention read in other ways, where the model copies keys together before it uses them.

    `in_place`: keys and values are read where they were copied from (rolled, gathered, in overlapping windows), and
    values of several tensors in each of them.
    `over_tokens`: and the key axis, which counts offsets, is one over tokens under a mask (see `refocus.bands`).
    `copies`: whether the model itself makes the copies.
    """

    in_place: Site | None = None
    over_tokens: Site | None = None
    copies: bool = True


@dataclass(frozen=True)
class Left:
    """Attention that was seen and left alone."""

    root: fx.Node
    normaliser: fx.Node
    declined: Declined


def closed_under_sharing(sites: list[Site]) -> tuple[list[Site], list[tuple[Site, Left]]]:
    """The sites that remain when scores and weights may be read by nobody but sites: two attentions over the same
    scores, or over sums of the same products, are both fused, or neither is; unless there is another product in the
    scores, and those that others read can be loaded."""
    gone: list[tuple[Site, Left]] = []
    while True:
        inner = {n for site in sites for n in (*site.interior, site.root)}
        open_ = [(site, reason) for site in sites for readers, reason in site.shared if not readers <= inner]
        if not open_:
            return sites, gone
        for site, reason in {id(site): (site, reason) for site, reason in reversed(open_)}.values():
            if site.loading is not None:
                sites = [site.loading if x is site else x for x in sites]
                continue
            gone.append((site, Left(site.root, site.normaliser, reason)))
            sites = [x for x in sites if x is not site]


def each_told_once(sites: list[Site]) -> list[Site]:
    """The sites, of which those over the same scores do not all yield the same log-sum-exps, and none one that only
    the weights of another are made of."""
    inner = {n for site in sites for n in (*site.interior, site.root)}
    told: set[fx.Node] = set()
    found = []
    for site in sites:
        results = tuple(r for r in site.results if r.node not in told and not inner.issuperset(r.node.users))
        told.update(r.node for r in results)
        found.append(site if len(results) == len(site.results) else _with_results(site, results))
    return found


def _with_results(site: Site, results: tuple[RowResult, ...]) -> Site:
    """The same, and what its readings yield: row sums where these, or the epilogue, ask for them."""
    needed = any(x.tensor.startswith((ROUNDING, COUNT, SUM)) for x in site.epilogue.loads)
    parts = tuple(replace(p, region=replace(p.region, row_sums=needed or bool(results))) for p in site.parts)
    readings = replace(
        site.readings,
        in_place=site.readings.in_place and _with_results(site.readings.in_place, results),
        over_tokens=site.readings.over_tokens and _with_results(site.readings.over_tokens, results),
    )
    return replace(site, parts=parts, results=results, readings=readings)
