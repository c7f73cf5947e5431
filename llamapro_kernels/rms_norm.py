"""RMSNorm, and RMSNorm of a sum that also returns the sum.

    rstd = 1 / sqrt(mean(x^2) + eps)          y = x * rstd * w
    dx = rstd * (w * dy - xhat * mean(w * dy * xhat))   with xhat = x * rstd
    dw = sum over rows of dy * xhat

x is (..., N), weight (N,), rstd (..., 1); any floating dtype, sums in fp32 (fp64 for fp64).
Saved for backward: x (the sum, for add_rms_norm), rstd, and weight; nothing when nothing wants a
gradient. Bytes moved at least: forward read x, write y; backward read dy
and x, write dx. add_rms_norm reads one tensor more and writes the sum; its backward adds the
sum's own gradient in the same pass. For a product in 8 bits (`frozen.py`), y is written as its rows
alone, and dx besides as those of the next product; what is rounded is y, or dx, in x's dtype.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch

from llamapro_kernels import cpu, library
from llamapro_kernels import rms_norm_triton as kernels
from llamapro_kernels.quantize import (
    fake_rows,
    gradient_then_quantized,
    quantize_rows_forward_cpp,
    quantize_rows_reference,
    then_quantized,
)
from llamapro_kernels.rms_norm_triton import outputs_like


def rms_norm_reference(x, weight, eps):
    """Ground truth: y in x's dtype, and rstd."""
    xf = x.to(library.compute_dtype(x.dtype))
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * rstd * weight.to(xf.dtype)).to(x.dtype), rstd


def rms_norm_backward_reference(dy, x, weight, rstd, dweight_dtype):
    """`weight` is None when dx is not wanted, `dweight_dtype` when dweight is not."""
    dyf, xhat = dy.to(rstd.dtype), x.to(rstd.dtype) * rstd
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if dweight_dtype is not None:
        dweight = library.as_rows(dyf * xhat).sum(0).to(dweight_dtype)
    if weight is not None:
        dxhat = dyf * weight.to(rstd.dtype)
        mean = (dxhat * xhat).mean(-1, keepdim=True)
        dx = (rstd * (dxhat - xhat * mean)).to(x.dtype)
    return dx, dweight


def add_rms_norm_reference(x, residual, weight, eps):
    """Ground truth: the normed sum, the sum as stored in x's dtype, and rstd of that sum."""
    total = x + residual
    y, rstd = rms_norm_reference(total, weight, eps)
    return y, total, rstd


def add_rms_norm_backward_reference(dy, dtotal, total, weight, rstd, dweight_dtype):
    """`dtotal` is None when nothing downstream used the sum."""
    dx, dweight = rms_norm_backward_reference(dy, total, weight, rstd, dweight_dtype)
    return dx if weight is None or dtotal is None else dx + dtotal, dweight


def rms_norm_forward_cpp(x, weight, eps):
    y, _, rstd = add_rms_norm_forward_cpp(x, None, weight, eps)
    return y, rstd


def add_rms_norm_forward_cpp(x, residual, weight, eps):
    y, total, rstd = outputs_like(x, residual)
    x, residual, *outputs = (
        None if t is None else library.as_rows(t) for t in (x, residual, y, total)
    )
    cpu.ops.rms_norm_forward(x, residual, library.contiguous_fp32(weight), eps, *outputs, rstd)
    return y, total, rstd


def rms_norm_backward_cpp(dy, x, weight, rstd, dweight_dtype):
    return add_rms_norm_backward_cpp(dy, None, x, weight, rstd, dweight_dtype)


