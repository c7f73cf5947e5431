"""Products by either library, whatever this machine's CPU would choose."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llamapro_kernels import product
from llamapro_kernels.product import linear, matmul

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(params=[False, True], ids=["pytorch", "onednn"], autouse=True)
def slow(request, monkeypatch):
    monkeypatch.setattr(product, "MKL_IS_SLOW", request.param)
    monkeypatch.setattr(product, "PIECE", 16)
    torch.manual_seed(0)


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check(result, truth):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[result.dtype]
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [(), (1,), (2, 7), (0, 3)])
def test_values(rows, dtype):
    x, weight = random(*rows, 24, dtype=dtype), random(37, 24, dtype=dtype)
    dy, bias = random(*rows, 37, dtype=dtype), random(37, dtype=dtype)
    check(linear(x, weight), x.double() @ weight.double().T)
    check(linear(x, weight, bias), x.double() @ weight.double().T + bias.double())
    check(matmul(dy, weight), dy.double() @ weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_and_into(dtype):
    dy, x = random(11, 37, dtype=dtype), random(11, 24, dtype=dtype)
    check(matmul(dy.T, x), dy.double().T @ x.double())
    out = torch.full((11, 48), 7.0, dtype=dtype)
    weight = random(37, 24, dtype=dtype)
    check(matmul(x, weight.T, out=out[:, :37]), x.double() @ weight.double().T)
    check(out[:, :37], x.double() @ weight.double().T)
    assert (out[:, 37:] == 7).all()


def test_the_library_asked(slow, request):
    """fp32 alone goes to oneDNN, and its FLOPs are counted like PyTorch's."""
    asked = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with FlopCounterMode(display=False) as counter:
            linear(random(2, 7, 24, dtype=dtype), random(37, 24, dtype=dtype))
        assert counter.get_total_flops() == 2 * 14 * 24 * 37
        (asked[dtype],) = counter.get_flop_counts()["Global"]
    onednn = "onednn" in request.node.callspec.id
    expected = torch.ops.mkldnn._linear_pointwise if onednn else torch.ops.aten.mm
    assert asked[torch.float32] == expected
    assert asked[torch.bfloat16] == asked[torch.float64] == torch.ops.aten.mm
