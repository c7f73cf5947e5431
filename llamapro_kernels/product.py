"""Matrix products between the kernels: PyTorch's, or oneDNN's where that is the faster library.

For fp32 on a CPU PyTorch asks MKL, which does not use the wide vectors of AMD's CPUs. There
the same product comes from oneDNN, which PyTorch brings too and asks in bf16 anyway. These
functions have no derivative: they stand where a gradient is written out.
"""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from llamapro_kernels import library

PIECE = 8192  # columns of a product that are copied to where they belong while in the cache
ONEDNN = torch.backends.mkldnn.is_available()
MKL_IS_SLOW = ONEDNN and torch.backends.mkl.is_available() and "AuthenticAMD" in library.cpu_words()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) weight (N, K)^T + bias (N,) as (..., N), in their dtype."""
    if _takes_onednn(x):
        return _onednn(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (..., K) b (K, N) as (..., N), in their dtype; with `out` (M, N) into it, from a (M, K)."""
    if not _takes_onednn(a):
        return a @ b if out is None else torch.mm(a, b, out=out)
    if out is None:
        return _onednn(a, b.T)
    for at in range(0, b.shape[1], PIECE):
        out[:, at : at + PIECE] = _onednn(a, b[:, at : at + PIECE].T)
    return out


def _takes_onednn(x):
    if not MKL_IS_SLOW or x.dtype != torch.float32 or x.device.type != "cpu" or not x.numel():
        return False
    return not torch.compiler.is_compiling()  # which chooses libraries itself


def _onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _flops(x, weight, *_, out_shape=None):
    return 2 * torch.Size(x).numel() * weight[0]


if ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
