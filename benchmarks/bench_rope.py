import pytest
import torch
from compare import DEVICE

import llamapro_kernels as lk


@pytest.mark.parametrize("length, heads, kv_heads, dim", [(2048, 9, 3, 64), (4096, 32, 8, 128)])
def test_rope(compare, length, heads, kv_heads, dim):
    """Forward and backward of q and k together."""
    q = torch.randn(1, length, heads, dim, device=DEVICE, requires_grad=True)
    k = torch.randn(1, length, kv_heads, dim, device=DEVICE, requires_grad=True)
    angles = torch.rand(length, dim // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
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
    )
