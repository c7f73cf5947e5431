"""A linear layer whose weight is one matrix, or a tuple of the row pieces that it would consist of.

    y = [x w0^T, x w1^T, ...] + [b0, b1, ...],   dx = dy0 w0 + dy1 w1 + ...,   dwi = dyi^T x

The pieces are somebody else's parameters, such as a model's q, k and v: they are never copied. y
and dy are packed, (..., R) with R rows of all pieces; dyi are the columns of piece i. Pieces that
lie one after the other in memory are multiplied as the one matrix that they are; others one by one,
each into its columns of y. Under torch.compile, which cannot look at memory, always one by one.
"""

import torch

from llamapro_kernels.matmul import linear, matmul

Weight = torch.Tensor | tuple[torch.Tensor, ...]


def project(x: torch.Tensor, weight: Weight, bias: Weight | None = None) -> torch.Tensor:
    """y (M, R) of x (M, K), weight (R, K) and bias (R,)."""
    whole = joined(weight)
    if whole is not None:
        return linear(x, whole, torch.cat(bias) if isinstance(bias, tuple) else bias)
    biases = (None,) * len(weight) if bias is None else bias
    if torch.compiler.is_compiling():
        return torch.cat([linear(x, *both) for both in zip(weight, biases, strict=True)], -1)
    y = x.new_empty((len(x), rows(weight)))
    for columns, w, b in zip(_columns(y, weight), weight, biases, strict=True):
        if b is None:
            matmul(x, w.T, out=columns)
        else:
            columns.copy_(linear(x, w, b))  # rounded once, with its bias
    return y


def input_gradient(dy: torch.Tensor, weight: Weight) -> torch.Tensor:
    """dx (..., K) of dy (..., R)."""
    whole = joined(weight)
    if whole is not None:
        return matmul(dy, whole)
    rows_of_dy = dy.flatten(0, -2)  # (M, R)
    first, *others = zip(_columns(rows_of_dy, weight), weight, strict=True)
    dx = matmul(*first)
    for columns, w in others:
        if dx.is_cuda:
            dx.addmm_(columns, w)
        else:
            dx += matmul(columns, w)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


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


def joined(weight: Weight) -> torch.Tensor | None:
    """The matrix itself, or the one that pieces are when nothing lies between them; else None."""
    if not isinstance(weight, tuple):
        return weight
    if len(weight) == 1:
        return weight[0]
    if torch.compiler.is_compiling():
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