def add_rms_norm_backward_cpp(dy, dtotal, total, weight, rstd, dweight_dtype):
    want_x, want_weight = weight is not None, dweight_dtype is not None
    dx, partial = library.empty_if(want_x, total), None
    dtotal = library.as_rows(dtotal) if want_x and dtotal is not None else None
    dy, x = library.as_rows(dy), library.as_rows(total)
    if want_weight:
        partial = x.new_empty((torch.get_num_threads(), x.shape[1]), dtype=torch.float32)
    cpu.ops.rms_norm_backward(
        *(dy, dtotal, x, library.contiguous_fp32(weight), rstd),
        *(library.as_rows(dx) if want_x else None, partial),
    )
    return dx, partial.sum(0).to(dweight_dtype) if want_weight else x.new_empty(0)


def _fake(x, weight, eps):
    y, _, rstd = outputs_like(x, None)
    return y, rstd


def _fake_backward(dy, x, weight, rstd, dweight_dtype):
    width = 0 if dweight_dtype is None else x.shape[-1]
    return library.empty_if(weight is not None, x), x.new_empty(width, dtype=dweight_dtype)


def _fake_add(x, residual, weight, eps):
    return outputs_like(x, residual)


def _fake_add_backward(dy, dtotal, total, weight, rstd, dweight_dtype):
    return _fake_backward(dy, total, weight, rstd, dweight_dtype)


def _dx_alone(backward):
    """Of a backward that also knows the gradient of the weight."""
    return lambda *args: backward(*args, None)[0]


def _check(x, weight, eps):
    _check_weight(x, weight)
    library.check_eps(eps)


def _check_add(x, residual, weight, eps):
    _check(x, weight, eps)
    library.expect(x.shape, x, residual=residual)


def _check_backward(dy, x, weight, rstd, dweight_dtype):
    _check_add_backward(dy, None, x, weight, rstd, dweight_dtype)


def _check_add_backward(dy, dtotal, total, weight, rstd, dweight_dtype):
    library.expect(total.shape, total, dy=dy, dtotal=dtotal)
    dtype = library.compute_dtype(total.dtype)
    library.expect((*total.shape[:-1], 1), total, dtype, rstd=rstd)
    if weight is not None:
        _check_weight(total, weight)


def _check_add_backward_quantized(dy, dtotal, total, weight, rstd, columns):
    _check_add_backward(dy, dtotal, total, weight, rstd, None)
    library.expect(total.shape[-1:], total, torch.float32, columns=columns)


def _check_weight(x, weight):
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be (N,) for x (..., N), got {tuple(weight.shape)} for {tuple(x.shape)}"
        )
    library.expect(weight.shape, x, weight.dtype, weight=weight)


