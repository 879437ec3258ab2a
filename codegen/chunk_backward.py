"""The gradients of every chunk, from the state at its start, what flows into its end, and its own steps.

    pairs[t, j]  = (sum over e of grad[t, e] v[j, e] + grad_sums[t]) exp(cum[t] - cum[j])     where t sees j, else 0
    grad_q[t]    = sum over j of pairs[t, j] k[j]  + exp(cum[t]) (state grad[t] + total grad_sums[t])
    grad_k[j]    = sum over t of pairs[t, j] q[t]  + exp(last - cum[j]) (grad_state v[j] + grad_total)
    grad_v[j]    = sum over t of scores[t, j] grad[t] + exp(last - cum[j]) grad_state^T k[j]

A gate is passed by every pair of steps on either side of it. By where these stand, in this chunk or not, its gradient
is made of four sums (q . grad_q and k . grad_k summed over features, or with gates by channel, kept apart):

    grad_gate[s] = sum over t >= s of (q . grad_q - k . first part of grad_k)[t]     (pairs t, t left out of both)
                 + sum over j < s  of (k . second part of grad_k)[j]
                 + exp(last) (state . grad_state + total . grad_total)

so that no sum is longer than a chunk. Every number has one writer and a fixed order of summation.
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_forward import load_scores
from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import Kind, Setting
from refocus.codegen.chunk_states import load_after, load_grad_sums
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def queries(setting: Setting) -> ChunkKernel:
    """`grad_q` (query heads, length, d); `rows` (query heads, length), what gates get of it."""
    form = setting.form
    w = ChunkWriter(setting, "queries_backward", "what flows back into queries")
    body = w.body
    names = *(("q",) if w.gated else ()), *(x for kind in w.kinds for x in (kind.keys, kind.values)), "grad"
    for name in names:
        w.operand(name, 3)
    w.gate_sums()
    for wanted, name in ((True, "states"), (form.sums, "totals")):
        if wanted:
            w.buffer(name)
    w.buffer("grad_q", dict(setting.dtypes)["grad_q"])
    if w.gated:
        w.buffer("rows")
    if form.sums:
        w.operand("grad_sums", 2)
    w.stand(True, "one chunk of one head.")
    w.whole_lanes("d")
    w.whole_lanes("e")
    for name in names:
        w.base(body, name, name in ("q", "grad"))
    w.decays(body, "cum", "rest")
    w.seen(body, w.apart)
    if form.sums:
        load_grad_sums(w, body)
    for kind in w.kinds:
        _pairs(w, body, kind)
    if w.gated:
        body.line("rows = tl.zeros([CHUNK], tl.float32)")
    loop = w.lanes(body, "d")
    loop.line("acc = tl.zeros([CHUNK, BLOCK_D], tl.float32)")
    inner = w.lanes(loop, "e")
    if inner is not loop:
        w.tile(inner, "grad", "grad", "e")
    w.state(inner, "state", "states")
    inner.line(f"acc = {w.state_dot('grad', 'state', 'acc', transposed=True)}")
    if form.sums:
        w.vector(loop, "total", "totals")
        loop.line("acc += grad_sums[:, None] * total[None, :]")
    if w.gated:
        loop.line("acc = acc * tl.exp(cum)[:, None]")
    for kind in w.kinds:
        w.tile(loop, f"key{kind.mark}", kind.keys, "d")
        loop.line(f"acc = {w.dot(f'pairs{kind.mark}', f'key{kind.mark}', 'acc')}")
    if w.gated:
        w.tile(loop, "query", "q", "d")
        loop.line("rows += tl.sum(acc * query, 1)")
    if w.apart:
        loop.lines(f"acc += own{kind.mark}[:, None] * key{kind.mark}" for kind in w.kinds)
    w.put_tile(loop, "grad_q", "acc", "d", "head")
    if w.gated:
        body.line("tl.store(rows_ptr + head * length + start + t, rows, mask=inside)")
    return w.finish()


@lru_cache(maxsize=256)
def keys(setting: Setting, inflow: bool = True) -> ChunkKernel:
    """`grad_k` (key heads, length, d); `columns` and `after` (key heads, tiles of d, length), what gates get of its two
    parts. `inflow`: something flows into the state at the chunk's end."""
    form = setting.form
    w = ChunkWriter(setting, "keys_backward", "what flows back into keys" + ("" if inflow else " within chunks"))
    body = w.body
    for name in ("q", "k", "v", "grad") if w.gated else ("q", "v", "grad"):
        w.operand(name, 3)
    sums = form.sums and inflow
    w.gate_sums()
    for wanted, name in ((inflow, "grad_states"), (sums, "grad_totals")):
        if wanted:
            w.buffer(name)
    w.buffer("grad_k", dict(setting.dtypes)["grad_k"])
    for wanted, name in ((w.gated, "columns"), (w.gated and inflow, "after")):
        if wanted:
            w.buffer(name)
    if form.sums:
        w.operand("grad_sums", 2)
    w.stand(False, "one chunk of one head, and a tile of its features.")
    w.own_lanes("d", "tl.program_id(1)")
    w.whole_lanes("e")
    for name in ("k", "v") if w.gated else ("v",):
        w.base(body, name, False)
    w.decays(body, *(("cum", "left") if inflow else ("cum", "rest")))
    w.seen(body, w.apart)
    if inflow:
        load_after(w, "CHUNK")
        if w.gated:
            body.line("after = after * tl.exp(left)[:, None]")
    body.line("acc = tl.zeros([CHUNK, BLOCK_D], tl.float32)")
    if w.gated:
        w.tile(body, "key", "k", "d")
        body.line("columns = tl.zeros([CHUNK], tl.float32)")
    shared = w.sharing(body)
    w.base(shared, "q", True)
    w.base(shared, "grad", True)
    if form.sums:
        load_grad_sums(w, shared)
    _pairs(w, shared, w.kinds[0], inflow and w.blocks_e == 1)
    w.tile(shared, "query", "q", "d")
    if w.gated:
        shared.line(f"part = {w.dot('tl.trans(pairs)', 'query')}")
        shared.line("columns += tl.sum(part * key, 1)")
        shared.line(f"acc += part{' + own[:, None] * query' if w.apart else ''}")
    else:
        shared.line(f"acc = {w.dot('tl.trans(pairs)', 'query', 'acc')}")
    w.put_tile(body, "grad_k", "acc + after" if inflow else "acc", "d", w.key_head)
    if w.gated:
        at = f"({w.key_head} * BLOCKS_D + tl.program_id(1))" if w.blocks_d > 1 else w.key_head
        body.line(f"tl.store(columns_ptr + {at} * length + start + t, columns, mask=inside)")
        if inflow:
            body.line(f"tl.store(after_ptr + {at} * length + start + t, tl.sum(after * key, 1), mask=inside)")
    return w.finish()


