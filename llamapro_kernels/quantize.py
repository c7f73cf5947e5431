"""Rows of a matrix in 8 bits: e4m3, with a power of two for each row.

    scale_i = 2^e, the smallest with |x_ij| <= 448 scale_i        values = round(x / scale)

x is (..., K), values (..., K) float8_e4m3fn, scale (..., 1) fp32. `columns`, (K,) fp32, multiplies
x first: the scales of the other operand's rows, which run along the sum of the product that these
rows are for. A power of two costs no precision, since 8-bit floats are as fine under every scale,
and makes values * scale exact in bf16: a product of such rows has the same terms in 8 bits, in 16
and in 32. In a row with a number that is not finite, all is NaN. Bytes moved at least: read x,
write values.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; powers of two as in the
Open Compute Project's microscaling formats (Rouhani et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from llamapro_kernels import cpu, gpu, library
from llamapro_kernels.gpu import tl, triton

E4M3 = torch.float8_e4m3fn
ONE_PASS_WIDTH = 16384  # a wider row does not fit in the registers of a program
BY_BITS = tl.constexpr(gpu.INTERPRETED) if triton else None
WIDE_TILE = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8, "ONE_PASS": False}


class QuantizedRows(NamedTuple):
    """An operand of a product: values * scale, of which results are in `dtype`."""

    values: torch.Tensor  # (M, K) e4m3
    scale: torch.Tensor  # (M, 1) fp32
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor, columns: torch.Tensor | None = None) -> QuantizedRows:
        """Those of x (..., K), as one matrix."""
        return cls.flat(*torch.ops.llamapro.quantize_rows(x, columns), x.dtype)

    @classmethod
    def flat(cls, values, scale, dtype: torch.dtype) -> QuantizedRows:
        """Those of values (..., K) and their scales, as one matrix."""
        return cls(library.as_rows(values), library.as_rows(scale), dtype)

    def dequantize(self) -> torch.Tensor:
        """values * scale, exact but in fp16."""
        return dequantize(self.values, self.scale, self.dtype)


def quantize_rows_reference(x, columns):
    """Ground truth, computed in fp32."""
    x = x.float() if columns is None else x.float() * columns
    peak = x.abs().amax(-1, keepdim=True)
    # The exponent's bits: 448 is 1.75 * 2^8, and any larger fraction needs one power more.
    exponent = ((peak.view(torch.int32) + 0x1FFFFF >> 23) - 8).clamp(1)
    scale, inverse = ((bits << 23).view(torch.float32) for bits in (exponent, 254 - exponent))
    scale = scale.masked_fill(~peak.isfinite(), torch.nan)
    return (x * inverse).to(E4M3), scale


def dequantize_rows_reference(values, scale, dtype):
    """`scale` is None for 1."""
    return values.to(dtype) if scale is None else (values.float() * scale).to(dtype)


@gpu.jit
def row_peak(value):
    """The largest size in each row; infinity, too, where something is no number."""
    return tl.max(tl.where(value == value, tl.abs(value), float("inf")), 1, keep_dims=True)


@gpu.jit
def row_scale(peak):
    """The scale of rows whose largest size is `peak`, and 1 / scale."""
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) + 0x1FFFFF >> 23) - 8, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = (254 - exponent << 23).to(tl.float32, bitcast=True)
    return tl.where(peak < float("inf"), scale, float("nan")), inverse


@gpu.jit
def rounded(value):
    """e4m3 of numbers of at most 448, to nearest even: by its bits in the interpreter, whose own
    conversion is wrong."""
    if BY_BITS:
        bits = value.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = (size + 0x7FFFF + (size >> 20 & 1) >> 20) - (120 << 3)
        subnormal = size.to(tl.float32, bitcast=True) + 16384.0  # whose last bit is worth 2^-9
        subnormal = subnormal.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0x3C800000, subnormal, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code) | (bits >> 24 & 0x80)
        value = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        value = value.to(tl.float8e4nv)
    return value


@gpu.jit
def quantize_rows_kernel(
    x, columns, values, scale, rows, width, x_row, x_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_PASS: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, or one in two loops, of which the second finds most in the cache."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    peak = tl.zeros([ROWS, 1], tl.float32)
    if ONE_PASS:
        value = _load(x, columns, row, column, rows, width, x_row, x_col)
        peak = row_peak(value)
    else:
        for start in range(0, width, BLOCK):
            value = _load(x, columns, row, start + column, rows, width, x_row, x_col)
            peak = tl.maximum(peak, row_peak(value))
    factor, inverse = row_scale(peak)
    tl.store(scale + row, factor, mask=row < rows)
    if ONE_PASS:
        mask = (row < rows) & (column < width)
        tl.store(values + row * width + column, rounded(value * inverse), mask=mask)
    else:
        for start in range(0, width, BLOCK):
            value = _load(x, columns, row, start + column, rows, width, x_row, x_col)
            mask = (row < rows) & (start + column < width)
            at = values + row * width + start + column
            tl.store(at, rounded(value * inverse), mask=mask)


@gpu.jit
def _load(x, columns, row, column, rows, width, x_row, x_col):
    mask = (row < rows) & (column < width)
    value = tl.load(x + row * x_row + column * x_col, mask=mask, other=0).to(tl.float32)
    if columns is not None:
        value *= tl.load(columns + column, mask=column < width, other=0)
    return value


def quantize_rows_forward(x, columns):
    values, scale = fake_rows(x, columns)
    x = library.as_rows(x)
    tile = {**gpu.row_tile(x), "ONE_PASS": True} if x.shape[1] <= ONE_PASS_WIDTH else WIDE_TILE
    gpu.launch(
        quantize_rows_kernel,
        (triton.cdiv(len(x), tile["ROWS"]),),
        *(x, columns, values, scale, *x.shape, *x.stride()),
        **tile,
    )
    return values, scale


def quantize_rows_forward_cpp(x, columns):
    values, scale = fake_rows(x, columns)
    as_bytes = library.as_rows(values).view(torch.uint8)
    cpu.ops.quantize_rows(library.as_rows(x), columns, as_bytes, scale)
    return values, scale


def dequantize_rows_cpp(values, scale, dtype):
    if dtype == torch.float64:
        return dequantize_rows_reference(values, scale, dtype)
    y = _fake_inverse(values, scale, dtype)
    as_bytes = library.as_rows(values.contiguous()).view(torch.uint8)
    cpu.ops.dequantize_rows(as_bytes, scale, library.as_rows(y))
    return y


def fake_rows(x, columns):
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=E4M3), scale


def _fake_inverse(values, scale, dtype):
    return values.new_empty(values.shape, dtype=dtype)


def _check(x, columns):
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in library.FLOATING:
        raise ValueError(f"x (..., K) of floats, K >= 1, expected, got {tuple(x.shape)}, {x.dtype}")
    library.expect(x.shape[-1:], x, torch.float32, columns=columns)
    if columns is not None and not columns.is_contiguous():
        raise ValueError(f"contiguous columns expected, got strides {columns.stride()}")


def _check_inverse(values, scale, dtype):
    if values.dim() == 0 or values.dtype != E4M3 or dtype not in library.FLOATING:
        raise ValueError(
            f"values (..., K) in {E4M3} and a floating dtype expected,"
            f" got {tuple(values.shape)}, {values.dtype} and {dtype}"
        )
    library.expect((*values.shape[:-1], 1), values, torch.float32, scale=scale)


quantize_rows_op = library.define(
    "quantize_rows",
    forward="(Tensor x, Tensor? columns) -> (Tensor values, Tensor scale)",
    inverse="(Tensor values, Tensor? scale, ScalarType dtype) -> Tensor",
    fakes={"forward": fake_rows, "inverse": _fake_inverse},
    checks={"forward": _check, "inverse": _check_inverse},
)
quantize_rows_op.register(
    "reference", forward=quantize_rows_reference, inverse=dequantize_rows_reference
)
# Where 8 bits are multiplied nothing is dequantized: that is PyTorch's to do.
quantize_rows_op.register(
    "triton", forward=quantize_rows_forward, inverse=dequantize_rows_reference
)
quantize_rows_op.register("cpp", forward=quantize_rows_forward_cpp, inverse=dequantize_rows_cpp)


def then_quantized(forward, quantize):
    """The function that has the first output of `forward` in 8 bits, in two steps."""

    def call(*args):
        outputs = forward(*args)
        y, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        return *quantize(y, None), *others

    return call


def gradient_then_quantized(backward, quantize):
    """The function of one argument more, columns, that has the gradient that `backward` gives, and
    the gradient times columns in 8 bits, in two steps."""

    def call(*args):
        *args, columns = args
        dx = backward(*args)
        return dx, *quantize(dx, columns)

    return call


def dequantize(
    values: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """values * scale in dtype; None for a scale of 1."""
    return torch.ops.llamapro.quantize_rows_inverse(values, scale, dtype)
