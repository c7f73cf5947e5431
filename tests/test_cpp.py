"""What holds for the compiled CPU ops alone: blocks, threads, memory that is freed or too small."""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from op_cases import CASES
from test_ops import as_tuple, convert, draw, run

import llamapro_kernels as lk
from benchmarks.plain import attention as plain_attention
from llamapro_kernels import cpu, library

pytestmark = pytest.mark.skipif(cpu.WHY_NO_BUILD is not None, reason=str(cpu.WHY_NO_BUILD))

MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 70},
    "packed": {"cu_seqlens": [0, 1, 130, 131, 300]},
    "packed window": {"cu_seqlens": [0, 150, 300], "window": 40},
}
LENGTHS = {"causal": [(1, 300, 300), (2, 129, 257), (1, 65, 300), (1, 1, 300)]}
LENGTHS["full"] = [(1, 300, 300), (2, 300, 65)]


# Of each build: what it is for, and what other CPUs than those it is loaded on would have.
OWN = {
    "baseline": "%xmm",
    "avx2": "%ymm",
    "avx512": "%zmm",
    "avx512_bf16": r"\bvdpbf16ps",
    "amx": r"\btdpbf16ps",
}
FOREIGN = {
    "baseline": "%[yz]mm",
    "avx2": "%zmm",
    "avx512": r"\bv(dpbf16ps|cvtne)",
    "avx512_bf16": r"\bt(dp|ileload)",
    "amx": r"\btdp(fp16|bss)",
}


