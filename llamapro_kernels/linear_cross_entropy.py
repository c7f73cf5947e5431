"""Cross-entropy of a linear head, in chunks of tokens: no (tokens, V) tensor ever exists.

    z = x w^T,  peak = max z,  total = sum exp(z - peak)
    loss_i = peak_i - z_i[target_i] + log total_i,  softmax(z) = exp(z - peak - log total)
    dz = (softmax(z) - onehot(target)) * upstream,  dx = dz w,  dw = dz^T x

x is (N, D), weight (V, D), targets (N,) integer; sums in fp32 (fp64 for fp64), losses too.
Because softmax(z) is at hand while the loss is computed, the forward also computes the gradients
that will be wanted, of the plain sum; backward only scales them, in fp32, so that neither a large
loss scale nor 1/N is rounded to the model's dtype. The one case where that is impossible, the
weight's gradient under reduction "none", reads stats, (2, N), peak and log total, in backward and
computes z again. (Their sum, the log-sum-exp, would be rounded by half a unit of a large peak.) A
frozen head has no (V, D) buffer, a frozen x no (N, D) buffer.

Source: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models"; the fused
forward is Liger-Kernel's idea (Hsu et al. 2024).
"""

from __future__ import annotations

from functools import partial

import torch

from llamapro_kernels import cpu, library
from llamapro_kernels.cross_entropy_triton import gradient_triton, softmax_triton
from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.linear_head import (
    chunk_tokens,
    logits_by_chunk,
    plain_dx,
    plain_logits,
    scaled,
    write_input_gradient,
)
from llamapro_kernels.matmul import add_matmul, pieces
from llamapro_kernels.quantize import E4M3

REDUCTIONS = ("none", "mean", "sum")
ops = library.ops


def linear_cross_entropy_reference(
    x, weight, targets, ignore_index, per_token, want_x, want_weight
):
    """Ground truth: losses or their sum, stats, and dx and (fp32) dweight of the sum."""
    dtype = library.compute_dtype(x.dtype)
    valid = targets != ignore_index
    _check_targets(targets, ignore_index, weight.shape[0])
    losses, stats = x.new_empty(len(x), dtype=dtype), x.new_empty((2, len(x)), dtype=dtype)
    dx = x.new_empty(x.shape if want_x else 0)
    dweight = x.new_zeros(weight.shape if want_weight else 0, dtype=dtype)
    for rows in pieces(len(x), chunk_tokens(len(weight), x.device.type)):
        logits = plain_logits(x[rows], weight).to(dtype)
        target = targets[rows].where(valid[rows], 0)[:, None]
        score, peak = logits.gather(1, target)[:, 0], logits.amax(-1, keepdim=True)
        p = logits.sub_(peak).exp_()
        total = p.sum(-1, keepdim=True)
        stats[:, rows] = torch.cat((peak, total.log()), 1).T
        losses[rows] = (stats[0, rows] - score + stats[1, rows]).where(valid[rows], 0.0)
        if want_x or want_weight:
            dlogits = _dlogits(p.div_(total), target, valid[rows], 1.0).to(x.dtype)
            if want_x:
                dx[rows] = plain_dx(dlogits, weight)
            if want_weight:
                dweight += dlogits.T @ x[rows]
    return losses if per_token else losses.sum(), stats, dx, dweight


def linear_cross_entropy_backward_reference(dloss, x, weight, targets, stats, ignore_index):
    """dweight when each token has an upstream gradient of its own: dloss is (N,)."""
    _check_targets(targets, ignore_index, weight.shape[0])  # again: NumPy may have written to them
    dweight = weight.new_zeros(weight.shape, dtype=stats.dtype)
    for rows in pieces(len(x), chunk_tokens(len(weight), x.device.type)):
        logits = torch.nn.functional.linear(x[rows], weight).to(stats.dtype)
        valid = targets[rows] != ignore_index
        target = targets[rows].where(valid, 0)[:, None]
        upstream = dloss[rows, None].to(stats.dtype)
        p = logits.sub_(stats[0, rows, None]).sub_(stats[1, rows, None]).exp_()
        dlogits = _dlogits(p, target, valid, upstream).to(x.dtype)
        dweight += dlogits.T @ x[rows]
    return dweight.to(weight.dtype)


def _dlogits(p, target, valid, upstream):
    """The logits' gradient, in the memory of their softmax."""
    p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
    return p.mul_(upstream).masked_fill_(~valid[:, None], 0.0)


def _check_targets(targets, ignore_index, vocabulary):
    """On a GPU this check would wait for the device: there such a target's loss is NaN."""
    if targets.device.type != "cpu":
        return
    bad = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))]
    if len(bad):
        raise IndexError(
            f"targets must lie in 0..{vocabulary - 1} or be ignore_index, got {bad[0].item()}"
        )


