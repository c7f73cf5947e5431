"""Attention that keeps two numbers a row and never the scores.

    s = q k^T (masked),  peak = max s,  total = sum 2^((s - peak) c)  with c = scale * log2(e)
    p = 2^((s - peak) c - log2 total),  o = p v
    dv = p^T do,  ds = p * (do v^T - rowsum(do * o)),  dq = scale * ds k,  dk = scale * ds^T q

The largest exponent is exactly 0, forward and backward, however large the scores: one number a row,
the log-sum-exp, would be rounded by half a unit of the peak, and p with it.

q is (B, T, H, D), k and v (B, S, Hkv, D), H a multiple of Hkv (query head h reads key head
h // (H / Hkv)); o is (B, T, H, D) in q's dtype, stats (B, H, 2, T), peak and log2 total, in fp32
(fp64 for fp64), as are the sums. When S != T the last query sees the last key. A row that sees
nothing, or scores of -inf alone, gives zeros.
Saved for backward: q, k and stats, and v and o where dq or dk is wanted; nothing when nothing wants
a gradient. `llamapro::flash_attention_backward_packed` gives dq, dk and dv side by side,
(B, T, H + 2 Hkv, D), as the gradient of the projection that they come from. Bytes moved at least:
q, k, v, o once each; 4 B H T S D FLOPs forward (half when causal), 2.5 times that backward.

The reference below holds a (T, S) block of scores per head; the kernels, in
`attention_triton.py` and csrc/attention.cpp, do not.

Source: Dao 2023, "FlashAttention-2".
"""

from functools import partial

import torch

from llamapro_kernels import attention_triton, cpu, library
from llamapro_kernels.attention_triton import LOG2E

LARGEST_SCALE = torch.finfo(torch.float32).max / LOG2E  # in base 2 it is still a number


def flash_attention_reference(q, k, v, cu_seqlens, causal, scale, window):
    """Ground truth: o and stats by explicit scores, G = H / Hkv query heads to a key head."""
    qg = _query_groups(q, k)  # (B, Hkv, G T, D)
    kg, vg = _heads_first(k), _heads_first(v)  # (B, Hkv, S, D)
    scores = _scores(qg, kg, q.shape[1], cu_seqlens, causal, window)  # (B, Hkv, G T, S)
    peak = scores.amax(-1, keepdim=True) if k.shape[1] else scores.sum(-1, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0)  # so that p is 0 and not NaN
    p = scores.sub_(peak).mul_(scale * LOG2E).exp2_()
    total = p.sum(-1, keepdim=True)  # (B, Hkv, G T, 1)
    total = total.masked_fill(total == 0, 1)
    stats = [x.reshape(q.shape[0], q.shape[2], q.shape[1]) for x in (peak, total.log2())]
    return _ungrouped((p @ vg) / total, q), torch.stack(stats, 2)  # (B, T, H, D), (B, H, 2, T)


def flash_attention_backward_reference(
    do, q, k, v, o, stats, cu_seqlens, causal, scale, window, want_q, want_k, want_v
):
    """Compute dq, dk and dv, those that are wanted; v and o are None when only dv is."""
    qg, dog = _query_groups(q, k), _query_groups(do, k)  # (B, Hkv, G T, D)
    kg = _heads_first(k)  # (B, Hkv, S, D)
    scores = _scores(qg, kg, q.shape[1], cu_seqlens, causal, window)  # (B, Hkv, G T, S)
    peak, log_total = (x.reshape(*scores.shape[:-1], 1) for x in stats.unbind(2))
    p = scores.sub_(peak).mul_(scale * LOG2E).sub_(log_total).exp2_()
    dq, dk, dv = q.new_empty(0), k.new_empty(0), k.new_empty(0)
    if want_v:
        dv = (p.mT @ dog).transpose(1, 2).to(k.dtype)  # (B, S, Hkv, D)
    if want_q or want_k:
        dp = dog @ _heads_first(v).mT  # (B, Hkv, G T, S)
        ds = p * dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(scale)
        if want_q:
            dq = _ungrouped(ds @ kg, q)  # (B, T, H, D)
        if want_k:
            dk = (ds.mT @ qg).transpose(1, 2).to(k.dtype)  # (B, S, Hkv, D)
    return dq, dk, dv


