"""One call of linear attention on Triton: which kernels run, and the memory between them.

Between kernels, beside the results, live one state for each chunk (float32), and with gates for each channel one score
for each step and step of its chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from refocus.codegen import chunk_backward, chunk_channels, chunk_forward, chunk_states, chunk_step
from refocus.codegen.chunk_kernel import ChunkKernel, dtype_name, empty
from refocus.codegen.chunk_setting import SMALLEST, Kind, Setting, kinds
from refocus.codegen.linear_form import LinearForm

MOST_SEGMENTS = 16


@dataclass(frozen=True)
class Scan:
    """A pass through the chunks: its kernel, by part, how it calls the totals, the state it starts from, and where the
    last one goes."""

    kernel: Callable[[Setting, str], ChunkKernel]
    totals: str
    start: Tensor | None
    end: Tensor | None
    forward: bool = True


def segments_of(device: torch.device, programs: int, chunks: int) -> int:
    """Into how many segments a sequence is cut: enough for two programs on each processor, of eight chunks at least."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // max(programs, 1), chunks // 8, MOST_SEGMENTS))


def _carried(
    ends: Tensor, forgotten: Tensor | None, start: Tensor | None, order: Iterable[int]
) -> tuple[Tensor, Tensor]:
    """What is carried into each segment (segments, heads, ...), and out of the last, from what each adds."""
    carried = torch.empty_like(ends)
    state = torch.zeros_like(ends[0]) if start is None else start
    for segment in order:
        carried[segment] = state
        if forgotten is None:
            state = state + ends[segment]
        else:
            decay = forgotten[segment].exp()
            state = torch.addcmul(ends[segment], state, decay[(...,) + (None,) * (state.dim() - decay.dim())])
    return carried, state


