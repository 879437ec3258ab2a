"""A kernel of the chunked schedule: its file, its arguments, its launch.

All these kernels go through the sequence in chunks of `chunk` steps, and their text is made of the same pieces: where a
program stands (a head and a chunk), tiles of operands [step, feature], tiles of a state [feature, value], and decays
between steps of one chunk. `ChunkWriter` writes these; the kernels themselves are in the files beside it.

Decays stay logarithms, summed from the start of the chunk, until a difference of two of them is known to be no gain:
every exponential is of a number that is at most 0 (where gates are), and nothing is divided by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from refocus.codegen import cache
from refocus.codegen.flash_fit import padded
from refocus.codegen.launch import function_of, on_device
from refocus.codegen.linear_form import LinearForm
from refocus.codegen.plan import Plan
from refocus.codegen.writer import Block

NARROW = ("float16", "bfloat16")
SMALLEST = 16  # what tl.dot multiplies


@dataclass(frozen=True)
class Setting:
    """All that the text of a kernel depends on. `repr` rebuilds it.

    `d`, `e`: features and values; `share`: query heads for each key head; `dtypes`: of the operands, by name.
    """

    form: LinearForm
    chunk: int
    d: int
    e: int
    share: int
    dtypes: tuple[tuple[str, str], ...]

    @property
    def dtype(self) -> str:
        """What products are computed in: the operands' own narrow dtype, else float32."""
        known = dict(self.dtypes)
        same = {known[name] for name in "qkv"}
        return known["q"] if len(same) == 1 and known["q"] in NARROW else "float32"

    @property
    def narrow(self) -> bool:
        return self.dtype in NARROW

    @property
    def widest(self) -> int:
        return max(64, padded(self.d), padded(self.e))


@dataclass(frozen=True)
class Schedule:
    """Values in a tile (and features, where not told apart), and what Triton is asked for."""

    block: int
    warps: int
    stages: int
    features: int = 0


# Tiles that spill no registers on sm_80 and sm_90, at 64 and 128 features and values (tests/test_linear_triton_aot.py).
# Products of float32 run without tensor cores, which takes more registers.
_NARROW = Schedule(64, 4, 2)
_FLOAT32 = Schedule(32, 8, 1)
_STEP = Schedule(32, 4, 1)
_NARROW_KERNELS = {
    "gates_backward": Schedule(32, 4, 1), "linear_step": _STEP, "delta_inverse": Schedule(64, 1, 1),
    "delta_states": Schedule(32, 8, 2, 128), "delta_states_backward": Schedule(32, 8, 1, 128),
}  # fmt: skip
# With one tile of features and values there are no loops to load in, and everything is in registers at once.
_NARROW_SINGLE = {"keys_backward": Schedule(32, 4, 2), "values_backward": Schedule(32, 4, 2)}
_FLOAT32_KERNELS = {
    "gates_backward": Schedule(32, 4, 1), "linear_step": _STEP, "delta_inverse": Schedule(32, 1, 1),
    "delta_states_backward": Schedule(16, 8, 1, 32),
}  # fmt: skip


def schedule(setting: Setting, name: str) -> Schedule:
    """The schedule of the kernel `name`."""
    if name == "gate_sums":
        return Schedule(32, 4 if setting.form.gate == "channel" else 1, 1)
    if not setting.narrow:
        return _FLOAT32_KERNELS.get(name, _FLOAT32)
    if setting.widest <= 64 and name in _NARROW_SINGLE:
        return _NARROW_SINGLE[name]
    return _NARROW_KERNELS.get(name, _NARROW)


@dataclass(frozen=True)
class Parameter:
    """An argument of a kernel: `kind` "pointer" (to the tensor `of`), "stride" (its dimension `dim`) or "size".
    `dtype`: the pointer's; `unit`: the stride is one where the tensor is contiguous."""

    name: str
    kind: str
    of: str = ""
    dim: int = 0
    dtype: str = ""
    unit: bool = False


