"""Products by every way there is, whatever this machine's CPU would choose."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llamapro_kernels import cpu
from llamapro_kernels import matmul as module
from llamapro_kernels.matmul import add_matmul, linear, matmul

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
MM, ONEDNN = torch.ops.aten.mm, torch.ops.mkldnn._linear_pointwise
TILES = cpu.ops.matmul if cpu.BUILD else None
SIXTEEN_BITS = {torch.bfloat16, torch.float16}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = dict(zip(DTYPES, (1e-12, 1e-5, 1e-2, 2e-3), strict=True))


CPUS = ["Intel", "AMD", "Intel, fp32 alone", "AMD, fp32 alone"]
if cpu.BUILD:
    CPUS.append("Intel, tiles")


@pytest.fixture(params=CPUS, autouse=True)
def machine(request, monkeypatch):
    monkeypatch.setattr(module, "TILED", {torch.bfloat16} if "tiles" in request.param else set())
    monkeypatch.setattr(module, "MKL_IS_SLOW", "AMD" in request.param)
    monkeypatch.setattr(module, "EMULATED", SIXTEEN_BITS if "alone" in request.param else set())
    monkeypatch.setattr(module, "PIECE", 16)
    monkeypatch.setattr(module, "ADDED", 5 * 24)
    monkeypatch.setattr(module, "COPIED", 8)
    monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(module, "ONEDNN_PAYS", 0)
    torch.manual_seed(0)
    return request.param


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check(result, truth, dtype=None):
    tolerance = TOLERANCE[dtype or result.dtype]
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 7), (0, 3)])
def test_values(rows, dtype):
    x, weight = random(*rows, 24, dtype=dtype), random(37, 24, dtype=dtype)
    dy, bias = random(*rows, 37, dtype=dtype), random(37, dtype=dtype)
    check(linear(x, weight), x.double() @ weight.double().T)
    check(linear(x, weight, bias), x.double() @ weight.double().T + bias.double())
    check(linear(x, weight, None, dy), x.double() @ weight.double().T + dy.double())
    check(linear(x, weight, bias, dy), x.double() @ weight.double().T + bias.double() + dy.double())
    check(matmul(dy, weight), dy.double() @ weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_with_a_stride(dtype):
    x, weight = random(7, 24, dtype=dtype), random(37, 24, dtype=dtype)
    for bias in (random(74, dtype=dtype)[::2], random(1, dtype=dtype).expand(37)):
        check(linear(x, weight, bias), x.double() @ weight.double().T + bias.double())


def test_what_does_not_fit_is_refused_as_by_pytorch():
    x, weight = random(7, 24), random(37, 24)
    for arguments in ((x, weight[:, 1:]), (x, weight.double()), (x, weight, random(36))):
        with pytest.raises(RuntimeError) as expected:
            torch.nn.functional.linear(*arguments)
        with pytest.raises(RuntimeError) as error:
            linear(*arguments)
        assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_transposed_and_into(dtype):
    dy, x = random(11, 37, dtype=dtype), random(11, 24, dtype=dtype)
    check(matmul(dy.T, x), dy.double().T @ x.double())
    out = torch.full((11, 48), 7.0, dtype=dtype)
    weight = random(37, 24, dtype=dtype)
    check(matmul(x, weight.T, out=out[:, :37]), x.double() @ weight.double().T)
    check(out[:, :37], x.double() @ weight.double().T)
    assert (out[:, 37:] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_added(dtype, machine):
    """What is added is rounded to 16 bits only where PyTorch multiplies those."""
    a, b, total = random(11, 37, dtype=dtype), random(11, 24, dtype=dtype), random(37, 24)
    truth = total.double() + a.double().T @ b.double()
    add_matmul(total, a.T, b)
    in_fp32 = "alone" in machine or ("tiles" in machine and dtype == torch.bfloat16)
    check(total, truth, torch.float32 if in_fp32 else dtype)


class Asked(TorchDispatchMode):
    """What multiplied, and what was multiplied: [(op, dtype)]."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (MM, ONEDNN, TILES):
            self.products.append((function.overloadpacket, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
def test_the_library_asked(dtype, machine, large, monkeypatch):
    monkeypatch.setattr(module, "ONEDNN_PAYS", 8 * 8 * 8 + (not large))
    in_fp32 = dtype == torch.float32 or (dtype in SIXTEEN_BITS and "alone" in machine)
    onednn = in_fp32 and "AMD" in machine and large
    tiles = "tiles" in machine and dtype == torch.bfloat16
    op = ONEDNN if onednn else TILES if tiles else MM
    with Asked() as asked:
        linear(random(2, 4, 8, dtype=dtype), random(8, 8, dtype=dtype))
    assert asked.products == [(op, torch.float32 if in_fp32 else dtype)]


@pytest.mark.parametrize("dtype", sorted(SIXTEEN_BITS, key=str))
def test_few_rows(dtype):
    """Are bound by reading the weight, which is not copied for them."""
    with Asked() as asked:
        matmul(random(3, 24, dtype=dtype), random(24, 16, dtype=dtype))
    assert asked.products == [(MM, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_flops(dtype):
    with FlopCounterMode(display=False) as counter:
        linear(random(2, 7, 24, dtype=dtype), random(37, 24, dtype=dtype))
    assert counter.get_total_flops() == 2 * 14 * 24 * 37


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile(dtype):
    x, weight, bias = random(2, 7, 24), random(37, 24), random(37)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    check(compiled(x, weight, bias), linear(x, weight, bias).double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_graph_serves_all_lengths(dtype):
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(
        linear, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(1) or graph
    )
    for length in (20, 27, 35):
        x, weight = random(2, length, 24, dtype=dtype), random(37, 24, dtype=dtype)
        check(compiled(x, weight), x.double() @ weight.double().T)
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", sorted(SIXTEEN_BITS, key=str))
def test_what_does_not_fit_is_refused(dtype):
    """By PyTorch, whatever multiplies: 8 is a whole piece, of which more could go unseen."""
    x, weight = random(9, 8, dtype=dtype), random(8, 8, dtype=dtype)
    with pytest.raises(RuntimeError, match="shapes"):
        matmul(x, random(16, 8, dtype=dtype))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(x, weight.float())
    with pytest.raises(RuntimeError):
        linear(x, weight, random(16, dtype=dtype))