def _pairs(w: ChunkWriter, block: Block, kind: Kind, has_value: bool = False) -> None:
    """What flows back into the scores of pairs, with their decay, as an operand of a product; into those of a step with
    itself, where they are kept apart, as `own`."""
    pairs, own = f"pairs{kind.mark}", f"own{kind.mark}"
    if w.apart:
        block.line(f"{own} = tl.zeros([CHUNK], tl.float32)")
    block.line(f"{pairs} = tl.zeros([CHUNK, CHUNK], tl.float32)")
    loop = w.lanes(block, "e")
    if not kind.mark or loop is not block:
        w.tile(loop, "grad", "grad", "e")
    if not has_value:
        w.tile(loop, "value", kind.values, "e")
    loop.line(f"{pairs} = {w.dot('grad', 'tl.trans(value)', pairs)}")
    if w.apart:
        loop.line(f"{own} += tl.sum(grad.to(tl.float32) * value, 1)")
    if w.form.sums:
        block.line(f"{pairs} += grad_sums[:, None]")
        if w.apart:
            block.line(f"{own} += grad_sums")
    w.weigh(block, pairs)
    if w.setting.narrow:
        block.line(f"{pairs} = {w.narrow(pairs)}")


@lru_cache(maxsize=256)
def values(setting: Setting, inflow: bool = True) -> ChunkKernel:
    """`grad_v` (key heads, length, e). `inflow`: something flows into the state at the chunk's end."""
    w = ChunkWriter(setting, "values_backward", "what flows back into values" + ("" if inflow else " within chunks"))
    body = w.body
    if inflow or not w.by_channel:
        w.operand("k", 3)
    for name in ("grad",) if w.by_channel else ("q", "grad"):
        w.operand(name, 3)
    w.gate_sums()
    for wanted, name in ((w.by_channel, "scores"), (inflow, "grad_states")):
        if wanted:
            w.buffer(name)
    w.buffer("grad_v", dict(setting.dtypes)["grad_v"])
    w.stand(False, "one chunk of one head, and a tile of its values.")
    w.own_lanes("e", "tl.program_id(1)")
    if inflow or not w.by_channel:
        w.whole_lanes("d")
        w.base(body, "k", False)
    if not w.by_channel:
        w.decays(body, *(("cum", "left") if inflow else ("cum", "rest")))
        w.seen(body)
    body.line("acc = tl.zeros([CHUNK, BLOCK_E], tl.float32)")
    if inflow:
        loop = w.lanes(body, "d")
        w.tile(loop, "key", "k", "d")
        if w.by_channel:
            w.decays(loop, "left")
            loop.line(f"key = {w.narrow('(key * tl.exp(left))')}")
        w.state(loop, "grad_state", "grad_states")
        loop.line(f"acc = {w.state_dot('key', 'grad_state', 'acc')}")
        if w.form.gate == "head":
            body.line("acc = acc * tl.exp(left)[:, None]")
    shared = w.sharing(body)
    w.base(shared, "grad", True)
    if w.by_channel:
        w.seen(shared)
        load_scores(w, shared, "scores", "scores")
    else:
        w.base(shared, "q", True)
        shared.line("scores = tl.zeros([CHUNK, CHUNK], tl.float32)")
        loop = w.lanes(shared, "d")
        w.tile(loop, "query", "q", "d")
        w.tile(loop, "key", "k", "d")
        loop.line(f"scores = {w.dot('query', 'tl.trans(key)', 'scores')}")
        w.weigh(shared, "scores")
    w.tile(shared, "grad", "grad", "e")
    scores = w.narrow("scores")
    shared.line(f"acc = {w.dot(f'tl.trans({scores})', 'grad', 'acc')}")
    w.put_tile(body, "grad_v", "acc", "e", w.key_head)
    return w.finish()


