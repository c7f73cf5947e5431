"""A linear layer whose weight is one matrix, or a tuple of the row pieces that it would consist of.
Each may be a `FrozenMatrix`, in 8 bits.

    y = [x w0^T, x w1^T, ...] + [b0, b1, ...],   dx = dy0 w0 + dy1 w1 + ...,   dwi = dyi^T x

The pieces are somebody else's parameters, such as a model's q, k and v: they are never copied. y
and dy are packed, (..., R) with R rows of all pieces; dyi are the columns of piece i. Pieces that
lie one after the other in memory are multiplied as the one matrix that they are; others one by one,
each into its columns of y. Under torch.compile, which cannot look at memory, always one by one.
"""

import torch

from llamapro_kernels import library
from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.matmul import linear, matmul
from llamapro_kernels.quantize import QuantizedRows

Matrix = torch.Tensor | FrozenMatrix
Weight = Matrix | tuple[Matrix, ...]
Operand = torch.Tensor | QuantizedRows
ops = library.ops


def project(
    x: Operand, weight: Weight, bias: Weight | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """y (M, R) of x (M, K), weight (R, K) and bias (R,), plus the residual (M, R)."""
    whole = joined(weight)
    if whole is not None:
        return _linear(x, whole, torch.cat(bias) if isinstance(bias, tuple) else bias, residual)
    biases = (None,) * len(weight) if bias is None else bias
    if isinstance(bias, torch.Tensor):
        biases = bias.split([len(w) for w in weight])
    pairs = list(zip(weight, biases, strict=True))
    if torch.compiler.is_compiling() or any(isinstance(w, FrozenMatrix) for w in weight):
        y = torch.cat([_linear(x, *pair) for pair in pairs], -1)
        return y if residual is None else residual + y
    y = x.new_empty((len(x), rows(weight)))
    for columns, (w, b) in zip(_columns(y, weight), pairs, strict=True):
        if b is None:
            matmul(x, w.T, out=columns)
        else:
            columns.copy_(linear(x, w, b))  # rounded once, with its bias
    return y if residual is None else residual + y


def _linear(x, weight, bias, residual=None):
    if not isinstance(weight, FrozenMatrix):
        return linear(x, weight, bias, residual)
    y = weight.linear(x)
    y = y if bias is None else y + bias
    return y if residual is None else residual + y


def input_gradient(dy: Operand, weight: Weight) -> torch.Tensor:
    """dx (..., K) of dy (..., R); of rows, (M, K)."""
    whole = joined(weight)
    if whole is not None:
        return _input_gradient(dy, whole)
    rows_of_dy = dy.flatten(0, -2)  # (M, R)
    first, *others = zip(_columns(rows_of_dy, weight), weight, strict=True)
    dx = _input_gradient(*first)
    for columns, w in others:
        if dx.is_cuda and not isinstance(w, FrozenMatrix):
            dx.addmm_(columns, w)
        else:
            dx += _input_gradient(columns, w)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def _input_gradient(dy, weight):
    if isinstance(weight, FrozenMatrix):
        return weight.input_gradient(dy)
    return matmul(dy, weight)


def normed_for(weight: Weight, x: torch.Tensor, norm: torch.Tensor, eps: float):
    """The norm of x (..., K) as a product with the weight reads it, (M, K), and its rstd."""
    if in_rows(weight) is None:
        normed, rstd = ops.rms_norm(x, norm, eps)
        return normed.flatten(0, -2), rstd
    *rows, rstd = ops.rms_norm_quantized(x, norm, eps)
    return QuantizedRows.flat(*rows, x.dtype), rstd


def add_normed_for(weight: Weight, x: torch.Tensor, residual, norm: torch.Tensor, eps: float):
    """The norm of x + residual likewise, the sum, and its rstd."""
    if in_rows(weight) is None:
        normed, total, rstd = ops.add_rms_norm(x, residual, norm, eps)
        return normed.flatten(0, -2), total, rstd
    *rows, total, rstd = ops.add_rms_norm_quantized(x, residual, norm, eps)
    return QuantizedRows.flat(*rows, total.dtype), total, rstd


def swiglu_for(weight: Weight, gate_up: torch.Tensor) -> Operand:
    """swiglu(gate_up) likewise."""
    if in_rows(weight) is None:
        return ops.swiglu(gate_up).flatten(0, -2)
    return QuantizedRows.flat(*ops.swiglu_quantized(gate_up), gate_up.dtype)


def in_rows(weight: Weight) -> FrozenMatrix | None:
    """The matrix whose products read rows in 8 bits, so that nobody reads 16; else None."""
    whole = joined(weight)
    return whole if isinstance(whole, FrozenMatrix) and whole.takes_rows else None


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, weight: Weight, wanted):
    """dw of dy (M, R) and x (M, K): of all pieces by one product, or of the wanted ones alone."""
    if not isinstance(weight, tuple):
        return matmul(dy.T, x)
    if all(wanted):
        return matmul(dy.T, x).split([len(w) for w in weight])
    pairs = zip(_columns(dy, weight), wanted, strict=True)
    return tuple(matmul(columns.T, x) if want else None for columns, want in pairs)


def bias_gradient(dy: torch.Tensor, bias: Weight, wanted):
    """db of dy (M, R)."""
    summed = dy.sum(0)
    if not isinstance(bias, tuple):
        return summed
    pieces = summed.split([len(b) for b in bias])
    return tuple(db if want else None for db, want in zip(pieces, wanted, strict=True))


def rows(weight: Weight) -> int:
    """R, of all pieces together."""
    return sum(map(len, weight)) if isinstance(weight, tuple) else len(weight)


def joined(weight: Weight) -> Matrix | None:
    """The matrix itself, or the one that pieces are when nothing lies between them; else None."""
    if not isinstance(weight, tuple):
        return weight
    if len(weight) == 1:
        return weight[0]
    if torch.compiler.is_compiling():
        return None
    if any(isinstance(piece, FrozenMatrix) for piece in weight):
        return None
    storage, at = weight[0].untyped_storage()._cdata, weight[0].storage_offset()
    for piece in weight:
        here = piece.untyped_storage()._cdata, piece.storage_offset()
        if here != (storage, at) or not piece.is_contiguous():
            return None
        at += piece.numel()
    width = weight[0].shape[1]
    return weight[0].as_strided((rows(weight), width), (width, 1))


def _columns(y, weight):
    """y (M, R) by pieces."""
    return y.split([len(w) for w in weight], -1)
