"""Pairs of steps of one chunk, where each channel has a gate of its own.

    scores[t, j] = sum over d of q[t, d] k[j, d] exp(cum[t, d] - cum[j, d])    where t sees j

is no product of matrices, nor may the exponential be taken apart into exp(cum[t]) and exp(-cum[j]), which overflows. So
the chunk is cut into blocks of `SUB` steps. Between two blocks there is a step r with j <= r <= t for all their pairs,
and exp(cum[t] - cum[r]) and exp(cum[r] - cum[j]) are both no gain: that is a product of matrices. Pairs within a block
are summed up one key, or one query, after the other. (Secondary chunks: Yang et al. 2024, gated linear attention.)
"""

from __future__ import annotations

from functools import lru_cache

from refocus.codegen.chunk_kernel import ChunkKernel, ChunkWriter
from refocus.codegen.chunk_setting import SMALLEST, Setting
from refocus.codegen.chunk_states import load_after, load_grad_sums
from refocus.codegen.flash_fit import padded
from refocus.codegen.writer import Block


@lru_cache(maxsize=256)
def scores(setting: Setting) -> ChunkKernel:
    """`scores`: (query heads, length, CHUNK), float32, written where a query sees the key."""
    w = _writer(setting, "channel_scores", "scores of pairs of a chunk")
    body = w.body
    w.operand("q", 3)
    w.operand("k", 3)
    w.gate_sums()
    w.buffer("scores")
    _stand(w, True, "the scores of the queries of one block of a chunk of one head.")
    w.base(body, "q", True)
    w.base(body, "k", False)
    w.tile(body, "query", "q", "d")
    w.gate_sum(body, "cum", "t", tile=True)
    body.line("row = scores_ptr + (head * length + start + t) * CHUNK")
    if setting.chunk > SMALLEST:
        w.gate_sum(body, "edge", "block * SUB")
        body.line(f"moved = {_moved(w, 'query', w.between('cum', 'edge', ('', '[None, :]')))}")
        loop = _others(w, body, "0", "block")
        _moved_keys(w, loop)
        loop.line(f"pairs = {w.dot('moved', 'tl.trans(key)')}")
        loop.line("tl.store(row[:, None] + j[None, :], pairs, mask=inside[:, None])")
    loop = body.nested("for j in range(block * SUB, stop):")
    _key_row(w, loop)
    loop.line("pairs = tl.sum(query * key[None, :] * decay, 1)")
    loop.line("tl.store(row + j, pairs, mask=seen & inside)")
    return w.finish()


@lru_cache(maxsize=256)
def pairs(setting: Setting) -> ChunkKernel:
    """`pairs`: (query heads, length, CHUNK), float32, what flows back into the scores."""
    w = ChunkWriter(setting, "channel_pairs", "what flows back into scores")
    body = w.body
    w.operand("v", 3)
    w.operand("grad", 3)
    w.buffer("pairs")
    if w.form.sums:
        w.operand("grad_sums", 2)
    w.stand(True, "one chunk of one head.")
    w.whole_lanes("e")
    w.base(body, "v", False)
    w.base(body, "grad", True)
    body.line("pairs = tl.zeros([CHUNK, CHUNK], tl.float32)")
    loop = w.lanes(body, "e")
    w.tile(loop, "grad", "grad", "e")
    w.tile(loop, "value", "v", "e")
    loop.line(f"pairs = {w.dot('grad', 'tl.trans(value)', 'pairs')}")
    if w.form.sums:
        load_grad_sums(w, body)
        body.line("pairs += grad_sums[:, None]")
    body.line("address = pairs_ptr + (head * length + start + t[:, None]) * CHUNK + t[None, :]")
    body.line("tl.store(address, pairs, mask=inside[:, None])")
    return w.finish()


