"""Rows of the report: a recognised or declined site as plain data for people."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence, Set
from pathlib import Path

import torch
from torch import fx

from refocus.attention import Left, Part, Site
from refocus.codegen.plan import Plan
from refocus.evaluate import size_of
from refocus.ir import TRUE, Region, Sym
from refocus.lift import op_name
from refocus.mask_report import source_of, tiles_of
from refocus.notation import notation
from refocus.report import Cost, Tiles
from refocus.report import Site as Row
from refocus.sizes import hint

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_TORCH = str(Path(torch.__file__).parent)


def location_of(node: fx.Node) -> str:
    """The user's "file:line" of a node: the innermost frame outside PyTorch itself."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    for file, line in reversed(frames):
        if not file.startswith(_TORCH):
            return f"{file}:{line}"
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def describe_left(name: str, left: Left) -> Row:
    """A site that was not recognised."""
    return Row(
        name,
        location_of(left.root),
        False,
        False,
        reason=left.declined.reason,
        blame=left.declined.blame or op_name(left.root),
    )


def numbers_of(site: Site) -> dict[Sym, int]:
    """Representative values of a site's symbolic sizes, and of numbers that it is called with."""
    wanted = {s for part in site.parts for s in part.region.syms}
    if not wanted:
        return {}
    found: dict[str, int] = {}
    bindings = (b for part in site.parts for b in part.bindings if isinstance(b, fx.Node))
    for node in (*site.root.graph.find_nodes(op="placeholder"), *bindings):
        value = node.meta.get("val")
        for d in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(d, torch.SymInt):
                found[str(d.node.expr)] = hint(d)
    return {s: found.get(s.name, 1024) for s in wanted}


def describe_site(
    name: str, site: Site, plans: Sequence[Plan] | None, reason: str, inferred: Set[fx.Node] = frozenset()
) -> Row:
    """A recognised site: `plans` is None where it was left as it is. `inferred`: constants taken for a closed form.
    Which kernel runs it is known when all attentions stand in the graph."""
    region = site.parts[0].region
    numbers = numbers_of(site)
    tiles = tiles_of(region, plans[0] if plans else None, numbers)
    before, after = costs(site, numbers, tiles)
    return Row(
        name,
        location_of(site.root),
        recognized=True,
        fused=plans is not None,
        reason=reason,
        family=site.family,
        notation="\n".join(notation(p.region) for p in site.parts),
        mask=notation(region.mask) if region.mask != TRUE else "",
        mask_source=source_of(site, inferred),
        tiles=tiles,
        engine=plans[0].engine if plans else "",
        before=before,
        after=after if plans else None,
    )


def kernel_path(region: Region, plan: Plan) -> str | None:
    """Where the generated source of this region is kept, for engines that generate one."""
    if plan.engine != "triton":
        return None
    from refocus.codegen.triton_engine import emit

    return str(emit(region, plan).path)


def _numel(part: Part, numbers: dict[Sym, int]) -> int:
    total = 0
    for operand, binding in zip(part.region.operands, part.bindings):
        width = binding.meta["val"].element_size() if isinstance(binding, fx.Node) else 8
        total += math.prod(size_of(d, numbers) for d in operand.shape) * width
    return total


def costs(site: Site, numbers: dict[Sym, int], tiles: Tiles | None) -> tuple[Cost, Cost]:
    """Work before (the dense scores are stored and read back) and after (only tiles that are not empty)."""
    before_flops = after_flops = before_bytes = after_bytes = 0
    kept = 1.0 - (tiles.empty_share if tiles else 0.0)
    for part in site.parts:
        region = part.region
        pairs = math.prod(size_of(a.size, numbers) for a in (*region.batch, region.query, region.key))
        dot = sum(math.prod(size_of(a.size, numbers) for a in d.over) for d in region.dots)
        value = math.prod(size_of(a.size, numbers) for a in region.value) if region.value else 1
        flops = pairs * (2 * dot + 2 * value + 6)
        size = site.root.meta["val"].element_size()
        io = (
            _numel(part, numbers)
            + math.prod(size_of(a.size, numbers) for a in (*region.batch, region.query, *region.value)) * size
        )
        before_flops, after_flops = before_flops + flops, after_flops + int(flops * kept)
        before_bytes, after_bytes = before_bytes + io + 4 * pairs * size, after_bytes + io
    return Cost(before_flops, before_bytes), Cost(after_flops, after_bytes)
