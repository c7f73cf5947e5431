"""Inputs of other kinds than the op kit's, and those that are refused."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import CASES
from test_ops import (  # noqa: F401 (two are fixtures for all tests here)
    DEVICE,
    PAIRS,
    Calls,
    convert,
    draw,
    every_pair,
    move,
    poisoned_empty,
    run,
    small_chunks,
)

import llamapro_kernels as lk


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU looking would mean waiting")
@pytest.mark.parametrize("backend", [backend for name, backend in PAIRS if name == "rope"])
def test_halves_of_a_rotary_table_that_differ(backend):
    """Frequencies side by side are another convention."""
    q, angles = torch.ones(1, 4, 2, 8), torch.rand(4, 4).repeat_interleave(2, -1)
    with lk.use_backend(backend), pytest.raises(ValueError, match=r"cos must have equal halves"):
        lk.rope(q, q, angles.cos(), angles.sin())


def test_weights_of_another_dtype():
    """bf16 activations with an fp32 norm weight or rope table: results in x's dtype."""
    x, weight = torch.randn(4, 32).bfloat16().requires_grad_(), torch.randn(32, requires_grad=True)
    y = lk.rms_norm(x, weight)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (x.dtype, x.dtype, torch.float32)
    q = torch.randn(1, 4, 2, 8).bfloat16()
    angles = torch.rand(4, 4).repeat(1, 2)
    exact = lk.rope(q.double(), q.double(), angles.cos().double(), angles.sin().double())[0]
    rotated = lk.rope(q, q, angles.cos(), angles.sin())[0]
    assert rotated.dtype == torch.bfloat16
    assert ((rotated.double() - exact).abs() <= torch.finfo(q.dtype).eps * exact.abs() + 1e-6).all()


def test_the_sum_is_normed_as_it_is_stored():
    x, residual, weight = (torch.randn(4, 64).bfloat16() for _ in range(3))
    y, total = lk.add_rms_norm(x, residual, weight[0])
    assert torch.equal(total, x + residual) and torch.equal(y, lk.rms_norm(total, weight[0]))


@pytest.mark.parametrize("upstream", [2.0**16, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scales_of_mixed_precision_trainers(dtype, upstream):
    """A scale beyond fp16's range, and one that bf16 cannot hold, cost no more than plain."""
    x, weight = torch.randn(64, 32).to(dtype), (torch.randn(50, 32) / 8).to(dtype)
    targets = torch.randint(50, (64,))
    grads = []
    for function, kind in (
        (lambda x, w: lk.linear_cross_entropy(x, w, targets), dtype),
        (lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets), dtype),
        (lambda x, w: F.cross_entropy(F.linear(x, w), targets), torch.float64),
    ):
        leaves = [t.detach().to(kind, copy=True).requires_grad_() for t in (x, weight)]
        (function(*leaves) * upstream).backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for ours, plain, truth in zip(*grads, strict=True):
        stored = torch.finfo(dtype).eps / 2 * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + stored


AUTOCAST = {
    "attention": lambda x, weight: lk.flash_attention(
        x[None, :, None], *[weight[None, :, None]] * 2
    ),
    "linear_swiglu": lk.linear_swiglu,
    "mean loss": lambda x, weight: lk.linear_cross_entropy(x, weight, torch.arange(6)),
    "losses": lambda *xs: lk.linear_cross_entropy(*xs, torch.arange(6), reduction="none"),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_products_run_in_the_dtype_of_autocast(name):
    """To the bit as in that dtype, so that sums stay in fp32; gradients have their leaf's dtype."""
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    expected = AUTOCAST[name](x.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = AUTOCAST[name](x, weight.bfloat16())  # of two dtypes, as products under autocast may be
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    grads = (torch.autograd.grad(o.float().square().sum(), (x, weight)) for o in (y, expected))
    for got, value in zip(*grads, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, value)


def test_targets_that_are_a_column():
    """Targets with a stride, as a column of pairs or one for all has, are read by it."""
    x, weight = torch.randn(6, 8, device=DEVICE), torch.randn(9, 8, device=DEVICE)
    pairs = torch.randint(9, (6, 2), device=DEVICE)
    for targets in (pairs[:, 0], pairs[0, :1].expand(6)):
        for reduction in ("mean", "none"):
            w = weight.clone().requires_grad_()
            loss = lk.linear_cross_entropy(x, w, targets, reduction=reduction).sum()
            expected = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction).sum()
            torch.testing.assert_close(loss, expected)
            copied = lk.linear_cross_entropy(x, w, targets.clone(), reduction=reduction).sum()
            assert torch.equal(*(torch.autograd.grad(o, w)[0] for o in (loss, copied)))


@pytest.mark.parametrize("cuts", [[0], [], [0, 3], [2, 6], [0, 4, 2, 6]], ids=str)
def test_compiled_graphs_check_documents_too(cuts):
    torch.compiler.reset()
    attend = torch.compile(lk.flash_attention, backend="aot_eager", fullgraph=True)
    q = torch.randn(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to T = 6, got \["):
        attend(q, q, q, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))


def test_targets_that_change_before_backward():
    """Written to by NumPy, which autograd does not see: no memory beyond the vocabulary is."""
    x, weight = torch.randn(6, 8), torch.randn(9, 8, requires_grad=True)
    targets = torch.randint(9, (6,))
    losses = lk.linear_cross_entropy(x, weight, targets, reduction="none")
    targets.numpy()[0] = 9
    with pytest.raises(IndexError, match="got 9"):
        losses.sum().backward()


@pytest.mark.parametrize("window", [5, 6, 2**31 - 1, 2**40])
def test_a_window_that_hides_nothing(window):
    q, k = (torch.randn(1, 5, 2, 16, device=DEVICE, requires_grad=True) for _ in "qk")
    results = []
    for options in ({}, {"window": window}):
        o = lk.flash_attention(q, k, q, **options)
        results.append([o, *torch.autograd.grad(o.sum(), (q, k))])
    for full, windowed in zip(*results, strict=True):
        assert torch.equal(full, windowed)


def test_the_default_dtype_changes_nothing():
    q = torch.randn(1, 5, 2, 16, device=DEVICE, requires_grad=True)
    results = []
    for default in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            results.append(torch.autograd.grad(lk.flash_attention(q, q, q).square().sum(), q)[0])
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*results)


def test_forward_mode_is_refused():
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: lk.rms_norm(x, weight), (x,), (x,))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jacrev"])
def test_transforms_of_functions_are_refused(transform):
    x, weight = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"do not work under torch\.func's grad, vmap"):
        getattr(torch.func, transform)(lambda x: lk.rms_norm(x, weight).sum())(x)


