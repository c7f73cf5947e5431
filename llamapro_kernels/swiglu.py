"""SwiGLU on a packed gate and up projection.

    y = silu(g) * u,  silu(g) = g * s,  s = 1 / (1 + exp(-g))
    dg = dy * u * s * (1 + g * (1 - s)),  du = dy * silu(g)

gate_up is (..., 2I) with the gate first, y (..., I); any floating dtype, arithmetic in fp32 (fp64
for fp64). Saved for backward: gate_up; silu is computed again, which is cheaper than keeping it.
Bytes moved at least: forward read 2I, write I; backward read 3I, write 2I. For a product in 8 bits
(`frozen.py`), y and dgate_up are written as rows in 8 bits alone, of what they are in gate_up's
dtype.

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import torch

from llamapro_kernels import cpu, gpu, library
from llamapro_kernels.gpu import tl, triton
from llamapro_kernels.quantize import (
    ONE_PASS_WIDTH,
    fake_rows,
    gradient_then_quantized,
    quantize_rows_forward,
    quantize_rows_forward_cpp,
    quantize_rows_reference,
    rounded,
    row_peak,
    row_scale,
    then_quantized,
)

WIDE_TILE = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8}


def swiglu_reference(gate_up):
    """Ground truth: silu(gate) * up in gate_up's dtype."""
    gate, up = gate_up.to(library.compute_dtype(gate_up.dtype)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_reference(dy, gate_up):
    gate, up = gate_up.to(library.compute_dtype(gate_up.dtype)).chunk(2, -1)
    dyf, sigmoid = dy.to(gate.dtype), torch.sigmoid(gate)
    dgate = dyf * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, dyf * gate * sigmoid), -1).to(gate_up.dtype)


