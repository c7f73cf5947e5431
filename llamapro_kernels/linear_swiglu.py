"""SwiGLU of a linear layer: the first half of a Llama MLP without its (tokens, 2I) projection.

    [g, u] = x w^T,  y = silu(g) * u
    backward: [g, u] again, then swiglu's backward, dx = d[g, u] w, dw = d[g, u]^T x

x is (..., N), weight (2I, N) with the gate's rows first, y (..., I); any floating dtype, sums in
fp32 (fp64 for fp64). The product and the activation are one kernel, so the projection never goes
to memory forward; it is computed again backward. Saved for backward: x and weight. Bytes moved at
least: x, weight and y once each; 4 N I FLOPs a token forward, and again 4 N I for each of the
projection, dx and dw backward.

`swiglu(linear(x, weight))` saves the projection instead and computes it once: it is what
`decoder_block` does.

Source: Shazeer 2020, "GLU Variants Improve Transformer"; the tiled product with grouped programs is
that of Tillet et al. 2019, "Triton".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llamapro_kernels import gpu, library
from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.gpu import TensorDescriptor, tl, triton
from llamapro_kernels.matmul import linear, matmul
from llamapro_kernels.swiglu import swiglu_forward_cpp, swiglu_reference


@dataclass(frozen=True)
class Tile:
    """A tile's tokens, columns of y and summed dimension, and how a program is launched."""

    block_m: int
    block_i: int
    block_n: int
    num_warps: int
    num_stages: int


TILES = {
    # Also where there are no descriptors, or no row here.
    "sm_80": Tile(block_m=128, block_i=64, block_n=32, num_warps=8, num_stages=3),
    "sm_90": Tile(block_m=128, block_i=128, block_n=64, num_warps=8, num_stages=4),
    "sm_100": Tile(block_m=128, block_i=128, block_n=64, num_warps=8, num_stages=4),
    "gfx942": Tile(block_m=128, block_i=64, block_n=32, num_warps=4, num_stages=2),
    "fp32": Tile(block_m=32, block_i=32, block_n=16, num_warps=4, num_stages=1),
    "interpreter": Tile(block_m=16, block_i=16, block_n=16, num_warps=4, num_stages=1),
}


def linear_swiglu_reference(x, weight):
    """Ground truth: silu(gate) * up of the projection, rounded as a linear layer would."""
    return swiglu_reference(torch.nn.functional.linear(x, weight))


