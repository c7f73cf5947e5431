import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length, heads, kv_heads, dim", [(2048, 9, 3, 64), (4096, 32, 8, 128)])
def test_rope(compare, length, heads, kv_heads, dim, dtype):
    """Forward and backward of q and k together."""
    shapes = (1, length, heads, dim), (1, length, kv_heads, dim)
    q, k = (torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in shapes)
    angles = torch.rand(length, dim // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    grads = [torch.randn_like(q), torch.randn_like(k)]

    def step(function):
        return lambda: torch.autograd.grad(function(q, k), [q, k], grads)

    def plain(q, k):
        def rotate(x):
            x1, x2 = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]

        return rotate(q), rotate(k)

    compare(
        step(lambda q, k: lk.rope(q, k, cos, sin)),
        {"plain": step(plain), "compiled": step(torch.compile(plain))},
        bytes=4 * (q.nbytes + k.nbytes),
        dtype=dtype,
    )