@dataclass(frozen=True)
class Call:
    """One call: its form, and its tensors by name."""

    form: LinearForm
    chunk: int
    tensors: dict[str, Tensor]

    def receiving(self, grad: Tensor | None, grad_sums: Tensor | None, grad_final: Tensor | None) -> Call:
        """With what flows back into the results. The form's `final` then says whether anything does into the state."""
        q, v = self.tensors["q"], self.tensors["v"]
        more = {"grad": v.new_zeros(1, 1, 1).expand(*q.shape[:2], v.shape[2]) if grad is None else grad}
        if grad_sums is not None:
            more["grad_sums"] = grad_sums
        if grad_final is not None:
            more["grad_final"] = grad_final.to(torch.float32).contiguous()
        form = replace(self.form, final=grad_final is not None)
        return Call(form, self.chunk, self.tensors | more)

    @property
    def length(self) -> int:
        return self.tensors["k"].shape[1]

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def key_heads(self) -> int:
        return self.tensors["k"].shape[0]

    @property
    def share(self) -> int:
        return self.tensors["q"].shape[0] // max(self.key_heads, 1) or 1

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.key_heads, self.tensors["k"].shape[2], self.tensors["v"].shape[2]

    @property
    def kinds(self) -> list[tuple[Kind, Call]]:
        """Each kind of keys and values, and the same call with it alone."""
        if not self.form.lookup:
            return [(kinds(self.form)[0], self)]
        t, form = self.tensors, replace(self.form, erase=False, lookup=False)
        of = {kind: {"k": t[kind.keys], "v": t[kind.values]} for kind in kinds(self.form)}
        rest = {name: x for name, x in t.items() if name in ("q", "gate", "grad")}
        return [(kind, Call(form, self.chunk, rest | tensors)) for kind, tensors in of.items()]

    def setting(self, form: LinearForm | None = None, **dtypes: torch.dtype) -> Setting:
        named = {name: dtype_name(x) for name, x in self.tensors.items()}
        named |= {name: str(x).removeprefix("torch.") for name, x in dtypes.items()}
        _, d, e = self.state_shape
        tf32 = torch.version.hip is None and self.tensors["q"].device.type != "xpu"
        return Setting(form or self.form, self.chunk, d, e, self.share, tuple(sorted(named.items())), tf32)

    def run(self, kernel: ChunkKernel, grid: tuple[int, ...], buffers: dict[str, Tensor], **sizes: int) -> None:
        kernel.run(grid, self.tensors | buffers, {"length": self.length, **sizes})

    # -------------------------------------------------------------------------------------------------------- forward

    def gate_sums(self, setting: Setting) -> dict[str, Tensor]:
        if setting.form.gate == "none":
            return {}
        heads, d, _ = self.state_shape
        channels = (d,) if setting.form.gate == "channel" else ()
        shape = heads, self.chunks * self.chunk, *channels
        buffers = {name: empty(self.tensors["q"], *shape) for name in ("cum", "rest")}
        kernel = chunk_states.gate_sums(setting)
        self.run(kernel, (heads * self.chunks, kernel.tiles[0] if channels else 1), buffers)
        return buffers

    def states(self, setting: Setting, more: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """The gates' sums and the states at the start of each chunk; the final state goes where `more` has it."""
        buffers = self.gate_sums(setting) | {name: x for name, x in more.items() if x is not None}
        heads, d, e = self.state_shape
        buffers["states"] = empty(self.tensors["q"], heads, self.chunks, d, e)
        if setting.form.sums:
            buffers["totals"] = empty(self.tensors["q"], heads, self.chunks, d)
        self.scan(
            setting, buffers, Scan(chunk_states.states, "totals", self.tensors.get("initial"), buffers.get("final"))
        )
        return buffers

    def scan(self, setting: Setting, buffers: dict[str, Tensor], scan: Scan) -> None:
        """Go through the chunks; where heads are few, in several segments of the sequence at once."""
        heads, d, e = self.state_shape
        whole = scan.kernel(setting, "whole")
        tiles = prod(whole.tiles)
        wanted = segments_of(self.tensors["q"].device, heads * tiles, self.chunks)
        per_segment = -(-self.chunks // max(wanted, 1))
        if wanted <= 1 or self.chunks <= per_segment:
            self.run(whole, (heads, tiles), buffers)
            return
        segments = -(-self.chunks // per_segment)
        grid, like = (heads, tiles, segments), self.tensors["q"]
        ends, forgotten = empty(like, segments, heads, d, e), None
        more = {"ends": ends}
        if setting.form.gate != "none":
            forgotten = empty(like, segments, heads, *((d,) if setting.form.gate == "channel" else ()))
            more["forgotten"] = forgotten
        if setting.form.sums:
            totals = more[scan.totals] = empty(like, segments, heads, d)
        self.run(scan.kernel(setting, "ends"), grid, buffers | more, per_segment=per_segment)
        order = range(segments) if scan.forward else range(segments - 1, -1, -1)
        carried, last = _carried(ends, forgotten, scan.start, order)
        if scan.end is not None:
            scan.end.copy_(last)
        more = {"carried": carried}
        if setting.form.sums:
            more[f"{scan.totals}_carried"] = _carried(totals, forgotten, None, order)[0]
        self.run(scan.kernel(setting, "carried"), grid, buffers | more, per_segment=per_segment)

    def outputs(self, buffers: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor | None]:
        q = self.tensors["q"]
        setting = self.setting(out=v.dtype)
        buffers["out"] = empty(q, *q.shape[:2], v.shape[2], dtype=v.dtype)
        if self.form.sums:
            buffers["sums"] = empty(q, *q.shape[:2])
        if self.form.gate == "channel":
            buffers |= self.channel_scores(buffers)
        kernel = chunk_forward.outputs(setting)
        self.run(kernel, (q.shape[0] * self.chunks, kernel.tiles[1]), buffers)
        return buffers["out"], buffers.get("sums")

    def channel_scores(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of each kind of keys."""
        q, found = self.tensors["q"], {}
        grid = (q.shape[0] * self.chunks, self.chunk // SMALLEST)
        for kind, one in self.kinds:
            scores = found[f"scores{kind.mark}"] = empty(q, *q.shape[:2], self.chunk)
            one.run(chunk_channels.scores(one.setting()), grid, buffers | {"scores": scores})
        return found

    def step(self, final: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor | None]:
        q, kernel = self.tensors["q"], chunk_step.step(self.setting(out=v.dtype))
        buffers = {"out": empty(q, q.shape[0], 1, v.shape[2], dtype=v.dtype)}
        if self.form.sums:
            buffers["sums"] = empty(q, q.shape[0], 1)
        if final is not None:
            buffers["final"] = final
        self.run(kernel, (self.key_heads, kernel.tiles[1]), buffers)
        return buffers["out"], buffers.get("sums")

    # ------------------------------------------------------------------------------------------------------- backward

    def gradients(self) -> tuple[Tensor | None, ...]:
        t, form = self.tensors, self.form
        buffers = self.states(self.setting(replace(form, final=False)), {})
        grad_initial = empty(t["q"], *self.state_shape) if form.initial else None
        buffers |= self.states_backward(buffers, grad_initial)
        results = {
            f"grad_{name}": torch.empty(t[name].shape, dtype=t[name].dtype, device=t[name].device) for name in "qkv"
        }
        buffers |= results
        if form.gate == "channel":
            buffers |= self.channel_scores(buffers)
        self.values(buffers)
        grad_gate = self.pairs(buffers)
        if grad_gate is not None:
            grad_gate = grad_gate.to(t["gate"].dtype)
        return (*results.values(), grad_gate, None, grad_initial, None)

    def values(self, buffers: dict[str, Tensor], inflow: bool = True) -> None:
        """The gradient of values goes into its buffer. `inflow`: something flows into the states at the ends of chunks,
        and is counted here."""
        kernel = chunk_backward.values(self.setting(grad_v=buffers["grad_v"].dtype), inflow)
        self.run(kernel, (self.key_heads * self.chunks, kernel.tiles[1]), buffers)

    def pairs(self, buffers: dict[str, Tensor], inflow: bool = True) -> Tensor | None:
        """The gradients of queries and of every kind of keys go into their buffers, that of gates is returned."""
        return (self._by_channel if self.form.gate == "channel" else self._by_head)(buffers, inflow)

    def _by_head(self, buffers: dict[str, Tensor], inflow: bool) -> Tensor | None:
        q, chunks = self.tensors["q"], self.key_heads * self.chunks
        setting, gated = self.setting(grad_q=buffers["grad_q"].dtype), self.form.gate != "none"
        rows = {"rows": empty(q, *q.shape[:2])} if gated else {}
        self.run(chunk_backward.queries(setting), (chunks * self.share,), buffers | rows)
        parts: dict[str, list[Tensor]] = {"columns": [], "after": []} if inflow else {"columns": []}
        for kind, one in self.kinds:
            grad_k = buffers[f"grad_{kind.keys}"]
            keys = chunk_backward.keys(one.setting(grad_k=grad_k.dtype), inflow)
            mine = {name: empty(q, self.key_heads, keys.tiles[0], self.length) for name in parts if gated}
            one.run(keys, (chunks, keys.tiles[0]), buffers | mine | {"grad_k": grad_k})
            for name, part in mine.items():
                parts[name].append(part)
        if not gated:
            return None
        found = {name: torch.cat(tiles, 1) if len(tiles) > 1 else tiles[0] for name, tiles in parts.items()}
        grad_gate = empty(q, self.key_heads, self.length)
        kernel = chunk_backward.gates(setting, found["columns"].shape[1], inflow)
        self.run(kernel, (chunks,), buffers | rows | found | {"grad_gate": grad_gate})
        return grad_gate

    def _by_channel(self, buffers: dict[str, Tensor], inflow: bool) -> Tensor:
        q, k = self.tensors["q"], self.tensors["k"]
        chunks, blocks = self.key_heads * self.chunks, self.chunk // SMALLEST
        pairs = {kind: empty(q, *q.shape[:2], self.chunk) for kind, _ in self.kinds}
        for kind, one in self.kinds:
            one.run(chunk_channels.pairs(one.setting()), (chunks * self.share,), buffers | {"pairs": pairs[kind]})
        found = {"rows": empty(q, *q.shape)} | {f"pairs{kind.mark}": x for kind, x in pairs.items()}
        setting = self.setting(grad_q=buffers["grad_q"].dtype)
        self.run(chunk_channels.queries(setting), (chunks * self.share, blocks), buffers | found)
        for kind, one in self.kinds:
            grad_k = buffers[f"grad_{kind.keys}"]
            mine = {name: empty(q, *k.shape) for name in (("columns", "after") if inflow else ("columns",))}
            kernel = chunk_channels.keys(one.setting(grad_k=grad_k.dtype), inflow)
            one.run(kernel, (chunks, blocks), buffers | mine | {"pairs": pairs[kind], "grad_k": grad_k})
            found |= {name: x.add_(found[name]) if name in found else x for name, x in mine.items()}
        found["grad_gate"] = empty(q, *k.shape)
        kernel = chunk_channels.gates(setting, inflow)
        self.run(kernel, (chunks, kernel.tiles[0]), buffers | found)
        return found["grad_gate"]

    def states_backward(self, buffers: dict[str, Tensor], grad_initial: Tensor | None) -> dict[str, Tensor]:
        setting = self.setting()
        heads, d, e = self.state_shape
        found = {"grad_states": empty(self.tensors["q"], heads, self.chunks, d, e)}
        if setting.form.sums:
            found["grad_totals"] = empty(self.tensors["q"], heads, self.chunks, d)
        if grad_initial is not None:
            found["grad_initial"] = grad_initial
        start = self.tensors.get("grad_final")
        scan = Scan(chunk_states.states_backward, "grad_totals", start, grad_initial, forward=False)
        self.scan(setting, buffers | found, scan)
        return found