@lru_cache(maxsize=256)
def gates(setting: Setting, count: int, inflow: bool = True) -> ChunkKernel:
    """`grad_gate` (key heads, length), float32, from so many tiles of `columns` and `after`. `inflow`: something flows
    into the state at the chunk's end."""
    form = setting.form
    w = ChunkWriter(setting, "gates_backward", "what flows back into gates" + ("" if inflow else " within chunks"))
    body = w.body
    for wanted, name in ((inflow, "cum"), (True, "rows"), (True, "columns"), (inflow, "after"), (inflow, "states")):
        if wanted:
            w.buffer(name)
    if inflow:
        w.buffer("grad_states")
    if form.sums and inflow:
        w.buffer("totals")
        w.buffer("grad_totals")
    w.buffer("grad_gate")
    w.stand(False, "one chunk of one head.")
    body.line("flow = tl.zeros([CHUNK], tl.float32)")
    shared = w.sharing(body)
    shared.line("flow += tl.load(rows_ptr + head * length + start + t, mask=inside, other=0.0)")
    if inflow:
        body.line("after = tl.zeros([CHUNK], tl.float32)")
    tiles = body.nested(f"for tile in range(0, {count}):") if count > 1 else body
    at = f"({w.key_head} * {count} + tile)" if count > 1 else w.key_head
    tiles.line(f"flow -= tl.load(columns_ptr + {at} * length + start + t, mask=inside, other=0.0)")
    if inflow:
        tiles.line(f"after += tl.load(after_ptr + {at} * length + start + t, mask=inside, other=0.0)")
    body.line("flow = tl.sum(tl.where(t[None, :] >= t[:, None], flow[None, :], 0.0), 1)")
    if inflow:
        body.line("flow += tl.sum(tl.where(t[None, :] < t[:, None], after[None, :], 0.0), 1)")
        _across(w)
    body.line(f"tl.store(grad_gate_ptr + {w.key_head} * length + start + t, flow, mask=inside)")
    return w.finish()


def _across(w: ChunkWriter) -> None:
    """What passes the whole chunk."""
    body = w.body
    w.whole_lanes("d")
    w.whole_lanes("e")
    body.line("across = tl.zeros([BLOCK_D], tl.float32)")
    loop = w.lanes(body, "d")
    if w.form.sums:
        w.vector(loop, "total", "totals")
        w.vector(loop, "grad_total", "grad_totals")
        loop.line("across += total * grad_total")
    inner = w.lanes(loop, "e")
    w.state(inner, "state", "states")
    w.state(inner, "grad_state", "grad_states")
    inner.line("across += tl.sum(state * grad_state, 1)")
    w.decays(body, "last")
    body.line("flow += tl.exp(last) * tl.sum(across, 0)")