def flash_attention_backward_packed_reference(*saved):
    return torch.cat(flash_attention_backward_reference(*saved, True, True, True), 2)


def _query_groups(q, k):
    """Reshape (B, T, H, D) to (B, Hkv, G T, D): a product per key head, k and v not copied."""
    batch, length, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    q = q.reshape(batch, length, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    return q.to(library.compute_dtype(q.dtype)).reshape(batch, kv_heads, group * length, dim)


def _heads_first(x):
    """Turn (B, S, Hkv, D) to (B, Hkv, S, D), in the dtype of sums."""
    return x.to(library.compute_dtype(x.dtype)).transpose(1, 2)


def _ungrouped(x, like):
    """Reshape (B, Hkv, G T, D) back to (B, T, H, D)."""
    batch, length, heads, dim = like.shape
    return x.reshape(batch, heads, length, dim).transpose(1, 2).to(like.dtype)


def _scores(q, k, length, cu_seqlens, causal, window):
    scores = q @ k.mT
    mask = _mask(length, k.shape[2], cu_seqlens, causal, window, q.device)
    if mask is not None:
        groups = scores.shape[2] // max(1, length)
        by_query = scores.unflatten(2, (groups, length))  # (B, Hkv, G, T, S)
        by_query.masked_fill_(~mask, float("-inf"))
    return scores


def _mask(queries, keys, cu_seqlens, causal, window, device):
    """Make a mask (T, S), True where the query may see the key; None when every one may."""
    if not causal and cu_seqlens is None:
        return None
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    mask = key <= query if causal else torch.ones_like(key == query)
    if window is not None:
        mask &= key > query - window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, key.to(cu_seqlens.dtype), right=True)
        mask &= document == document[:, None]
    return mask


def _fake(q, k, v, cu_seqlens, causal, scale, window):
    batch, length, heads, _ = q.shape
    stats = q.new_empty((batch, heads, 2, length), dtype=library.compute_dtype(q.dtype))
    return q.new_empty(q.shape), stats


def _fake_backward(
    do, q, k, v, o, stats, cu_seqlens, causal, scale, window, want_q, want_k, want_v
):
    return tuple(library.empty_if(w, t) for w, t in ((want_q, q), (want_k, k), (want_v, k)))


def _fake_backward_packed(do, q, k, v, o, stats, cu_seqlens, causal, scale, window):
    return q.new_empty((*q.shape[:2], q.shape[2] + 2 * k.shape[2], q.shape[3]))


def _attend_cpp(q, k, v, cu_seqlens, causal, scale, window):
    o, stats = _fake(q, k, v, cu_seqlens, causal, scale, window)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    cpu.ops.flash_attention_forward(q, k, v, cu_seqlens, causal, scale, window, o, stats)
    return o, stats


def _differentiate_cpp(do, q, k, v, o, stats, cu_seqlens, causal, scale, window, dq, dk, dv):
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    cpu.ops.flash_attention_backward(
        do, q, k, v, o, stats, cu_seqlens, causal, scale, window, dq, dk, dv
    )


# What the backends have in common: attend(...) gives o and stats; differentiate(..., dq, dk, dv)
# writes the gradients that are not None, of any strides but, in C++, with the numbers of a head as
# neighbours.


def flash_attention_forward(q, k, v, cu_seqlens, causal, scale, window, *, attend):
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere it would wait
        cuts = cu_seqlens.tolist()
        if len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != q.shape[1] or cuts != sorted(cuts):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {q.shape[1]}, got {cuts}")
    return attend(q, k, v, cu_seqlens, causal, scale, window)


