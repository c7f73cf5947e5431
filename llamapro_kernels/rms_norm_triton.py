"""The Triton kernels of `rms_norm.py`, whose docstring has the formulas, and their launchers.

Rows that fit in the registers of a program are read once, wider ones twice.
"""

from __future__ import annotations

import torch

from llamapro_kernels import gpu, library
from llamapro_kernels.gpu import tl, triton
from llamapro_kernels.quantize import E4M3, quantize_rows_forward, rounded, row_peak, row_scale

ONE_PASS_WIDTH = 16384  # a wider row does not fit in the registers of a program
ONE_PASS_WIDTH_DWEIGHT = 8192  # nor does one beside the sums for dweight
WIDE_TILE = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8}


@gpu.jit
def rms_norm_forward_kernel(
    x, residual, weight, y, y_scale, total, rstd, rows, width, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; ADD norms x + residual and stores that sum in total. With y_scale, y is in
    8 bits."""
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
    value = value * scale * w
    if y_scale is not None:
        value = value.to(x.dtype.element_ty).to(tl.float32)
        factor, inverse = row_scale(row_peak(value))
        tl.store(y_scale + row, factor, mask=row < rows)
        value = rounded(value * inverse)
    tl.store(y + row * width + column, value, mask=mask)
    tl.store(rstd + row, scale, mask=row < rows)


@gpu.jit
def rms_norm_forward_wide_kernel(
    x, residual, weight, y, y_scale, total, rstd, rows, width, eps,
    x_row, x_col, residual_row, residual_col, weight_col,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row (ROWS is 1) in two loops; the second finds most of it in the cache. No y_scale."""
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
    dy, dtotal, x, weight, rstd, dx, partial, columns, values, values_scale,
    rows, width, rows_per_program,
    dy_row, dy_col, dtotal_row, dtotal_col, x_row, x_col, weight_col,
    ADD: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """rows_per_program rows, ROWS whole ones at a time, STAGES - 1 of them loaded ahead.

    ADD adds dtotal to dx. WANT_WEIGHT stores these rows' part of dweight in partial[program]. With
    columns, dx * columns is stored in 8 bits, too.
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
            if columns is not None:
                grad = grad.to(dx.dtype.element_ty).to(tl.float32)
                grad *= _load(columns + column, column < width)
                factor, inverse = row_scale(row_peak(grad))
                tl.store(values_scale + row, factor, mask=row < last)
                tl.store(values + row * width + column, rounded(grad * inverse), mask=mask)
    if WANT_WEIGHT:
        partial += tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(partial, tl.sum(dweight, 0), mask=tl.arange(0, BLOCK) < width)


@gpu.jit
def rms_norm_backward_wide_kernel(
    dy, dtotal, x, weight, rstd, dx, partial, columns, values, values_scale,
    rows, width, rows_per_program,
    dy_row, dy_col, dtotal_row, dtotal_col, x_row, x_col, weight_col,
    ADD: tl.constexpr, WANT_X: tl.constexpr, WANT_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As above, one row at a time in two loops; dweight grows in partial[program] itself. No
    columns."""
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


def rms_norm_quantized(x, weight, eps):
    values, scale, _, rstd = add_rms_norm_quantized(x, None, weight, eps)
    return values, scale, rstd


def add_rms_norm_forward(x, residual, weight, eps):
    y, total, rstd = outputs_like(x, residual)
    _launch_forward(x, residual, weight, eps, y, None, total, rstd)
    return y, total, rstd


def add_rms_norm_quantized(x, residual, weight, eps):
    if x.shape[-1] > ONE_PASS_WIDTH:
        y, total, rstd = add_rms_norm_forward(x, residual, weight, eps)
        return *quantize_rows_forward(y, None), total, rstd
    y, total, rstd = outputs_like(x, residual)
    y, scale = y.new_empty(y.shape, dtype=E4M3), torch.empty_like(rstd)
    _launch_forward(x, residual, weight, eps, y, scale, total, rstd)
    return y, scale, total, rstd


def outputs_like(x, residual):
    """y, the sum where there is one, and rstd, uninitialised."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=library.compute_dtype(x.dtype))
    return y, torch.empty_like(y) if residual is not None else None, rstd


def _launch_forward(x, residual, weight, eps, y, y_scale, total, rstd):
    add = residual is not None
    x, residual = library.as_rows(x), library.as_rows(residual) if add else None
    kernel, tile = rms_norm_forward_kernel, gpu.row_tile(x)
    if x.shape[1] > ONE_PASS_WIDTH:
        kernel, tile = rms_norm_forward_wide_kernel, WIDE_TILE
    gpu.launch(
        kernel,
        (triton.cdiv(len(x), tile["ROWS"]),),
        *(x, residual, weight, y, y_scale, total, rstd, *x.shape, eps),
        *(*_strides(x), *_strides(residual), weight.stride(0)),
        ADD=add,
        **tile,
    )


def rms_norm_backward(dy, x, weight, rstd, dweight_dtype):
    return add_rms_norm_backward(dy, None, x, weight, rstd, dweight_dtype)


def add_rms_norm_backward(dy, dtotal, total, weight, rstd, dweight_dtype):
    return _launch_backward(dy, dtotal, total, weight, rstd, dweight_dtype, (None, None, None))


def add_rms_norm_backward_quantized(dy, dtotal, total, weight, rstd, columns):
    if total.shape[-1] > ONE_PASS_WIDTH:
        dx, _ = add_rms_norm_backward(dy, dtotal, total, weight, rstd, None)
        return dx, *quantize_rows_forward(dx, columns)
    values, scale = total.new_empty(total.shape, dtype=E4M3), torch.empty_like(rstd)
    dx, _ = _launch_backward(dy, dtotal, total, weight, rstd, None, (columns, values, scale))
    return dx, values, scale


def _launch_backward(dy, dtotal, total, weight, rstd, dweight_dtype, quantized):
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
        *(dy, dtotal, x, weight, rstd, dx, partial, *quantized, rows, width, share),
        *(*_strides(dy), *_strides(dtotal), *_strides(x), weight.stride(0) if want_x else 0),
        ADD=add,
        WANT_X=want_x,
        WANT_WEIGHT=want_weight,
        **tile,
    )
    return dx, _sum_of_rows(partial, dweight_dtype) if want_weight else x.new_empty(0)


def _strides(x):
    return (0, 0) if x is None else x.stride()


def _sum_of_rows(partial, dtype):
    """In one launch, and half of the time of PyTorch's sum and cast."""
    total = partial.new_empty(partial.shape[1], dtype=dtype)
    grid = (triton.cdiv(partial.shape[1], 32),)
    gpu.launch(
        sum_of_rows_kernel, grid, partial, total, *partial.shape, ROWS=64, BLOCK=32, num_warps=4
    )
    return total


def _backward_tile(x, want_weight):
    """With dweight a program has many rows, so the next ones are loaded ahead."""
    tile = gpu.row_tile(x, 4096 if want_weight else 2048)
    return {**tile, "STAGES": 3 if want_weight else 1}
