"""Matrix products between the kernels: PyTorch's, or on some CPUs the same by a faster way.

PyTorch asks MKL in fp32 and oneDNN in 16 bits. Three rules differ from that, on a CPU alone:

- fp32 on an AMD CPU comes from oneDNN, which PyTorch brings too: MKL uses no wide vectors there.
  A small product stays with MKL, which begins sooner.
- 16-bit operands are copied to fp32 where the CPU has no instruction that multiplies them, and the
  result is rounded once. Otherwise multiplications are emulated, at a fifth of the fp32 rate at
  best; the copies cost a tenth of the product.
- bf16 operands on a CPU with AMX are multiplied by csrc/matmul.cpp: oneDNN takes up to twice as
  long for some shapes, and is up to a fifth faster for others.

These functions have no derivative: they stand where a gradient is written out.
"""

import itertools

import torch

from llamapro_kernels import cpu
from llamapro_kernels.flops import register_flop_formula

TILED = {torch.bfloat16} if cpu.BUILD == "amx" else set()
ONEDNN_PAYS = 2**25  # multiplications: what has fewer MKL does as fast, and begins sooner
PIECE = 8192  # columns of a product that are copied to where they belong while in the cache
ADDED = 2**21  # numbers of a product that PyTorch rounds, copies to fp32 and adds at a time
COPIED = 1024  # rows, columns and depth of what is in fp32 at a time: 4 MB an operand
ROWS = 16  # fewer take as long as reading the other operand, which is shortest in 16 bits
ONEDNN = torch.backends.mkldnn.is_available()
MKL_IS_SLOW = ONEDNN and torch.backends.mkl.is_available() and "AuthenticAMD" in cpu.words()
FLAGS = {torch.bfloat16: "avx512_bf16", torch.float16: "avx512_fp16"}
EMULATED = {
    dtype
    for dtype, flag in FLAGS.items()
    if "sse2" in cpu.words() and flag not in cpu.words()  # known to be x86
}


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., K) weight (N, K)^T + bias (N,) + residual (..., N) as (..., N), in their dtype."""
    if bias is None and _is_tiled(x, weight.T):
        return _by_tiles(x, weight.T, residual=residual)
    emulated = _is_emulated(x, weight.T, bias)
    y = _by_fp32(x, weight.T, bias) if emulated else _linear(x, weight, bias)
    return y if residual is None else residual + y


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a (..., K) b (K, N) as (..., N), in their dtype; with `out` (M, N) into it, from a (M, K)."""
    if _is_emulated(a, b):
        return _by_fp32(a, b, out=out)
    if _is_tiled(a, b):
        return _by_tiles(a, b, out)
    if not _takes_onednn(a, b):
        return a @ b if out is None else torch.mm(a, b, out=out)
    if out is None:
        return _linear(a, b.T)
    for columns in pieces(b.shape[1], PIECE):
        out[:, columns] = _linear(a, b[:, columns].T)
    return out


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total (M, N) += a (M, K) b (K, N): the total in fp32, and the sums where a device can."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif _is_emulated(a, b):
        for rows, columns in itertools.product(pieces(a.shape[0]), pieces(b.shape[1])):
            _add_by_fp32(total[rows, columns], a[rows], b[:, columns])
    elif _is_tiled(a, b):
        cpu.ops.matmul(a, b, None, None, total)
    else:
        for rows in pieces(len(total), max(1, ADDED // max(1, b.shape[1]))):
            total[rows] += a[rows] @ b


def scaled_matmul(rows, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """rows (M, K) times the transposed scale (N, 1) * values (N, K), both in e4m3, as (M, N).

    In the dtype that the rows are for, but rounded to bf16: GPUs give no other. With the sums of
    tensor cores kept in fewer bits than fp32 has: their error is lost in that of e4m3.
    """
    y = torch._scaled_mm(
        rows.values, values.T, rows.scale, scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y.to(rows.dtype)


def _takes_onednn(a, b, bias=None):
    if not MKL_IS_SLOW or a.dtype != torch.float32:
        return False
    if a.numel() * b.shape[-1] < ONEDNN_PAYS or not _fits(a, b, bias):
        return False
    return not torch.compiler.is_compiling()  # which chooses libraries itself


def _is_emulated(a, b, bias=None):
    return a.dtype in EMULATED and _fits(a, b, bias) and _has_many_rows(a)


def _is_tiled(a, b):
    if a.dtype not in TILED or not _fits(a, b) or not _has_many_rows(a):
        return False
    return not torch.compiler.is_compiling()


def _has_many_rows(a):
    return a.numel() >= ROWS * a.shape[-1]


def _fits(a, b, bias=None):
    """On a CPU, and something to do. What does not fit is left to PyTorch, which says so."""
    if a.device.type != "cpu" or a.dtype != b.dtype or b.dim() != 2 or a.shape[-1:] != b.shape[:1]:
        return False
    if bias is not None and (bias.dtype != a.dtype or bias.shape != b.shape[1:]):
        return False
    return a.numel() > 0 and b.numel() > 0


def _linear(x, weight, bias=None):
    if _takes_onednn(x, weight.T, bias):
        bias = None if bias is None else bias.contiguous()  # oneDNN takes it to be
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def _by_tiles(a, b, out=None, residual=None):
    """a b + residual in bf16, summed in fp32 and rounded once."""
    if out is None:
        out = a.new_empty((*a.shape[:-1], b.shape[1]))
    residual = None if residual is None else residual.flatten(0, -2)
    cpu.ops.matmul(a.flatten(0, -2), b, residual, out.flatten(0, -2), None)
    return out


def _by_fp32(a, b, bias=None, out=None):
    """a b + bias in 16 bits, by products in fp32."""
    if out is None and torch.compiler.is_compiling():  # whole: pieces would tie the graph to sizes
        return _linear(a.float(), b.T.float(), None if bias is None else bias.float()).to(a.dtype)
    if out is None:
        out = a.new_empty((*a.shape[:-1], b.shape[1]))
    a, to = a.flatten(0, -2), out.flatten(0, -2)
    for rows, columns in itertools.product(pieces(a.shape[0]), pieces(b.shape[1])):
        added = None if bias is None else bias[columns].float()
        to[rows, columns] = _add_by_fp32(added, a[rows], b[:, columns])
    return out


def _add_by_fp32(total, a, b):
    """total + a b, in place unless the total is no matrix."""
    for depth in pieces(a.shape[1]):
        left, right = a[:, depth].float(), b[depth].float()
        if total is None or total.dim() == 1:
            total = _linear(left, right.T, total)
        elif _takes_onednn(left, right):
            total += _linear(left, right.T)
        else:
            torch.addmm(total, left, right, out=total)
    return total


def pieces(length: int, size: int | None = None) -> list[slice]:
    """0..length in slices of `size`."""
    size = size or COPIED
    return [slice(at, at + size) for at in range(0, length, size)]


def _linear_flops(x, weight, *_, out_shape=None):
    return 2 * torch.Size(x).numel() * weight[0]


def _matmul_flops(a, b, *_, out_shape=None):
    return 2 * a[0] * a[1] * b[1]


if ONEDNN:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise, _linear_flops)
if hasattr(cpu.ops, "matmul"):
    register_flop_formula(cpu.ops.matmul, _matmul_flops)
    torch.library.register_fake("llamapro_cpp::matmul", lambda a, b, residual, out, total: None)
