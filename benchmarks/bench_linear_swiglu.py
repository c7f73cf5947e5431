import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("tokens, width, inner", [(1024, 576, 1536), (2048, 2048, 8192)])
def test_linear_swiglu(compare, tokens, width, inner):
    """Forward alone: the fused product against the vendor's product and a SwiGLU of its own."""
    x = torch.randn(tokens, width, device=DEVICE)
    weight = torch.randn(2 * inner, width, device=DEVICE) / width**0.5

    compare(
        lambda: (lk.linear_swiglu(x, weight),),
        {
            "plain": lambda: (plain.linear_swiglu(x, weight),),
            "matmul, lk.swiglu": lambda: (lk.swiglu(F.linear(x, weight)),),
        },
        flops=4 * tokens * width * inner,
    )
