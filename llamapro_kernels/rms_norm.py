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

from __future__ import annotations

import torch

from llamapro_kernels import cpu, gpu, library
from llamapro_kernels.gpu import tl, triton

ONE_PASS_WIDTH = 16384  # a wider row does not fit in the registers of a program
ONE_PASS_WIDTH_DWEIGHT = 8192  # nor does one beside the sums for dweight
WIDE_TILE = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8}


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


@gpu.jit
def rms_norm_forward_kernel(
    x, residual, weight, y, total, rstd, rows, width, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; ADD norms x + residual and stores that sum in total."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    mask = (row < rows) & (column < width)
    value = _load(x + row * x_row + column * x_col, mask)
    if ADD:
        value += _load(residual + row * residual_row + column * residual_col, mask)
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + row * width + column, value, mask=mask)
    scale = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / width + eps)
    w = _load(weight + column * weight_col, column < width)
    tl.store(y + row * width + column, value * scale * w, mask=mask)
    tl.store(rstd + row, scale, mask=row < rows)


@gpu.jit
def rms_norm_forward_wide_kernel(
    x, residual, weight, y, total, rstd, rows, width, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row (ROWS is 1) in two loops; the second finds most of it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        value = _load(x + row * x_row + column * x_col, column < width)
        if ADD:
            value += _load(residual + row * residual_row + column * residual_col, column < width)
            value = value.to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + row * width + column, value, mask=column < width)
        squares += value * value
    scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    for start in range(0, width, BLOCK):
        column = (start + tl.arange(0, BLOCK)).to(tl.int64)
        value = _load(x + row * x_row + column * x_col, column < width)
        if ADD:
            value += _load(residual + row * residual_row + column * residual_col, column < width)
            value = value.to(total.dtype.element_ty).to(tl.float32)
        w = _load(weight + column * weight_col, column < width)
        tl.store(y + row * width + column, value * scale * w, mask=column < width)
    tl.store(rstd + row, scale)


@gpu.jit
def rms_norm_backward_kernel(
    dy, dtotal, x, weight, rstd, dx, partial, rows, width, rows_per_program,
    dy_row, dy_col, dtotal_row, dtotal_col, x_row, x_col, weight_col,
    ADD: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """rows_per_program rows, ROWS whole ones at a time, STAGES - 1 of them loaded ahead.

    ADD adds dtotal to dx. WANT_WEIGHT stores these rows' part of dweight in partial[program].
    """
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for top in tl.range(first, last, ROWS, num_stages=STAGES):
        row = (top + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < last) & (column < width)
        scale = tl.load(rstd + row, mask=row < last, other=0)
        xhat = _load(x + row * x_row + column * x_col, mask) * scale
        g = _load(dy + row * dy_row + column * dy_col, mask)
        if WANT_WEIGHT:
            dweight += g * xhat
        if WANT_X:  # the weight is read again for each row: registers are scarcer than cache
            g *= _load(weight + column * weight_col, column < width)
            mean = tl.sum(g * xhat, 1, keep_dims=True) / width
            grad = scale * (g - xhat * mean)
            if ADD:
                grad += _load(dtotal + row * dtotal_row + column * dtotal_col, mask)
            tl.store(dx + row * width + column, grad, mask=mask)
    if WANT_WEIGHT:
        partial += tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK) < width)


