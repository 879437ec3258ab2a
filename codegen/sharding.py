"""The operators on DTensors: each process computes the part of the region that its own shards are.

A batch axis (or the axis of queries) may be cut over a dimension of the mesh. Operands that are read at that axis are
cut alike, also where several positions share one (grouped heads, h // g); all others are whole on every process. The
local region is the same program with a shorter axis `a`, read at `a + start` wherever the position itself counts: a
slope by head, a mask by batch. So q, k and v that are sharded over heads or batch stay where they are; what is sharded
in another way is redistributed first. Gradients of operands that all processes hold whole are partial sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from refocus import ir, simplify
from refocus.evaluate import size_of
from refocus.ir import Axis, Call, Const, Expr, Load, Operand, Region, Sym
from refocus.polynomial import to_poly

Placements = tuple[Placement, ...]
Numbers = Mapping[Sym, int]
Cuts = tuple[Axis | None, ...]  # the axis that each dimension of a mesh cuts


@dataclass(frozen=True)
class Way:
    """How a dimension is read: at stride * (axis // group) + something less than the stride, once from end to end.

    Equal parts of the dimension then belong to equal parts of the axis."""

    axis: Axis
    group: int = 1
    stride: int = 1

    def length(self, axis_length: Expr) -> Expr:
        """Of the part of the dimension that belongs to so long a part of the axis."""
        return simplify.mul(simplify.floordiv(axis_length, self.group), self.stride)

    def divides(self, size: int, parts: int) -> bool:
        return size // self.stride % parts == 0


@lru_cache(maxsize=256)
def read_at(region: Region, operand: Operand) -> dict[int, Way]:
    """The dimensions of an operand that can be cut together with an axis: those that every load reads in one way."""
    loads = {x for e in region.expressions for x in (*e.loads, e) if isinstance(x, Load) and x.tensor == operand.name}
    found: dict[int, Way] = {}
    for dim, size in enumerate(operand.shape):
        ways = {_way(load.index[dim], size, (*region.batch, region.query)) for load in loads}
        way = ways.pop() if len(ways) == 1 else None
        others = [x for load in loads for n, x in enumerate(load.index) if n != dim]
        if way is not None and all(way.axis not in x.axes for x in others):  # a diagonal x[h, h] cannot be cut
            found[dim] = way
    return found


def _way(index: Expr, size: Expr, axes: Sequence[Axis]) -> Way | None:
    for axis in axes:
        terms = [(mono, n) for mono, n in to_poly(index).items() if any(axis in atom.axes for atom in mono)]
        if len(terms) != 1 or len(terms[0][0]) != 1 or terms[0][1] <= 0:
            continue
        (atom,), stride = terms[0]
        group = 1
        if (
            isinstance(atom, Call)
            and atom.op == "floordiv"
            and atom.args[0] == axis
            and isinstance(atom.args[1], Const)
        ):
            group = int(atom.args[1].value)
        elif atom != axis:
            continue
        low, high = simplify.bounds(_rest(index, axis))
        within = low is not None and high is not None and 0 <= low and high < stride
        if within and simplify.mul(size, group) == simplify.mul(axis.size, stride):
            return Way(axis, group, stride)
    return None


def _rest(index: Expr, axis: Axis) -> Expr:
    return simplify.substitute(index, {axis: Const(0)})


# ------------------------------------------------------------------------------------------------ which axes are cut


@dataclass(frozen=True)
class Cut:
    """How a region is cut over a mesh of this shape: by `axes`, one for each dimension of the mesh."""

    region: Region
    mesh: tuple[int, ...]
    axes: Cuts

    def parts(self, axis: Axis) -> int:
        return prod(n for n, cut in zip(self.mesh, self.axes) if cut == axis)

    def divides(self, numbers: Numbers) -> bool:
        """Whether every axis falls into equal parts."""
        return all(axis is None or size_of(axis.size, numbers) % self.parts(axis) == 0 for axis in self.axes)

    def operand(self, operand: Operand, numbers: Numbers) -> Placements:
        """Where an operand has to lie."""
        ways = read_at(self.region, operand)
        found: list[Placement] = []
        for cut in self.axes:
            fits = [
                d
                for d, way in ways.items()
                if way.axis == cut and way.divides(size_of(operand.shape[d], numbers), self.parts(way.axis))
            ]
            found.append(Shard(fits[0]) if fits else Replicate())
        return tuple(found)

    def gradient(self, operand: Operand, numbers: Numbers) -> Placements:
        """Where its gradient comes to lie: each process has seen a part of what reads an operand that is whole."""
        places = self.operand(operand, numbers)
        return tuple(
            Partial("sum") if cut is not None and isinstance(place, Replicate) else place
            for cut, place in zip(self.axes, places)
        )

    def result(self, before: int = 0) -> Placements:
        """Where a tensor (.., *batch, query, ..) comes to lie; `before`: dimensions ahead of these."""
        order = (*self.region.batch, self.region.query)
        return tuple(Replicate() if cut is None else Shard(before + order.index(cut)) for cut in self.axes)


def cut_of(region: Region, mesh: tuple[int, ...], numbers: Numbers, given: Sequence[Placements | None]) -> Cut:
    """The cut that moves least data, for operands that lie as given (None: whole, as a plain tensor)."""
    axes: list[Axis | None] = [None] * len(mesh)
    for m in range(len(mesh)):
        options: list[Axis | None] = []
        for operand, places in zip(region.operands, given):
            shard = places[m] if places is not None else None
            if type(shard) is Shard and shard.dim in (ways := read_at(region, operand)):
                options.append(ways[shard.dim].axis)
        order = [a for a in (*region.batch, region.query) if a in options]
        cuts = [Cut(region, mesh, (*axes[:m], option, *axes[m + 1 :])) for option in (*order, None)]
        axes[m] = min((c for c in cuts if c.divides(numbers)), key=lambda c: _moved(c, m, numbers, given)).axes[m]
    return Cut(region, mesh, tuple(axes))


def _moved(cut: Cut, m: int, numbers: Numbers, given: Sequence[Placements | None]) -> int:
    """How many elements are sent, about, to bring the operands where one dimension of the mesh wants them."""
    total = 0
    for operand, places in zip(cut.region.operands, given):
        here, there = (places[m] if places is not None else Replicate()), cut.operand(operand, numbers)[m]
        if here != there and not isinstance(here, Replicate):
            size = prod(size_of(n, numbers) for n in operand.shape)
            total += size if isinstance(there, Replicate) or isinstance(here, Partial) else size // cut.mesh[m]
    return total


# ------------------------------------------------------------------------------------------------ the local region


@dataclass(frozen=True)
class Local:
    """One process's part: its region, and the new lengths that are symbols of it, as parts of old ones."""

    region: Region
    lengths: tuple[tuple[Sym, Expr, int], ...]

    def sizes(self, numbers: Numbers) -> list[int]:
        known = dict(numbers) | {sym: size_of(size, numbers) // parts for sym, size, parts in self.lengths}
        return [known[sym] for sym in self.region.syms]


@lru_cache(maxsize=256)
def local_part(cut: Cut, places: tuple[Placements, ...], coordinate: tuple[int, ...]) -> Local:
    """The region of the process at `coordinate` of the mesh, whose operands lie as `places` say."""
    region = cut.region
    shorter: dict[Axis, Axis] = {}
    moved: dict[Expr, Expr] = {}
    lengths: list[tuple[Sym, Expr, int]] = []
    for axis in dict.fromkeys(a for a in cut.axes if a is not None):
        parts, number = cut.parts(axis), 0
        for size, other, at in zip(cut.mesh, cut.axes, coordinate):
            number = number * size + at if other == axis else number  # the first dimension of a mesh cuts first
        length: Expr
        if isinstance(axis.size, Const):
            length = Const(int(axis.size.value) // parts)
        else:
            length = Sym(f"{axis.name}_part", 1)
            lengths.append((length, axis.size, parts))
        shorter[axis] = Axis(axis.name, length)
        moved[axis] = simplify.add(shorter[axis], simplify.mul(length, number))
    own: dict[str, dict[int, Way]] = {}
    operands = []
    for operand, where in zip(region.operands, places):
        ways, shape = read_at(region, operand), list(operand.shape)
        own[operand.name] = {}
        for place in where:
            if isinstance(place, Shard):
                way = own[operand.name][place.dim] = ways[place.dim]
                shape[place.dim] = way.length(shorter[way.axis].size)
        operands.append(replace(operand, shape=tuple(shape)))

    def visit(node: Expr) -> Expr | None:
        if isinstance(node, Axis):
            return moved.get(node, node)
        if isinstance(node, Load) and own.get(node.tensor):
            here = own[node.tensor]
            index = [inside(x, here[d]) if d in here else go(x) for d, x in enumerate(node.index)]
            return Load(node.tensor, tuple(index), node.dtype)
        return None

    def inside(index: Expr, way: Way) -> Expr:
        """Where a part of an operand is read."""
        place = simplify.floordiv(shorter[way.axis], way.group)
        return simplify.add(simplify.mul(place, way.stride), go(_rest(index, way.axis)))

    def go(node: Expr) -> Expr:
        return ir.rewrite(node, visit, simplify.rebuild)

    part = replace(
        region,
        batch=tuple(shorter.get(a, a) for a in region.batch),
        query=shorter.get(region.query, region.query),
        operands=tuple(operands),
        score=go(region.score),
        mask=go(region.mask),
        logits=go(region.logits),
        values=go(region.values),
        gate=go(region.gate),
        extra=tuple(go(x) for x in region.extra),
    )
    return Local(part, tuple(lengths))


# ------------------------------------------------------------------------------------------------ the operators' rules


@dataclass(frozen=True)
class _Call:
    """One call on DTensors, as this process sees it."""

    mesh: DeviceMesh
    cut: Cut
    numbers: Numbers
    operands: list[Tensor]  # local ones
    local: Local

    @staticmethod
    def of(region: Region, operands: Sequence[Tensor], sizes: Sequence[int], others: Sequence[Tensor] = ()) -> _Call:
        meshes = {t.device_mesh for t in (*operands, *others) if isinstance(t, DTensor)}
        if len(meshes) != 1:
            raise RuntimeError("an attention of DTensors needs all of them on one device mesh")
        mesh = meshes.pop()
        for operand, tensor in zip(region.operands, operands, strict=True):
            if tensor.dim() and not isinstance(tensor, DTensor):
                raise RuntimeError(
                    f"an attention got DTensors, and a plain torch.Tensor for {operand.name!r}: make it a DTensor, too"
                )
        if region.output is not None:
            raise RuntimeError("an attention of DTensors puts its result nowhere but where it is made")
        numbers = dict(zip(region.syms, sizes, strict=True))
        given = [t.placements if isinstance(t, DTensor) else None for t in operands]
        cut = cut_of(region, tuple(mesh.shape), numbers, given)
        places = tuple(cut.operand(o, numbers) for o in region.operands)
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise RuntimeError("this process is not in the device mesh of an attention's operands")
        local = local_part(cut, places, tuple(coordinate))
        return _Call(mesh, cut, numbers, [_laid(t, mesh, p) for t, p in zip(operands, places)], local)

    def whole(self, local: Tensor, before: int = 0) -> DTensor:
        """The DTensor of which a result (.., *batch, query, ..) is this process's part."""
        region, places = self.cut.region, self.cut.result(before)
        order = (*region.batch, region.query)
        shape = list(local.shape)
        for k, axis in enumerate(order):
            shape[before + k] = size_of(axis.size, self.numbers)
        return _made(local, self.mesh, places, shape)


def _laid(tensor: Tensor, mesh: DeviceMesh, places: Placements) -> Tensor:
    """This process's part of a tensor that lies as `places` say."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != places:
        tensor = tensor.redistribute(mesh, places)
    return tensor.to_local()


def _cut(tensor: Tensor, mesh: DeviceMesh, places: Placements) -> Tensor:
    """The same; a plain tensor is whole on every process: zeros, where nothing flows back into a result."""
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _laid(tensor, mesh, places)


def _made(local: Tensor, mesh: DeviceMesh, places: Placements, shape: Sequence[int]) -> DTensor:
    stride = [prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(local, mesh, places, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def register(attend: Any, attend_saving: Any, attend_backward: Any, parse: Any) -> None:
    """Give the operators their rules. `parse`: from a region's text to the region and its symbols."""

    def forward(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        operands, sizes, text, plan = args
        call = _Call.of(parse(text)[0], operands, sizes)
        out = op(call.operands, call.local.sizes(call.numbers), repr(call.local.region), plan)
        return call.whole(out) if isinstance(out, Tensor) else (call.whole(out[0]), call.whole(out[1], 1))

    def backward(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        grad, operands, out, sums, sizes, text, plan, needs, *more = args
        region = parse(text)[0]
        call = _Call.of(region, operands, sizes, (grad, out, sums))
        results = [_cut(t, call.mesh, call.cut.result(n)) for t, n in ((grad, 0), (out, 0), (sums, 1))]
        grad, out, sums = results
        into_rows = [None if t is None else _cut(t, call.mesh, call.cut.result(1)) for t in more]
        numbers, local = call.local.sizes(call.numbers), repr(call.local.region)
        found = iter(op(grad, call.operands, out, sums, numbers, local, plan, needs, *into_rows))
        gradients = []
        for operand, tensor, need in zip(region.operands, operands, needs, strict=True):
            if need:
                places = call.cut.gradient(operand, call.numbers)
                made = _made(next(found), call.mesh, places, tensor.shape)
                gradients.append(made if isinstance(tensor, DTensor) else made.full_tensor())
        return gradients

    for op, rule in ((attend, forward), (attend_saving, forward), (attend_backward, backward)):
        op.register_torch_dispatch(DTensor, rule)