@lru_cache(maxsize=256)
def queries(setting: Setting) -> ChunkKernel:
    """`grad_q` (query heads, length, d); `rows`, the same shape in float32, what gates get of it."""
    w = _writer(setting, "channel_queries_backward", "what flows back into queries")
    form, body = w.form, w.body
    for name in ("q", *(kind.keys for kind in w.kinds), "grad"):
        w.operand(name, 3)
    w.gate_sums()
    for kind in w.kinds:
        w.buffer(f"pairs{kind.mark}")
    for wanted, name in ((True, "states"), (form.sums, "totals")):
        if wanted:
            w.buffer(name)
    w.buffer("grad_q", dict(setting.dtypes)["grad_q"])
    w.buffer("rows")
    if form.sums:
        w.operand("grad_sums", 2)
    _stand(w, True, "the queries of one block of a chunk of one head.")
    w.whole_lanes("e")
    for kind in w.kinds:
        w.base(body, kind.keys, False)
    w.base(body, "grad", True)
    w.gate_sum(body, "cum", "t", tile=True)
    rows = {kind: f"row{kind.mark}" for kind in w.kinds}
    body.lines(f"{rows[kind]} = pairs{kind.mark}_ptr + (head * length + start + t) * CHUNK" for kind in w.kinds)
    body.line("acc = tl.zeros([SUB, BLOCK_D], tl.float32)")
    loop = w.lanes(body, "e")
    w.tile(loop, "grad", "grad", "e")
    w.state(loop, "state", "states")
    loop.line(f"acc = {w.state_dot('grad', 'state', 'acc', transposed=True)}")
    if form.sums:
        load_grad_sums(w, body)
        w.vector(body, "total", "totals")
        body.line("acc += grad_sums[:, None] * total[None, :]")
    body.line("acc = acc * tl.exp(cum)")
    if setting.chunk > SMALLEST:
        w.gate_sum(body, "edge", "block * SUB")
        body.line("near = tl.zeros([SUB, BLOCK_D], tl.float32)")
        loop = _others(w, body, "0", "block")
        for kind in w.kinds:
            _moved_keys(w, loop, kind.keys)
            loop.line(f"pairs = tl.load({rows[kind]}[:, None] + j[None, :], mask=inside[:, None], other=0.0)")
            loop.line(f"near = {w.dot(w.narrow('pairs'), 'key', 'near')}")
        body.line(f"acc += near * tl.exp({w.between('cum', 'edge', ('', '[None, :]'))})")
    loop = body.nested("for j in range(block * SUB, stop):")
    for kind in w.kinds:
        _key_row(w, loop, kind.keys, apart=True)
        loop.line(f"pairs = tl.load({rows[kind]} + j, mask=seen & inside, other=0.0)")
        loop.line("acc += pairs[:, None] * key[None, :] * decay")
    w.base(body, "q", True)
    w.tile(body, "query", "q", "d")
    w.put_tile(body, "rows", "acc * query", "d", "head")
    for kind in w.kinds if w.apart else ():
        body.line(f"own = tl.load({rows[kind]} + t, mask=inside, other=0.0)")
        w.tile(body, "own_key", kind.keys, "d")
        body.line("acc += own[:, None] * own_key")
    w.put_tile(body, "grad_q", "acc", "d", "head")
    return w.finish()