rms_norm_op = library.define(
    "rms_norm",
    forward="(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    backward="(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, ScalarType? dweight_dtype)"
    " -> (Tensor dx, Tensor dweight)",
    quantized="(Tensor x, Tensor weight, float eps) -> (Tensor values, Tensor scale, Tensor rstd)",
    fakes={
        "forward": _fake,
        "backward": _fake_backward,
        "quantized": then_quantized(_fake, fake_rows),
    },
    checks={"forward": _check, "backward": _check_backward, "quantized": _check},
)
rms_norm_op.register(
    "reference",
    forward=rms_norm_reference,
    backward=rms_norm_backward_reference,
    quantized=then_quantized(rms_norm_reference, quantize_rows_reference),
)
rms_norm_op.register(
    "triton",
    forward=kernels.rms_norm_forward,
    backward=kernels.rms_norm_backward,
    quantized=kernels.rms_norm_quantized,
)
rms_norm_op.register(
    "cpp",
    forward=rms_norm_forward_cpp,
    backward=rms_norm_backward_cpp,
    quantized=then_quantized(rms_norm_forward_cpp, quantize_rows_forward_cpp),
)
add_rms_norm_op = library.define(
    "add_rms_norm",
    forward="(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    backward="(Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor rstd,"
    " ScalarType? dweight_dtype) -> (Tensor dx, Tensor dweight)",
    quantized="(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor values, Tensor scale, Tensor total, Tensor rstd)",
    backward_quantized="(Tensor dy, Tensor? dtotal, Tensor total, Tensor weight, Tensor rstd,"
    " Tensor columns) -> (Tensor dx, Tensor values, Tensor scale)",
    fakes={
        "forward": _fake_add,
        "backward": _fake_add_backward,
        "quantized": then_quantized(_fake_add, fake_rows),
        "backward_quantized": gradient_then_quantized(_dx_alone(_fake_add_backward), fake_rows),
    },
    checks={
        "forward": _check_add,
        "backward": _check_add_backward,
        "quantized": _check_add,
        "backward_quantized": _check_add_backward_quantized,
    },
)
add_rms_norm_op.register(
    "reference",
    forward=add_rms_norm_reference,
    backward=add_rms_norm_backward_reference,
    quantized=then_quantized(add_rms_norm_reference, quantize_rows_reference),
    backward_quantized=gradient_then_quantized(
        _dx_alone(add_rms_norm_backward_reference), quantize_rows_reference
    ),
)
add_rms_norm_op.register(
    "triton",
    forward=kernels.add_rms_norm_forward,
    backward=kernels.add_rms_norm_backward,
    quantized=kernels.add_rms_norm_quantized,
    backward_quantized=kernels.add_rms_norm_backward_quantized,
)
add_rms_norm_op.register(
    "cpp",
    forward=add_rms_norm_forward_cpp,
    backward=add_rms_norm_backward_cpp,
    quantized=then_quantized(add_rms_norm_forward_cpp, quantize_rows_forward_cpp),
    backward_quantized=gradient_then_quantized(
        _dx_alone(add_rms_norm_backward_cpp), quantize_rows_forward_cpp
    ),
)


def _setup_context(ctx, inputs, output):
    """For both ops: what is normed is the only input or the second output."""
    *_, weight, _ = inputs
    *_, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    if any(ctx.needs_input_grad):
        *want_inputs, want_weight, _ = ctx.needs_input_grad[: len(inputs)]
        ctx.dweight_dtype = weight.dtype if want_weight else None
        normed = inputs[0] if len(output) == 2 else output[1]
        ctx.save_for_backward(normed, weight if any(want_inputs) else None, rstd)


def _backward(ctx, dy, _):
    if dy is None:
        return None, None, None
    dx, dweight = torch.ops.llamapro.rms_norm_backward(dy, *ctx.saved_tensors, ctx.dweight_dtype)
    want_x, want_weight, _ = ctx.needs_input_grad
    return dx if want_x else None, dweight if want_weight else None, None


def _backward_add(ctx, dy, dtotal, _):
    want_x, want_residual, want_weight, _ = ctx.needs_input_grad
    if dy is None:  # only the sum was used
        return dtotal if want_x else None, dtotal if want_residual else None, None, None
    dx, dweight = torch.ops.llamapro.add_rms_norm_backward(
        dy, dtotal, *ctx.saved_tensors, ctx.dweight_dtype
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
    Raises TypeError for other dtypes, ValueError when the sizes do not match or eps is negative.
    Source: Zhang and Sennrich 2019.
    """
    library.check_floating(x=x, weight=weight)
    _check(x, weight, eps)
    return torch.ops.llamapro.rms_norm(library.recordable(x), weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual, and the sum itself: ``(normed, x + residual)``.

    x, residual: (..., N), weight: (N,); both results are (..., N) in the dtype of x + residual
    (under autocast they differ). The sum is rounded to that dtype before it is normed, as the two
    steps apart would do. Raises TypeError for other dtypes, ValueError when the sizes differ.
    """
    library.check_floating(x=x, residual=residual, weight=weight)
    _check(x, weight, eps)
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    dtype = torch.promote_types(x.dtype, residual.dtype)
    x, residual = x.to(dtype), residual.to(dtype)
    y, total, _ = torch.ops.llamapro.add_rms_norm(x, residual, weight, eps)
    return y, total
