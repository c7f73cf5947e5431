import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tokens, width, vocabulary", [(1024, 576, 49152)])
def test_linear_cross_entropy(compare, tokens, width, vocabulary, frozen, dtype):
    """Forward and backward; a frozen head has no gradient here and in the peers."""
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=DEVICE, dtype=dtype).mul_(0.02)
    weight.requires_grad_(not frozen)
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    wanted = [x] if frozen else [x, weight]

    def step(function):
        return lambda: torch.autograd.grad(function(x), wanted)

    def peer(x):
        return plain.linear_cross_entropy(x, weight, targets)

    compare(
        step(lambda x: lk.linear_cross_entropy(x, weight, targets)),
        {"plain": step(peer), "compiled": step(torch.compile(peer))},
        flops=(4 if frozen else 6) * tokens * width * vocabulary,
        dtype=dtype,
    )
