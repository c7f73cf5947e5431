"""The Triton kernels of `linear_cross_entropy.py`, whose docstring has the formulas.

They work on a chunk of logits (tokens, V); the products are the library's.
"""

from __future__ import annotations

from llamapro_kernels import gpu
from llamapro_kernels.gpu import tl, triton


@gpu.jit
def cross_entropy_kernel(
    logits, targets, losses, peaks, log_totals, logits_row, vocabulary, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and stats of one row of logits, by an online softmax."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_row
    peak, total = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base), 0)
        peak = higher
    log_total = tl.log(total)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    score = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, peak - score + log_total))
    tl.store(peaks + row, peak)
    tl.store(log_totals + row, log_total)


@gpu.jit
def dlogits_kernel(
    logits, targets, peaks, log_totals, dloss, logits_row, dloss_stride, vocabulary, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits become (softmax - onehot) in place, times dloss where there is one."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    logits += row * logits_row + column
    z = tl.load(logits, mask=column < vocabulary, other=0).to(tl.float32)
    target = tl.load(targets + row)
    p = tl.exp(z - tl.load(peaks + row) - tl.load(log_totals + row))
    dz = p - tl.where(column == target, 1.0, 0.0)
    if dloss is not None:
        dz *= tl.load(dloss + row * dloss_stride).to(tl.float32)
    tl.store(logits, tl.where(target == ignore_index, 0.0, dz), mask=column < vocabulary)


def softmax_triton(logits, targets, ignore_index, losses, stats, want_gradient):
    gpu.launch(
        cross_entropy_kernel,
        (len(logits),),
        *(logits, targets, losses, *stats),
        *(logits.stride(0), logits.shape[1], ignore_index),
        BLOCK=min(4096, triton.next_power_of_2(logits.shape[1])),
        num_warps=8,
    )
    if want_gradient:
        gradient_triton(logits, targets, ignore_index, stats, None)


def gradient_triton(logits, targets, ignore_index, stats, dloss):
    vocabulary = logits.shape[1]
    block = min(2048, triton.next_power_of_2(vocabulary))
    gpu.launch(
        dlogits_kernel,
        (len(logits) * triton.cdiv(vocabulary, block),),
        *(logits, targets, *stats, dloss, logits.stride(0)),
        *(0 if dloss is None else dloss.stride(0), vocabulary, ignore_index),
        BLOCK=block,
        num_warps=4,
    )