def _forward(x, weight, targets, ignore_index, per_token, want_x, want_weight, *, softmax):
    """softmax(logits, targets, ignore_index, losses, stats, want) makes logits their gradient."""
    _check_targets(targets, ignore_index, weight.shape[0])
    losses, stats, dx, dweight = _fake(x, weight, targets, ignore_index, True, want_x, want_weight)
    dweight.zero_()
    targets = targets.contiguous()
    for rows, logits in logits_by_chunk(x, weight):
        want = want_x or want_weight
        softmax(logits, targets[rows], ignore_index, losses[rows], stats[:, rows], want)
        if want_x:
            write_input_gradient(dx[rows], logits, weight)
        if want_weight:
            add_matmul(dweight, logits.T, x[rows])
    return losses if per_token else losses.sum(), stats, dx, dweight


def _backward_weight(dloss, x, weight, targets, stats, ignore_index, *, gradient):
    """gradient(logits, targets, ignore_index, stats, dloss) makes logits their gradient."""
    _check_targets(targets, ignore_index, weight.shape[0])
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32)
    targets = targets.contiguous()
    for rows, logits in logits_by_chunk(x, weight):
        gradient(logits, targets[rows], ignore_index, stats[:, rows], dloss[rows])
        add_matmul(dweight, logits.T, x[rows])
    return dweight.to(weight.dtype)


def _softmax_cpp(logits, targets, ignore_index, losses, stats, want_gradient):
    cpu.ops.cross_entropy(logits, targets, ignore_index, *stats, losses, None, want_gradient)


def _gradient_cpp(logits, targets, ignore_index, stats, dloss):
    dloss = library.contiguous_fp32(dloss)
    cpu.ops.cross_entropy(logits, targets, ignore_index, *stats, None, dloss, True)


def _fake(x, weight, targets, ignore_index, per_token, want_x, want_weight):
    stats = x.new_empty((2, x.shape[0]), dtype=library.compute_dtype(x.dtype))
    dweight = stats.new_empty(weight.shape if want_weight else 0)
    loss = stats.new_empty(x.shape[:1] if per_token else ())
    return loss, stats, library.empty_if(want_x, x), dweight


def _fake_backward(dloss, x, weight, targets, stats, ignore_index):
    return weight.new_empty(weight.shape)


def _flops(x, weight, targets, ignore_index, per_token, want_x, want_weight, *, out_shape=None):
    return 2 * x[0] * weight[0] * weight[1] * (1 + want_x + want_weight)


def _flops_frozen(x, values, scale, transposed, *settings, out_shape=None):
    return _flops(x, values, *settings, False)


def _flops_backward(dloss, x, weight, targets, stats, ignore_index, *, out_shape=None):
    return 2 * x[0] * weight[0] * weight[1] * 2


def _check(x, weight, targets, ignore_index, *_):
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"x (N, D) and weight (V, D) expected, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    library.expect((weight.shape[0], x.shape[1]), x, weight=weight)
    library.expect(x.shape[:1], x, torch.int64, targets=targets)


def _check_frozen(x, values, scale, transposed, targets, ignore_index, *_):
    if x.dim() != 2 or values.dim() != 2 or values.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"x (N, D) and values (V, D) expected, got {tuple(x.shape)} and {tuple(values.shape)}"
        )
    library.expect(values.shape, x, E4M3, values=values)
    library.expect((len(values), 1), x, torch.float32, scale=scale)
    library.expect(values.shape[::-1], x, E4M3, transposed=transposed)
    library.expect(x.shape[:1], x, torch.int64, targets=targets)


def _check_backward(dloss, x, weight, targets, stats, ignore_index):
    _check(x, weight, targets, ignore_index)
    library.expect((2, len(x)), x, library.compute_dtype(x.dtype), stats=stats)
    library.expect(x.shape[:1], x, dloss.dtype, dloss=dloss)


linear_cross_entropy_op = library.define(
    "linear_cross_entropy",
    forward="(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool per_token,"
    " bool want_x, bool want_weight) -> (Tensor loss, Tensor stats, Tensor dx, Tensor dweight)",
    backward="(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor stats,"
    " int ignore_index) -> Tensor",
    fakes={"forward": _fake, "backward": _fake_backward},
    checks={"forward": _check, "backward": _check_backward},
    flops={"forward": _flops, "backward": _flops_backward},
)
linear_cross_entropy_op.register(
    "reference",
    forward=linear_cross_entropy_reference,
    backward=linear_cross_entropy_backward_reference,
)
linear_cross_entropy_op.register(
    "triton",
    forward=partial(_forward, softmax=softmax_triton),
    backward=partial(_backward_weight, gradient=gradient_triton),
)
linear_cross_entropy_op.register(
    "cpp",
    forward=partial(_forward, softmax=_softmax_cpp),
    backward=partial(_backward_weight, gradient=_gradient_cpp),
)


