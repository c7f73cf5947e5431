"""RMSNorm, and RMSNorm of a sum that also returns the sum.

    rstd = 1 / sqrt(mean(x^2) + eps)          y = x * rstd * w
    dx = rstd * (w * dy - xhat * mean(w * dy * xhat))   with xhat = x * rstd
    dw = sum over rows of dy * xhat

x is (..., N), weight (N,), rstd (..., 1); any floating dtype, sums in fp32 (fp64 for fp64).
Saved for backward: x (the sum, for add_rms_norm), rstd, and weight; nothing when nothing wants a
gradient. Bytes moved at least: forward read x, write y; backward read dy
and x, write dx. add_rms_norm reads one tensor more and writes the sum; its backward adds the
sum's own gradient in the same pass.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

import torch

from llamapro_kernels import library


def rms_norm_reference(x, weight, eps):
    """Ground truth: y in x's dtype, and rstd."""
    xf = x.to(library.compute_dtype(x.dtype))
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * rstd * weight.to(xf.dtype)).to(x.dtype), rstd


def rms_norm_backward_reference(dy, x, weight, rstd, want_x, want_weight):
    dyf, xhat = dy.to(rstd.dtype), x.to(rstd.dtype) * rstd
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if want_weight:
        rows = (dyf * xhat).reshape(xhat.numel() // max(1, x.shape[-1]), x.shape[-1])
        dweight = rows.sum(0).to(dweight.dtype)
    if want_x:
        dxhat = dyf * weight.to(rstd.dtype)
        mean = (dxhat * xhat).mean(-1, keepdim=True)
        dx = (rstd * (dxhat - xhat * mean)).to(x.dtype)
    return dx, dweight


def add_rms_norm_reference(x, residual, weight, eps):
    """Ground truth: the normed sum, the sum as stored in x's dtype, and rstd of that sum."""
    total = x + residual
    y, rstd = rms_norm_reference(total, weight, eps)
    return y, total, rstd


def add_rms_norm_backward_reference(dy, dtotal, total, weight, rstd, want_total, want_weight):
    """`dy` or `dtotal` is None when nothing downstream used that output."""
    if dy is None:
        dweight = torch.zeros_like(weight) if want_weight else weight.new_empty(0)
        return dtotal.clone() if want_total else total.new_empty(0), dweight
    dx, dweight = rms_norm_backward_reference(dy, total, weight, rstd, want_total, want_weight)
    return dx + dtotal if want_total and dtotal is not None else dx, dweight


def _fake(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _rstd_like(x)


def _fake_backward(dy, x, weight, rstd, want_x, want_weight):
    return library.empty_if(want_x, x), library.empty_if(want_weight, weight)


def _fake_add(x, residual, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), _rstd_like(x)


def _fake_add_backward(dy, dtotal, total, weight, rstd, want_total, want_weight):
    return library.empty_if(want_total, total), library.empty_if(want_weight, weight)


def _rstd_like(x):
    return x.new_empty((*x.shape[:-1], 1), dtype=library.compute_dtype(x.dtype))


rms_norm_op = library.define(
    "rms_norm",
    forward="(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool want_x, bool want_weight)"
    " -> (Tensor dx, Tensor dweight)",
    fakes={"forward": _fake, "backward": _fake_backward},
)
rms_norm_op.register("reference", forward=rms_norm_reference, backward=rms_norm_backward_reference)
add_rms_norm_op = library.define(
    "add_rms_norm",
    forward="(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    backward="(Tensor? dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd,"
    " bool want_total, bool want_weight) -> (Tensor dx, Tensor dweight)",
    fakes={"forward": _fake_add, "backward": _fake_add_backward},
)
add_rms_norm_op.register(
    "reference", forward=add_rms_norm_reference, backward=add_rms_norm_backward_reference
)


def _setup_context(ctx, inputs, output):
    """For both ops: what is normed is the only input or the second output."""
    *_, weight, _ = inputs
    *_, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(inputs[0] if len(output) == 2 else output[1], weight, rstd)


def _backward(ctx, dy, _):
    want_x, want_weight, _ = ctx.needs_input_grad
    if dy is None:
        return None, None, None
    dx, dweight = torch.ops.llamapro.rms_norm_backward(dy, *ctx.saved_tensors, want_x, want_weight)
    return dx if want_x else None, dweight if want_weight else None, None


def _backward_add(ctx, dy, dtotal, _):
    want_x, want_residual, want_weight, _ = ctx.needs_input_grad
    want_total = want_x or want_residual
    if dy is None and dtotal is None:
        return None, None, None, None
    dx, dweight = torch.ops.llamapro.add_rms_norm_backward(
        dy, dtotal, *ctx.saved_tensors, want_total, want_weight
    )
    return (
        dx if want_x else None,
        dx if want_residual else None,
        dweight if want_weight else None,
        None,
    )


rms_norm_op.autograd(_backward, setup_context=_setup_context)
add_rms_norm_op.autograd(_backward_add, setup_context=_setup_context)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x: (..., N), weight: (N,), floating point; returns (..., N) in x's dtype.
    Raises TypeError for other dtypes, ValueError when the sizes do not match.
    Source: Zhang and Sennrich 2019.
    """
    _check(x, weight)
    return torch.ops.llamapro.rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, and the sum itself: ``(normed, x + residual)``.

    x, residual: (..., N), weight: (N,); both results are (..., N) in the dtype of x + residual
    (under autocast they differ). The sum is rounded to that dtype before it is normed, as the two
    steps apart would do. Raises TypeError for other dtypes, ValueError when the sizes differ.
    """
    _check(x, weight)
    library.check_floating(x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    y, total, _ = torch.ops.llamapro.add_rms_norm(x, residual, weight, eps)
    return y, total


def _check(x, weight):
    library.check_floating(x=x, weight=weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be (N,) for x (..., N), got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
