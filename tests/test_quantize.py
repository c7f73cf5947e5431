"""Rows in 8 bits on every backend, and the ops that write them, against fp64."""

import importlib

import pytest
import torch
from test_ops import DEVICE, LAYOUTS, dtypes
from torch.library import opcheck

import llamapro_kernels as lk
from llamapro_kernels import library, quantize
from llamapro_kernels.quantize import E4M3, QuantizedRows

ops = torch.ops.llamapro
TYPED = [
    (backend, dtype)
    for backend in ("triton", "cpp", "reference")
    if library._runs_on(backend, DEVICE, torch.float32)
    for dtype in dtypes(backend)
]
every_dtype = pytest.mark.parametrize("backend, dtype", TYPED, ids=str)


def bits(tensors):
    return [t.view(torch.uint8) if t.dtype == E4M3 else t for t in tensors]


def assert_same(ours, expected):
    for a, b in zip(bits(ours), bits(expected), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def columns_of(width):
    return (2.0 ** (torch.arange(width) % 7 - 3)).to(DEVICE)


def nearest(x, scale):
    """x, fp64, on the grid of e4m3 under these scales, to nearest even."""
    size = (x / scale).abs()
    step = torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-6))) - 3)
    return torch.round(x / scale / step) * step * scale


@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 33), (1, 1), (0, 8)], ids=str)
@every_dtype
def test_each_number_is_the_nearest_and_each_scale_the_smallest(
    backend, dtype, shape, layout, with_columns
):
    torch.manual_seed(0)
    sizes = torch.logspace(-3, 3, shape[-2] if len(shape) > 1 else 1)[:, None]
    x = LAYOUTS[layout]((torch.randn(shape) * sizes).to(DEVICE, dtype))
    before, columns = x.clone(), columns_of(shape[-1]) if with_columns else None
    with lk.use_backend(backend):
        values, scale = ops.quantize_rows(x, columns)
        back = quantize.dequantize(values, scale, dtype)
    assert values.shape == shape and values.dtype == E4M3 and torch.equal(x, before)
    truth, scale = (x.float() * (1 if columns is None else columns)).double(), scale.double()
    peak = truth.abs().amax(-1, keepdim=True)
    assert torch.equal(torch.exp2(torch.log2(scale).round()), scale)
    assert (peak <= 448 * scale).all() and (peak > 224 * scale).all()
    expected = nearest(truth, scale)
    assert torch.equal(values.double() * scale, expected)
    assert torch.equal(back, expected.to(dtype))


@every_dtype
def test_what_is_not_finite_makes_its_row_so_and_zeros_stay(backend, dtype):
    x = torch.ones(4, 40, dtype=dtype, device=DEVICE)
    x[0, 3], x[1, 39], x[2] = torch.nan, -torch.inf, 0
    with lk.use_backend(backend):
        back = QuantizedRows.of(x).dequantize()
    assert back[:2].isnan().all() and (back[2] == 0).all() and (back[3] == 1).all()


@every_dtype
def test_rows_too_wide_for_one_pass(backend, dtype, monkeypatch):
    """The kernels' loops, with less of them: a row of three tiles, and one that is not full."""
    torch.manual_seed(0)
    x = torch.randn(3, 100, device=DEVICE).to(dtype)
    with lk.use_backend("reference"):
        expected = [ops.quantize_rows(x, c) for c in (None, columns_of(100))]
    monkeypatch.setattr(quantize, "ONE_PASS_WIDTH", 16)
    monkeypatch.setattr(quantize, "WIDE_TILE", {**quantize.WIDE_TILE, "BLOCK": 32})
    with lk.use_backend(backend):
        for columns, both in zip((None, columns_of(100)), expected, strict=True):
            assert_same(ops.quantize_rows(x, columns), both)


@pytest.mark.parametrize("width, wide", [(5, False), (64, False), (130, False), (40, True)])
@every_dtype
def test_ops_write_rows_as_a_second_step_would(backend, dtype, width, wide, monkeypatch):
    """Bit for bit: y, or the gradient, is rounded to its own dtype first."""
    if wide:
        tile = {"ROWS": 1, "BLOCK": 32, "num_warps": 4}
        for module in ("swiglu", "rms_norm_triton"):
            module = importlib.import_module(f"llamapro_kernels.{module}")
            monkeypatch.setattr(module, "ONE_PASS_WIDTH", 4)
            monkeypatch.setattr(module, "WIDE_TILE", tile)
    torch.manual_seed(0)
    x, residual, dy, dsum = (torch.randn(2, 3, width, device=DEVICE).to(dtype) for _ in range(4))
    weight, gate_up = torch.randn(width), torch.randn(2, 3, 2 * width)
    weight, gate_up = weight.to(DEVICE, dtype), gate_up.to(DEVICE, dtype)
    columns, both = columns_of(width), columns_of(2 * width)
    with lk.use_backend(backend):
        y, rstd = ops.rms_norm(x, weight, 1e-5)
        expected = *ops.quantize_rows(y, None), rstd
        assert_same(ops.rms_norm_quantized(x, weight, 1e-5), expected)
        y, total, rstd = ops.add_rms_norm(x, residual, weight, 1e-5)
        expected = *ops.quantize_rows(y, None), total, rstd
        assert_same(ops.add_rms_norm_quantized(x, residual, weight, 1e-5), expected)
        for upstream in (dsum, None):
            given = dy, upstream, total, weight, rstd
            dx, _ = ops.add_rms_norm_backward(*given, None)
            expected = dx, *ops.quantize_rows(dx, columns)
            assert_same(ops.add_rms_norm_backward_quantized(*given, columns), expected)
        expected = ops.quantize_rows(ops.swiglu(gate_up), None)
        assert_same(ops.swiglu_quantized(gate_up), expected)
        expected = ops.quantize_rows(ops.swiglu_backward(dy, gate_up), both)
        assert_same(ops.swiglu_backward_quantized(dy, gate_up, both), expected)


def test_opcheck():
    """But for the schema, which is checked with arithmetic that PyTorch's e4m3 does not have."""
    x, weight, rstd = torch.randn(3, 8), torch.ones(8), torch.ones(3, 1)
    values, scale = ops.quantize_rows(x, None)
    calls = {
        ops.quantize_rows: (x, columns_of(8).cpu()),
        ops.quantize_rows_inverse: (values, scale, torch.bfloat16),
        ops.rms_norm_quantized: (x, weight, 1e-5),
        ops.add_rms_norm_quantized: (x, x, weight, 1e-5),
        ops.add_rms_norm_backward_quantized: (x, x, x, weight, rstd, weight),
        ops.swiglu_quantized: (x,),
        ops.swiglu_backward_quantized: (x[:, :4], x, weight),
    }
    utils = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    for op, arguments in calls.items():
        opcheck(op, arguments, test_utils=utils)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.quantize_rows(torch.ones(2, 0), None), r"K >= 1, expected, got \(2, 0\)"),
        (lambda: ops.quantize_rows(torch.ones(2, 3), torch.ones(2)), r"columns must be \(3,\)"),
        (lambda: ops.quantize_rows(torch.ones(3), torch.ones(6)[::2]), "contiguous columns"),
        (lambda: ops.quantize_rows_inverse(torch.ones(2, 3), None, torch.float32), "values"),
        (
            lambda: ops.swiglu_backward_quantized(
                torch.ones(2, 3), torch.ones(2, 6), torch.ones(3)
            ),
            r"columns must be \(6,\)",
        ),
    ],
)
def test_operands_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
