"""Matrices in 8 bits, and everything that multiplies by them, against fp64.

What a product rounds is spelled out here in plain PyTorch and computed in fp64: that is the truth.
`units` lets a CPU multiply by `torch._scaled_mm`, as a GPU does.
"""

import pytest
import torch
from test_block import OPTIONS, WANTED, composition, make
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

import llamapro_kernels as lk
from benchmarks import plain
from llamapro_kernels import frozen
from llamapro_kernels.block import RECOMPUTE
from llamapro_kernels.quantize import QuantizedRows

MATRICES = ("qkv", "o_proj", "gate_up", "down_proj")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS32, EPS_BF16 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16))


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(frozen, "has_units", lambda device: True)


def weight_of(rows, columns, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = torch.logspace(-1, 1, rows)[:, None]
    return (torch.randn(rows, columns) * sizes / columns**0.5).to(dtype)


def rounded(x, columns=None):
    """x (..., K) in 8 bits as a product reads it, in fp64."""
    return QuantizedRows.of(x, columns).dequantize().double()


class Spelled(torch.autograd.Function):
    """x w^T of a frozen matrix, every operand rounded as the module's docstring says."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return rounded(x).view(x.shape) @ held.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx, dy):
        scale = ctx.held.columns
        return rounded(dy, scale).view(dy.shape) / scale @ ctx.held.dequantize(dy.dtype), None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_a_matrix_is_its_rows_in_8_bits(dtype, compact, units):
    weight = weight_of(48, 32, dtype)
    held = lk.FrozenMatrix.quantize(weight, compact)
    values = QuantizedRows.of(weight)
    assert held.shape == (48, 32) and len(held) == 48 and not held.requires_grad
    assert torch.equal(held.dequantize(torch.float64), values.dequantize().double())
    assert held.nbytes == (1 if compact else 2) * 48 * 32 + 4 * 48
    if not compact:
        assert torch.equal(held.transposed.float(), held.values.float().T)
    assert held.holds(weight) and not held.holds(weight.flip(0))
    # What is on the grid of 8 bits stays, whatever the scale that it now has.
    again = lk.FrozenMatrix.quantize(held.dequantize(torch.float32), compact)
    assert torch.equal(again.dequantize(torch.float64), held.dequantize(torch.float64))


def test_pieces_are_those_of_the_weight(units):
    weight = weight_of(48, 32)
    pieces = lk.FrozenMatrix.quantize(weight).split([16, 0, 32])
    assert [len(piece) for piece in pieces] == [16, 0, 32]
    assert pieces[2].holds(weight[16:]) and not pieces[2].holds(weight[:32])
    assert torch.equal(pieces[2].transposed.float(), pieces[2].values.float().T)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("by", ["dtype", "units", "no rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_both_ways(dtype, by, compact, monkeypatch):
    """The truth to the rounding of sums and of what is stored; fast and compact to the bit."""
    if by == "units":
        monkeypatch.setattr(frozen, "has_units", lambda device: True)
    if by == "no rows":  # as on a GPU that multiplies 16 bits
        monkeypatch.setattr(lk.FrozenMatrix, "takes_rows", False)
    held = lk.FrozenMatrix.quantize(weight_of(48, 32), compact)
    x, dy = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 48).to(dtype)
    w, columns = held.dequantize(torch.float64), held.columns.double()
    xs, dys = x.double(), dy.double()
    if by != "no rows":
        xs = rounded(x).view(x.shape)
        dys = rounded(dy, held.columns).view(dy.shape) / columns
    stored = max(torch.finfo(dtype).eps, EPS_BF16 if by == "units" else 0)
    for ours, a, b in ((held.linear(x), xs, w.T), (held.input_gradient(dy), dys, w)):
        truth, terms = a @ b, a.abs() @ b.abs()
        assert ours.dtype == dtype
        bound = stored * truth.abs() + len(b) * EPS32 * terms
        bound += 2.0**-24 * (dtype == torch.float16)  # the least that is above 0
        assert ((ours.double() - truth).abs() <= bound).all()


def test_fast_and_compact_give_the_same_bits(units):
    weight = weight_of(64, 48, torch.bfloat16)
    fast, compact = (lk.FrozenMatrix.quantize(weight, form) for form in (False, True))
    assert fast.transposed is not None and compact.transposed is None
    x, dy = torch.randn(5, 48).bfloat16(), torch.randn(5, 64).bfloat16()
    assert torch.equal(fast.linear(x), compact.linear(x))
    assert torch.equal(fast.input_gradient(dy), compact.input_gradient(dy))


def test_sizes_that_units_do_not_take_are_multiplied_in_the_dtype(units, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", None)
    held = lk.FrozenMatrix.quantize(weight_of(20, 24))
    assert held.transposed is None and held.linear(torch.randn(3, 24)).shape == (3, 20)


def held_in_8_bits(weights, wanted):
    """A block's weights, with each matrix that no gradient is wanted of in 8 bits."""
    return {
        name: lk.FrozenMatrix.quantize(t.detach()) if name in MATRICES and name not in wanted else t
        for name, t in weights.items()
    }


def gradients(function, wanted, pieces=False, **options):
    """y and the gradients of what is wanted, in fp64, of a block in which the rest is frozen."""
    documents = options.get("cu_seqlens")
    if documents is not None:
        options["cu_seqlens"] = torch.tensor(documents, dtype=torch.int32)
    x, weights, table, dy = make(torch.float64, True, batch=2 if documents is None else 1)
    leaves = {n: t.requires_grad_(n in wanted) for n, t in {"x": x, **weights}.items()}
    given = held_in_8_bits({n: t for n, t in leaves.items() if n != "x"}, wanted)
    if pieces:
        given = {n: t if n not in PIECES else tuple(t.split(PIECES[n])) for n, t in given.items()}
    y = function(x, lk.BlockWeights(**given), *table, **options)
    y.backward(dy)
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


PIECES = {"qkv": [32, 16, 16], "gate_up": [20, 20]}


def spelled_out(x, w, *table, **options):
    """The composition of the public ops, its products with frozen matrices as `Spelled`."""

    def product(x, weight, bias=None):
        if not isinstance(weight, lk.FrozenMatrix):
            return linear(x, weight, bias)
        y = Spelled.apply(x, weight)
        return y if bias is None else y + bias

    globals_of = composition.__globals__
    before, globals_of["linear"] = globals_of["linear"], product
    try:
        return composition(x, w, *table, **options)
    finally:
        globals_of["linear"] = before


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("wanted", WANTED)
def test_a_block_computes_what_is_spelled_out(wanted, recompute, options):
    """In fp64 to rounding: every gradient that is wanted is there, and no other."""
    wanted, options = WANTED[wanted], OPTIONS[options]
    ours = gradients(lk.decoder_block, wanted, recompute=recompute, **options)
    expected = gradients(spelled_out, wanted, **options)
    for name, value in expected.items():
        assert (ours[name] is None) == (value is None) == (name not in {"y", *wanted}), name
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("wanted", ["frozen", "norms and x", "outputs"])
def test_pieces_compute_what_one_matrix_does(wanted):
    """But for dx, to which each piece rounds its own part of dy."""
    ours = gradients(lk.decoder_block, WANTED[wanted], pieces=True)
    whole = gradients(lk.decoder_block, WANTED[wanted])
    assert {n for n, t in ours.items() if t is None} == {n for n, t in whole.items() if t is None}
    for name in {"y", "down_proj"} & {n for n, t in whole.items() if t is not None}:
        torch.testing.assert_close(ours[name], whole[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by", ["dtype", "units"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_is_within_the_floor_of_8_bits(dtype, by, monkeypatch):
    """Of the truth on the same values, without the rounding of activations: each of four products
    rounds its operand by 2^-4 of it at most, and each of their input gradients once more."""
    if by == "units":
        monkeypatch.setattr(frozen, "has_units", lambda device: True)
    torch.manual_seed(0)
    width, dim, inner, length = 64, 16, 96, 24
    shapes = {"qkv": (8 * dim, width), "o_proj": (width, 4 * dim)}
    shapes |= {"gate_up": (2 * inner, width), "down_proj": (width, inner)}
    held = {n: lk.FrozenMatrix.quantize(weight_of(*s) / 3) for n, s in shapes.items()}
    angles = torch.rand(length, dim // 2).repeat(1, 2)
    x, dy = torch.randn(2, 3, length, width)

    def run(function, dtype, weights):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        norms = {n: torch.ones(width, dtype=dtype) for n in ("attention_norm", "mlp_norm")}
        y = function(leaf, lk.BlockWeights(**norms, **weights), angles.cos(), angles.sin())
        y.backward(dy.to(dtype))
        return y.detach().double(), leaf.grad.double()

    truth = run(
        composition, torch.float64, {n: h.dequantize(torch.float64) for n, h in held.items()}
    )
    plain_16 = run(composition, dtype, {n: h.dequantize(dtype) for n, h in held.items()})
    ours = run(lk.decoder_block, dtype, held)
    for name, a, b, t, roundings in zip(("y", "dx"), ours, plain_16, truth, (4, 8), strict=True):
        error, peer = ((v - t).norm() / t.norm() for v in (a, b))
        print(f"{name} {dtype}: error {error:.4f}, plain {peer:.4f}")
        assert 0 < error <= 2 * peer + roundings * 2.0**-4


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_flops_are_those_of_16_bits(recompute, monkeypatch):
    def count(weights, table, x, dy):
        with FlopCounterMode(display=False) as counted:
            x = x.detach().requires_grad_()
            lk.decoder_block(x, lk.BlockWeights(**weights), *table, recompute=recompute).backward(
                dy
            )
        return counted.get_total_flops()

    x, weights, table, dy = make(torch.float32)
    expected = count(weights, table, x, dy)
    held = held_in_8_bits(weights, ())
    assert count(held, table, x, dy) == expected > 0
    monkeypatch.setattr(frozen, "has_units", lambda device: True)
    monkeypatch.setattr(frozen, "ALIGNED", 4)
    assert count(held_in_8_bits(weights, ()), table, x, dy) == expected


def test_nobody_writes_16_bits_that_nobody_reads(monkeypatch):
    """A frozen block with matrices in 8 bits: the norms and SwiGLU write rows alone."""
    x, weights, table, dy = make(torch.float32, bias=False)
    called = []
    for name in ("rms_norm", "add_rms_norm", "swiglu", "swiglu_backward"):
        op = getattr(torch.ops.llamapro, name)
        monkeypatch.setattr(
            torch.ops.llamapro, name, lambda *a, n=name, op=op: called.append(n) or op(*a)
        )
    held = lk.BlockWeights(**held_in_8_bits(weights, ()))
    lk.decoder_block(x.requires_grad_(), held, *table).backward(dy)
    assert x.grad is not None and called == []


def test_a_compiled_block_is_one_graph_with_the_same_bits():
    x, weights, table, dy = make(torch.float32)
    held = lk.BlockWeights(**held_in_8_bits(weights, ()))

    def run(function):
        leaf = x.detach().requires_grad_()
        y = function(leaf, held, *table)
        y.backward(dy)
        return y.detach(), leaf.grad

    compiled = torch.compile(lk.decoder_block, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled), run(lk.decoder_block), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(dtype):
    x, weights, table, dy = make(torch.float32)
    held = lk.BlockWeights(**held_in_8_bits(weights, ()))
    cast = lk.BlockWeights(*(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in held))

    def run(x, weights):
        leaf = x.detach().requires_grad_()
        y = lk.decoder_block(leaf, weights, *table)
        y.backward(dy.to(y.dtype))
        return y.detach().float(), leaf.grad.float()

    expected = run(x.to(dtype), cast)
    with torch.autocast("cpu", dtype=dtype):
        ours = run(x, held)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_over_a_frozen_head(reduction, monkeypatch):
    """In fp64, in chunks, against the loss of the spelled-out logits."""
    module = __import__("importlib").import_module("llamapro_kernels.linear_head")
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(module, "CHUNK_TOKENS_CPU", 3)
    torch.manual_seed(0)
    held = lk.FrozenMatrix.quantize(weight_of(97, 32))
    x, targets = torch.randn(2, 8, 32).double(), torch.randint(97, (2, 8))
    targets[0, :3] = -100
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = lk.linear_cross_entropy(ours, held, targets, reduction=reduction)
    logits = Spelled.apply(expected.flatten(0, 1), held)
    # The gradient of the sum is rounded to 8 bits; upstream scales come after.
    kind = "none" if reduction == "none" else "sum"
    truth = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction=kind)
    truth.sum().backward()
    upstream = 1 / int((targets != -100).sum()) if reduction == "mean" else 1.0
    torch.testing.assert_close(loss.flatten(), (truth * upstream).flatten(), rtol=1e-12, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad * upstream, rtol=1e-12, atol=1e-14)


def test_swiglu_of_a_frozen_projection():
    held = lk.FrozenMatrix.quantize(weight_of(34, 32))
    x = torch.randn(2, 5, 32).double()
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, truth = lk.linear_swiglu(ours, held), plain.swiglu(Spelled.apply(expected, held))
    dy = torch.randn(2, 5, 17).double()
    for output in (y, truth):
        output.backward(dy)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-12, atol=1e-14)


FINITE = torch.ones(4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: lk.FrozenMatrix.quantize([1.0]), TypeError, "weight must be a tensor"),
        (lambda: lk.FrozenMatrix.quantize(torch.ones(3)), ValueError, r"\(R, K\) expected"),
        (lambda: lk.FrozenMatrix.quantize(torch.ones(0, 3)), ValueError, r"got \(0, 3\)"),
        (lambda: lk.FrozenMatrix.quantize(FINITE / 0), ValueError, "finite numbers expected"),
        (
            lambda: lk.FrozenMatrix.quantize(FINITE.clone().requires_grad_()),
            ValueError,
            "wants a gradient",
        ),
        (
            lambda: lk.linear_swiglu(torch.ones(2, 3), lk.FrozenMatrix.quantize(FINITE)),
            ValueError,
            r"x \(..., N\) and weight \(2I, N\)",
        ),
        (
            lambda: lk.linear_cross_entropy(
                torch.ones(2, 3), lk.FrozenMatrix.quantize(FINITE), torch.zeros(2).long()
            ),
            ValueError,
            r"weight \(V, D\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_matrix_of_another_shape_is_named():
    x, weights, table, _ = make(torch.float32)
    weights["down_proj"] = lk.FrozenMatrix.quantize(torch.ones(24, 21))
    with pytest.raises(ValueError, match=r"gate_up must be \(42, 24\)|down_proj"):
        lk.decoder_block(x, lk.BlockWeights(**weights), *table)