@gpu.jit
def rms_norm_backward_wide_kernel(
    dy, dtotal, x, weight, rstd, dx, partial, rows, width, rows_per_program,
    dy_row, dy_col, dtotal_row, dtotal_col, x_row, x_col, weight_col,
    ADD: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As above, one row at a time in two loops; dweight grows in partial[program] itself."""
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for top in range(first, last):
        row = tl.full([], top, tl.int64)
        scale = tl.load(rstd + row)
        dots = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = (start + tl.arange(0, BLOCK)).to(tl.int64)
            xhat = _load(x + row * x_row + column * x_col, column < width) * scale
            g = _load(dy + row * dy_row + column * dy_col, column < width)
            if WANT_X:
                dots += g * xhat * _load(weight + column * weight_col, column < width)
            if WANT_WEIGHT:
                share = partial + tl.program_id(0).to(tl.int64) * width + column
                written = tl.where(row > first, width, 0)
                before = tl.load(share, mask=column < written, other=0)
                tl.store(share, before + g * xhat, mask=column < width)
        if WANT_X:
            mean = tl.sum(dots, 0) / width
            for start in range(0, width, BLOCK):
                column = (start + tl.arange(0, BLOCK)).to(tl.int64)
                xhat = _load(x + row * x_row + column * x_col, column < width) * scale
                g = _load(dy + row * dy_row + column * dy_col, column < width)
                g *= _load(weight + column * weight_col, column < width)
                grad = scale * (g - xhat * mean)
                if ADD:
                    at = dtotal + row * dtotal_row + column * dtotal_col
                    grad += _load(at, column < width)
                tl.store(dx + row * width + column, grad, mask=column < width)
        tl.debug_barrier()  # the next row reads the share that this one wrote


@gpu.jit
def sum_of_rows_kernel(x, total, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of all rows of x, fp32, in the dtype of total."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    share = tl.zeros([ROWS, BLOCK], tl.float32)
    for top in range(0, rows, ROWS):
        row = top + tl.arange(0, ROWS)[:, None]
        at = x + row.to(tl.int64) * width + column
        share += tl.load(at, mask=(row < rows) & (column < width), other=0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(total + column, tl.sum(share, 0), mask=column < width)


@gpu.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0).to(tl.float32)


def rms_norm_forward(x, weight, eps):
    y, _, rstd = add_rms_norm_forward(x, None, weight, eps)
    return y, rstd


def add_rms_norm_forward(x, residual, weight, eps):
    y, total, rstd = _fake_add(x, residual, weight, eps)
    add = residual is not None
    x, residual = library.as_rows(x), library.as_rows(residual) if add else None
    kernel, tile = rms_norm_forward_kernel, _tile(x)
    if x.shape[1] > ONE_PASS_WIDTH:
        kernel, tile = rms_norm_forward_wide_kernel, WIDE_TILE
    gpu.launch(
        kernel,
        (triton.cdiv(len(x), tile["ROWS"]),),
        *(x, residual, weight, y, total, rstd, *x.shape, eps),
        *(*_strides(x), *_strides(residual), weight.stride(0)),
        ADD=add,
        **tile,
    )
    return y, total, rstd


def rms_norm_backward(dy, x, weight, rstd, dweight_dtype):
    return add_rms_norm_backward(dy, None, x, weight, rstd, dweight_dtype)


def add_rms_norm_backward(dy, dtotal, total, weight, rstd, dweight_dtype):
    want_x, want_weight = weight is not None, dweight_dtype is not None
    dx = library.empty_if(want_x, total)
    add = want_x and dtotal is not None
    dy, x, dtotal = (library.as_rows(t) for t in (dy, total, dtotal if add else dy))
    rows, width = x.shape
    kernel, tile = rms_norm_backward_kernel, _backward_tile(x, want_weight)
    if width > (ONE_PASS_WIDTH_DWEIGHT if want_weight else ONE_PASS_WIDTH):
        kernel, tile = rms_norm_backward_wide_kernel, WIDE_TILE
    share, partial = tile["ROWS"], None
    if want_weight:  # a few programs a processor, so that partial stays small
        share = max(share, triton.cdiv(rows, 2 * gpu.processors(x.device)))
        partial = x.new_empty((triton.cdiv(rows, share), width), dtype=torch.float32)
    gpu.launch(
        kernel,
        (triton.cdiv(rows, share),),
        *(dy, dtotal, x, weight, rstd, dx, partial, rows, width, share),
        *(*_strides(dy), *_strides(dtotal), *_strides(x), weight.stride(0) if want_x else 0),
        ADD=add,
        WANT_X=want_x,
        WANT_WEIGHT=want_weight,
        **tile,
    )
    return dx, _sum_of_rows(partial, dweight_dtype) if want_weight else x.new_empty(0)


def _sum_of_rows(partial, dtype):
    """In one launch, and half of the time of PyTorch's sum and cast."""
    total = partial.new_empty(partial.shape[1], dtype=dtype)
    grid = (triton.cdiv(partial.shape[1], 32),)
    gpu.launch(
        sum_of_rows_kernel, grid, partial, total, *partial.shape, ROWS=64, BLOCK=32, num_warps=4
    )
    return total


def _tile(x, elements=2048):
    """Whole rows, several where they are shorter than so many elements."""
    block = max(1, triton.next_power_of_2(x.shape[1]))
    rows = max(1, elements // block)
    most_warps = 8 if block <= 8192 else 16
    warps = min(most_warps, gpu.warps_for(rows * block, x.device))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def _backward_tile(x, want_weight):
    """With dweight a program has many rows, so the next ones are loaded ahead."""
    return {**_tile(x, 4096), "STAGES": 3} if want_weight else {**_tile(x), "STAGES": 1}


def rms_norm_forward_cpp(x, weight, eps):
    y, _, rstd = add_rms_norm_forward_cpp(x, None, weight, eps)
    return y, rstd


def add_rms_norm_forward_cpp(x, residual, weight, eps):
    y, total, rstd = _fake_add(x, residual, weight, eps)
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


def _strides(x):
    return (0, 0) if x is None else x.stride()


def _fake(x, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format), _rstd_like(x)


def _fake_backward(dy, x, weight, rstd, dweight_dtype):
    width = 0 if dweight_dtype is None else x.shape[-1]
    return library.empty_if(weight is not None, x), x.new_empty(width, dtype=dweight_dtype)


def _fake_add(x, residual, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y) if residual is not None else None, _rstd_like(x)


def _fake_add_backward(dy, dtotal, total, weight, rstd, dweight_dtype):
    return _fake_backward(dy, total, weight, rstd, dweight_dtype)


def _rstd_like(x):
    return x.new_empty((*x.shape[:-1], 1), dtype=library.compute_dtype(x.dtype))


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
    fakes={"forward": _fake, "backward": _fake_backward},
    checks={"forward": _check, "backward": _check_backward},
)
rms_norm_op.register("reference", forward=rms_norm_reference, backward=rms_norm_backward_reference)
rms_norm_op.register("triton", forward=rms_norm_forward, backward=rms_norm_backward)
rms_norm_op.register("cpp", forward=rms_norm_forward_cpp, backward=rms_norm_backward_cpp)
add_rms_norm_op = library.define(
    "add_rms_norm",
    forward="(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
    backward="(Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, Tensor rstd,"
    " ScalarType? dweight_dtype) -> (Tensor dx, Tensor dweight)",
    fakes={"forward": _fake_add, "backward": _fake_add_backward},
    checks={"forward": _check_add, "backward": _check_add_backward},
)
add_rms_norm_op.register(
    "reference", forward=add_rms_norm_reference, backward=add_rms_norm_backward_reference
)
add_rms_norm_op.register("triton", forward=add_rms_norm_forward, backward=add_rms_norm_backward)
add_rms_norm_op.register(
    "cpp", forward=add_rms_norm_forward_cpp, backward=add_rms_norm_backward_cpp
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