def _over_frozen(forward):
    """The forward of a head in 8 bits, whose gradient nobody wants, by its tensors."""

    def call(x, values, scale, transposed, targets, ignore_index, per_token, want_x):
        head = FrozenMatrix(values, scale, transposed)
        return forward(x, head, targets, ignore_index, per_token, want_x, False)[:3]

    return call


frozen_op = library.define(
    "linear_cross_entropy_frozen",
    forward="(Tensor x, Tensor values, Tensor scale, Tensor? transposed, Tensor targets,"
    " int ignore_index, bool per_token, bool want_x) -> (Tensor loss, Tensor stats, Tensor dx)",
    fakes={"forward": _over_frozen(_fake)},
    checks={"forward": _check_frozen},
    flops={"forward": _flops_frozen},
)
frozen_op.register("reference", forward=_over_frozen(linear_cross_entropy_reference))
frozen_op.register("triton", forward=_over_frozen(partial(_forward, softmax=softmax_triton)))
frozen_op.register("cpp", forward=_over_frozen(partial(_forward, softmax=_softmax_cpp)))


def _setup_context_frozen(ctx, inputs, output):
    _, stats, dx = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, dx)
    ctx.save_for_backward(dx if inputs[-1] else None)


def _backward_frozen(ctx, dloss, *_):
    (dx,) = ctx.saved_tensors
    if dloss is None or dx is None:
        return (None,) * 8
    return scaled(dx, dloss.reshape(-1, 1), dx.dtype), *(None,) * 7


def _setup_context(ctx, inputs, output):
    x, weight, targets, ctx.ignore_index, ctx.per_token, want_x, want_weight = inputs
    _, stats, dx, dweight = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(stats, dx, dweight)
    ctx.dtypes = x.dtype, weight.dtype
    ctx.late_weight = ctx.needs_input_grad[1] and not want_weight
    again = (x, weight, targets, stats) if ctx.late_weight else ()
    ctx.save_for_backward(dx if want_x else None, dweight if want_weight else None, *again)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    dx, dweight, *again = ctx.saved_tensors
    if dx is not None:
        dx = scaled(dx, dloss.reshape(-1, 1), ctx.dtypes[0])
    if dweight is not None:
        dweight = scaled(dweight, dloss.reshape(1, 1), ctx.dtypes[1])
    if ctx.late_weight:
        dweight = ops.linear_cross_entropy_backward(dloss, *again, ctx.ignore_index)
    return dx, dweight, None, None, None, None, None


linear_cross_entropy_op.autograd(_backward, setup_context=_setup_context)
frozen_op.autograd(_backward_frozen, setup_context=_setup_context_frozen)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor | FrozenMatrix,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross-entropy of the logits ``x @ weight.T`` against `targets`, without holding them.

    x: (..., D) and weight: (V, D) of one floating dtype, or the weight a `FrozenMatrix`, in 8 bits;
    targets: (...) int64 or int32. Returns
    the fp32 loss: a scalar for "mean" (over valid targets) and "sum", (...) for "none". Targets
    equal to `ignore_index` do not count; when all are ignored the loss and gradients are 0. Under
    autocast the logits are computed in autocast's dtype.
    Raises TypeError for dtypes, ValueError for shapes and, on a CPU, IndexError for targets outside
    0..V-1; on a GPU, where looking would mean waiting, the loss of such a target is NaN.
    Source: Wijmans et al. 2024.
    """
    frozen = isinstance(weight, FrozenMatrix)
    library.check_floating(x=x, weight=weight.scale if frozen else weight)
    x, *others = library.in_autocast(x, *() if frozen else (weight,))
    weight = weight if frozen else others[0]
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets must be an int64 or int32 tensor, got {type(targets).__name__}")
    dtypes = x.dtype, x.dtype if frozen else weight.dtype, targets.dtype
    if dtypes[0] != dtypes[1] or targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            "x and weight must have one dtype and targets int64 or int32, got {}, {}, {}".format(
                *dtypes
            )
        )
    if targets.device != x.device:
        raise ValueError(f"targets are on {targets.device}, x on {x.device}: one device expected")
    if len(weight.shape) != 2 or x.shape[-1:] != weight.shape[1:] or targets.shape != x.shape[:-1]:
        raise ValueError(
            "x (..., D), weight (V, D) and targets (...) expected,"
            f" got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    recording, per_token = torch.is_grad_enabled(), reduction == "none"
    rows, want_x = library.as_rows(x), recording and x.requires_grad
    settings = targets.reshape(-1).long(), ignore_index, per_token, want_x
    if frozen:
        loss = ops.linear_cross_entropy_frozen(rows, *weight.tensors(), *settings)[0]
    else:
        want_weight = recording and weight.requires_grad and not per_token
        loss = ops.linear_cross_entropy(rows, weight, *settings, want_weight)[0]
    if per_token:
        return loss.reshape(targets.shape)
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
