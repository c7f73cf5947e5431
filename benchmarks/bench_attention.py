import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE

import llamapro_kernels as lk


@pytest.mark.parametrize("length, heads, kv_heads, dim", [(512, 9, 3, 64), (2048, 9, 3, 64)])
def test_attention(compare, length, heads, kv_heads, dim):
    """Causal, forward and backward."""
    q = torch.randn(1, length, heads, dim, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(1, length, kv_heads, dim, device=DEVICE, requires_grad=True) for _ in "kv")
    do = torch.randn_like(q)

    def step(function):
        return lambda: torch.autograd.grad(function(q, k, v), [q, k, v], do)

    def sdpa(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(
            1, 2
        )

    compare(
        step(lk.flash_attention),
        {"sdpa": step(sdpa)},
        flops=7 * heads * length**2 * dim,  # half of 4 forward and of 10 backward
    )
