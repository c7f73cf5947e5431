"""The Triton kernels of `linear_kl_divergence.py`, whose docstring has the formulas.

They work on a chunk of both logits (tokens, V); the products are the library's.
"""

from __future__ import annotations

from llamapro_kernels import gpu
from llamapro_kernels.gpu import tl, triton


@gpu.jit
def row_stats(logits, vocabulary, scale, BLOCK: tl.constexpr):
    """Peak and log total of a row, by an online softmax. The peak is subtracted first: a fused
    product and difference of large logits would be their rounding."""
    peak, total = float("-inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(z, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        total = total * tl.exp((peak - base) * scale) + tl.sum(tl.exp((z - base) * scale), 0)
        peak = higher
    return peak, tl.log(total)


@gpu.jit
def kl_divergence_kernel(
    student, teacher, mask, losses, peaks, log_totals, teacher_peaks, teacher_log_totals,
    student_row, teacher_row, vocabulary, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and stats of one row of both logits."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    peak, log_total = row_stats(student, vocabulary, scale, BLOCK)
    teacher_peak, teacher_log_total = row_stats(teacher, vocabulary, scale, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        z = tl.load(student + column, mask=inside, other=0).to(tl.float32)
        t = tl.load(teacher + column, mask=inside, other=float("-inf")).to(tl.float32)
        log_q = (z - peak) * scale - log_total
        log_p = (t - teacher_peak) * scale - teacher_log_total
        loss += tl.exp(log_p) * tl.where(log_p == float("-inf"), 0.0, log_p - log_q)
    tl.store(losses + row, tl.where(tl.load(mask + row) != 0, tl.sum(loss, 0), 0.0))
    tl.store(peaks + row, peak)
    tl.store(log_totals + row, log_total)
    tl.store(teacher_peaks + row, teacher_peak)
    tl.store(teacher_log_totals + row, teacher_log_total)


@gpu.jit
def kl_dlogits_kernel(
    student, teacher, mask, peaks, log_totals, teacher_peaks, teacher_log_totals, dloss,
    student_row, teacher_row, dloss_stride, vocabulary, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The student's logits become (q - p) / temperature in place, times dloss where there is."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    student += row * student_row + column
    teacher += row * teacher_row + column
    z = tl.load(student, mask=column < vocabulary, other=0).to(tl.float32)
    t = tl.load(teacher, mask=column < vocabulary, other=0).to(tl.float32)
    q = tl.exp((z - tl.load(peaks + row)) * scale - tl.load(log_totals + row))
    p = tl.exp((t - tl.load(teacher_peaks + row)) * scale - tl.load(teacher_log_totals + row))
    dz = (q - p) * scale
    if dloss is not None:
        dz *= tl.load(dloss + row * dloss_stride).to(tl.float32)
    tl.store(student, tl.where(tl.load(mask + row) != 0, dz, 0.0), mask=column < vocabulary)


def divergence_triton(student, teacher, mask, losses, stats, temperature, want_gradient):
    gpu.launch(
        kl_divergence_kernel,
        (len(student),),
        *(student, teacher, mask, losses, *stats),
        *(student.stride(0), teacher.stride(0), student.shape[1], 1 / temperature),
        BLOCK=min(4096, triton.next_power_of_2(student.shape[1])),
        num_warps=8,
    )
    if want_gradient:
        gradient_triton(student, teacher, mask, stats, None, temperature)


def gradient_triton(student, teacher, mask, stats, dloss, temperature):
    vocabulary = student.shape[1]
    block = min(2048, triton.next_power_of_2(vocabulary))
    gpu.launch(
        kl_dlogits_kernel,
        (len(student) * triton.cdiv(vocabulary, block),),
        *(student, teacher, mask, *stats, dloss, student.stride(0), teacher.stride(0)),
        *(0 if dloss is None else dloss.stride(0), vocabulary, 1 / temperature),
        BLOCK=block,
        num_warps=4,
    )
