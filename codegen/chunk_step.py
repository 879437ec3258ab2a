"""A single step, as in decoding: the state is read once, changed, read out, and written once.

Products are plain sums in float32: with one step there is no matrix on the other side.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import Setting
from refocus.codegen.flash_fit import padded
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def step(setting: Setting) -> ChunkKernel:
    """`out` (query heads, 1, e), `sums` (query heads, 1), `final` (key heads, d, e)."""
    form = setting.form
    w = ChunkWriter(setting, "linear_step", "one step")
    w.block_d, w.blocks_d = padded(setting.d), 1
    body = w.body
    for name in "qkv":
        w.operand(name, 3)
    if w.gated:
        w.operand("gate", 3 if w.by_channel else 2)
    if form.lookup and form.initial:  # of no state, nothing is found
        w.operand("erase", 3)
        w.operand("lookup", 3)
    elif form.erase and not form.lookup:
        w.operand("erase", 2)
    for wanted, name in ((form.initial, "initial"), (form.final, "final"), (form.sums, "sums")):
        if wanted:
            w.buffer(name)
    w.buffer("out", dict(setting.dtypes)["out"])
    body.line("# One program: one head, and a tile of its values.")
    body.line(f"{w.key_head} = tl.program_id(0).to(tl.int64)")
    w.own_lanes("d", "")
    w.own_lanes("e", "tl.program_id(1)")
    for name, lane in (("k", "d"), ("v", "e")):
        _vector(w, body, {"k": "key", "v": "value"}[name], name, lane, w.key_head)
    _decayed(w)
    if form.strict:
        _read(w)
    if form.lookup and form.initial:
        _vector(w, body, "erase", "erase", "d", w.key_head)
        body.line("state -= erase[:, None] * found[None, :]")
    elif form.erase and not form.lookup:
        body.line(f"erase = tl.load(erase_ptr + {w.key_head} * erase_stride_0).to(tl.float32)")
        kept = " - tl.sum(key[:, None] * state, 0)" if form.initial else ""
        body.line(f"value = erase * (value{kept})" if kept else "value = erase * value")
    body.line(f"state {'+=' if form.initial else '='} key[:, None] * value[None, :]")
    if not form.strict:
        _read(w)
    if form.final:
        w.put_state(body, "final", "state", w.key_head)
    return w.finish()


def _decayed(w: ChunkWriter) -> None:
    """The state as the step finds it."""
    body = w.body
    if not w.form.initial:
        if w.form.strict:
            body.line("state = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)")
        return
    w.state(body, "state", "initial", w.key_head)
    if w.form.lookup:
        _vector(w, body, "lookup", "lookup", "d", w.key_head)
        body.line("found = tl.sum(lookup[:, None] * state, 0)")
    if w.by_channel:
        _vector(w, body, "gate", "gate", "d", w.key_head)
        body.line("state = state * tl.exp(gate)[:, None]")
    elif w.gated:
        body.line(f"gate = tl.load(gate_ptr + {w.key_head} * gate_stride_0).to(tl.float32)")
        body.line("state = state * tl.exp(gate)")


def _read(w: ChunkWriter) -> None:
    block = w.sharing(w.body)
    _vector(w, block, "query", "q", "d", "head")
    mask = f", mask={w.mask('e')}" if w.mask("e") else ""
    out = "tl.sum(query[:, None] * state, 0)"
    dtype = next(p.dtype for p in w.parameters if p.name == "out_ptr")
    cast = "" if dtype == "float32" else f".to(tl.{dtype})"
    block.line(f"tl.store(out_ptr + head * E + e, {out}{cast}{mask})")
    if w.form.sums:
        # The normaliser starts from nothing, so before this step there is none.
        block = block.nested("if tl.program_id(1) == 0:") if w.blocks_e > 1 else block
        block.line(f"tl.store(sums_ptr + head, {'0.0' if w.form.strict else 'tl.sum(query * key, 0)'})")


def _vector(w: ChunkWriter, block: Block, target: str, name: str, lane: str, head: str) -> None:
    stride = f"{name}_stride_2"
    mask = f", mask={w.mask(lane)}, other=0.0" if w.mask(lane) else ""
    address = f"{name}_ptr + {head} * {name}_stride_0 + {lane} * {stride}"
    block.line(f"{target} = tl.load({address}{mask}).to(tl.float32)")
