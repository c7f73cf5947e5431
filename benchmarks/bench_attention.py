import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, length, heads, kv_heads, dim",
    [(2, 512, 9, 3, 64), (1, 2048, 9, 3, 64), (2, 512, 8, 2, 128), (1, 2048, 8, 2, 128)],
)
def test_attention(compare, batch, length, heads, kv_heads, dim, dtype):
    """Causal, forward and backward."""
    shapes = (batch, length, heads, dim), *[(batch, length, kv_heads, dim)] * 2
    q, k, v = (torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in shapes)
    do = torch.randn_like(q)

    def step(function):
        return lambda: torch.autograd.grad(function(q, k, v), [q, k, v], do)

    compare(
        step(lk.flash_attention),
        {"sdpa": step(plain.sdpa)},
        flops=7 * batch * heads * length**2 * dim,  # half of 4 forward and of 10 backward
        dtype=dtype,
    )
