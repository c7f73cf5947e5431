import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(2048, 1536), (4096, 11008)])
def test_swiglu(compare, rows, width, dtype):
    """Forward and backward."""
    gate_up = torch.randn(rows, 2 * width, device=DEVICE, dtype=dtype, requires_grad=True)
    dy = torch.randn(rows, width, device=DEVICE, dtype=dtype)

    def step(function):
        return lambda: torch.autograd.grad(function(gate_up), [gate_up], dy)

    compare(
        step(lk.swiglu),
        {"plain": step(plain.swiglu), "compiled": step(torch.compile(plain.swiglu))},
        bytes=4 * gate_up.nbytes,  # read 2I, write I; read 3I, write 2I
        dtype=dtype,
    )