@lru_cache(maxsize=256)
def keys(setting: Setting, inflow: bool = True) -> ChunkKernel:
    """`grad_k` (key heads, length, d); `columns` and `after`, the same shape in float32, what gates get of them.
    `inflow`: something flows into the state at the chunk's end."""
    w = _writer(
        setting, "channel_keys_backward", "what flows back into keys" + ("" if inflow else " within chunks")
    )  # fmt: skip
    form, body = w.form, w.body
    for name in ("q", "k", "v") if inflow else ("q", "k"):
        w.operand(name, 3)
    w.gate_sums()
    for wanted, name in ((True, "pairs"), (inflow, "grad_states"), (form.sums and inflow, "grad_totals")):
        if wanted:
            w.buffer(name)
    w.buffer("grad_k", dict(setting.dtypes)["grad_k"])
    w.buffer("columns")
    if inflow:
        w.buffer("after")
    _stand(w, False, "the keys of one block of a chunk of one head.")
    if inflow:
        w.whole_lanes("e")
        w.base(body, "v", False)
    w.gate_sum(body, "cum", "t", tile=True)
    if inflow:
        load_after(w, "SUB")
        w.gate_sum(body, "last", "CHUNK - 1")
        body.line(f"after = after * tl.exp({w.between('last', 'cum', ('[None, :]', ''))})")
    body.line("acc = tl.zeros([SUB, BLOCK_D], tl.float32)")
    if w.apart:
        body.line("same = tl.zeros([SUB, BLOCK_D], tl.float32)")
    if setting.chunk > SMALLEST:
        w.gate_sum(body, "edge", "block * SUB + SUB - 1")
        body.line("near = tl.zeros([SUB, BLOCK_D], tl.float32)")
    shared = w.sharing(body)
    w.base(shared, "q", True)
    shared.line("column = pairs_ptr + (head * length + start) * CHUNK + t")
    if setting.chunk > SMALLEST:
        loop = _others(w, shared, "block + 1", "CHUNK // SUB")
        w.tile(loop, "query", "q", "d", "j", "inside_j")
        w.gate_sum(loop, "cum_j", "j", tile=True)
        loop.line(f"query = {_moved(w, 'query', w.between('cum_j', 'edge', ('', '[None, :]')))}")
        loop.line("pairs = tl.load(column[None, :] + j[:, None] * CHUNK, mask=inside_j[:, None], other=0.0)")
        turned = f"tl.trans({w.narrow('pairs')})"
        loop.line(f"near = {w.dot(turned, 'query', 'near')}")
        body.line(f"acc += near * tl.exp({w.between('edge', 'cum', ('[None, :]', ''))})")
    loop = shared.nested("for j in range(block * SUB, stop):")
    _seen(w, loop, "j", "t", apart=True)
    guard = f", mask={w.mask('d')}, other=0.0" if w.mask("d") else ""
    loop.line(f"query = tl.load(q_base + j * q_stride_1 + d * q_stride_2{guard}).to(tl.float32)")
    w.gate_sum(loop, "cum_j", "j")
    between = w.between("cum_j", "cum", ("[None, :]", ""))
    loop.line(f"decay = tl.exp(tl.where(seen[:, None], {between}, 0.0))")
    loop.line("pairs = tl.load(column + j * CHUNK, mask=seen, other=0.0)")
    loop.line("acc += pairs[:, None] * query[None, :] * decay")
    if w.apart:
        shared.line("own = tl.load(column + t * CHUNK, mask=inside, other=0.0)")
        w.tile(shared, "own_query", "q", "d")
        shared.line("same += own[:, None] * own_query")
    parts = ["acc", *(["after"] if inflow else []), *(["same"] if w.apart else [])]
    w.put_tile(body, "grad_k", " + ".join(parts), "d", w.key_head)
    w.base(body, "k", False)
    w.tile(body, "key", "k", "d")
    w.put_tile(body, "columns", "acc * key", "d", w.key_head)
    if inflow:
        w.put_tile(body, "after", "after * key", "d", w.key_head)
    return w.finish()