def test_an_input_made_in_inference_mode():
    """As with PyTorch's norm, a trainable weight has its gradient."""
    with torch.inference_mode():
        x, residual = torch.randn(4, 8), torch.randn(4, 8)
    grads = []
    for norm in (lk.rms_norm, lambda x, w: F.rms_norm(x, (8,), w, 1e-5)):
        weight = torch.ones(8, requires_grad=True)
        norm(x, weight).square().sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)
    lk.add_rms_norm(x, residual, weight)[0].sum().backward()
    with torch.inference_mode():
        lk.rms_norm(x, weight)


@every_pair
def test_registered_ops_check_their_operands(name, backend):
    """Whoever calls them without the public function: one number more or less along any dimension
    of any operand, or another dtype, is an error and never memory beyond it."""
    case = CASES[name]
    inputs, constants, grads = draw(name, "odd")
    inputs, constants = convert(inputs, torch.float32), move(constants)
    with lk.use_backend(backend):
        with Calls() as calls:
            run(case.ours, inputs, constants, [g.to(DEVICE) for g in grads])
        for function, args, _ in calls.seen:
            for i, operand in enumerate(args):
                if not isinstance(operand, torch.Tensor):
                    continue
                for wrong in wrong_operands(operand):
                    given = [*args[:i], wrong, *args[i + 1 :]]
                    if fits_all_the_same(function, given):
                        continue
                    with pytest.raises((ValueError, TypeError), match=r"expected|must|need"):
                        function(*given)


def wrong_operands(operand):
    for dim, size in enumerate(operand.shape):
        yield operand.narrow(dim, 0, size - 1)
        yield torch.cat((operand, operand.narrow(dim, 0, 1)), dim)
    yield operand[None]
    yield operand.to(torch.float64 if operand.is_floating_point() else torch.int16)


def fits_all_the_same(function, args):
    """Whether the op has a meaning for these: documents may be fewer, heads of k more."""
    try:
        with torch.device("meta"):
            plain = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        function(*plain)
    except (ValueError, TypeError):
        return False
    return True


def packed(*cuts):
    q = torch.ones(1, 4, 2, 8)
    return lambda: lk.flash_attention(q, q, q, cu_seqlens=torch.tensor(cuts, dtype=torch.int32))


