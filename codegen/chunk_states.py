"""What passes between chunks: the state at the start of every chunk and, backward, what flows into its end.

    chunk_states          state[n + 1]      = exp(last) state[n]      + sum over t of exp(last - cum[t]) k[t] v[t]^T
    chunk_states_backward grad_state[n - 1] = exp(last) grad_state[n] + sum over t of exp(cum[t]) q[t] grad[t]^T

with cum[t] the sum of the gates of the chunk up to t, last that of all its gates. One program goes through the chunks
with one tile of the state. Where heads are too few to fill the device, the sequence is cut into segments: their ends
are computed from nothing (`part` "ends"), carried from one to the next (`refocus.codegen.linear_triton`), and all
segments start at once from what is carried into them ("carried").
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import Setting
from refocus.codegen.writer import Block

PARTS = ("whole", "ends", "carried")


@lru_cache(maxsize=256)
def gate_sums(setting: Setting) -> ChunkKernel:
    """`cum`: (key heads, chunks * chunk[, d]), float32; past the end of the sequence, what the last step has. `rest`:
    what these sums lost to rounding, the same shape.

    A gate of -inf forgets everything, as does one of -104, whose exponential is no float32 but 0. It is taken for that,
    so that differences of sums stay numbers.
    """
    w = ChunkWriter(setting, "gate_sums", "sums of gates since the start of the chunk")
    body = w.body
    w.operand("gate", 3 if w.by_channel else 2)
    w.gate_sums()
    w.stand(False, "one chunk of one head.")
    w.base(body, "gate", False)
    if w.by_channel:
        w.own_lanes("d", "tl.program_id(1)")
        mask = w.mask(("t", "d"))
        address = "gate_base + t[:, None] * gate_stride_1 + d[None, :] * gate_stride_2"
        body.line(f"gate = tl.load({address}, mask={mask}, other=0.0).to(tl.float32)")
        _sum(body)
        guard = f", mask={w.mask(('', 'd'))}" if w.mask("d") else ""
        for name in ("cum", "rest"):
            body.line(f"tl.store({name}_ptr + (place * CHUNK + t[:, None]) * D + d[None, :], {name}{guard})")
    else:
        body.line("gate = tl.load(gate_base + t * gate_stride_1, mask=inside, other=0.0).to(tl.float32)")
        _sum(body)
        body.lines(f"tl.store({name}_ptr + place * CHUNK + t, {name})" for name in ("cum", "rest"))
    return w.finish()


def _sum(body: Block) -> None:
    body.line("gate = tl.maximum(gate, -104.0)")
    body.line("cum, rest = tl.associative_scan((gate, tl.zeros_like(gate)), 0, add_exactly)")


@lru_cache(maxsize=256)
def states(setting: Setting, part: str = "whole") -> ChunkKernel:
    """`states`: (key heads, chunks, d, e), at the start of each chunk; `totals`: (key heads, chunks, d)."""
    return _States(setting, "chunk_states", "the state at the start of every chunk", part).write()


@lru_cache(maxsize=256)
def states_backward(setting: Setting, part: str = "whole") -> ChunkKernel:
    """`grad_states`: (key heads, chunks, d, e), what flows into the end of each chunk; `grad_totals`. The setting's
    `final` is whether anything flows into the final state."""
    return _StatesBackward(setting, "chunk_states_backward", "what flows into the end of every chunk", part).write()


class _States:
    """Both directions: what differs are the operands and which way the chunks are visited."""

    keys, values, states, totals = "k", "v", "states", "totals"
    of_queries = False

    def __init__(self, setting: Setting, name: str, what: str, part: str) -> None:
        assert part in PARTS
        self.part, form = part, setting.form
        what += {"whole": "", "ends": ": what segments add", "carried": ", in segments"}[part]
        self.w = ChunkWriter(setting, name, what)
        self.form = form

    @property
    def starts(self) -> str:
        """What the first state comes from."""
        return "carried" if self.part == "carried" else "initial" if self.form.initial and self.part == "whole" else ""

    @property
    def ends(self) -> str:
        """Where the last state goes."""
        return "ends" if self.part == "ends" else "final" if self.form.final and self.part == "whole" else ""

    def write(self) -> ChunkKernel:
        w, body, sums = self.w, self.w.body, self.form.sums
        self._arguments()
        number = "tl.program_id(1)"
        w.size("length")
        segment = "" if self.part == "whole" else " in one segment of the sequence"
        body.line(f"# One program: a tile of the state of one head{segment}, chunk after chunk.")
        body.line(f"{w.key_head} = tl.program_id(0).to(tl.int64)")
        w.own_lanes("d", f"{number} // BLOCKS_E" if w.blocks_e > 1 else number)
        w.own_lanes("e", f"{number} % BLOCKS_E" if w.blocks_d > 1 else number)
        body.line("t = tl.arange(0, CHUNK)")
        body.line("chunks = tl.cdiv(length, CHUNK)")
        slot, first, stop = w.key_head, "0", "chunks"
        if self.part != "whole":
            w.size("per_segment")
            body.line("first = tl.program_id(2) * per_segment")
            body.line("stop = tl.minimum(first + per_segment, chunks)")
            body.line(f"slot = tl.program_id(2) * tl.num_programs(0) + {w.key_head}")
            slot, first, stop = "slot", "first", "stop"
        self._begin(slot)
        loop = self._loop(first, stop)
        loop.line(f"place = {w.key_head} * chunks + chunk")
        loop.line("start = tl.cast(chunk, tl.int64) * CHUNK")
        loop.line("inside = t < length - start")
        if self.part != "ends":
            w.put_state(loop, self.states, "state")
            if sums:
                w.put_vector(loop, self.totals, "total")
        w.decays(loop, "kept", *(("cum",) if self.of_queries else ("left",)))
        self._decay(loop)
        self._add(w.sharing(loop) if self.of_queries else loop)
        self._end(slot)
        return w.finish()

    def _arguments(self) -> None:
        w, sums = self.w, self.form.sums
        w.operand(self.keys, 3)
        w.operand(self.values, 3)
        w.gate_sums()
        for wanted, name in ((self.starts, self.starts), (self.ends, self.ends)):
            if wanted:
                w.buffer(name)
        if self.part != "ends":
            w.buffer(self.states)
        if sums:
            w.buffer(f"{self.totals}_{self.part}" if self.part == "carried" else self.totals)
            if self.part == "carried":
                w.buffer(self.totals)
        if self.part == "ends" and w.gated:
            w.buffer("forgotten")

    def _begin(self, slot: str) -> None:
        w, body, sums = self.w, self.w.body, self.form.sums
        if self.starts:
            w.state(body, "state", self.starts, slot)
        else:
            body.line("state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)")
        if sums and self.part == "carried":
            w.vector(body, "total", f"{self.totals}_carried", slot)
        elif sums:
            body.line("total = tl.zeros([BLOCK_D], tl.float32)")
        if self.part == "ends" and w.gated:
            body.line("forgotten = tl.zeros([BLOCK_D], tl.float32)" if w.by_channel else "forgotten = 0.0")

    def _loop(self, first: str, stop: str) -> Block:
        return self.w.body.nested(f"for chunk in range({first}, {stop}):")

    def _decay(self, loop: Block) -> None:
        w = self.w
        if w.gated:
            w.keep(loop, "state")
            if self.form.sums:
                w.keep(loop, "total", vector=True)
            if self.part == "ends":
                loop.line("forgotten += last")

    def _add(self, block: Block) -> None:
        w = self.w
        w.base(block, "k", False)
        w.base(block, "v", False)
        w.tile(block, "key", "k", "d")
        w.tile(block, "value", "v", "e")
        if w.gated:
            block.line(f"key = key * tl.exp(left){w.spread}")
        if self.form.sums:
            block.line(f"total += tl.sum({'key' if w.gated else 'key.to(tl.float32)'}, 0)")
        key = w.narrow("key") if w.gated else "key"
        block.line(f"state = {w.dot(f'tl.trans({key})', 'value', 'state')}")

    def _end(self, slot: str) -> None:
        w, body = self.w, self.w.body
        if self.ends:
            w.put_state(body, self.ends, "state", slot)
        if self.part == "ends":
            if self.form.sums:
                w.put_vector(body, self.totals, "total", slot)
            if w.by_channel:
                w.put_vector(body, "forgotten", "forgotten", slot)
            elif w.gated:
                body.line(f"tl.store(forgotten_ptr + {slot}, forgotten)")


class _StatesBackward(_States):
    keys, values, states, totals = "q", "grad", "grad_states", "grad_totals"
    of_queries = True

    @property
    def starts(self) -> str:
        given = self.form.final and self.part == "whole"
        return "carried" if self.part == "carried" else "grad_final" if given else ""

    @property
    def ends(self) -> str:
        given = self.form.initial and self.part == "whole"
        return "ends" if self.part == "ends" else "grad_initial" if given else ""

    def _arguments(self) -> None:
        super()._arguments()
        if self.form.sums:
            self.w.operand("grad_sums", 2)

    def _loop(self, first: str, stop: str) -> Block:
        loop = self.w.body.nested(f"for back in range({first}, {stop}):")
        loop.line("chunk = chunks - 1 - back" if first == "0" else "chunk = first + stop - 1 - back")
        return loop

    def _add(self, block: Block) -> None:
        w = self.w
        w.base(block, "q", True)
        w.base(block, "grad", True)
        w.tile(block, "query", "q", "d")
        w.tile(block, "grad", "grad", "e")
        if w.gated:
            block.line(f"query = query * tl.exp(cum){w.spread}")
        if self.form.sums:
            load_grad_sums(w, block)
            block.line("total += tl.sum(query * grad_sums[:, None], 0)")
        query = w.narrow("query") if w.gated else "query"
        block.line(f"state = {w.dot(f'tl.trans({query})', 'grad', 'state')}")


def load_after(w: ChunkWriter, rows: str) -> None:
    """`after`: what flows back into a tile of keys, so many `rows`, out of the state at their chunk's end."""
    body = w.body
    body.line(f"after = tl.zeros([{rows}, BLOCK_D], tl.float32)")
    loop = w.lanes(body, "e")
    w.tile(loop, "value", "v", "e")
    w.state(loop, "grad_state", "grad_states")
    loop.line(f"after = {w.state_dot('value', 'grad_state', 'after', transposed=True)}")
    if w.form.sums:
        w.vector(body, "grad_total", "grad_totals")
        body.line("after += grad_total[None, :]")


def load_grad_sums(w: ChunkWriter, block: Block) -> None:
    """What flows back into the normaliser's sums, of one chunk."""
    w.base(block, "grad_sums", True)
    address = "grad_sums_base + t * grad_sums_stride_1"
    block.line(f"grad_sums = tl.load({address}, mask=inside, other=0.0).to(tl.float32)")
