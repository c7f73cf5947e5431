"""Inputs far from 1, which the op kit's random ones are not: scores and logits from 1e-30 to 1e30,
and random cases of every op with values of any size.

The rule is the op kit's: our error is at most twice plain PyTorch's in the same dtype, plus the
rounding of what is stored and of the terms that are summed.
"""

import pytest
import torch
from op_cases import CASES
from test_ops import DEVICE, PAIRS, as_tuple, dtypes, run
from torch.nn.attention import SDPBackend, sdpa_kernel

import llamapro_kernels as lk
from benchmarks.plain import linear_cross_entropy, sdpa
from llamapro_kernels import cpu, gpu, library

EPS32 = torch.finfo(torch.float32).eps
SIZES = [10.0**e for e in (-30, 0, 2, 4, 5, 6, 7, 8, 9, 30)]


def typed(op):
    """(backend, dtype) of all that serve the op here."""
    return [
        (backend, dtype)
        for backend in library._ops[op].implementations
        if library._runs_on(backend, DEVICE, torch.float32)
        for dtype in dtypes(backend)
        if dtype != torch.float64
    ]


def math_sdpa(q, k, v, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v, **options)


def assert_close(ours, plain, truth, dtype, term=0.0, condition=0.0):
    """`term`: the largest of what is summed, where that cancels. `condition`: what rounding of the
    inputs' products does to the truth."""
    error, peer = ((x.double().cpu() - truth).abs().max().item() for x in (ours, plain))
    stored = torch.finfo(dtype).eps / 2 * max(term, truth.abs().max().item())
    summed = max(truth.shape, default=1) * EPS32 / 2 * term
    bound = 2 * peer + stored + summed + condition
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}, plain {peer:.3e}"


def conditions(truth, again, inputs):
    """By how much each of `truth` moves when every number of the inputs does by what 64 products
    in fp32 round at most; the most of eight tries."""
    most = [0.0] * len(truth)
    for _ in range(8):
        near = [x * (1 + torch.randn(x.shape).sign() * 64 * EPS32 / 2) for x in inputs]
        moved = [(n - t).abs().max().item() for n, t in zip(again(near), truth, strict=True)]
        most = [*map(max, most, moved)]
    return most


@pytest.mark.parametrize("size", SIZES[::3] if gpu.INTERPRETED else SIZES)  # it is slow
@pytest.mark.parametrize("backend, dtype", typed("flash_attention"), ids=str)
def test_attention_with_scores_of_any_size(backend, dtype, size):
    torch.manual_seed(0)
    shapes = [(1, 40, 4, 32), *[(1, 40, 2, 32)] * 2, (1, 40, 4, 32)]
    q, k, v, do = (torch.randn(shape).to(dtype) for shape in shapes)
    largest = torch.einsum("bthd,bshd->bhts", q[:, :, ::2].double(), k.double()).abs().max().item()
    scale = size / largest

    def results(function, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = function(*leaves, scale=scale)
        return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o))]

    exact = [x.double() for x in (q, k, v)]
    plain, truth = results(math_sdpa, (q, k, v)), results(math_sdpa, exact)
    with lk.use_backend(backend):
        ours = results(lk.flash_attention, [x.to(DEVICE) for x in (q, k, v)])
    # ds = p * (do v^T - do o^T) cancels, and o is stored in the dtype. (PyTorch's math is in fp32.)
    dp = torch.einsum("bthd,bshd->bhts", do[:, :, ::2].double().abs(), v.double().abs()).max()
    terms = [0.0, *(scale * dp.item() * x.abs().max().item() for x in (exact[1], exact[0])), 0.0]
    moves = conditions(truth, lambda near: results(math_sdpa, near), exact)
    for *values, term, moved in zip(ours, plain, truth, terms, moves, strict=True):
        assert_close(*values, dtype, term, moved)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend, dtype", typed("flash_attention"), ids=str)
