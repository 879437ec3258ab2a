"""What the report says of a mask: where it comes from, how many tiles it empties, and what that looks like."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from torch import fx

from refocus import masks
from refocus.codegen.plan import Plan
from refocus.evaluate import size_of
from refocus.ir import TRUE, Const, Expr, Load, Region, Sym
from refocus.pictures import maps_of
from refocus.report import Tiles
from refocus.simplify import and_, conjuncts

if TYPE_CHECKING:
    from refocus.recognize import Site

_TILE = 64
_CELLS = 64  # along each side of a picture
_MOST_HEADS = 64


def source_of(site: Site, inferred: Set[fx.Node]) -> str:
    """Where the parts of a site's mask come from: a closed form (written as one, or inferred from a constant), vectors,
    blocks, dense tensors."""
    region, bindings = site.parts[0].region, site.parts[0].bindings
    if region.mask == TRUE:
        return ""
    bound = {o.name: b for o, b in zip(region.operands, bindings)}
    found: dict[str, list[str]] = {}
    for part in conjuncts(region.mask):
        if not part.loads:
            kind = "closed form"
            if _reached(site, frozenset(b for b in bindings if isinstance(b, fx.Node))) & inferred:
                kind = "closed form, inferred from a constant"
            found.setdefault(kind, [])
        for load in part.loads:
            names = found.setdefault(_kind(load, region), [])
            binding = bound.get(load.tensor)
            name = binding.name if isinstance(binding, fx.Node) else load.tensor
            if name not in names:
                names.append(name)
    return "; ".join(f"{kind} ({', '.join(names)})" if names else kind for kind, names in found.items())


def _kind(load: Load, region: Region) -> str:
    pair = [e for e in load.index if region.query in e.axes or region.key in e.axes]
    if not {region.query, region.key} <= load.axes:
        return "vectors"
    return "dense tensor" if any(e in (region.query, region.key) for e in pair) else "blocks"


def _reached(site: Site, ends: Set[fx.Node]) -> set[fx.Node]:
    """The nodes between what a site loads and its root."""
    seen: set[fx.Node] = set()
    stack = [site.root]
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            if source not in seen and source not in ends:
                seen.add(source)
                stack.append(source)
    return seen


def tiles_of(region: Region, plan: Plan | None, numbers: dict[Sym, int]) -> Tiles | None:
    """Tile counts of the mask at these sizes, and its distinct planes. What is known at run time only may empty more:
    its tiles count as partial. None where nothing is known before."""
    block_q, block_k = (plan.block_q, plan.block_k) if plan else (_TILE, _TILE)
    closed: Expr = and_(*(part for part in conjuncts(region.mask) if not part.loads))
    loaded = bool(region.mask.loads)
    if loaded and closed == TRUE:
        return None
    axes = [a for a in region.batch if a in closed.axes]
    counts = masks.count_tiles(closed, masks.Tiling.of(region, block_q, block_k, {}, numbers, "cpu"))
    scale = 1
    while max(size_of(region.query.size, numbers) // block_q, size_of(region.key.size, numbers) // block_k) > (
        _CELLS * scale
    ):
        scale += 1
    shown = closed
    for axis in axes:  # one plane for each head, of as many as one can look at
        if size_of(axis.size, numbers) > _MOST_HEADS:
            shown = Const(True, "bool")
    state = masks.classify(shown, masks.Tiling.of(region, block_q * scale, block_k * scale, {}, numbers, "cpu")).state
    partial, full = (counts.partial + counts.full, 0) if loaded else (counts.partial, counts.full)
    maps = maps_of(state.clamp(max=1) if loaded else state, [a.name for a in axes], scale) if shown != TRUE else ()
    return Tiles((block_q, block_k), counts.empty, partial, full, maps=maps)
