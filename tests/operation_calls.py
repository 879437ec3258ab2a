"""Calls of ATen operations, made from their schemas: one with all defaults, and others that differ in one argument.

Values are multiples of a quarter, so that ties and zeros are met everywhere: what is compared is a result and its
gradient where an operation has a kink, too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

ROWS, COLUMNS = 3, 4
REFUSALS = (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError)  # what a call that is none raises


@dataclass(frozen=True)
class Positions:
    """Integers that are made of positions alone, as distances are; or a mask, where they are compared."""

    shape: tuple[int, ...] = (ROWS, COLUMNS)
    above: int | None = None
    modulo: int = 3

    def value(self) -> Tensor:
        numbers = torch.arange(torch.Size(self.shape).numel()).view(self.shape) % self.modulo
        return numbers if self.above is None else numbers > self.above

    def node(self, graph: fx.Graph) -> fx.Node:
        aten = torch.ops.aten
        line = graph.call_function(aten.arange.default, (torch.Size(self.shape).numel(),))
        table = graph.call_function(aten.view.default, (line, list(self.shape)))
        numbers = graph.call_function(aten.remainder.Scalar, (table, self.modulo))
        return numbers if self.above is None else graph.call_function(aten.gt.Scalar, (numbers, self.above))


def quarters(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-5, 6, shape, generator=generator).to(torch.float64) / 4


def whole(*shape: int, below: int, least: int = 0, seed: int = 0) -> Tensor:
    return torch.randint(least, below, shape, generator=torch.Generator().manual_seed(seed))


def chosen(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


@dataclass(frozen=True)
class Given:
    """One call: its arguments by name; those that are left out have their defaults."""

    op: torch._ops.OpOverload
    values: dict[str, Any]

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """As a traced graph holds them: by position, up to the last one that is given, and the others by name."""
        schema = self.op._schema.arguments
        places = [k for k, a in enumerate(schema) if a.name in self.values and not a.kwarg_only]
        args = [self.values.get(a.name, a.default_value) for a in schema[: max(places, default=-1) + 1]]
        return args, {a.name: self.values[a.name] for a in schema if a.kwarg_only and a.name in self.values}

    def run(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Its results, and the gradients of all floats that it is given; None where it has none."""
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if isinstance(value, Positions):
                return value.value()
            if isinstance(value, Tensor) and value.is_floating_point():
                leaves.append(value.detach().clone().requires_grad_())
                return leaves[-1]
            return value

        args, kwargs = pytree.tree_map(leaf, self.arguments())
        try:
            results = _listed(self.op(*args, **kwargs))
            return results, gradients(results, leaves)
        except RuntimeError as problem:
            if "derivative" not in str(problem) and "not differentiable" not in str(problem):
                raise
            with torch.no_grad():
                return _listed(self.op(*args, **kwargs)), None

    def graph(self) -> tuple[fx.GraphModule, list[fx.Node], dict[str, Tensor]]:
        """A graph of fake values, the nodes of the results, and the tensors that are given by the names of theirs."""
        graph = fx.Graph()
        tensors: dict[str, Tensor] = {}

        def node_of(value: Any) -> Any:
            if isinstance(value, Positions):
                return value.node(graph)
            if not isinstance(value, Tensor):
                return value
            node = graph.placeholder(f"given{len(tensors)}")
            tensors[node.name] = value
            return node

        args, kwargs = pytree.tree_map(node_of, self.arguments())
        results = [graph.call_function(self.op, tuple(args), kwargs)]
        if not isinstance(self.op._schema.returns[0].type, torch.TensorType) or len(self.op._schema.returns) > 1:
            many = range(len(self.run()[0]))
            results = [graph.call_function(operator.getitem, (results[0], k)) for k in many]
        graph.output(tuple(results))
        gm = fx.GraphModule(torch.nn.Module(), graph)
        with FakeTensorMode() as mode, torch.no_grad():
            for node in gm.graph.nodes:
                if node.op == "placeholder":
                    value = tensors[node.name]
                    node.meta["val"] = mode.from_tensor(value.requires_grad_(value.is_floating_point()))
                elif node.op == "call_function":
                    fakes = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                    node.meta["val"] = node.target(*fakes[0], **fakes[1])  # type: ignore[operator]
        return gm, results, {name: value.detach() for name, value in tensors.items()}


