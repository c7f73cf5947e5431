import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width, vocabulary", [(1024, 576, 49152)])
def test_linear_kl_divergence(compare, tokens, width, vocabulary, dtype):
    """Forward and backward under a frozen head, which student and teacher share."""
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    teacher = torch.randn(tokens, width, device=DEVICE, dtype=dtype)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=dtype).mul_(0.02)

    def step(function):
        return lambda: torch.autograd.grad(function(x, teacher, weight), [x])

    compare(
        step(lk.linear_kl_divergence),
        {
            "plain": step(plain.linear_kl_divergence),
            "compiled": step(torch.compile(plain.linear_kl_divergence)),
        },
        flops=6 * tokens * width * vocabulary,
        dtype=dtype,
    )
