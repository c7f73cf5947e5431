"""Matrices that never change, in 8 bits, and products with them in both directions.

    w = scale * values            values (R, K) e4m3, scale (R, 1) a power of two, fp32
    y = x w^T = (x_s x_v) values^T scale^T              x_s x_v: the rows of x in 8 bits
    dx = dy w = (d_s d_v) values                        d_s d_v: those of dy * scale^T

One set of numbers serves both directions: the scales of w's rows run along the sum of dx, so they
go into dy before it is rounded. dx is the gradient of y in these values, without another rounding
of w. A GPU multiplies 8 bits with both operands' sums along memory, so dx reads the matrix
transposed: kept beside the other ("fast": the bytes of 16 bits), or made anew each time
(`compact`: half of that).

GPUs from sm_90 on multiply in 8 bits, see `scaled_matmul`. Others, and matrices whose sizes are
no multiples of 16, multiply x in its own dtype by a copy of one matrix in it. A CPU multiplies what
a GPU would, rounded to the same 8 bits, in x's dtype.

Source: rows scaled alone as in torchao's float8 training; what is frozen is rounded once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from llamapro_kernels import library
from llamapro_kernels.matmul import linear, matmul, scaled_matmul
from llamapro_kernels.quantize import QuantizedRows, dequantize

ALIGNED = 16  # what the sizes of an 8-bit product must be multiples of


@dataclass(frozen=True, eq=False)
class FrozenMatrix:
    """A matrix (R, K) in 8 bits; `quantize` makes it. There is no gradient of it."""

    values: torch.Tensor  # (R, K) e4m3
    scale: torch.Tensor  # (R, 1) fp32
    transposed: torch.Tensor | None  # (K, R) e4m3, where it is kept
    requires_grad = False

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: torch.Tensor, compact: bool = False) -> FrozenMatrix:
        """Round a frozen weight (R, K), of any floating dtype, to 8 bits.

        compact: keep one layout. Where 8 bits are not multiplied, no other would be read.
        Raises TypeError for what is no floating tensor, ValueError for another shape, for a weight
        that wants a gradient, and for numbers that are not finite.
        """
        library.check_floating(weight=weight)
        if weight.dim() != 2 or not weight.numel():
            raise ValueError(f"a weight (R, K) expected, got {tuple(weight.shape)}")
        if weight.requires_grad:
            raise ValueError("a frozen weight expected, got one that wants a gradient")
        values, scale = torch.ops.llamapro.quantize_rows(weight, None)
        if not weight.is_meta and not scale.isfinite().all():
            raise ValueError("finite numbers expected in a weight, got others")
        both = not compact and _is_multiplied(weight.shape, weight.device)
        return cls(values, scale, values.T.contiguous() if both else None)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def __len__(self) -> int:
        return self.shape[0]

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.values, self.scale, self.transposed

    @property
    def takes_rows(self) -> bool:
        """Whether products round their other operand to 8 bits, too."""
        return self.values.device.type == "cpu" or self._is_multiplied

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix as it is computed with, (R, K): exact in every dtype but fp16."""
        return dequantize(self.values, self.scale, dtype)

    def linear(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """y (..., R) of x (..., K); of rows, (M, R)."""
        if not self.takes_rows:
            return linear(x, self.dequantize(x.dtype))
        rows = x if isinstance(x, QuantizedRows) else QuantizedRows.of(x)
        if self._is_multiplied:
            y = scaled_matmul(rows, self.values, self.scale)
        else:
            y = linear(rows.dequantize(), self.dequantize(rows.dtype))
        return _shaped_as(x, y)

    def input_gradient(self, dy: torch.Tensor | QuantizedRows) -> torch.Tensor:
        """dx (..., K) of dy (..., R); of rows, which are those of dy * columns, (M, K)."""
        if not self.takes_rows:
            return matmul(dy, self.dequantize(dy.dtype))
        rows = dy if isinstance(dy, QuantizedRows) else QuantizedRows.of(dy, self.columns)
        if self._is_multiplied:
            across = self.values.T.contiguous() if self.transposed is None else self.transposed
            dx = scaled_matmul(rows, across, self.scale.new_ones((len(across), 1)))
        else:
            dx = matmul(rows.dequantize(), dequantize(self.values, None, rows.dtype))
        return _shaped_as(dy, dx)

    @property
    def columns(self) -> torch.Tensor:
        """What dy is multiplied by before it is rounded, (R,)."""
        return self.scale[:, 0]

    @property
    def _is_multiplied(self) -> bool:
        return _is_multiplied(self.shape, self.values.device)

    def holds(self, weight: torch.Tensor) -> bool:
        """Whether this is, bit for bit, what `quantize` makes of the weight."""
        fresh = FrozenMatrix.quantize(weight.to(self.values.device), compact=True)
        same = torch.equal(fresh.values.view(torch.uint8), self.values.view(torch.uint8))
        return same and torch.equal(fresh.scale, self.scale)

    def split(self, sizes: list[int]) -> list[FrozenMatrix]:
        """Matrices of so many rows each, which share this one's memory."""
        across = [None] * len(sizes)
        if self.transposed is not None:
            across = self.transposed.split(sizes, 1)
        pieces = self.values.split(sizes), self.scale.split(sizes), across
        return [FrozenMatrix(*parts) for parts in zip(*pieces, strict=True)]

    def to(self, device) -> FrozenMatrix:
        """This matrix on another device."""
        return FrozenMatrix(*(None if t is None else t.to(device) for t in self.tensors()))


def _shaped_as(x, y):
    return y if isinstance(x, QuantizedRows) else y.view(*x.shape[:-1], y.shape[-1])


def _is_multiplied(shape: torch.Size, device: torch.device) -> bool:
    return has_units(device) and not any(size % ALIGNED for size in shape)


@functools.cache
def has_units(device: torch.device) -> bool:
    """Whether this device multiplies e4m3 by `torch._scaled_mm`, a scale for each row."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