@lru_cache(maxsize=256)
def gates(setting: Setting, inflow: bool = True) -> ChunkKernel:
    """`grad_gate` (key heads, length, d), float32: as in `refocus.codegen.chunk_backward`, each channel by itself."""
    w = ChunkWriter(
        setting, "channel_gates_backward", "what flows back into gates" + ("" if inflow else " within chunks")
    )  # fmt: skip
    form, body = w.form, w.body
    for name in ("cum", "rows", "columns", "after", "states", "grad_states") if inflow else ("rows", "columns"):
        w.buffer(name)
    if form.sums and inflow:
        w.buffer("totals")
        w.buffer("grad_totals")
    w.buffer("grad_gate")
    w.stand(False, "one chunk of one head, and a tile of its features.")
    w.own_lanes("d", "tl.program_id(1)")
    if inflow:
        w.whole_lanes("e")
    mask = w.mask(("t", "d"))
    here = "length + start + t[:, None]) * D + d[None, :]"
    own = f"({w.key_head} * {here}"
    body.line(f"flow = -tl.load(columns_ptr + {own}, mask={mask}, other=0.0)")
    shared = w.sharing(body)
    shared.line(f"flow += tl.load(rows_ptr + (head * {here}, mask={mask}, other=0.0)")
    if inflow:
        body.line(f"after = tl.load(after_ptr + {own}, mask={mask}, other=0.0)")
        _across(w)
    body.line("flow = tl.cumsum(flow, 0, reverse=True)")
    if inflow:
        body.line("flow += tl.cumsum(after, 0) - after + (tl.exp(last) * across)[None, :]")
    w.put_tile(body, "grad_gate", "flow", "d", w.key_head)
    return w.finish()


def _across(w: ChunkWriter) -> None:
    """What passes the whole chunk."""
    body = w.body
    body.line("across = tl.zeros([BLOCK_D], tl.float32)")
    if w.form.sums:
        w.vector(body, "total", "totals")
        w.vector(body, "grad_total", "grad_totals")
        body.line("across += total * grad_total")
    loop = w.lanes(body, "e")
    w.state(loop, "state", "states")
    w.state(loop, "grad_state", "grad_states")
    loop.line("across += tl.sum(state * grad_state, 1)")
    w.gate_sum(body, "last", "CHUNK - 1", rest=False)


def _writer(setting: Setting, name: str, what: str) -> ChunkWriter:
    """Programs of a block of steps hold all features."""
    w = ChunkWriter(setting, name, what)
    w.block_d, w.blocks_d = padded(setting.d), 1
    return w


def _stand(w: ChunkWriter, of_queries: bool, note: str) -> None:
    w.stand(of_queries, note, "block * SUB + tl.arange(0, SUB)")
    w.body.line("stop = tl.minimum(block * SUB + SUB, length - start).to(tl.int32)")
    w.own_lanes("d", "")


def _others(w: ChunkWriter, block: Block, first: str, stop: str) -> Block:
    """A loop over the steps of other blocks."""
    loop = block.nested(f"for other in range({first}, {stop}):")
    loop.line("j = other * SUB + tl.arange(0, SUB)")
    loop.line("inside_j = j < length - start")
    return loop


def _moved(w: ChunkWriter, name: str, between: str) -> str:
    """A tile with its decay to or from the edge, as an operand of a product."""
    return w.narrow(f"({name} * tl.exp({between}))")


def _moved_keys(w: ChunkWriter, loop: Block, name: str = "k") -> None:
    """Keys of an earlier block, with their decay up to the edge, which those of every kind have."""
    w.tile(loop, "key", name, "d", "j", "inside_j")
    if name == "k":
        w.gate_sum(loop, "cum_j", "j", tile=True)
    loop.line(f"key = {_moved(w, 'key', w.between('edge', 'cum_j', ('[None, :]', '')))}")


def _seen(w: ChunkWriter, loop: Block, query: str, key: str, apart: bool) -> None:
    loop.line(f"seen = {query} {'>' if w.form.strict or apart else '>='} {key}")


def _key_row(w: ChunkWriter, loop: Block, name: str = "k", apart: bool = False) -> None:
    """Key `j` of the own block, and its decay up to each of the queries that see it, which those of every kind have."""
    if name == "k":
        _seen(w, loop, "t", "j", apart)
    guard = f", mask={w.mask('d')}, other=0.0" if w.mask("d") else ""
    loop.line(f"key = tl.load({name}_base + j * {name}_stride_1 + d * {name}_stride_2{guard}).to(tl.float32)")
    if name != "k":
        return
    w.gate_sum(loop, "cum_j", "j")
    between = w.between("cum", "cum_j", ("", "[None, :]"))
    loop.line(f"decay = tl.exp(tl.where(seen[:, None], {between}, 0.0))")