@pytest.mark.parametrize("build", FOREIGN)
def test_a_build_has_the_instructions_of_its_cpus(build):
    """Any other would end the process there; objects of two builds were once mixed up."""
    path = Path(cpu.__file__).parent / f"cpu_{build}.so"
    if not path.exists() or not shutil.which("objdump"):
        pytest.skip("no such build, or no objdump to read it with")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(OWN[build], listing)
    assert not re.search(FOREIGN[build], listing)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def attention(sizes, mask, dtype, dim):
    """o, dq, dk and dv: ours, plain PyTorch's in the dtype, and the truth."""
    torch.manual_seed(0)
    batch, queries, keys = sizes
    options = dict(MASKS[mask])
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    shapes = [(batch, queries, 4, dim), *[(batch, keys, 2, dim)] * 2, (batch, queries, 4, dim)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]

    def results(function, dtype):
        q, k, v, do = (x.to(dtype) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = function(*leaves, **options)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    with lk.use_backend("cpp"):
        ours = results(lk.flash_attention, dtype)
    plain, truth = (results(plain_attention, kind) for kind in (dtype, torch.float64))
    return list(zip(ours, plain, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 17])
@pytest.mark.parametrize(
    "mask, sizes",
    [(mask, sizes) for mask in MASKS for sizes in LENGTHS.get(mask, [(1, 300, 300)])],
)
def test_attention_over_several_blocks(mask, sizes, dim, dtype):
    """The three-way rule of the op kit, on lengths that no block divides."""
    for ours, plain, truth in attention(sizes, mask, dtype, dim):
        stored = torch.finfo(dtype).eps / 2 * truth.abs().max()
        summed = 300 * torch.finfo(torch.float32).eps / 2 * truth.abs().max()
        error, peer = ((x - truth).abs().max() for x in (ours, plain))
        assert error <= 2 * peer + stored + summed


@pytest.mark.parametrize("across_b", [False, True])
@pytest.mark.parametrize("across_a", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (33, 97, 70), (64, 1100, 300), (600, 32, 17), (1030, 33, 530)]
)
def test_matmul_over_several_pieces(sizes, across_a, across_b, threads):
    """Rows or columns of a and b are neighbours; a residual is added, or a total in fp32.

    The last result is stored around the cache: that takes rows that start where cache lines do.
    """
    m, k, n = sizes
    a = torch.randn(k, m + 3).bfloat16()[:, :m].T if across_a else torch.randn(m, k).bfloat16()
    b = torch.randn(n, k + 1).bfloat16()[:, :k].T if across_b else torch.randn(k, n).bfloat16()
    truth = a.double() @ b.double()
    residual = torch.randn(m, n).bfloat16()
    for count in (2, 5):
        threads(count)
        wide, total = torch.full((m, n // 32 * 32 + 32), 7.0).bfloat16(), torch.ones(m, n)
        cpu.ops.matmul(a, b, residual, wide[:, :n], None)
        cpu.ops.matmul(a, b, None, None, total)
        once = {"rtol": 2**-8, "atol": 1e-4}  # half a unit of bf16, and the sums in fp32
        torch.testing.assert_close(wide[:, :n].double(), truth + residual.double(), **once)
        torch.testing.assert_close(total.double(), 1 + truth, rtol=1e-5, atol=1e-3)
        assert (wide[:, n:] == 7).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(name, count, threads):
    """As many threads, the same bits; fewer or more, the same but for the order of sums."""
    inputs, constants, grads = draw(name, "typical")
    inputs = convert(inputs, torch.bfloat16)
    results = []
    with lk.use_backend("cpp"):
        for now in (count, count, 3):
            threads(now)
            outputs, gradients = run(CASES[name].ours, inputs, constants, grads)
            results.append([*outputs, *gradients.values()])
    for first, again, other in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, other)


def test_attention_has_the_same_bits_for_the_same_threads(threads):
    threads(5)
    runs = [attention((2, 300, 300), "causal", torch.bfloat16, 64) for _ in range(2)]
    for (first, *_), (second, *_) in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_nan_and_infinity_go_through():
    """As in plain PyTorch: what is broken is seen."""
    q, k, v = (torch.randn(1, 8, 1, 16) for _ in "qkv")
    q[0, 5] = float("nan")
    k[0, 6] = float("inf")
    with lk.use_backend("cpp"):
        o = lk.flash_attention(q, k, v)
        assert o[0, :5].isfinite().all() and o[0, 5:].isnan().all()
        x = torch.tensor([[float("nan"), 1, -1e4, 1e4, float("inf"), 1, 1, 1]])
        ours, plain = lk.swiglu(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:]
    torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("function", ["exp", "log_sum_exp"])
def test_extreme_logits(function):
    """2^x over its whole range, through the op that needs it: losses equal PyTorch's."""
    scale = {"exp": 1.0, "log_sum_exp": 80.0}[function]
    x = torch.linspace(-1, 1, 501)[:, None] * scale
    weight, targets = torch.tensor([[1.0], [-1.0], [0.0]]), torch.arange(501) % 3
    with lk.use_backend("cpp"):
        ours = lk.linear_cross_entropy(x, weight, targets, reduction="none")
    plain = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")
    torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads_now", [1, 2])
def test_memory_beside_the_logits_counts_for_nothing(threads_now, threads):
    """Rows of logits are padded, and oneDNN on AMX multiplies what lies there, were it NaN."""
    threads(threads_now)
    x = torch.randn(300, 32).bfloat16().requires_grad_()
    weight, targets = torch.randn(97, 32).bfloat16(), torch.arange(300) % 97
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory is NaN
    try:
        with lk.use_backend("cpp"):
            lk.linear_cross_entropy(x, weight, targets).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_attention_takes_memory_only_for_what_is_wanted(wanted):
    """By bits: each gradient alone is the one that comes with all."""
    q, do = torch.randn(2, 1, 200, 4, 32)
    k, v = torch.randn(2, 1, 200, 2, 32)
    functions = library._ops["flash_attention"].implementations["cpp"]
    options = (None, True, 0.2, None)
    o, stats = functions["forward"](q, k, v, *options)
    complete = functions["backward"](do, q, k, v, o, stats, *options, True, True, True)
    only_v = wanted == (False, False, True)
    given = (do, q, k, None, None, stats) if only_v else (do, q, k, v, o, stats)
    for grad, all_of_it, want in zip(
        as_tuple(functions["backward"](*given, *options, *wanted)), complete, wanted, strict=True
    ):
        assert torch.equal(grad, all_of_it) if want else not grad.numel()


def test_messages_say_got_and_expected():
    with pytest.raises(RuntimeError, match="float32, bfloat16 or float16 expected, got"):
        cpu.ops.swiglu_forward(torch.ones(2, 4).double(), torch.ones(2, 2).double())
    with pytest.raises(RuntimeError, match="a matrix expected, got 3 dimensions"):
        cpu.ops.swiglu_forward(torch.ones(1, 2, 4), torch.ones(2, 2))
    a = torch.ones(2, 4).bfloat16()
    with pytest.raises(RuntimeError, match="times bfloat16 as Float expected, got BFloat16"):
        cpu.ops.matmul(a, a.T, None, None, torch.ones(2, 2).bfloat16())
    with pytest.raises(RuntimeError, match=r"\(M, K\) times \(K, N\) expected"):
        cpu.ops.matmul(a, a, None, torch.ones(2, 4).bfloat16(), None)
