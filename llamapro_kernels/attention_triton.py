"""The Triton kernels of `attention.py`, whose docstring has the formulas, and their launchers.

Four kernels: forward, delta = rowsum(do * o), dq, and dk with dv. Each program owns a tile of
rows and loops over the tiles of the other side that it sees, so nothing is added atomically and
the same input gives the same bits. Causal order, a window and documents are one thing here: every
query sees one contiguous range of keys. Where the layout allows it, tiles are read by tensor
descriptors (TMA) on GPUs that have them, otherwise by pointers.
"""

from __future__ import annotations

import torch

from llamapro_kernels import gpu
from llamapro_kernels.attention_tiles import HELD_IN_REGISTERS, INTERPRETER, TILES
from llamapro_kernels.gpu import TensorDescriptor, tl, triton

INTERPRETED = tl.constexpr(gpu.INTERPRETED) if tl else None
LOG2E = 1.4426950408889634  # the softmax is taken in base 2, for which GPUs have an instruction
L2_BYTES = 2**24  # for what the programs of the heads that run together all read
PROGRAMS_PER_PROCESSOR = 4  # at least so many run before the next heads start


@gpu.jit
def attention_forward_kernel(
    q, k, v, o, stats, starts, ends, q_strides, k_strides, v_strides, o_strides,
    queries, keys, heads, group, together, scale, window,
    CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head against the keys they see. scale is in base 2."""
    first, head, batch = _own_tile(queries, heads, together, True, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)
    low, high = _seen_keys(row, queries, keys, window, starts, ends, CAUSAL)
    begin, whole, tail, end = _phases(
        _seen_keys(first, queries, keys, window, starts, ends, CAUSAL),
        _seen_keys(first + BLOCK_Q - 1, queries, keys, window, starts, ends, CAUSAL),
        BLOCK_K,
    )
    own = (
        _tile((q, q_strides, batch, head, queries), first, HEAD_DIM, DIM, BLOCK_Q, TMA),
        low,
        high,
    )
    k_from = (k, k_strides, batch, head // group, keys)
    v_from = (v, v_strides, batch, head // group, keys)
    state = (
        tl.zeros([BLOCK_Q, DIM], tl.float32),
        tl.zeros([BLOCK_Q], tl.float32),
        tl.full([BLOCK_Q], float("-inf"), tl.float32),
    )
    if window is not None or starts is not None:
        state = _attend(
            state, own, k_from, v_from, scale, begin, whole, True, HEAD_DIM, DIM, BLOCK_K, TMA
        )
    state = _attend(
        state, own, k_from, v_from, scale, whole, tail, False, HEAD_DIM, DIM, BLOCK_K, TMA
    )
    acc, total, peak = _attend(
        state, own, k_from, v_from, scale, tail, end, True, HEAD_DIM, DIM, BLOCK_K, TMA
    )
    divisor = tl.where(total > 0, total, 1)
    _store_tile((o, o_strides, batch, head, queries), first, acc / divisor[:, None], HEAD_DIM)
    stats = _stats_of_head(stats, batch, head, heads, queries)
    tl.store(stats + row, tl.where(peak == float("-inf"), 0, peak), mask=row < queries)
    tl.store(stats + queries + row, tl.log2(divisor), mask=row < queries)


@gpu.jit
def _attend(
    state, own, k_from, v_from, scale, begin, end,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys begin..end, MASKED to each row's low <= key < high."""
    acc, total, peak = state
    q, low, high = own
    for start in range(begin, end, BLOCK):
        k = _tile(k_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            key = start + tl.arange(0, BLOCK)[None, :]
            scores = tl.where((key >= low[:, None]) & (key < high[:, None]), scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen nothing has a peak of -inf; 0 in its place gives p = 0 and not NaN.
        base = tl.where(higher == float("-inf"), 0, higher)
        # Not scores * scale - base: one rounding of that is half a unit of a peak that may be huge.
        p = tl.exp2((scores - base[:, None]) * scale)
        alpha = tl.exp2((peak - base) * scale)
        total = total * alpha + tl.sum(p, 1)
        v = _tile(v_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        peak = higher
    return acc, total, peak


@gpu.jit
def attention_delta_kernel(
    do, o, delta, do_strides, o_strides, queries, heads,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * o), for BLOCK_Q queries of one head.

    As the diagonal of a product, which rounds as the product do v^T does: of a query whose weight
    is all on one key, o is that key's v, and ds is exactly 0.
    """
    first, head, batch = _own_tile(queries, heads, 1, False, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)
    do = _tile((do, do_strides, batch, head, queries), first, HEAD_DIM, DIM, BLOCK_Q, False)
    o = _tile((o, o_strides, batch, head, queries), first, HEAD_DIM, DIM, BLOCK_Q, False)
    products = tl.dot(do, o.T, input_precision="ieee")
    diagonal = tl.arange(0, BLOCK_Q)[:, None] == tl.arange(0, BLOCK_Q)[None, :]
    delta = _row_of_head(delta, batch, head, heads, queries)
    tl.store(delta + row, tl.sum(tl.where(diagonal, products, 0), 1), mask=row < queries)


@gpu.jit
def attention_dq_kernel(
    do, q, k, v, stats, delta, dq, starts, ends,
    do_strides, q_strides, k_strides, v_strides, dq_strides,
    queries, keys, heads, group, together, scale, window,
    CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HELD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head: a sum over the keys they see."""
    first, head, batch = _own_tile(queries, heads, together, True, BLOCK_Q)
    row = first + tl.arange(0, BLOCK_Q)
    low, high = _seen_keys(row, queries, keys, window, starts, ends, CAUSAL)
    begin, whole, tail, end = _phases(
        _seen_keys(first, queries, keys, window, starts, ends, CAUSAL),
        _seen_keys(first + BLOCK_Q - 1, queries, keys, window, starts, ends, CAUSAL),
        BLOCK_K,
    )
    q_tile = _tile((q, q_strides, batch, head, queries), first, HEAD_DIM, DIM, BLOCK_Q, TMA)
    if HELD:
        q_tile = _in_registers(q_tile, row, queries)
    stats_row = _stats_of_head(stats, batch, head, heads, queries)
    peak, log_total = _saved_stats(stats_row, row, queries)
    own = (
        q_tile,
        _tile((do, do_strides, batch, head, queries), first, HEAD_DIM, DIM, BLOCK_Q, TMA),
        peak,
        log_total,
        _saved_delta(_row_of_head(delta, batch, head, heads, queries), row, queries),
        low,
        high,
    )
    k_from = (k, k_strides, batch, head // group, keys)
    v_from = (v, v_strides, batch, head // group, keys)
    acc = tl.zeros([BLOCK_Q, DIM], tl.float32)
    if window is not None or starts is not None:
        acc = _add_dq(
            acc, own, k_from, v_from, scale, begin, whole, True, HEAD_DIM, DIM, BLOCK_K, TMA
        )
    acc = _add_dq(acc, own, k_from, v_from, scale, whole, tail, False, HEAD_DIM, DIM, BLOCK_K, TMA)
    acc = _add_dq(acc, own, k_from, v_from, scale, tail, end, True, HEAD_DIM, DIM, BLOCK_K, TMA)
    acc *= scale * 0.6931471805599453
    _store_tile((dq, dq_strides, batch, head, queries), first, acc, HEAD_DIM)


@gpu.jit
def _add_dq(
    acc, own, k_from, v_from, scale, begin, end,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    q, do, peak, log_total, delta, low, high = own
    for start in range(begin, end, BLOCK):
        k = _tile(k_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        v = _tile(v_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            key = start + tl.arange(0, BLOCK)[None, :]
            scores = tl.where((key >= low[:, None]) & (key < high[:, None]), scores, float("-inf"))
        p = tl.exp2((scores - peak[:, None]) * scale - log_total[:, None])
        ds = p * (tl.dot(do, v.T, input_precision="ieee") - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@gpu.jit
def attention_dkv_kernel(
    do, q, k, v, stats, delta, dk, dv, starts, ends,
    do_strides, q_strides, k_strides, v_strides, dk_strides,
    queries, keys, heads, group, together, scale, window,
    WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    CAUSAL: tl.constexpr, TMA: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HELD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K keys of one key head: sums over its query heads and their queries."""
    first, head, batch = _own_tile(keys, heads // group, together, False, BLOCK_K)
    column = first + tl.arange(0, BLOCK_K)
    low, high = _seeing_queries(column, queries, keys, window, starts, ends, CAUSAL)
    begin, whole, _, end = _phases(
        _seeing_queries(first, queries, keys, window, starts, ends, CAUSAL),
        _seeing_queries(first + BLOCK_K - 1, queries, keys, window, starts, ends, CAUSAL),
        BLOCK_Q,
    )
    # Queries beyond the last are zeros and need no mask. With bounds on that side everything is
    # masked: a third copy of the loop would not leave registers enough.
    if window is not None or starts is not None:
        whole = end
    k_tile = _tile((k, k_strides, batch, head, keys), first, HEAD_DIM, DIM, BLOCK_K, TMA)
    v_tile = k_tile
    if WANT_K:
        v_tile = _tile((v, v_strides, batch, head, keys), first, HEAD_DIM, DIM, BLOCK_K, TMA)
    if HELD:
        k_tile = _in_registers(k_tile, column, keys)
    own = (k_tile, v_tile, low, high)
    acc = (tl.zeros([BLOCK_K, DIM], tl.float32), tl.zeros([BLOCK_K, DIM], tl.float32))
    for query_head in range(head * group, head * group + group):
        q_from = (q, q_strides, batch, query_head, queries)
        do_from = (do, do_strides, batch, query_head, queries)
        stats_row = _stats_of_head(stats, batch, query_head, heads, queries)
        delta_row = stats_row
        if WANT_K:
            delta_row = _row_of_head(delta, batch, query_head, heads, queries)
        rows_from = (q_from, do_from, stats_row, delta_row)
        acc = _add_dkv(
            acc, own, rows_from, scale, begin, whole,
            True, WANT_K, WANT_V, HEAD_DIM, DIM, BLOCK_Q, TMA,
        )  # fmt: skip
        acc = _add_dkv(
            acc, own, rows_from, scale, whole, end,
            False, WANT_K, WANT_V, HEAD_DIM, DIM, BLOCK_Q, TMA,
        )  # fmt: skip
    if WANT_K:
        dk_acc = acc[0] * (scale * 0.6931471805599453)
        _store_tile((dk, dk_strides, batch, head, keys), first, dk_acc, HEAD_DIM)
    if WANT_V:
        _store_tile((dv, dk_strides, batch, head, keys), first, acc[1], HEAD_DIM)


@gpu.jit
def _add_dkv(
    acc, own, rows_from, scale, begin, end,
    MASKED: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Keys by queries, the transpose of the above, so that p and ds are left factors."""
    dk, dv = acc
    k, v, low, high = own
    q_from, do_from, stats_row, delta_row = rows_from
    queries = q_from[4]
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        q = _tile(q_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        do = _tile(do_from, start, HEAD_DIM, DIM, BLOCK, TMA)
        scores = _transposed_product(k, q)
        if MASKED:
            seen = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        peak, log_total = _saved_stats(stats_row, row, queries)
        p = tl.exp2((scores - peak[None, :]) * scale - log_total[None, :])
        if WANT_V:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        if WANT_K:
            delta = _saved_delta(delta_row, row, queries)
            ds = p * (_transposed_product(v, do) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@gpu.jit
def _transposed_product(a, b):
    """a b^T, with the bits of b a^T, which NumPy, in the interpreter, does not give by itself."""
    if INTERPRETED:
        return tl.dot(b, a.T, input_precision="ieee").T
    else:
        return tl.dot(a, b.T, input_precision="ieee")


@gpu.jit
def _own_tile(length, heads, together, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """(first row, head, batch) of this program.

    In causal order the last queries and the first keys have most work: they start first, in all of
    the heads that run together, so that no long program is left at the end.
    """
    tiles = tl.cdiv(length, BLOCK)
    index = tl.program_id(0)
    first = index // (tiles * together) * together
    together = tl.minimum(together, tl.num_programs(0) // tiles - first)
    index -= first * tiles
    tile, head = index // together, first + index % together
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile * BLOCK, head % heads, head // heads


@gpu.jit
def _seen_keys(row, queries, keys, window, starts, ends, CAUSAL: tl.constexpr):
    """A query sees a contiguous range of keys, low <= key < high; both rise with the query."""
    row = tl.minimum(row, queries - 1)
    position = row + keys - queries
    low, high = row * 0, row * 0 + keys
    if CAUSAL:
        high = tl.maximum(position + 1, 0)
    if window is not None:
        low = tl.maximum(position - window + 1, 0)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + row))
        high = tl.minimum(high, tl.load(ends + row))
    return low, high


@gpu.jit
def _seeing_queries(column, queries, keys, window, starts, ends, CAUSAL: tl.constexpr):
    """The inverse: a key is seen by the queries low <= query < high."""
    column = tl.minimum(column, keys - 1)
    position = column + queries - keys
    low, high = column * 0, column * 0 + queries
    if CAUSAL:
        low = tl.maximum(position, 0)
    if window is not None:
        high = tl.minimum(tl.maximum(position + window, 0), queries)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + column))
        high = tl.minimum(high, tl.load(ends + column))
    return low, high


@gpu.jit
def _phases(first, last, BLOCK: tl.constexpr):
    """The loop in three: begin..whole and tail..end need a mask, whole..tail does not.

    first, last: the ranges (low, high) of the first and of the last row of the own tile.
    """
    begin = first[0] // BLOCK * BLOCK
    end = last[1]
    whole = tl.minimum(tl.cdiv(last[0], BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    tail = tl.maximum(first[1] // BLOCK * BLOCK, whole)
    return begin, whole, tail, end


@gpu.jit
def _tile(
    source, start, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr
):
    """x[batch, start : start + BLOCK, head], with zeros beyond the length and HEAD_DIM.

    source: (x or its tensor descriptor, its strides, batch, head, length).
    """
    if TMA:
        tile = source[0].load([source[2], source[3], start, 0]).reshape([BLOCK, DIM])
    else:
        pointers, mask = _tile_pointers(source, start, HEAD_DIM, DIM, BLOCK)
        tile = tl.load(pointers, mask=mask, other=0)
    return tile


@gpu.jit
def _in_registers(tile, row, length):
    """A tile that compilers keep in registers: a mask, which changes nothing, goes through them."""
    return tl.where((row < length)[:, None], tile, 0)


@gpu.jit
def _store_tile(target, start, tile, HEAD_DIM: tl.constexpr):
    pointers, mask = _tile_pointers(target, start, HEAD_DIM, tile.shape[1], tile.shape[0])
    tl.store(pointers, tile, mask=mask)


@gpu.jit
def _tile_pointers(source, start, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    x, strides, batch, head, length = source
    row, column = start + tl.arange(0, BLOCK)[:, None], tl.arange(0, DIM)[None, :]
    x += batch.to(tl.int64) * strides[0] + tl.full([], head, tl.int64) * strides[2]
    at = x + row.to(tl.int64) * strides[1] + column.to(tl.int64) * strides[3]
    return at, (row < length) & (column < HEAD_DIM)


@gpu.jit
def _row_of_head(x, batch, head, heads, queries):
    """Where this head's row of delta (B, H, T) begins."""
    return x + (batch.to(tl.int64) * heads + head) * queries


@gpu.jit
def _stats_of_head(stats, batch, head, heads, queries):
    """Where this head's peaks in stats (B, H, 2, T) begin; log2 of the totals comes after them."""
    return stats + (batch.to(tl.int64) * heads + head) * 2 * queries


@gpu.jit
def _saved_stats(stats, row, queries):
    peak = tl.load(stats + row, mask=row < queries, other=0)
    return peak, tl.load(stats + queries + row, mask=row < queries, other=0)


@gpu.jit
def _saved_delta(delta, row, queries):
    return tl.load(delta + row, mask=row < queries, other=0)


def attend(q, k, v, cu_seqlens, causal, scale, window):
    o = q.new_empty(q.shape)
    stats = q.new_empty((q.shape[0], q.shape[2], 2, q.shape[1]), dtype=torch.float32)
    tile, tma = _tile_rule("forward", q, k, v)
    gpu.launch(
        attention_forward_kernel,
        _grid(q, tile["BLOCK_Q"]),
        _operand(q, tile["BLOCK_Q"], tma),
        *(_operand(x, tile["BLOCK_K"], tma) for x in (k, v)),
        *(o, stats, *_document_bounds(cu_seqlens, q.shape[1])),
        *(q.stride(), k.stride(), v.stride(), o.stride()),
        *_sizes(q, k, _heads_together(q, k, tile["BLOCK_Q"]), scale, window),
        CAUSAL=causal,
        TMA=tma,
        HEAD_DIM=q.shape[3],
        **tile,
    )
    return o, stats


def differentiate(do, q, k, v, o, stats, cu_seqlens, causal, scale, window, dq, dk, dv):
    """Into dq, dk and dv, each of any strides and None where it is not wanted."""
    delta = None if dq is None and dk is None else _delta(do, o)
    saved, options = (do, q, k, v, stats, delta), (causal, scale, window)
    bounds = _document_bounds(cu_seqlens, q.shape[1])
    if dq is not None:
        _launch_dq(*saved, dq, bounds, *options)
    if dk is not None and dv is not None and _padded(k) > 128:  # more sums than registers
        _launch_dkv(*saved, dk, None, bounds, *options)
        _launch_dkv(*saved, None, dv, bounds, *options)
    elif dk is not None or dv is not None:
        _launch_dkv(*saved, dk, dv, bounds, *options)


def _delta(do, o):
    delta = o.new_empty((o.shape[0], o.shape[2], o.shape[1]), dtype=torch.float32)
    interpreted = gpu.architecture(o.device) == "interpreter"
    rows = 16 if interpreted else 4096 // max(64, _padded(o))
    gpu.launch(
        attention_delta_kernel,
        _grid(o, rows),
        *(do, o, delta, do.stride(), o.stride(), o.shape[1], o.shape[2]),
        HEAD_DIM=o.shape[3],
        DIM=_padded(o),
        BLOCK_Q=rows,
        num_warps=4,
    )
    return delta


def _launch_dq(do, q, k, v, stats, delta, dq, bounds, causal, scale, window):
    tile, tma = _tile_rule("dq", q, k, v, do)
    gpu.launch(
        attention_dq_kernel,
        _grid(q, tile["BLOCK_Q"]),
        *(_operand(x, tile["BLOCK_Q"], tma) for x in (do, q)),
        *(_operand(x, tile["BLOCK_K"], tma) for x in (k, v)),
        *(stats, delta, dq, *bounds),
        *(x.stride() for x in (do, q, k, v, dq)),
        *_sizes(q, k, _heads_together(q, k, tile["BLOCK_Q"]), scale, window),
        CAUSAL=causal,
        TMA=tma,
        HEAD_DIM=q.shape[3],
        **tile,
    )


def _launch_dkv(do, q, k, v, stats, delta, dk, dv, bounds, causal, scale, window):
    """dk or dv is None when it is not wanted; for dv alone so are v and delta."""
    v = k if v is None else v
    tile, tma = _tile_rule("dkv", q, k, v, do)
    gpu.launch(
        attention_dkv_kernel,
        _grid(k, tile["BLOCK_K"]),
        *(_operand(x, tile["BLOCK_Q"], tma) for x in (do, q)),
        *(_operand(x, tile["BLOCK_K"], tma) for x in (k, v)),
        *(stats, delta, dk, dv, *bounds),
        *(x.stride() for x in (do, q, k, v, dv if dk is None else dk)),
        *_sizes(q, k, _heads_together(k, q, tile["BLOCK_K"]), scale, window),
        WANT_K=dk is not None,
        WANT_V=dv is not None,
        CAUSAL=causal,
        TMA=tma,
        HEAD_DIM=q.shape[3],
        **tile,
    )


def _grid(x, block):
    """One program for each tile of each head."""
    return (triton.cdiv(x.shape[1], block) * x.shape[0] * x.shape[2],)


def _sizes(q, k, together, scale, window):
    if window is not None and window >= k.shape[1]:
        window = None  # it hides nothing, and may be too large for the kernels' int32
    queries, keys, heads, group = q.shape[1], k.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    return queries, keys, heads, group, together, scale * LOG2E, window


def _heads_together(own, other, block):
    """How many heads of own, of which every program has a block, run before the next ones start.

    As many as find what they read of other, and of its partner, in the cache. Or more: a program
    cannot be divided, so the longest must start first in enough heads to keep all processors busy.
    All groups have about the same number, for the last one must do that too.
    """
    read, readers = other.shape[2] // own.shape[2], own.shape[2] // other.shape[2]
    size = 2 * max(1, read) * other.shape[1] * other.shape[3] * other.element_size()
    cached = max(1, L2_BYTES // max(1, size)) * max(1, readers)
    tiles = max(1, triton.cdiv(own.shape[1], block))
    together = max(cached, PROGRAMS_PER_PROCESSOR * gpu.processors(own.device) // tiles)
    heads = own.shape[0] * own.shape[2]
    return triton.cdiv(heads, triton.cdiv(heads, together)) if heads else 1


def _padded(x):
    return max(16, triton.next_power_of_2(x.shape[3]))  # tl.dot takes no less


def _document_bounds(cu_seqlens, length):
    """Where the document of each position starts and ends, int32 (T,)."""
    if cu_seqlens is None:
        return None, None
    position = torch.arange(length, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:-1], position, right=True)
    return cu_seqlens[document], cu_seqlens[document + 1]


def _tile_rule(kernel, *operands):
    """The tile for this GPU, and whether all operands can be read by tensor descriptors (TMA)."""
    x, dim = operands[0], _padded(operands[0])
    if dim > 256:
        raise ValueError(f"the kernels take head dimensions up to 256, got {x.shape[3]}")
    chip, single = gpu.architecture(x.device), x.dtype == torch.float32
    tma = chip in ("sm_90", "sm_100") and not single and all(map(_describable, operands))
    if chip == "interpreter":
        tile = INTERPRETER
    else:
        chip = "sm_86" if chip in ("sm_90", "sm_100") and not tma else chip
        if single:
            chip = "gfx942 fp32" if chip == "gfx942" else "fp32"
        tile = TILES[chip][kernel][max(64, dim)]
    options = {"DIM": dim, **tile.options()}
    if kernel != "forward":
        options["HELD"] = (chip, kernel, dim) in HELD_IN_REGISTERS
    return options, tma


def _describable(x):
    """Whether tiles of x (B, T, H, D) can be read by a descriptor: 16-byte steps but along D."""
    steps = [step * x.element_size() for _, step in _outer_steps(x)]
    apart = all(step > 0 and step % 16 == 0 for step in steps) and x.stride(3) == 1
    return x.numel() > 0 and apart and x.data_ptr() % 16 == 0


def _outer_steps(x):
    """(size, stride) of batch, head and position; where there is one alone, any stride will do."""
    sizes = zip(x.shape, x.stride(), strict=True)
    batch, length, head, _ = ((size, step if size > 1 else 16) for size, step in sizes)
    return batch, head, length


def _operand(x, rows, tma):
    """x, or a descriptor (B, H, T, D) for tiles of this many rows of one head."""
    if not tma:
        return x
    shape, strides = zip(*_outer_steps(x), (x.shape[3], 1), strict=True)
    return TensorDescriptor(x, [*shape], [*strides], [1, 1, rows, _padded(x)])