def _listed(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def weights_of(result: Tensor, which: int) -> Tensor:
    """What flows back into a result."""
    return torch.randn(result.shape, generator=torch.Generator().manual_seed(which), dtype=torch.float64)


def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum of all results under fixed weights; zeros where none flows."""
    total: Any = 0
    for k, out in enumerate(results):
        if out.requires_grad:
            total = total + (out.double() * weights_of(out, k)).sum()
    if not isinstance(total, Tensor):
        return [torch.zeros_like(x) for x in leaves]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads)]


# ------------------------------------------------------------------------------------------------ what is given

# Of an argument: what it is in the plain call, then what it is in others. None of them need be fit for an operation:
# what raises is no call. DEFAULT: it is left out. ONLY: it is nothing else (it would be no number, or
# read past its end).
DEFAULT, ONLY = object(), object()
Values = list[Any]


@dataclass(frozen=True)
class Along:
    """A value that goes with others of other arguments."""

    value: Any
    others: dict[str, Any]


def along(value: Any, **others: Any) -> Along:
    return Along(value, others)


_MASK = [chosen(ROWS, COLUMNS), chosen(ROWS, COLUMNS, seed=1), chosen(1, COLUMNS), chosen(ROWS, 1)]
_DIMS: Values = [[1], [0], [0, 1], [1, 0], [-1], [], None]
_SHAPE: Values = [[2, 6], [4, 3], [12], [1, 12], [-1, 2]]
_LARGER: Values = [[2, 3, 4], [5, 3, 4], [1, 3, 4]]
_PLACES: Values = [whole(COLUMNS, below=ROWS), whole(COLUMNS, below=ROWS, least=-ROWS, seed=1)]
_BELOW: Values = [0.25, -0.5, 1, quarters(ROWS, COLUMNS, seed=5), quarters(COLUMNS, seed=5), quarters(seed=4)]


def _matrices(*sizes: tuple[int, ...]) -> Values:
    return [quarters(*size, seed=k + 20) for k, size in enumerate(sizes)]


# By operations (or overloads) and argument.
_EXAMPLES: dict[str, dict[str, Values]] = {
    "view _unsafe_view zeros ones full new_zeros new_ones new_full": {"size": _SHAPE}, "reshape": {"shape": _SHAPE},
    "expand broadcast_to": {"size": _LARGER}, "expand_as": {"other": _matrices((2, 3, 4), (5, 3, 4))},
    "view_as reshape_as": {"other": _matrices((2, 6), (4, 3))},
    "repeat": {"repeats": [[2, 1], [1, 2], [2, 2, 2]]}, "tile": {"dims": [[2], [1, 2], [2, 2, 2]]},
    "flatten": {"self": _matrices((2, 3, 4), (2, 2, 2)), "start_dim": [DEFAULT, 1, -2], "end_dim": [DEFAULT, 1, 0]},
    "unflatten": {"sizes": [[2, 2], [4, 1], [-1, 2]], "dim": [1, along(0, sizes=[3, 1]), -1]},
    "movedim moveaxis": {
        "self": _matrices((2, 3, 4), (4, 3, 2)), "source": [1, 0, 2, -1, [0, 1], [1, 2]],
        "destination": [0, 2, -1, [1, 2], [2, 0]],
    },
    "squeeze squeeze_copy": {"self": _matrices((3, 1, 1)), "dim": [1, 0, 2, -1, [1, 2], [0]]},
    "permute": {"self": _matrices((2, 3, 4)), "dims": [[1, 2, 0], [0, 2, 1], [-1, 0, 1]]}, "flip": {"dims": _DIMS},
    "transpose diagonal mT adjoint": {"self": _matrices((3, 3, 3), (2, 4, 4))},
    "slice": {"start": [1, 0, -2, 2, 9, -9], "end": [3, 2, -1, 9], "step": [DEFAULT, 2, 3]},
    "narrow": {"start": [1, 0, -2], "length": [2, 1]}, "select": {"index": [1, 0, -1, 2]},
    "index index_put": {
        "indices": [
            [whole(5, below=ROWS)], [None, whole(5, below=COLUMNS)], [whole(2, 5, below=ROWS), whole(5, below=4)],
            [whole(5, below=ROWS, least=-ROWS).int()], [chosen(ROWS, COLUMNS)], [chosen(ROWS).to(torch.uint8)],
        ],
        "values": [quarters(), quarters(1), quarters(5, 4)],
    },
    "index_select": {"index": _PLACES}, "gather": {"index": [whole(ROWS, 2, below=3), whole(2, 2, below=3, seed=1)]},
    "take_along_dim": {
        "self": [*_matrices((3, 4), (3, 4)), ONLY], "indices": [whole(ROWS, COLUMNS, below=3), whole(1, 5, below=3)],
        "dim": [1, 0, -2, DEFAULT],
    },
    "embedding": {"indices": _PLACES, "padding_idx": [DEFAULT, 0, 1]},
    "roll": {"shifts": [[1], [-2], [1, 2]], "dims": [[1], [0], [-1], [0, 1]]},
    "block_diag": {"tensors": [_matrices((2, 3), (3, 1))]},
    "pad constant_pad_nd": {
        "pad": [[1, 2], [1, 1, 1, 1], [-1, 2]], "mode": [DEFAULT, "reflect", "replicate", "circular"],
        "value": [DEFAULT, 2.5, -1, True],
    },
    "diag_embed": {"offset": [DEFAULT, 1, -2], "dim1": [DEFAULT, 0], "dim2": [DEFAULT, 0, 1]},
    "slice_scatter": {
        "self": _matrices((4, 4)), "src": _matrices((4, 2)), "dim": [1, along(0, src=quarters(2, 4))],
        "start": [1, along(2, end=4), along(DEFAULT, end=2), along(-3, end=-1), along(0, end=4, step=2)],
        "end": [3, along(4, start=2), along(9, start=2)], "step": [DEFAULT, along(2, start=0, end=3), along(2, end=9)],
    },
    "select_scatter": {"self": _matrices((4, 4)), "src": _matrices((4,)), "dim": [1, 0, -2], "index": [1, 0, -1]},
    "diagonal_scatter": {
        "self": _matrices((3, 4, 4)), "src": _matrices((3, 3)), "dim1": [1, along(2, dim2=1)],
        "dim2": [2, along(1, dim1=2)],
        "offset": [1, along(DEFAULT, src=quarters(3, 4)), along(-2, src=quarters(3, 2))],
    },
    "unfold": {"size": [2, 3], "step": [DEFAULT, 1, 2]},
    "im2col": {
        "self": _matrices((1, 2, 4, 4)), "kernel_size": [[2, 2], [3, 2]], "dilation": [[1, 1], [2, 1], [1, 2]],
        "padding": [[0, 0], [1, 0], [0, 2]], "stride": [[1, 1], [2, 1], [1, 2]],
    },
    "as_strided": {"size": [[2, 3], [2, 2]], "stride": [[1, 2], [3, 1]], "storage_offset": [DEFAULT, 2]},
    "kron": {"other": _matrices((2, 2), (2,))}, "outer": {"self": _matrices((3,)), "vec2": _matrices((4,), (2,))},
    "lerp": {"weight": [0.25, 2, 1, *_matrices((3, 4), (1, 4))]},
    "div divide": {"rounding_mode": [None, "floor", "trunc"]},
    "bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__": {
        "self": [*_MASK, True, False], "other": [_MASK[1], _MASK[2], _MASK[0], True, False],
    },
    "masked_fill": {"value": [0.5, -1, True, quarters(seed=3), torch.tensor(2), torch.tensor(True)]},
    "nan_to_num": {"self": [torch.tensor([[0.5, torch.inf, -torch.inf], [0, 1, torch.nan]]).double()]},
    "clamp clip": {"min": [DEFAULT, *_BELOW], "max": _BELOW}, "clamp_min clamp_max": {"min": _BELOW, "max": _BELOW},
    "round": {"decimals": [1, -1, 0]}, "dropout": {"p": [0.5, 0.25, 0.0, 1.0], "train": [True, False]},
    "batch_norm": {
        "weight": [*_matrices((4,), (4,)), None], "bias": [*_matrices((4,), (4,)), None], "training": [False, True],
        "running_mean": _matrices((4,), (4,)), "running_var": [x.abs() + 0.5 for x in _matrices((4,), (4,))],
        "eps": [1e-5, 0.5],
    },
    "diff": {
        "n": [DEFAULT, 2, 0], "prepend": [DEFAULT, *_matrices((3, 1), (3, 2))],
        "append": [DEFAULT, *_matrices((3, 1))],
    },
    "logit special_logit": {
        "self": [*(x.abs().clamp(max=1) for x in _matrices((3, 4), (3, 4))), chosen(3, 4), ONLY],
        "eps": [DEFAULT, 0.25, 1e-3],
    },
    "gelu": {"approximate": [DEFAULT, "tanh"]}, "prelu": {"weight": _matrices((1,), (4,), ())},
    "hardtanh": {"min_val": [DEFAULT, -0.5, -2, 0], "max_val": [DEFAULT, 0.5, 2, 0]},
    "softplus": {"beta": [DEFAULT, 2, 0.5, -1]}, "amax amin sum mean logsumexp norm": {"dim": _DIMS},
    "linalg_vector_norm norm": {"ord": [1, 2, 0.5, torch.inf, 0], "p": [1, 2, 0.5, torch.inf, 0], "dim": _DIMS},
    "prod": {"self": [Positions(), Positions((2, 2, 3), modulo=4)]},
    "any all any.dims all.dims": {"self": [Positions(above=k) for k in (0, 1, 5)]}, "any.dims all.dims": {"dim": _DIMS},
    "_softmax _log_softmax": {"half_to_float": [False]},
    "matmul linalg_matmul mm mv": {
        "self": _matrices((3, 4), (4,), (2, 3, 4)), "other": _matrices((4, 2), (4,), (2, 4, 2)),
        "mat2": _matrices((4, 2), (4, 3)), "vec": _matrices((4,)),
    },
    "dot": {"self": _matrices((4,), (4,)), "tensor": _matrices((4,), (4,))},
    "bmm": {"self": _matrices((2, 3, 4)), "mat2": _matrices((2, 4, 2))},
    "baddbmm": {"self": _matrices((2, 3, 2), (3, 1)), "batch1": _matrices((2, 3, 4)), "batch2": _matrices((2, 4, 2))},
    "addmm": {"self": _matrices((3, 2), (2,), (3, 1)), "mat1": _matrices((3, 4)), "mat2": _matrices((4, 2))},
    "linear": {"weight": _matrices((5, 4), (2, 4), (4,)), "bias": [DEFAULT, *_matrices((5,), ())]},
    "einsum": {"equation": ["ij,kj->ik", "ij,ij", "ij,kj->ikj", "ij,kl->il", "...j,kj->...k"]},
    "tensordot": {
        "other": _matrices((4, 3)), "dims_self": [[1], along([0], dims_other=[1]), along([0, 1], dims_other=[1, 0])],
        "dims_other": [[0], along([1], dims_self=[-2]), along([], dims_self=[])],
    },
    **{f"conv{n}d": {
        "input": _matrices((2, 4, *[5] * n)), "weight": _matrices((4, 4, *[2] * n), (4, 4, *[1] * n)),
        "bias": [DEFAULT, *_matrices((4,))], "groups": [DEFAULT, along(2, weight=quarters(4, 2, *[1] * n, seed=3))],
        "stride": [DEFAULT, [2] * n], "padding": [DEFAULT, [1] * n, "same"], "dilation": [DEFAULT, [2] * n],
    } for n in (1, 2, 3)},
    "fill": {"value": [2.5, -1, True, quarters(seed=3), torch.tensor(2)]}, "eye": {"n": [3, 5], "m": [4, 2]},
    "arange": {"start": [1, 0.5, -2], "end": [5, 4.5], "step": [2, 0.5, DEFAULT]},
    "chunk unsafe_chunk": {"self": _matrices((4, 6)), "chunks": [2, 3, 4]},
    "split split_with_sizes unsafe_split": {
        "self": _matrices((4, 6)), "split_size": [2, 4, [1, 3], [2, 2]], "split_sizes": [[1, 3], [2, 2]],
        "dim": [DEFAULT, 1, -1, along(1, split_sizes=[2, 1, 3]), along(-1, split_size=[2, 4])],
    },
    "tensor_split": {"indices": [[1, 3], [2]], "sections": [2, 3]},
    "broadcast_tensors": {"tensors": [_matrices((3, 1), (4,))]},
    "meshgrid": {"tensors": [_matrices((3,), (4,), (2,))], "indexing": ["ij", "xy"]},
}  # fmt: skip

_BY_NAME: dict[str, Values] = {
    "mask": _MASK, "condition": _MASK, "dim": [1, 0, -1, -2], "dims": _DIMS,
    "dtype": [DEFAULT, torch.float64, torch.float32, torch.int64], "device": [DEFAULT, torch.device("cpu")],
    "diagonal": [DEFAULT, 1, -1], "prepend": [DEFAULT],
}  # fmt: skip
_NUMBERS: Values = [2, 0.5, 0, -1, -0.75, True]
_BY_TYPE: dict[str, Values] = {"number": _NUMBERS, "int": [1, 0, 2, -1], "float": [0.5, 0.25], "bool": [True, False]}


def _others(shape: torch.Size, seed: int) -> Iterator[Any]:
    """Tensors of other values, kinds and shapes."""
    yield quarters(*shape, seed=seed + 10)
    yield whole(*shape, below=4, least=-3, seed=seed)
    yield whole(*shape, below=4, least=-3, seed=seed + 1).to(torch.int8)
    yield chosen(*shape, seed=seed)
    for dim in range(len(shape)):
        yield quarters(*shape[:dim], 1, *shape[dim + 1 :], seed=seed)
    yield quarters(seed=seed)
    yield Positions(tuple(shape))
    yield Positions(tuple(shape), above=0)


def _fits(argument: Any, value: Any) -> bool:
    if isinstance(value, Along):
        value = value.value
    if value is DEFAULT:
        return bool(argument.has_default_value())
    kind = str(argument.type)
    if kind.startswith("Optional["):
        kind = kind.removeprefix("Optional[").removesuffix("]")
        if value is None:
            return True
    wanted: dict[str, Any] = {
        "Tensor": Tensor | Positions, "number": int | float, "float": int | float, "bool": bool, "str": str,
        "int": int | torch.dtype, "Device": torch.device,
    }  # fmt: skip
    return isinstance(value, wanted.get(kind, list)) and not (kind == "int" and isinstance(value, bool))


def values_of(op: torch._ops.OpOverload, place: int) -> Values:
    """What one argument may be, that of the plain call first."""
    argument = op._schema.arguments[place]
    name = op._schema.name.removeprefix("aten::")
    is_tensor = "Tensor" in str(argument.type) and "List" not in str(argument.type)
    found: Values = [DEFAULT, None]
    own = [table for names, table in _EXAMPLES.items() if {name, f"{name}.{op._overloadname}"} & set(names.split())]
    for table in (*own, _BY_NAME):
        if argument.name in table:
            found = [*table[argument.name], DEFAULT, None]
            break
    else:
        if argument.name == "tensors":
            found = [[quarters(ROWS, COLUMNS), quarters(ROWS, COLUMNS, seed=1)]]
        found += _BY_TYPE.get(str(argument.type).removeprefix("Optional[").removesuffix("]"), [])
    if is_tensor and not any(x is ONLY for x in found):
        first = next((x for x in found if isinstance(x, Tensor | Positions)), quarters(ROWS, COLUMNS, seed=place))
        value = first.value() if isinstance(first, Positions) else first
        found += [first, *_others(value.shape, place)]
    if argument.name == "tensors":
        found += [[*found[0][:-1], other] for other in _others(found[0][-1].shape, place)]
        found += [found[0][:1]]
    return [value for value in found if value is not ONLY and _fits(argument, value)]


def plain(op: torch._ops.OpOverload) -> Given:
    """An operation with what it must be given, and no more."""
    values = {a.name: values_of(op, k)[:1] for k, a in enumerate(op._schema.arguments)}
    return Given(op, {name: found[0] for name, found in values.items() if found and found[0] is not DEFAULT})


def changed(call: Given, place: int) -> Iterator[Given]:
    """The call with one argument changed."""
    name = call.op._schema.arguments[place].name
    for value in values_of(call.op, place)[1:]:
        alone = value if isinstance(value, Along) else Along(value, {})
        values = {**call.values, **alone.others, name: alone.value}
        yield Given(call.op, {k: v for k, v in values.items() if v is not DEFAULT})