def flash_attention_backward(
    do, q, k, v, o, stats, cu_seqlens, causal, scale, window,
    want_q, want_k, want_v, *, differentiate,
):  # fmt: skip
    saved = do, q, k, v, o, stats, cu_seqlens, causal, scale, window
    wanted = want_q, want_k, want_v
    grads = _fake_backward(*saved, *wanted)
    differentiate(*saved, *(g if w else None for g, w in zip(grads, wanted, strict=True)))
    return grads


def flash_attention_backward_packed(
    do, q, k, v, o, stats, cu_seqlens, causal, scale, window, *, differentiate
):
    saved = do, q, k, v, o, stats, cu_seqlens, causal, scale, window
    dqkv = _fake_backward_packed(*saved)
    differentiate(*saved, *dqkv.split((q.shape[2], k.shape[2], k.shape[2]), 2))
    return dqkv


def visible_pairs(queries: int, keys: int, causal: bool = True, window: int | None = None) -> int:
    """How many (query, key) pairs attention looks at: 4 D FLOPs each, for each head, forward."""
    if not causal:
        return queries * keys
    first, queries = max(0, keys - queries) + 1, min(queries, keys)  # of those that see any key
    most = keys if window is None else window
    growing = min(max(0, most - first + 1), queries)  # see one key more than the query before
    return growing * (2 * first + growing - 1) // 2 + (queries - growing) * most


def _flops(q, k, v, cu_seqlens, causal, scale, window, *, out_shape=None):
    """Packed documents count as one: how long they are is not in the shapes."""
    batch, queries, heads, dim = q
    return 4 * batch * heads * dim * visible_pairs(queries, k[1], causal, window)


def _flops_backward(
    do, q, k, v, o, stats, cu_seqlens, causal, scale, window,
    want_q=True, want_k=True, want_v=True, *, out_shape=None,
):  # fmt: skip
    products = 1 + (want_q or want_k) + want_q + want_k + want_v
    return _flops(q, k, None, None, causal, scale, window) // 2 * products


def _check(q, k, v, cu_seqlens, causal, scale, window):
    check_operands(q, k, v)
    library.expect(k.shape, q, k=k, v=v)
    if cu_seqlens is not None:
        check_documents(q, k, cu_seqlens)


def _check_backward(do, q, k, v, o, stats, cu_seqlens, causal, scale, window, *wanted):
    """`wanted` is there when the gradients come apart; they need v and o but for dv alone."""
    _check(q, k, k if v is None else v, cu_seqlens, causal, scale, window)
    batch, length, heads, _ = q.shape
    library.expect(q.shape, q, do=do, o=o)
    library.expect((batch, heads, 2, length), q, library.compute_dtype(q.dtype), stats=stats)
    if (v is None or o is None) and any(wanted[:2]):
        raise ValueError("v and o are needed for dq and dk, got None")


flash_attention_op = library.define(
    "flash_attention",
    forward="(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, bool causal, float scale,"
    " int? window) -> (Tensor o, Tensor stats)",
    backward="(Tensor do, Tensor q, Tensor k, Tensor? v, Tensor? o, Tensor stats,"
    " Tensor? cu_seqlens, bool causal, float scale, int? window,"
    " bool want_q, bool want_k, bool want_v) -> (Tensor dq, Tensor dk, Tensor dv)",
    backward_packed="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor stats,"
    " Tensor? cu_seqlens, bool causal, float scale, int? window) -> Tensor dqkv",
    fakes={
        "forward": _fake,
        "backward": _fake_backward,
        "backward_packed": _fake_backward_packed,
    },
    checks={
        "forward": _check,
        "backward": _check_backward,
        "backward_packed": _check_backward,
    },
    flops={
        "forward": _flops,
        "backward": _flops_backward,
        "backward_packed": _flops_backward,
    },
)
flash_attention_op.register(
    "reference",
    forward=partial(flash_attention_forward, attend=flash_attention_reference),
    backward=flash_attention_backward_reference,
    backward_packed=flash_attention_backward_packed_reference,
)
for _backend, _attend, _differentiate in (
    ("triton", attention_triton.attend, attention_triton.differentiate),
    ("cpp", _attend_cpp, _differentiate_cpp),
):
    flash_attention_op.register(
        _backend,
        forward=partial(flash_attention_forward, attend=_attend),
        backward=partial(flash_attention_backward, differentiate=_differentiate),
        backward_packed=partial(flash_attention_backward_packed, differentiate=_differentiate),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, *ctx.settings = inputs
    o, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats)
    if any(ctx.needs_input_grad):
        only_v = not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        v, o = (None, None) if only_v else (v, o)
        ctx.save_for_backward(q, k, v, o, stats, cu_seqlens)


