"""The results of every chunk, from the state at its start and its own steps.

    scores[t, j] = sum over d of q[t, d] k[j, d] exp(cum[t] - cum[j])    where t sees j, else 0
    out[t]       = exp(cum[t]) q[t]^T state + sum over j of scores[t, j] v[j]      (for each kind of keys and values)
    sums[t]      = exp(cum[t]) q[t]^T total + sum over j of scores[t, j]

With gates for each channel the scores come from `refocus.codegen.chunk_channels`.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import Setting
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def outputs(setting: Setting) -> ChunkKernel:
    """`out` (query heads, length, e), contiguous, in the dtype of v; `sums` (query heads, length), float32."""
    form = setting.form
    w = ChunkWriter(setting, "chunk_outputs", "the results of every chunk")
    body = w.body
    w.operand("q", 3)
    for kind in w.kinds:
        for name in (kind.values,) if w.by_channel else (kind.keys, kind.values):
            w.operand(name, 3)
    w.gate_sums()
    if w.by_channel:
        for kind in w.kinds:
            w.buffer(f"scores{kind.mark}")
    for wanted, name in ((True, "states"), (form.sums, "totals")):
        if wanted:
            w.buffer(name)
    w.buffer("out", dict(setting.dtypes)["out"])
    if form.sums:
        w.buffer("sums")
    w.stand(True, "one chunk of one head, and a tile of its values.")
    w.own_lanes("e", "tl.program_id(1)")
    w.whole_lanes("d")
    w.base(body, "q", True)
    w.base(body, "v", False)
    if not w.by_channel:
        w.base(body, "k", False)
        w.decays(body, "cum", "rest")
        body.line("scores = tl.zeros([CHUNK, CHUNK], tl.float32)")
    body.line("acc = tl.zeros([CHUNK, BLOCK_E], tl.float32)")
    if form.sums:
        body.line("sums = tl.zeros([CHUNK], tl.float32)")
    _from_state(w, w.lanes(body, "d"))
    if not w.by_channel:
        if w.gated:
            body.line("acc = acc * tl.exp(cum)[:, None]")
            if form.sums:
                body.line("sums = sums * tl.exp(cum)")
    w.seen(body)
    for kind in w.kinds:
        if w.by_channel:
            load_scores(w, body, "scores", f"scores{kind.mark}")
        else:
            if kind.mark:
                _scores(w, kind.keys)
            w.weigh(body, "scores")
        if kind.mark:
            w.base(body, kind.values, False)
        w.tile(body, "value", kind.values, "e")
        body.line(f"acc = {w.dot(w.narrow('scores'), 'value', 'acc')}")
    w.put_tile(body, "out", "acc", "e", "head")
    if form.sums:
        body.line("sums += tl.sum(scores, 1)")
        # Programs of other values have them, too.
        block = body.nested("if tl.program_id(1) == 0:") if w.blocks_e > 1 else body
        block.line("tl.store(sums_ptr + head * length + start + t, sums, mask=inside)")
    return w.finish()


def _from_state(w: ChunkWriter, loop: Block) -> None:
    w.tile(loop, "query", "q", "d")
    if w.by_channel:
        w.decays(loop, "cum")
        loop.line("query = query * tl.exp(cum)")
    else:
        w.tile(loop, "key", "k", "d")
        loop.line(f"scores = {w.dot('query', 'tl.trans(key)', 'scores')}")
    w.state(loop, "state", "states")
    loop.line(f"acc = {w.state_dot(w.narrow('query') if w.by_channel else 'query', 'state', 'acc')}")
    if w.form.sums:
        w.vector(loop, "total", "totals")
        loop.line("sums += tl.sum(query * total[None, :], 1)")


def _scores(w: ChunkWriter, key: str) -> None:
    """Those of another kind of keys."""
    w.base(w.body, key, False)
    w.body.line("scores = tl.zeros([CHUNK, CHUNK], tl.float32)")
    loop = w.lanes(w.body, "d")
    if loop is not w.body:
        w.tile(loop, "query", "q", "d")
    w.tile(loop, "key", key, "d")
    loop.line(f"scores = {w.dot('query', 'tl.trans(key)', 'scores')}")


def load_scores(w: ChunkWriter, block: Block, target: str, name: str, head: str = "head", row: str = "t") -> None:
    """Of a chunk [query, key] the pairs that are `seen`, from a buffer (query heads, length, CHUNK)."""
    address = f"{name}_ptr + ({head} * length + start + {row}[:, None]) * CHUNK + t[None, :]"
    block.line(f"{target} = tl.load({address}, mask=seen & inside[:, None], other=0.0)")
