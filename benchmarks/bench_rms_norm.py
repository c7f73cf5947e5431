import pytest
import torch
from compare import DEVICE, DTYPES

import llamapro_kernels as lk
from benchmarks import plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows, width", [(2048, 576), (4096, 4096)])
def test_rms_norm(compare, rows, width, frozen, dtype):
    """Forward and backward; with a frozen weight the peers skip its gradient too."""
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(width, device=DEVICE, dtype=dtype, requires_grad=not frozen)
    dy = torch.randn_like(x)
    wanted = [x] if frozen else [x, weight]

    def step(function):
        return lambda: torch.autograd.grad(function(x), wanted, dy)

    def peer(x):
        return plain.rms_norm(x, weight, 1e-5)

    compare(
        step(lambda x: lk.rms_norm(x, weight, 1e-5)),
        {"plain": step(peer), "compiled": step(torch.compile(peer))},
        bytes=5 * x.nbytes,  # read x, write y; read dy and x, write dx
        dtype=dtype,
    )
