"""KL divergence of two softmaxes of linear heads, in chunks of tokens: no (tokens, V) tensor.

    z = x w^T,  t = teacher u^T,  q = softmax(z / temperature),  p = softmax(t / temperature)
    log q = (z - peak) / temperature - log total,  total = sum exp((z - peak) / temperature)
    loss_i = sum p_i (log p_i - log q_i)                 KL(teacher || student), of token i
    dz = (q - p) * upstream / temperature,  dx = dz w,  dw = dz^T x

x is (N, D), weight w (V, D), teacher (N, E), its weight u (V, E), mask (N,) bool: tokens where it
is False do not count. Sums in fp32 (fp64 for fp64), losses too. The teacher is a constant, and so
is its head, also where that is w. As in linear_cross_entropy.py the forward computes the gradients
of the plain sum, and backward scales them; the weight's gradient under reduction "none" computes
the logits again, and reads stats, (4, N): peak and log total of z, and of t. Equal states and heads
have a loss and gradients of exactly 0: both log-softmaxes take the same steps. Bytes: two chunks of
logits at a time, each written once and read three times; the student's are written and read again
as their gradient.

Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", without its
factor temperature^2; in chunks as Wijmans et al. 2024 do it for cross-entropy.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from llamapro_kernels import cpu, library
from llamapro_kernels.kl_divergence_triton import divergence_triton, gradient_triton
from llamapro_kernels.linear_head import chunk_tokens, logits_by_chunk, scaled
from llamapro_kernels.matmul import add_matmul, matmul, pieces

REDUCTIONS = ("none", "mean", "sum")
ops = library.ops


def linear_kl_divergence_reference(
    x, teacher, weight, teacher_weight, mask, temperature, per_token, want_x, want_weight
):
    """Ground truth: losses or their sum, stats, and dx and (fp32) dweight of the sum."""
    losses, stats, dx, dweight = _fake(
        x, teacher, weight, teacher_weight, mask, temperature, True, want_x, want_weight
    )
    dweight.zero_()
    for rows in pieces(len(x), chunk_tokens(len(weight), x.device.type, _share(x))):
        log_q, stats[:2, rows] = _log_softmax(x[rows], weight, temperature)
        log_p, stats[2:, rows] = _log_softmax(teacher[rows], teacher_weight, temperature)
        terms = log_p.exp() * (log_p - log_q)
        losses[rows] = terms.masked_fill_(log_p == -math.inf, 0).sum(-1).where(mask[rows], 0)
        if want_x or want_weight:
            dlogits = _dlogits(log_q, log_p, mask[rows], 1 / temperature).to(x.dtype)
            if want_x:
                dx[rows] = dlogits @ weight
            if want_weight:
                dweight += dlogits.T @ x[rows]
    return losses if per_token else losses.sum(), stats, dx, dweight


def linear_kl_divergence_backward_reference(
    dloss, x, teacher, weight, teacher_weight, mask, stats, temperature
):
    """dweight when each token has an upstream gradient of its own: dloss is (N,)."""
    dweight = weight.new_zeros(weight.shape, dtype=stats.dtype)
    for rows in pieces(len(x), chunk_tokens(len(weight), x.device.type, _share(x))):
        log_q = _log_softmax(x[rows], weight, temperature)[0]
        log_p = _log_softmax(teacher[rows], teacher_weight, temperature)[0]
        upstream = dloss[rows, None].to(stats.dtype) / temperature
        dweight += _dlogits(log_q, log_p, mask[rows], upstream).to(x.dtype).T @ x[rows]
    return dweight.to(weight.dtype)


def _log_softmax(states, head, temperature):
    """Of the logits, and what it is made with, (2, N): peak and log total."""
    logits = torch.nn.functional.linear(states, head)
    logits = logits.to(library.compute_dtype(logits.dtype))
    peak = logits.amax(-1, keepdim=True)
    below = logits.sub_(peak).div_(temperature)
    log_total = below.exp().sum(-1, keepdim=True).log()
    return below - log_total, torch.cat((peak, log_total), 1).T


def _dlogits(log_q, log_p, mask, upstream):
    return (log_q.exp() - log_p.exp()).mul_(upstream).masked_fill_(~mask[:, None], 0.0)


def _divergence_cpp(student, teacher, mask, losses, stats, temperature, want_gradient):
    scale = 1 / temperature
    cpu.ops.kl_divergence(student, teacher, mask, *stats, losses, None, scale, want_gradient)


def _gradient_cpp(student, teacher, mask, stats, dloss, temperature):
    dloss = library.contiguous_fp32(dloss)
    cpu.ops.kl_divergence(student, teacher, mask, *stats, None, dloss, 1 / temperature, True)


def _forward(
    x, teacher, weight, teacher_weight, mask, temperature, per_token, want_x, want_weight,
    *, divergence,
):  # fmt: skip
    """divergence(student, teacher, mask, losses, stats, temperature, want) makes the student's
    logits their gradient."""
    losses, stats, dx, dweight = _fake(
        x, teacher, weight, teacher_weight, mask, temperature, True, want_x, want_weight
    )
    dweight.zero_()
    mask, want = mask.contiguous(), want_x or want_weight
    for rows, student, theirs in _both_logits(x, teacher, weight, teacher_weight):
        divergence(student, theirs, mask[rows], losses[rows], stats[:, rows], temperature, want)
        if want_x:
            matmul(student, weight, out=dx[rows])
        if want_weight:
            add_matmul(dweight, student.T, x[rows])
    return losses if per_token else losses.sum(), stats, dx, dweight


def _backward_weight(
    dloss, x, teacher, weight, teacher_weight, mask, stats, temperature, *, gradient
):
    """gradient(student, teacher, mask, stats, dloss, temperature) makes logits their gradient."""
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32)
    mask = mask.contiguous()
    for rows, student, theirs in _both_logits(x, teacher, weight, teacher_weight):
        gradient(student, theirs, mask[rows], stats[:, rows], dloss[rows], temperature)
        add_matmul(dweight, student.T, x[rows])
    return dweight.to(weight.dtype)


def _both_logits(x, teacher, weight, teacher_weight):
    share = _share(x)
    chunks = logits_by_chunk(x, weight, share), logits_by_chunk(teacher, teacher_weight, share)
    for (rows, student), (_, theirs) in zip(*chunks, strict=True):
        yield rows, student, theirs


def _share(x):
    """Two logits are held, so half of the tokens; on a GPU a quarter: 512 of them still do 512
    FLOPs for each byte of the head in 16 bits, more than it needs to be busy."""
    return 2 if x.device.type == "cpu" else 4


def _fake(x, teacher, weight, teacher_weight, mask, temperature, per_token, want_x, want_weight):
    stats = x.new_empty((4, x.shape[0]), dtype=library.compute_dtype(x.dtype))
    dweight = stats.new_empty(weight.shape if want_weight else 0)
    loss = stats.new_empty(x.shape[:1] if per_token else ())
    return loss, stats, library.empty_if(want_x, x), dweight


def _fake_backward(dloss, x, teacher, weight, teacher_weight, mask, stats, temperature):
    return weight.new_empty(weight.shape)


def _flops(
    x, teacher, weight, teacher_weight, mask, temperature, per_token, want_x, want_weight,
    *, out_shape=None,
):  # fmt: skip
    ours = x[1] * (1 + want_x + want_weight)
    return 2 * x[0] * weight[0] * (ours + teacher[1])


def _flops_backward(
    dloss, x, teacher, weight, teacher_weight, mask, stats, temperature, *, out_shape=None
):
    return 2 * x[0] * weight[0] * (2 * x[1] + teacher[1])


def _check(x, teacher, weight, teacher_weight, mask, temperature, *_):
    if not x.dim() == teacher.dim() == weight.dim() == teacher_weight.dim() == 2:
        shapes = [tuple(t.shape) for t in (x, teacher, weight, teacher_weight)]
        raise ValueError(f"states (N, D) and weights (V, D) expected, got {shapes}")
    library.expect((x.shape[0], teacher.shape[1]), x, teacher=teacher)
    library.expect((weight.shape[0], x.shape[1]), x, weight=weight)
    library.expect((weight.shape[0], teacher.shape[1]), x, teacher_weight=teacher_weight)
    library.expect(x.shape[:1], x, torch.bool, mask=mask)
    check_temperature(temperature)


def _check_backward(dloss, x, teacher, weight, teacher_weight, mask, stats, temperature):
    _check(x, teacher, weight, teacher_weight, mask, temperature)
    library.expect((4, len(x)), x, library.compute_dtype(x.dtype), stats=stats)
    library.expect(x.shape[:1], x, dloss.dtype, dloss=dloss)


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")


linear_kl_divergence_op = library.define(
    "linear_kl_divergence",
    forward="(Tensor x, Tensor teacher, Tensor weight, Tensor teacher_weight, Tensor mask,"
    " float temperature, bool per_token, bool want_x, bool want_weight)"
    " -> (Tensor loss, Tensor stats, Tensor dx, Tensor dweight)",
    backward="(Tensor dloss, Tensor x, Tensor teacher, Tensor weight, Tensor teacher_weight,"
    " Tensor mask, Tensor stats, float temperature) -> Tensor",
    fakes={"forward": _fake, "backward": _fake_backward},
    checks={"forward": _check, "backward": _check_backward},
    flops={"forward": _flops, "backward": _flops_backward},
)
linear_kl_divergence_op.register(
    "reference",
    forward=linear_kl_divergence_reference,
    backward=linear_kl_divergence_backward_reference,
)
linear_kl_divergence_op.register(
    "triton",
    forward=partial(_forward, divergence=divergence_triton),
    backward=partial(_backward_weight, gradient=gradient_triton),
)
linear_kl_divergence_op.register(
    "cpp",
    forward=partial(_forward, divergence=_divergence_cpp),
    backward=partial(_backward_weight, gradient=_gradient_cpp),
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.temperature, _, want_x, want_weight = inputs
    _, stats, dx, dweight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, dx, dweight)
    ctx.dtypes = tensors[0].dtype, tensors[2].dtype
    ctx.late_weight = ctx.needs_input_grad[2] and not want_weight
    again = (*tensors, stats) if ctx.late_weight else ()
    ctx.save_for_backward(dx if want_x else None, dweight if want_weight else None, *again)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 9
    dx, dweight, *again = ctx.saved_tensors
    if dx is not None:
        dx = scaled(dx, dloss.reshape(-1, 1), ctx.dtypes[0])
    if dweight is not None:
        dweight = scaled(dweight, dloss.reshape(1, 1), ctx.dtypes[1])
    if ctx.late_weight:
        dweight = ops.linear_kl_divergence_backward(dloss, *again, ctx.temperature)
    return dx, None, dweight, *(None,) * 6


linear_kl_divergence_op.autograd(_backward, setup_context=_setup_context)


def linear_kl_divergence(
    x: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    mask: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions of two sets of states, without logits.

    x: the student's states (..., D) and weight: its head (V, D). teacher: the teacher's states
    (..., E), of the head `teacher_weight` (V, E), by default `weight` and E = D. All of one
    floating dtype. temperature: both logits are divided by it; the loss is not scaled back. mask:
    (...) bool, the tokens that count, all by default.

    Returns the fp32 loss: a scalar for "mean" (over the tokens that count) and "sum", (...) for
    "none"; tokens that do not count have 0, and so has the mean of none. x and weight get
    gradients; the teacher and its head are constants, also where that head is `weight`. Under
    autocast the logits are computed in autocast's dtype.
    Raises TypeError for dtypes and ValueError for shapes, devices and a temperature of 0 or less.
    Source: Hinton, Vinyals and Dean 2015, without their factor temperature^2.
    """
    own = weight if teacher_weight is None else teacher_weight
    library.check_floating(x=x, teacher=teacher, weight=weight, teacher_weight=own)
    x, teacher, weight, own = library.in_autocast(x, teacher, weight, own)
    if not x.dtype == teacher.dtype == weight.dtype == own.dtype:
        got = ", ".join(str(t.dtype) for t in (x, teacher, weight, own))
        raise TypeError(f"x, teacher and weights must have one dtype, got {got}")
    fitting = x.shape[-1:] == weight.shape[1:] and teacher.shape[-1:] == own.shape[1:]
    if (
        weight.dim() != 2
        or len(weight) != len(own)
        or x.shape[:-1] != teacher.shape[:-1]
        or not fitting
    ):
        raise ValueError(
            "x (..., D), teacher (..., E), weight (V, D) and teacher_weight (V, E) expected, got"
            f" {tuple(x.shape)}, {tuple(teacher.shape)}, {tuple(weight.shape)}, {tuple(own.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    check_temperature(temperature)
    mask = _mask(mask, x)
    recording, per_token = torch.is_grad_enabled(), reduction == "none"
    want_x = recording and x.requires_grad
    want_weight = recording and weight.requires_grad and not per_token
    rows, theirs = library.as_rows(x), library.as_rows(teacher.detach())
    heads = weight, own.detach()
    settings = float(temperature), per_token, want_x, want_weight
    loss = ops.linear_kl_divergence(rows, theirs, *heads, mask.reshape(-1), *settings)[0]
    if per_token:
        return loss.reshape(mask.shape)
    return loss / mask.sum().clamp(min=1) if reduction == "mean" else loss


def _mask(mask, x):
    if mask is None:
        return torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {got}")
    if mask.shape != x.shape[:-1] or mask.device != x.device:
        raise ValueError(
            f"mask {tuple(x.shape[:-1])} on {x.device} expected,"
            f" got {tuple(mask.shape)} on {mask.device}"
        )
    return mask
