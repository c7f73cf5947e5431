"""Matrix products between the kernels: PyTorch's, or on some CPUs the same by a faster way.

PyTorch asks MKL in fp32 and oneDNN in 16 bits. Two rules differ from that, on a CPU alone:

- fp32 on an AMD CPU comes from oneDNN, which PyTorch brings too: MKL uses no wide vectors there.
- 16-bit operands are copied to fp32 where the CPU has no instruction that multiplies them, and the
  result is rounded once. Otherwise multiplications are emulated, at a fifth of the fp32 rate at
  best; the copies cost a tenth of the product.

These functions have no derivative: they stand where a gradient is written out.
"""

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from llamapro_kernels import library

PIECE = 8192  # columns of a product that are copied, as fp32 or to where they belong, at a time
ROWS = 16  # fewer take as long as reading the other operand, which is shortest in 16 bits
ONEDNN = torch.backends.mkldnn.is_available()
MKL_IS_SLOW = ONEDNN and torch.backends.mkl.is_available() and "AuthenticAMD" in library.cpu_words()
FLAGS = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
EMULATED = {
    dtype
    for dtype, flag in FLAGS.items()
    if "sse2" in library.cpu_words() and flag not in library.cpu_words()  # known to be x86
}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) weight (N, K)^T + bias (N,) as (..., N), in their dtype."""
    if _is_pytorchs(x):
        return torch.nn.functional.linear(x, weight, bias)
    return _by_fp32(x, weight.T, bias)


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (..., K) b (K, N) as (..., N), in their dtype; with `out` (M, N) into it, from a (M, K)."""
    if _is_pytorchs(a):
        return a @ b if out is None else torch.mm(a, b, out=out)
    return _by_fp32(a, b, out=out)


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (M, N) += a (M, K) b (K, N): the total in fp32, and the sums where a device can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif _is_pytorchs(a):
        total += a @ b
    else:
        b = b.float()
        for at in range(0, len(a), PIECE):
            total[at : at + PIECE].addmm_(a[at : at + PIECE].float(), b)


def _is_pytorchs(a):
    """Whether a product with `a` on the left is left to PyTorch."""
    if a.device.type != "cpu" or not a.numel():
        return True
    if a.dtype == torch.float32:  # while compiling, PyTorch chooses among libraries itself
        return not MKL_IS_SLOW or torch.compiler.is_compiling()
    return a.dtype not in EMULATED or a.numel() < ROWS * a.shape[-1]


def _by_fp32(a, b, bias=None, out=None):
    """a b + bias in the dtype of a, by products in fp32."""
    if out is None and (a.dtype == torch.float32 or b.shape[1] <= PIECE):
        return _fp32_product(a.float(), b, bias).to(a.dtype)
    if out is None:
        out = a.new_empty((*a.shape[:-1], b.shape[1]))
    a = a.float()
    for at in range(0, b.shape[1], PIECE):
        columns = slice(at, at + PIECE)
        out[..., columns] = _fp32_product(a, b[:, columns], None if bias is None else bias[columns])
    return out


def _fp32_product(a, b, bias):
    weight, bias = b.float().T, None if bias is None else bias.float()
    if MKL_IS_SLOW and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(a, weight, bias, "none", [], "")
    return torch.nn.functional.linear(a, weight, bias)


def _flops(x, weight, *_, out_shape=None):
    return 2 * torch.Size(x).numel() * weight[0]


if ONEDNN and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