x23, w3 = torch.ones(2, 3), torch.ones(3)
q4 = torch.ones(1, 4, 2, 8)
table = torch.ones(4, 8)
head, ids = torch.ones(5, 3), torch.zeros(2, dtype=torch.long)
REFUSED = {
    "integer x": (TypeError, "int64", lambda: lk.rms_norm(torch.ones(2, 3).long(), w3)),
    "weight size": (ValueError, r"\(4,\)", lambda: lk.rms_norm(x23, torch.ones(4))),
    "residual shape": (ValueError, r"\(2, 4\)", lambda: lk.add_rms_norm(x23, torch.ones(2, 4), w3)),
    "odd gate_up": (ValueError, r"\(2, 3\)", lambda: lk.swiglu(x23)),
    "short table": (ValueError, r"\(3, 8\)", lambda: lk.rope(q4, q4, table[:3], table[:3])),
    "no list": (TypeError, "got list", lambda: lk.swiglu([1.0, 2.0])),
    "an array": (TypeError, "x must be .* got ndarray", lambda: lk.rms_norm(x23.numpy(), w3)),
    "an array of weights": (TypeError, "weight .* ndarray", lambda: lk.rms_norm(x23, w3.numpy())),
    "negative eps": (ValueError, "eps must be .* got -1", lambda: lk.rms_norm(x23, w3, -1.0)),
    "eps that is none": (
        ValueError,
        "eps must be .* got nan",
        lambda: lk.add_rms_norm(x23, x23, w3, float("nan")),
    ),
    "infinite scale": (
        ValueError,
        "scale must be positive and finite, got inf",
        lambda: lk.flash_attention(q4, q4, q4, scale=float("inf")),
    ),
    "a pair of windows": (
        ValueError,
        r"window must be a whole number of at least 1, got \(8, 0\)",
        lambda: lk.flash_attention(q4, q4, q4, window=(8, 0)),
    ),
    "heads before positions": (
        ValueError,
        r"are they \(B, T, H, D\)\?",
        lambda: lk.flash_attention(torch.ones(1, 4, 9, 8), *[torch.ones(1, 2, 9, 8)] * 2),
    ),
    "a list of targets": (
        TypeError,
        "targets must be an int64 or int32 tensor, got list",
        lambda: lk.linear_cross_entropy(x23, head, [0, 1]),
    ),
    "float8": (
        TypeError,
        "float8_e4m3fn",
        lambda: lk.swiglu(torch.ones(2, 4).to(torch.float8_e4m3fn)),
    ),
    "q and k": (
        TypeError,
        "float32 and torch.float64",
        lambda: lk.rope(q4, q4.double(), table, table),
    ),
    "half a table": (ValueError, r"\(4, 4\)", lambda: lk.rope(q4, q4, table[:, :4], table[:, :4])),
    "table gradient": (
        ValueError,
        "constants",
        lambda: lk.rope(q4, q4, table.clone().requires_grad_(), table),
    ),
    "heads": (ValueError, "divide", lambda: lk.flash_attention(q4, *[torch.ones(1, 4, 3, 8)] * 2)),
    "no heads": (ValueError, "divide", lambda: lk.flash_attention(q4, *[q4[:, :, :0]] * 2)),
    "no dimension": (ValueError, "at least 1", lambda: lk.flash_attention(*[q4[..., :0]] * 3)),
    "mixed dtypes": (TypeError, "float64", lambda: lk.flash_attention(q4, q4, q4.double())),
    "window without causal": (
        ValueError,
        "window",
        lambda: lk.flash_attention(q4, q4, q4, causal=False, window=2),
    ),
    "int64 cu_seqlens": (
        ValueError,
        "int64",
        lambda: lk.flash_attention(q4, q4, q4, cu_seqlens=torch.tensor([0, 4])),
    ),
    "a list of documents": (
        TypeError,
        "got list",
        lambda: lk.flash_attention(q4, q4, q4, cu_seqlens=[0, 4]),
    ),
    "documents that end early": (ValueError, r"from 0 to T = 4, got \[0, 2\]", packed(0, 2)),
    "documents that start late": (ValueError, r"got \[1, 4\]", packed(1, 4)),
    "documents that go back": (ValueError, r"got \[0, 3, 2, 4\]", packed(0, 3, 2, 4)),
    "packed batch": (
        ValueError,
        "batch of one",
        lambda: lk.flash_attention(*[q4.expand(2, -1, -1, -1)] * 3, cu_seqlens=ids.int()),
    ),
    "target id": (IndexError, "got 9", lambda: lk.linear_cross_entropy(x23, head, ids + 9)),
    "targets elsewhere": (
        ValueError,
        "targets are on meta, x on cpu",
        lambda: lk.linear_cross_entropy(x23, head, ids.to("meta")),
    ),
    "target shape": (ValueError, r"\(1,\)", lambda: lk.linear_cross_entropy(x23, head, ids[:1])),
    "reduction": (
        ValueError,
        "'max'",
        lambda: lk.linear_cross_entropy(x23, head, ids, reduction="max"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused(what):
    error, message, call = REFUSED[what]
    with pytest.raises(error, match=message):
        call()
