"""The ops in plain PyTorch, which tests and benchmarks compare with."""

import math

import torch
import torch.nn.functional as F


def rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def linear_swiglu(x, weight):
    return swiglu(F.linear(x, weight))


def rotate(x, cos, sin):
    """Rotary embedding; cos and sin broadcast against x, in its dtype."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rope(q, k, cos, sin):
    cos, sin = (table[..., None, :].to(q.dtype) for table in (cos, sin))  # (..., T, 1, D)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def attention(q, k, v, *, causal=True, window=None, cu_seqlens=None, scale=None):
    """Explicit scores, a key at a time visible or not by the rules as the public docstring has."""
    t, s = q.shape[1], k.shape[1]
    query, key = torch.arange(t)[:, None] + s - t, torch.arange(s)
    seen = torch.ones(t, s, dtype=torch.bool)
    if causal:
        seen &= key <= query
    if window:
        seen &= query - key < window
    if cu_seqlens is not None:
        ends = cu_seqlens[1:, None].cpu()
        document = (torch.arange(s) >= ends).sum(0)
        seen &= document[:, None] == document
    seen = seen.to(q.device)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    p = p.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return torch.einsum("bhts,bshd->bthd", p, v)


def sdpa(q, k, v, **options):
    """PyTorch's own causal attention, which takes heads first: views suit it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **options)
    return o.transpose(1, 2)


def linear_kl_divergence(
    x, teacher, weight, *, temperature=1.0, reduction="mean", mask=None, teacher_weight=None
):
    """KL(teacher || student) from the logits of both; the teacher and its head are constants."""
    head = weight if teacher_weight is None else teacher_weight
    with torch.no_grad():
        log_p = (F.linear(teacher, head) / temperature).log_softmax(-1)
    log_q = (F.linear(x, weight) / temperature).log_softmax(-1)
    losses = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if mask is not None:
        losses = losses.masked_fill(~mask, 0.0)
    if reduction == "none":
        return losses
    counted = losses.numel() if mask is None else mask.sum()
    return losses.sum() / max(1, counted) if reduction == "mean" else losses.sum()


def linear_cross_entropy(x, weight, targets, *, reduction="mean"):
    """As trainers write it, with fp32 logits for the loss."""
    logits = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction=reduction)
