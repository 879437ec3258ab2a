"""Every argument of every operation that the lift reads counts: the reading follows it, or there is none.

An operation is called with all defaults, then with each argument changed. What the lift makes of each call is evaluated
and compared with what the operation computes, and so are the gradients. An argument that no change shows of fails, so
that an operation comes with examples of all its arguments (`operation_calls`), or with a reason here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from refocus.convolutions import CHANNEL_PRODUCT, CONVOLUTIONS
from refocus.differentiate import NotDifferentiable, differentiate
from refocus.evaluate import arange_env, evaluate
from refocus.facts import gather_facts
from refocus.ir import Axis, Expr, Load
from refocus.lift import Lifter, Unliftable
from refocus.lift_tables import MOVES, OPERATIONS
from refocus.lift_views import SPLITS
from refocus.notation import notation
from refocus.sizes import shape_of
from tests.operation_calls import REFUSALS, Given, changed, plain, weights_of

# What several results are taken from by `getitem`, which is no operation of ATen.
SEVERAL = (*SPLITS, "unbind", "meshgrid", "broadcast_tensors")
NOT_ATEN = ("getitem", CHANNEL_PRODUCT)
# How large their results are depends on values: a graph holds them with sizes that nobody knows, or with their numbers.
OF_VALUES = ("where", "narrow.Tensor", "tensor_split.tensor_indices_or_sections", "repeat_interleave.Tensor",
             "repeat_interleave.self_Tensor")
# Sums over all elements, or in another dtype; and bits that are read as other numbers.
NEVER_READ = ("norm.Scalar", "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim_dtype", "view.dtype")
ON_GPUS = ("mm.dtype", "bmm.dtype", "addmm.dtype", "baddbmm.dtype")

# What an operation is computed in: its result has that dtype, which handlers go by, and over the reals it is the same.
DTYPES = ("dtype", "out_dtype", "half_to_float")
EXEMPT = (
    "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy",  # where the result lies in memory
    "implicit",  # of expand: for graphs that TorchScript made
    "cudnn_enabled", "path",  # how it is computed
    "output_size",  # of repeat_interleave: the size that the result has
    "momentum",  # of running statistics, which are not updated where batch_norm is read
)  # fmt: skip


def overloads() -> Iterator[torch._ops.OpOverload]:
    names = {*MOVES, *OPERATIONS, *SEVERAL, *CONVOLUTIONS} - set(NOT_ATEN)
    for name in sorted(names):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if _is_traced(op):
                yield op


def _is_traced(op: torch._ops.OpOverload) -> bool:
    """Whether graphs hold it: not what writes to its arguments, or is there for TorchScript or named dimensions."""
    kinds = [str(a.type) for a in op._schema.arguments]
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    results = {str(r.type) for r in op._schema.returns}
    script = any(k in ("List[t]", "t") or k.startswith("Dict") for k in kinds) or "Dimname" in str(op._schema)
    script = script or "..." in str(op._schema) or str(op) == "aten.split.default"
    left_out = _name(op) in (*OF_VALUES, *ON_GPUS)
    return not writes and not script and not left_out and results <= {"Tensor", "List[Tensor]"}


def _name(op: torch._ops.OpOverload) -> str:
    return str(op).removeprefix("aten.").removesuffix(".default")


class Everything(Lifter):
    """Reads whatever has a reading."""

    def within(self, node, index):  # type: ignore[no-untyped-def]
        return True

    def inside(self, index):  # type: ignore[no-untyped-def]
        return True


Reading = tuple[Expr, tuple[Axis, ...]]


def read(gm: fx.GraphModule, results: list[fx.Node], given: Collection[str]) -> list[Reading | None]:
    """Each result in index notation, with its axes; None where there is no reading."""
    found: list[Reading | None] = []
    for node in results:
        lifter = Everything(gather_facts(gm), tainted=lambda n: True, expands=True)
        axes = tuple(Axis(f"i{k}", size) for k, size in enumerate(shape_of(node)))
        try:
            value = lifter.at(node, axes)
        except Unliftable:
            found.append(None)
            continue
        is_read = all(x.tensor in given for x in value.walk() if isinstance(x, Load))
        found.append((value, axes) if is_read else None)
    return found


def compare(call: Given) -> bool:
    """Whether a call is read; fails where it is read as something else than it computes."""
    expected, expected_grads = call.run()
    try:
        gm, nodes, tensors = call.graph()
    except (*REFUSALS, DataDependentOutputException, DynamicOutputShapeException):
        return False
    results, flowing = [], {name: torch.zeros_like(x) for name, x in tensors.items() if x.is_floating_point()}
    for k, (found, theirs) in enumerate(zip(read(gm, nodes, tensors), expected)):
        if found is None:
            continue
        value, axes = found
        told = f"{call}\nis read as {notation(value)}"
        assert value.is_int or value.is_float == theirs.is_floating_point(), told
        got = evaluate(value, arange_env(axes, {}), tensors, {}, torch.float64).expand(theirs.shape)
        assert torch.allclose(got.double(), theirs.double(), 1e-5, 1e-6, equal_nan=True), f"{told}\n{got}\n{theirs}"
        results.append(got)
        if value.is_float and flowing and theirs.requires_grad:
            _flow_back(found, tensors, weights_of(theirs, k), flowing)
    if results and len(results) == len(expected) and expected_grads is not None:
        for mine, theirs in zip(flowing.values(), expected_grads):
            dense = theirs.to_dense().double()
            assert torch.allclose(mine, dense, 1e-5, 1e-6, equal_nan=True), f"{told}\n{mine}\n{theirs}"
    return bool(results)


def _flow_back(found: Reading, tensors: dict[str, Tensor], weights: Tensor, flowing: dict[str, Tensor]) -> None:
    """Add what flows back from a value into each tensor."""
    value, axes = found
    env = arange_env(axes, {})
    try:
        shares = differentiate(value, Load("weights", axes, value.dtype), flowing)
    except NotDifferentiable:  # a sum, which only contractions have in a region
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
        out = evaluate(value, env, leaves, {}, torch.float64).expand(weights.shape)
        grads = torch.autograd.grad((out * weights).sum(), [leaves[n] for n in flowing], allow_unused=True)
        for name, grad in zip(flowing, grads):
            flowing[name] += 0 if grad is None else grad
        return
    given = {**tensors, "weights": weights}
    for share in shares:
        expressions = (share.cotangent, *share.load.index)
        part, *places = (evaluate(e, env, given, {}, torch.float64).expand(weights.shape) for e in expressions)
        place = torch.zeros(weights.shape, dtype=torch.int64)
        for index, size in zip(places, tensors[share.load.tensor].shape):
            place = place * size + index
        flowing[share.load.tensor].view(-1).index_add_(0, place.flatten(), part.flatten())


def shows(call: Given, other: Given) -> bool:
    """Whether two calls compute something else."""
    (a, da), (b, db) = call.run(), other.run()
    pairs = [*zip(a, b), *zip(da or (), db or ())]
    alike = len(a) == len(b) and all((x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout) for x, y in pairs)
    return not alike or any(not torch.allclose(x.to_dense(), y.to_dense(), equal_nan=True) for x, y in pairs)


@pytest.mark.parametrize("op", list(overloads()), ids=str)
def test_arguments(op: torch._ops.OpOverload) -> None:
    call = plain(op)
    is_read = compare(call)
    for place, argument in enumerate(op._schema.arguments):
        if argument.name in EXEMPT:
            continue
        shown = argument.name in DTYPES
        for other in changed(call, place):
            try:
                shown = shows(call, other) or shown
            except REFUSALS:
                continue
            is_read = compare(other) or is_read
        assert shown, f"no example shows what {argument.name!r} does: add one to operation_calls.py"
    assert is_read != (_name(op) in NEVER_READ), "no example is read" if not is_read else "it is read"


def test_an_argument_that_is_not_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "leaky_relu", OPERATIONS["relu"])
    with pytest.raises(AssertionError, match="is read as relu"):
        test_arguments(torch.ops.aten.leaky_relu.default)


def test_an_argument_without_examples_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.operation_calls._BY_NAME", {})
    monkeypatch.setattr("tests.operation_calls._BY_TYPE", {})
    with pytest.raises(AssertionError, match="no example shows what 'diagonal' does"):
        test_arguments(torch.ops.aten.tril.default)