@gpu.jit
def linear_swiglu_kernel(
    x, weight, y, x_strides, weight_strides, tokens, width, summed,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of y: two products that share x, and the activation of their sums."""
    first, column = _grouped_tile(tokens, width, BLOCK_M, BLOCK_I)
    gate = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_I], tl.float32)
    for at in range(0, summed, BLOCK_N):
        left = _tile(x, x_strides, first, at, tokens, summed, BLOCK_M, BLOCK_N, TMA)
        w = _tile(weight, weight_strides, column, at, width, summed, BLOCK_I, BLOCK_N, TMA)
        gate = tl.dot(left, w.T, gate, input_precision="ieee")
        w = _tile(
            weight, weight_strides, width + column, at, 2 * width, summed, BLOCK_I, BLOCK_N, TMA
        )
        up = tl.dot(left, w.T, up, input_precision="ieee")
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)[:, None]
    column += tl.arange(0, BLOCK_I)[None, :]
    mask = (row < tokens) & (column < width)
    tl.store(y + row * width + column, gate * tl.sigmoid(gate) * up, mask=mask)


@gpu.jit
def _grouped_tile(tokens, width, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr):
    """First token and column. Eight tiles one below the other share their weights in the cache."""
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(width, BLOCK_I)
    index = tl.program_id(0)
    group = index // (8 * across)
    rows = tl.minimum(down - 8 * group, 8)
    inside = index % (8 * across)
    return (8 * group + inside % rows) * BLOCK_M, inside // rows * BLOCK_I


@gpu.jit
def _tile(
    matrix, strides, first, at, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """matrix[first : first + ROWS, at : at + COLUMNS], with zeros beyond rows and columns."""
    if TMA:
        tile = matrix.load([first, at])
    else:
        row = first.to(tl.int64) + tl.arange(0, ROWS)[:, None]
        column = at + tl.arange(0, COLUMNS)[None, :].to(tl.int64)
        pointers = matrix + row * strides[0] + column * strides[1]
        tile = tl.load(pointers, mask=(row < rows) & (column < columns), other=0)
    return tile


def linear_swiglu_forward(x, weight):
    y = _fake(x, weight)
    x = library.as_rows(x)
    tokens, (width, summed) = len(x), (weight.shape[0] // 2, weight.shape[1])
    chip = gpu.architecture(x.device)
    tma = chip in ("sm_90", "sm_100") and x.dtype != torch.float32
    tma = tma and all(map(gpu.describable, (x, weight)))
    if chip != "interpreter" and not tma:
        chip = "fp32" if x.dtype == torch.float32 else {"gfx942": chip}.get(chip, "sm_80")
    tile = TILES[chip]
    operands = x, weight
    if tma:
        operands = (
            TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_n]),
            TensorDescriptor.from_tensor(weight, [tile.block_i, tile.block_n]),
        )
    gpu.launch(
        linear_swiglu_kernel,
        (triton.cdiv(tokens, tile.block_m) * triton.cdiv(width, tile.block_i),),
        *(*operands, y, x.stride(), weight.stride(), tokens, width, summed),
        TMA=tma,
        BLOCK_M=tile.block_m,
        BLOCK_I=tile.block_i,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y


def linear_swiglu_forward_cpp(x, weight):
    return swiglu_forward_cpp(linear(x, weight))


def linear_swiglu_backward(dy, x, weight, want_x, want_weight):
    """For every backend: the products are the library's, what lies between them is `swiglu`'s."""
    dgate_up = torch.ops.llamapro.swiglu_backward(dy, linear(x, weight))
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if want_x:
        dx = matmul(dgate_up, weight)
    if want_weight:
        dweight = matmul(library.as_rows(dgate_up).T, library.as_rows(x))
    return dx, dweight


def _fake(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _fake_backward(dy, x, weight, want_x, want_weight):
    return library.empty_if(want_x, x), library.empty_if(want_weight, weight)


def _flops(x, weight, *, out_shape=None):
    return 2 * weight[0] * math.prod(x)


def _flops_backward(dy, x, weight, want_x, want_weight, *, out_shape=None):
    return _flops(x, weight) * (1 + want_x + want_weight)


def _check_shapes(x, weight):
    fits = x.dim() > 0 and len(weight.shape) == 2 and weight.shape[1:] == x.shape[-1:]
    if not fits or weight.shape[0] % 2:
        raise ValueError(
            f"x (..., N) and weight (2I, N) expected, got {tuple(x.shape)}, {tuple(weight.shape)}"
        )


def _check(x, weight):
    _check_shapes(x, weight)
    library.expect(weight.shape, x, weight=weight)


def _check_backward(dy, x, weight, want_x, want_weight):
    _check(x, weight)
    library.expect((*x.shape[:-1], weight.shape[0] // 2), x, dy=dy)


linear_swiglu_op = library.define(
    "linear_swiglu",
    forward="(Tensor x, Tensor weight) -> Tensor",
    backward="(Tensor dy, Tensor x, Tensor weight, bool want_x, bool want_weight)"
    " -> (Tensor dx, Tensor dweight)",
    fakes={"forward": _fake, "backward": _fake_backward},
    checks={"forward": _check, "backward": _check_backward},
    flops={"forward": _flops, "backward": _flops_backward},
)
linear_swiglu_op.register(
    "reference", forward=linear_swiglu_reference, backward=linear_swiglu_backward
)
linear_swiglu_op.register("triton", forward=linear_swiglu_forward, backward=linear_swiglu_backward)
linear_swiglu_op.register("cpp", forward=linear_swiglu_forward_cpp, backward=linear_swiglu_backward)


def _setup_context(ctx, inputs, output):
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    want_x, want_weight = ctx.needs_input_grad
    dx, dweight = torch.ops.llamapro.linear_swiglu_backward(
        dy, *ctx.saved_tensors, want_x, want_weight
    )
    return dx if want_x else None, dweight if want_weight else None


linear_swiglu_op.autograd(_backward, setup_context=_setup_context)


class _OverFrozen(torch.autograd.Function):
    """With a weight in 8 bits, whose product is not fused with the activation."""

    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.save_for_backward(x, *tensors)
        with library.without_autocast(x.device.type):
            return torch.ops.llamapro.swiglu(FrozenMatrix(*tensors).linear(x))

    @staticmethod
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        weight = FrozenMatrix(*tensors)
        with library.without_autocast(x.device.type):
            dgate_up = torch.ops.llamapro.swiglu_backward(dy, weight.linear(x))
            return weight.input_gradient(dgate_up), None, None, None


def linear_swiglu(x: torch.Tensor, weight: torch.Tensor | FrozenMatrix) -> torch.Tensor:
    """swiglu(x @ weight.T), without keeping the product.

    x: (..., N), weight: (2I, N) of one floating dtype, or a `FrozenMatrix`, in 8 bits, the gate's
    rows first; returns (..., I).
    Under autocast it runs, and returns, in autocast's dtype. Raises TypeError for dtypes,
    ValueError for shapes that do not match. Source: Shazeer 2020.
    """
    if isinstance(weight, FrozenMatrix):
        library.check_floating(x=x, weight=weight.scale)
        _check_shapes(x, weight)
        return _OverFrozen.apply(*library.in_autocast(x), *weight.tensors())
    library.check_floating(x=x, weight=weight)
    x, weight = library.in_autocast(x, weight)
    if x.dtype != weight.dtype:
        raise TypeError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    _check(x, weight)
    return torch.ops.llamapro.linear_swiglu(x, weight)