def test_one_key_has_all_the_weight(backend, dtype, size):
    """One query, one key: o is v, dv is do, and dq and dk are nothing, however large the score."""
    torch.manual_seed(1)
    q, k, v, do = (torch.randn(1, 1, 1, 32, device=DEVICE).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with lk.use_backend(backend):
        o = lk.flash_attention(*leaves, scale=size / (q * k).sum().abs().item())
        dq, dk, dv = torch.autograd.grad(o, leaves, do)
    assert torch.equal(o, v) and torch.equal(dv, do)
    if cpu.BUILD != "amx":  # whose tiles sum in another order than its vectors
        assert not dq.any() and not dk.any()


@pytest.mark.parametrize("backend, dtype", typed("flash_attention"), ids=str)
def test_rows_whose_scores_are_all_minus_infinity(backend, dtype):
    """Zeros, as of a row that sees nothing; PyTorch's softmax gives NaN. fp32 can overflow so."""
    if dtype == torch.float16:
        pytest.skip("products of fp16 do not overflow fp32")
    q, k, v = (torch.ones(1, 6, 1, 16, device=DEVICE).to(dtype) for _ in range(3))
    q[:, 2] = -1e20
    k *= 1e20
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with lk.use_backend(backend):
        o = lk.flash_attention(*leaves, scale=1e-30)
        grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
    assert not o[:, 2].any() and not grads[0][:, 2].any()
    assert all(x.isfinite().all() for x in (o, *grads))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("size", [10.0**e for e in (-30, 0, 2, 4, 6, 8, 20, 30)])
@pytest.mark.parametrize("backend, dtype", typed("linear_cross_entropy"), ids=str)
def test_losses_with_logits_of_any_size(backend, dtype, size, reduction):
    """The two largest logits are equal: each has half of the weight."""
    torch.manual_seed(0)
    x = torch.randn(9, 1).sign().to(dtype)
    weight = torch.randn(50, 1)
    weight = (weight / weight.abs().max()).to(dtype).sort(0).values
    weight[1], weight[-2] = weight[0], weight[-1]
    if dtype == torch.float16:
        size = min(size, 6e4)
    weight = weight * size
    targets = torch.arange(9) * 6

    def results(function, kind, device="cpu"):
        leaves = [t.to(device, kind).requires_grad_() for t in (x, weight)]
        loss = function(*leaves, targets.to(device))
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    def plain(x, weight, targets):
        return linear_cross_entropy(x, weight, targets, reduction=reduction)

    def fused(x, weight, targets):
        return lk.linear_cross_entropy(x, weight, targets, reduction=reduction)

    with lk.use_backend(backend):
        ours = results(fused, dtype, DEVICE)
    for *values, term in zip(
        ours, results(plain, dtype), results(plain, torch.float64), (0, size * 50, 9), strict=True
    ):
        assert_close(*values, dtype, term)


MAGNITUDES = (0.0, 1e-30, 1e-6, 1e3, 1e6)  # products of a few are finite, in whatever order


@pytest.mark.parametrize("name, backend", PAIRS)
def test_random_cases(name, backend):
    """A fifth of the values of some other size. No result may overflow."""
    for seed in range(2 if gpu.INTERPRETED else 12):
        torch.manual_seed(seed)
        check_random_case(name, backend)


def check_random_case(name, backend):
    case = CASES[name]
    inputs, constants = case.make("odd"), case.constants("odd")
    for key, value in inputs.items():
        factors = torch.tensor(MAGNITUDES)[torch.randint(len(MAGNITUDES), value.shape)]
        inputs[key] = torch.where(torch.rand(value.shape) < 0.2, value * factors, value).float()
    grads = [torch.randn_like(o) for o in as_tuple(case.plain(**inputs, **constants))]

    def plainly(values):
        return flat(run(case.plain, dict(zip(inputs, values, strict=True)), constants, grads))

    given, fixed = ({k: t.to(DEVICE) for k, t in x.items()} for x in (inputs, constants))
    with lk.use_backend(backend):
        ours = flat(run(case.ours, given, fixed, [g.to(DEVICE) for g in grads]))
    exact = [value.double() for value in inputs.values()]
    plain, truth = plainly(inputs.values()), plainly(exact)
    moves = conditions(truth, plainly, exact)
    for a, *others, moved in zip(ours, plain, truth, moves, strict=True):
        assert a.isfinite().all()
        assert_close(a, *others, torch.float32, others[1].abs().max().item(), moved)


def flat(results):
    outputs, gradients = results
    return [*outputs, *gradients.values()]