@gpu.jit
def swiglu_forward_kernel(
    gate_up, y, rows, width, gate_up_row, gate_up_col, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, mask = _tile_indices(rows, width, ROWS, BLOCK)
    gate_up += row * gate_up_row
    g = tl.load(gate_up + column * gate_up_col, mask=mask, other=0).to(tl.float32)
    u = tl.load(gate_up + (column + width) * gate_up_col, mask=mask, other=0).to(tl.float32)
    tl.store(y + row * width + column, g * tl.sigmoid(g) * u, mask=mask)


@gpu.jit
def swiglu_backward_kernel(
    dy, gate_up, dgate_up, rows, width, dy_row, dy_col, gate_up_row, gate_up_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, mask = _tile_indices(rows, width, ROWS, BLOCK)
    gate_up += row * gate_up_row
    g = tl.load(gate_up + column * gate_up_col, mask=mask, other=0).to(tl.float32)
    u = tl.load(gate_up + (column + width) * gate_up_col, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy + row * dy_row + column * dy_col, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dgate = dgate_up + row * 2 * width + column
    tl.store(dgate, dy * u * sigmoid * (1 + g * (1 - sigmoid)), mask=mask)
    tl.store(dgate + width, dy * g * sigmoid, mask=mask)


@gpu.jit
def swiglu_quantized_kernel(
    gate_up, values, scale, rows, width, gate_up_row, gate_up_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of y, rounded to gate_up's dtype, then to 8 bits."""
    row, column, mask = _tile_indices(rows, width, ROWS, BLOCK)
    gate_up += row * gate_up_row
    g = tl.load(gate_up + column * gate_up_col, mask=mask, other=0).to(tl.float32)
    u = tl.load(gate_up + (column + width) * gate_up_col, mask=mask, other=0).to(tl.float32)
    y = (g * tl.sigmoid(g) * u).to(gate_up.dtype.element_ty).to(tl.float32)
    factor, inverse = row_scale(row_peak(y))
    tl.store(scale + row, factor, mask=row < rows)
    tl.store(values + row * width + column, rounded(y * inverse), mask=mask)


@gpu.jit
def swiglu_backward_quantized_kernel(
    dy, gate_up, columns, values, scale, rows, width, dy_row, dy_col, gate_up_row, gate_up_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of dgate_up * columns, likewise, in two loops: a wide row's three inputs and
    two outputs are more than there are registers. The second loop finds them in the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dy += row * dy_row
    gate_up += row * gate_up_row
    values += row * 2 * width
    peak = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        mask = (row < rows) & (column < width)
        dgate, dup = _scaled_gradients(
            dy, gate_up, columns, column, width, mask, dy_col, gate_up_col
        )
        peak = tl.maximum(peak, tl.maximum(row_peak(dgate), row_peak(dup)))
    factor, inverse = row_scale(peak)
    tl.store(scale + row, factor, mask=row < rows)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :].to(tl.int64)
        mask = (row < rows) & (column < width)
        dgate, dup = _scaled_gradients(
            dy, gate_up, columns, column, width, mask, dy_col, gate_up_col
        )
        tl.store(values + column, rounded(dgate * inverse), mask=mask)
        tl.store(values + width + column, rounded(dup * inverse), mask=mask)


@gpu.jit
def _scaled_gradients(dy, gate_up, columns, column, width, mask, dy_col, gate_up_col):
    """Both gradients, rounded to gate_up's dtype, times their columns."""
    g = tl.load(gate_up + column * gate_up_col, mask=mask, other=0).to(tl.float32)
    u = tl.load(gate_up + (column + width) * gate_up_col, mask=mask, other=0).to(tl.float32)
    dy = tl.load(dy + column * dy_col, mask=mask, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    dgate = (dy * u * sigmoid * (1 + g * (1 - sigmoid))).to(gate_up.dtype.element_ty)
    dup = (dy * g * sigmoid).to(gate_up.dtype.element_ty)
    gate_scale = tl.load(columns + column, mask=column < width, other=0)
    up_scale = tl.load(columns + width + column, mask=column < width, other=0)
    return dgate.to(tl.float32) * gate_scale, dup.to(tl.float32) * up_scale


@gpu.jit
def _tile_indices(rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Neighbouring programs lie in one row. The grid has one axis, for only it is long enough."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < width)


def swiglu_forward(gate_up):
    y = _fake(gate_up)
    gate_up = library.as_rows(gate_up)
    grid, tile = _tiling(gate_up, y.shape[-1])
    arguments = (gate_up, y, len(gate_up), y.shape[-1], *gate_up.stride())
    gpu.launch(swiglu_forward_kernel, grid, *arguments, **tile)
    return y


def swiglu_backward(dy, gate_up):
    dgate_up = _fake_backward(dy, gate_up)
    dy, gate_up = library.as_rows(dy), library.as_rows(gate_up)
    grid, tile = _tiling(gate_up, dy.shape[1])
    arguments = (dy, gate_up, dgate_up, *dy.shape, *dy.stride(), *gate_up.stride())
    gpu.launch(swiglu_backward_kernel, grid, *arguments, **tile)
    return dgate_up


def swiglu_quantized(gate_up):
    if gate_up.shape[-1] // 2 > ONE_PASS_WIDTH:
        return quantize_rows_forward(swiglu_forward(gate_up), None)
    values, scale = fake_rows(_fake(gate_up), None)
    gate_up = library.as_rows(gate_up)
    tile = gpu.row_tile(library.as_rows(values))
    gpu.launch(
        swiglu_quantized_kernel,
        (triton.cdiv(len(gate_up), tile["ROWS"]),),
        *(gate_up, values, scale, len(gate_up), values.shape[-1], *gate_up.stride()),
        **tile,
    )
    return values, scale


def swiglu_backward_quantized(dy, gate_up, columns):
    values, scale = fake_rows(gate_up, columns)
    dy, gate_up = library.as_rows(dy), library.as_rows(gate_up)
    tile = gpu.row_tile(dy) if dy.shape[1] <= WIDE_TILE["BLOCK"] else WIDE_TILE
    gpu.launch(
        swiglu_backward_quantized_kernel,
        (triton.cdiv(len(dy), tile["ROWS"]),),
        *(dy, gate_up, columns, values, scale, *dy.shape, *dy.stride(), *gate_up.stride()),
        **tile,
    )
    return values, scale


def swiglu_forward_cpp(gate_up):
    y = _fake(gate_up)
    cpu.ops.swiglu_forward(library.as_rows(gate_up), library.as_rows(y))
    return y


def swiglu_backward_cpp(dy, gate_up):
    dgate_up = _fake_backward(dy, gate_up)
    cpu.ops.swiglu_backward(*map(library.as_rows, (dy, gate_up, dgate_up)))
    return dgate_up


def _tiling(gate_up, width):
    block = max(1, min(1024, triton.next_power_of_2(width)))
    rows = 1024 // block
    tile = {"ROWS": rows, "BLOCK": block, "num_warps": gpu.warps_for(1024, gate_up.device)}
    return (triton.cdiv(len(gate_up), rows) * triton.cdiv(width, block),), tile


def _fake(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_backward(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _check(gate_up):
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be (..., 2I), got {tuple(gate_up.shape)}")


def _check_backward(dy, gate_up):
    _check(gate_up)
    library.expect((*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up, dy=dy)


def _check_backward_quantized(dy, gate_up, columns):
    _check_backward(dy, gate_up)
    library.expect(gate_up.shape[-1:], gate_up, torch.float32, columns=columns)


def _rows_alone(backward, quantize):
    """Nobody reads the gradient in 16 bits."""
    call = gradient_then_quantized(backward, quantize)
    return lambda *args: call(*args)[1:]


swiglu_op = library.define(
    "swiglu",
    forward="(Tensor gate_up) -> Tensor",
    backward="(Tensor dy, Tensor gate_up) -> Tensor",
    quantized="(Tensor gate_up) -> (Tensor values, Tensor scale)",
    backward_quantized="(Tensor dy, Tensor gate_up, Tensor columns)"
    " -> (Tensor values, Tensor scale)",
    fakes={
        "forward": _fake,
        "backward": _fake_backward,
        "quantized": then_quantized(_fake, fake_rows),
        "backward_quantized": _rows_alone(_fake_backward, fake_rows),
    },
    checks={
        "forward": _check,
        "backward": _check_backward,
        "quantized": _check,
        "backward_quantized": _check_backward_quantized,
    },
)
swiglu_op.register(
    "reference",
    forward=swiglu_reference,
    backward=swiglu_backward_reference,
    quantized=then_quantized(swiglu_reference, quantize_rows_reference),
    backward_quantized=_rows_alone(swiglu_backward_reference, quantize_rows_reference),
)
swiglu_op.register(
    "triton",
    forward=swiglu_forward,
    backward=swiglu_backward,
    quantized=swiglu_quantized,
    backward_quantized=swiglu_backward_quantized,
)
swiglu_op.register(
    "cpp",
    forward=swiglu_forward_cpp,
    backward=swiglu_backward_cpp,
    quantized=then_quantized(swiglu_forward_cpp, quantize_rows_forward_cpp),
    backward_quantized=_rows_alone(swiglu_backward_cpp, quantize_rows_forward_cpp),
)


def _setup_context(ctx, inputs, output):
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return torch.ops.llamapro.swiglu_backward(dy, *ctx.saved_tensors)


swiglu_op.autograd(_backward, setup_context=_setup_context)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up = [gate, up] packed along the last dimension.

    gate_up: (..., 2I) floating point; returns (..., I) in the same dtype.
    Raises TypeError for other dtypes, ValueError for an odd last dimension.
    Source: Shazeer 2020.
    """
    library.check_floating(gate_up=gate_up)
    _check(gate_up)
    return torch.ops.llamapro.swiglu(gate_up)
