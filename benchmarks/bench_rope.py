import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


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

    def peer(q, k):
        return plain.rope(q, k, cos, sin)

    compare(
        step(lambda q, k: lk.rope(q, k, cos, sin)),
        {"plain": step(peer), "compiled": step(torch.compile(peer))},
        bytes=4 * (q.nbytes + k.nbytes),
        dtype=dtype,
    )