def _backward(ctx, do, _):
    wanted = ctx.needs_input_grad[:3]
    if do is None:
        return (None,) * 7
    grads = torch.ops.llamapro.flash_attention_backward(
        do, *ctx.saved_tensors, *ctx.settings, *wanted
    )
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *(None,) * 4)


flash_attention_op.autograd(_backward, setup_context=_setup_context)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v per head, without keeping the scores.

    q: (B, T, H, D), k, v: (B, S, Hkv, D) of one floating dtype, H a multiple of Hkv; returns
    (B, T, H, D). `scale` defaults to 1 / sqrt(D). `causal`: the last query sees the last key and
    each earlier one a key less. `window` W (causal only): a query sees itself and the W - 1
    tokens before it. `cu_seqlens` (int32, (documents + 1,), from 0 to T): documents lie one after
    the other in a batch of one, S = T, and see only themselves; what it holds is checked on a CPU
    alone. Causal attention with more queries than keys is refused: queries that see nothing are
    mostly tensors in another order. Under autocast the op runs, and returns, in autocast's dtype.
    Raises TypeError for dtypes and ValueError for shapes or options that do not fit.
    Source: Dao 2023, "FlashAttention-2".
    """
    library.check_floating(q=q, k=k, v=v)
    q, k, v = library.in_autocast(q, k, v)
    check_operands(q, k, v)
    check_window(window)
    if window is not None and not causal:
        raise ValueError(f"a window is for causal attention alone, got {window}, causal={causal}")
    if causal:
        check_causal(q, k)
    if cu_seqlens is not None:
        check_documents(q, k, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < LARGEST_SCALE:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return torch.ops.llamapro.flash_attention(q, k, v, cu_seqlens, causal, scale, window)[0]


def attend_seen(q, k, v, seen):
    """Attention of one query a row, q (B, 1, H, D), to the keys that `seen` (B, S) names.

    The heads that share a key's are as queries of one head, so that PyTorch's fused kernels, which
    take a mask, need no copies of keys and values.
    """
    if q.shape[1] != 1 or seen.shape != k.shape[:2] or seen.dtype != torch.bool:
        got = f"{tuple(q.shape)} and {tuple(seen.shape)}, {seen.dtype}"
        raise ValueError(f"one query a row and a bool mask (B, S) of its keys expected, got {got}")
    grouped = q.unflatten(2, (k.shape[2], -1)).squeeze(1)  # (B, Hkv, H / Hkv, D)
    o = torch.nn.functional.scaled_dot_product_attention(
        grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen[:, None, None]
    )
    return o.flatten(1, 2).unsqueeze(1)


def check_window(window):
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be a whole number of at least 1, got {window!r}")


def check_causal(q, k):
    if q.shape[1] > k.shape[1]:
        raise ValueError(
            "causal attention needs as many keys as queries at least,"
            f" got q {tuple(q.shape)} and k {tuple(k.shape)}: are they (B, T, H, D)?"
        )


def check_operands(q, k, v):
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q (B, T, H, D) and k, v (B, S, Hkv, D) expected,"
            f" got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    divides = heads % kv_heads == 0 if kv_heads else heads == 0
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not q.shape[3] or not divides:
        raise ValueError(
            "q and k must agree in batch and head dimension, at least 1, and k's heads divide q's,"
            f" got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def check_documents(q, k, cu_seqlens):
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.device != q.device:
        raise ValueError(
            "cu_seqlens must be (documents + 1,) int32 on q's device,"
            f" got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(
            "packed documents need a batch of one and S = T,"
            f" got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