@dataclass(frozen=True)
class ChunkKernel:
    """A kernel in a file: the function `name` of the module at `path`, and how to call it. `tiles`: how many of them
    its features and its values make."""

    name: str
    source: str
    path: Path
    key: str
    plan: Plan
    parameters: tuple[Parameter, ...]
    tiles: tuple[int, int]

    def run(self, grid: tuple[int, ...], tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> None:
        """Run so many programs. Buffers, of which the kernel asks no strides, must be contiguous."""
        values: list[Tensor | int] = []
        for p in self.parameters:
            if p.kind == "size":
                values.append(sizes[p.name])
            else:
                values.append(tensors[p.of] if p.kind == "pointer" else tensors[p.of].stride(p.dim))
        if all(grid):
            device = next(iter(tensors.values())).device
            with on_device(device):
                function_of(self)[grid](*values, num_warps=self.plan.num_warps, num_stages=self.plan.num_stages)


def notation(form: LinearForm, share: int) -> list[str]:
    """The recurrence, in index notation."""
    shared = f"b//{share}" if share > 1 else "b"
    decay = {"none": "", "head": "exp(gate[c,t]) * ", "channel": "exp(gate[c,t,d]) * "}[form.gate]
    new = "k[c,t,d] * v[c,t,e]"
    lines = []
    if form.erase:
        new = "k[c,t,d] * u[c,t,e]"
        lines.append(f"u[c,t,e]   = erase[c,t] * (v[c,t,e] - sum_d k[c,t,d] * {decay}S[c,t-1,d,e])")
    lines.append(f"S[c,t,d,e] = {decay}S[c,t-1,d,e] + {new}")
    seen = f"S[{shared},t,d,e]"
    if form.strict:
        seen = f"{decay.replace('c,', shared + ',')}S[{shared},t-1,d,e]"
    lines.append(f"O[b,t,e]   = sum_d q[b,t,d] * {seen}")
    if form.sums:
        lines.append(f"sums[b,t]  = the same with v = 1{', and no initial state' if form.initial else ''}")
    return lines


class ChunkWriter:
    """The text of one kernel under construction."""

    def __init__(self, setting: Setting, name: str, what: str) -> None:
        self.setting, self.form, self.name, self.what = setting, setting.form, name, what
        self.schedule = schedule(setting, name)
        self.block_d = min(self.schedule.features or self.schedule.block, padded(setting.d))
        self.block_e = min(self.schedule.block, padded(setting.e))
        self.body = Block()
        self.parameters: list[Parameter] = []
        self.gated, self.by_channel = self.form.gate != "none", self.form.gate == "channel"
        self.key_head = "head" if setting.share == 1 else "key_head"
        self.blocks_d, self.blocks_e = -(-setting.d // self.block_d), -(-setting.e // self.block_e)

    # ------------------------------------------------------------------------------------------------------ the file

    def finish(self) -> ChunkKernel:
        setting = self.setting
        text = Block()
        text.line(f"# Generated by refocus: linear attention in chunks, {self.what}.")
        text.lines(f"#     {line}" for line in notation(self.form, setting.share))
        text.lines(("", "import triton", "import triton.language as tl", ""))
        lines = list(self.body.render(1))
        body = "\n".join(lines)
        sizes = {
            "CHUNK": setting.chunk, "D": setting.d, "E": setting.e, "BLOCK_D": self.block_d, "BLOCK_E": self.block_e,
            "BLOCKS_E": self.blocks_e, "BLOCKS_D": self.blocks_d, "SHARE": setting.share, "SUB": SMALLEST,
        }  # fmt: skip
        words = set(_words(body))
        text.lines(f"{name} = tl.constexpr({value})" for name, value in sizes.items() if name in words)
        text.lines(("", "", "@triton.jit", f"def {self.name}("))
        for kind in ("pointer", "stride", "size"):
            names = [p.name for p in self.parameters if p.kind == kind]
            text.lines(f"    {', '.join(names[k : k + 6])}," for k in range(0, len(names), 6))
        text.line("):")
        source = "\n".join((*text.render(), *lines)) + "\n"
        order = {"pointer": 0, "stride": 1, "size": 2}
        parameters = tuple(sorted(self.parameters, key=lambda p: order[p.kind]))
        plan = Plan("triton", "chunked", setting.chunk, setting.chunk, self.schedule.warps, self.schedule.stages)
        key = cache.key_of(setting, self.name, self.what, self.schedule)
        tiles = self.blocks_d, self.blocks_e
        return ChunkKernel(self.name, source, cache.save(source, key), key, plan, parameters, tiles)

    # ------------------------------------------------------------------------------------------------------ arguments

    def operand(self, name: str, dims: int, dtype: str = "") -> None:
        """A tensor with any strides."""
        self.parameters.append(Parameter(f"{name}_ptr", "pointer", name, 0, dtype or self.dtype_of(name)))
        for dim in range(dims):
            self.parameters.append(Parameter(f"{name}_stride_{dim}", "stride", name, dim, unit=dim == dims - 1))

    def buffer(self, name: str, dtype: str = "float32") -> None:
        """A contiguous tensor of our own."""
        self.parameters.append(Parameter(f"{name}_ptr", "pointer", name, 0, dtype))

    def size(self, name: str) -> None:
        self.parameters.append(Parameter(name, "size"))

    def dtype_of(self, name: str) -> str:
        return dict(self.setting.dtypes)[name]

    # ------------------------------------------------------------------------------------------------ where one stands

    def stand(self, of_queries: bool, note: str, steps: str = "tl.arange(0, CHUNK)") -> None:
        """One program for each chunk of each head, of queries or of keys; `place` numbers chunks of keys."""
        body, share = self.body, self.setting.share
        self.size("length")
        body.line(f"# One program: {note}")
        body.line("chunks = tl.cdiv(length, CHUNK)")
        body.line("chunk = tl.program_id(0) % chunks")
        head = "head" if of_queries else self.key_head
        body.line(f"{head} = (tl.program_id(0) // chunks).to(tl.int64)")
        if of_queries and share > 1:
            body.line("key_head = head // SHARE")
        body.line(f"place = {self.key_head} * chunks + chunk")
        body.line("start = chunk.to(tl.int64) * CHUNK")
        if "block" in steps:
            body.line("block = tl.program_id(1)")
        body.line(f"t = {steps}")
        body.line("inside = t < length - start")

    def sharing(self, block: Block) -> Block:
        """Where each query head of a key head is visited."""
        if self.setting.share == 1:
            return block
        inner = block.nested("for sharing in range(0, SHARE):")
        inner.line("head = key_head * SHARE + sharing")
        return inner

    def base(self, block: Block, name: str, of_queries: bool) -> None:
        """The address of an operand's chunk."""
        head = "head" if of_queries else self.key_head
        block.line(f"{name}_base = {name}_ptr + {head} * {name}_stride_0 + start * {name}_stride_1")

    # ----------------------------------------------------------------------------------------------------------- lanes

    def lanes(self, block: Block, lane: str) -> Block:
        """Where tiles of `lane` ("d" or "e") are visited one after the other: a loop where there are several."""
        size = f"BLOCK_{lane.upper()}"
        if (self.blocks_d if lane == "d" else self.blocks_e) == 1:
            return block
        inner = block.nested(f"for {lane}_start in range(0, {lane.upper()}, {size}):")
        inner.line(f"{lane} = {lane}_start + tl.arange(0, {size})")
        return inner

    def whole_lanes(self, lane: str) -> None:
        """Lanes of which there is one tile are set once, for all loops."""
        if (self.blocks_d if lane == "d" else self.blocks_e) == 1:
            self.body.line(f"{lane} = tl.arange(0, BLOCK_{lane.upper()})")

    def own_lanes(self, lane: str, number: str) -> None:
        """The tile of this program."""
        if (self.blocks_d if lane == "d" else self.blocks_e) == 1:
            self.body.line(f"{lane} = tl.arange(0, BLOCK_{lane.upper()})")
        else:
            self.body.line(f"{lane} = {number} * BLOCK_{lane.upper()} + tl.arange(0, BLOCK_{lane.upper()})")

    def mask(self, layout: tuple[str, str] | str, rows: str = "inside") -> str:
        """The text of a tile's mask: "d", "e" or "t" for a vector, two of them for a tile; "" where none is needed."""
        if isinstance(layout, str):
            return self._condition(layout, rows)
        first, second = (self._condition(x, rows) for x in layout)
        parts = [f"{first}[:, None]"] if first == rows else [f"({first})[:, None]"] if first else []
        parts += [f"{second}[None, :]"] if second == rows else [f"({second})[None, :]"] if second else []
        return " & ".join(parts)

    def _condition(self, lane: str, rows: str) -> str:
        if lane in ("t", ""):
            return rows if lane else ""
        width, block = (self.setting.d, self.block_d) if lane[0] == "d" else (self.setting.e, self.block_e)
        return f"{lane} < {lane[0].upper()}" if width % block else ""

    # ----------------------------------------------------------------------------------------------------------- tiles

    def tile(
        self, block: Block, target: str, name: str, lane: str, rows: str = "t", inside: str = "inside", dtype: str = ""
    ) -> None:
        """A tile [step, lane] of an operand, in what products are computed in, or in `dtype`."""
        dtype = dtype or self.setting.dtype
        mask = self.mask(("t", lane), inside)
        address = f"{name}_base + {rows}[:, None] * {name}_stride_1 + {lane}[None, :] * {name}_stride_2"
        given = next(p.dtype for p in self.parameters if p.name == f"{name}_ptr")
        cast = "" if given == dtype else f".to(tl.{dtype})"
        block.line(f"{target} = tl.load({address}, mask={mask}, other=0.0){cast}")

    def state(self, block: Block, target: str, name: str, place: str = "place", d: str = "d") -> None:
        """A tile [d, e] of a buffer of states."""
        mask = self.mask((d, "e"))
        guard = f", mask={mask}, other=0.0" if mask else ""
        block.line(f"{target} = tl.load({name}_ptr + {place} * D * E + {d}[:, None] * E + e[None, :]{guard})")

    def put_state(self, block: Block, name: str, text: str, place: str = "place", d: str = "d") -> None:
        mask = self.mask((d, "e"))
        guard = f", mask={mask}" if mask else ""
        block.line(f"tl.store({name}_ptr + {place} * D * E + {d}[:, None] * E + e[None, :], {text}{guard})")

    def vector(self, block: Block, target: str, name: str, place: str = "place") -> None:
        """A tile [d] of a buffer of states of the normaliser."""
        guard = f", mask={self.mask('d')}, other=0.0" if self.mask("d") else ""
        block.line(f"{target} = tl.load({name}_ptr + {place} * D + d{guard})")

    def put_vector(self, block: Block, name: str, text: str, place: str = "place") -> None:
        """Store a vector [d]; where several programs have it, one of them does."""
        if self.blocks_e > 1:
            block = block.nested("if tl.program_id(1) % BLOCKS_E == 0:")
        guard = f", mask={self.mask('d')}" if self.mask("d") else ""
        block.line(f"tl.store({name}_ptr + {place} * D + d, {text}{guard})")

    def put_tile(self, block: Block, name: str, text: str, lane: str, head: str) -> None:
        """Store a tile [step, lane] of a contiguous result, or a buffer (head, step, lane)."""
        dtype = next(p.dtype for p in self.parameters if p.name == f"{name}_ptr")
        if dtype != "float32":
            text = f"({text}).to(tl.{dtype})" if " " in text else f"{text}.to(tl.{dtype})"
        size = lane.upper()
        block.line(f"{name}_base = {name}_ptr + ({head} * length + start) * {size}")
        address = f"{name}_base + t[:, None] * {size} + {lane}[None, :]"
        block.line(f"tl.store({address}, {text}, mask={self.mask(('t', lane))})")

    # ---------------------------------------------------------------------------------------------------------- decays

    def decays(self, block: Block, last: bool) -> None:
        """`cum`: what the logarithms of decays sum up to, from the chunk's start to each step; `last`: to its end."""
        if self.form.gate == "head":
            block.line("cum = tl.load(cum_ptr + place * CHUNK + t)")
            if last:
                block.line("last = tl.load(cum_ptr + place * CHUNK + CHUNK - 1)")
        elif self.by_channel:
            guard = f", mask={self.mask(('', 'd'))}, other=0.0" if self.mask("d") else ""
            block.line(f"cum = tl.load(cum_ptr + (place * CHUNK + t[:, None]) * D + d[None, :]{guard})")
            if last:
                guard = f", mask={self.mask('d')}, other=0.0" if self.mask("d") else ""
                block.line(f"last = tl.load(cum_ptr + (place * CHUNK + CHUNK - 1) * D + d{guard})")

    def seen(self, block: Block) -> None:
        """`seen`: whether a query [:, None] sees a key [None, :] of its chunk, and with one gate a step, `decay`."""
        block.line(f"seen = t[:, None] {'>' if self.form.strict else '>='} t[None, :]")
        if self.form.gate == "head":
            block.line("decay = tl.exp(tl.where(seen, cum[:, None] - cum[None, :], 0.0))")

    def weigh(self, block: Block, name: str) -> None:
        """Scores, or what flows back into them, of pairs that are seen, with their decay."""
        weighed = f"{name} * decay" if self.form.gate == "head" else name
        block.line(f"{name} = tl.where(seen, {weighed}, 0.0)")

    # -------------------------------------------------------------------------------------------------------- products

    def narrow(self, text: str) -> str:
        """As an operand of a product."""
        return f"{text}.to(tl.{self.setting.dtype})" if self.setting.narrow else text

    def dot(self, a: str, b: str, acc: str = "") -> str:
        more = f", {acc}" if acc else ""
        precision = "" if self.setting.narrow else ', input_precision="ieee"'
        return f"tl.dot({a}, {b}{more}{precision})"

    def state_dot(self, a: str, state: str, acc: str = "", transposed: bool = False) -> str:
        """A product with a float32 state. A sum over a long sequence need not fit float16, so that takes TF32, which
        has the same mantissa and the range of float32."""
        turned = "tl.trans({})" if transposed else "{}"
        if self.setting.dtype != "float16":
            return self.dot(a, turned.format(self.narrow(state)), acc)
        more = f", {acc}" if acc else ""
        return f'tl.dot({a}.to(tl.float32), {turned.format(state)}{more}, input_precision="tf32")'


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)
