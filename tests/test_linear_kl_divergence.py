"""What the op kit does not ask of the KL divergence of two heads."""

import weakref

import pytest
import torch
from op_cases import short
from test_ops import DEVICE, dtypes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import llamapro_kernels as lk
from benchmarks import plain
from llamapro_kernels import cpu, gpu, library, linear_head, matmul

BACKENDS = ["reference"]
BACKENDS += ["cpp"] if cpu.WHY_NO_BUILD is None and DEVICE == "cpu" else []
BACKENDS += ["triton"] if gpu.INTERPRETED or DEVICE == "cuda" else []
TYPED = [(backend, dtype) for backend in BACKENDS for dtype in dtypes(backend)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def heads(n=13, d=16, v=97, dtype=torch.float32):
    """Student's and teacher's states, and a head."""
    torch.manual_seed(0)
    return tuple(short(*shape).to(DEVICE, dtype) for shape in ((n, d), (n, d), (v, d)))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("backend, dtype", TYPED, ids=str)
def test_a_teacher_that_is_the_student_changes_nothing(backend, dtype, temperature):
    x, _, weight = (t.requires_grad_() for t in heads(dtype=dtype))
    with lk.use_backend(backend):
        losses = lk.linear_kl_divergence(
            x, x.detach(), weight, temperature=temperature, reduction="none"
        )
        grads = torch.autograd.grad(losses.sum(), [x, weight])
        loss = lk.linear_kl_divergence(x, x.detach(), weight, temperature=temperature)
        grads += torch.autograd.grad(loss, [x, weight])
    assert not losses.any() and not loss.any()
    assert not any(g.any() for g in grads)


@every_backend
def test_chunks_change_nothing(backend, monkeypatch):
    """Losses to the bit, from logits that are exact in any order; dx but for the order of sums."""
    generator = torch.Generator().manual_seed(0)
    x, teacher, weight = (
        torch.randint(-2, 3, size, generator=generator).float().to(DEVICE)
        for size in ((13, 16), (13, 16), (97, 16))
    )
    x.requires_grad_()
    found = []
    for tokens in (1, 6, 100):
        monkeypatch.setattr(linear_head, "CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(linear_head, "CHUNK_TOKENS", 4 * tokens)
        monkeypatch.setattr(linear_head, "CHUNK_TOKENS_CPU", 2 * tokens)
        with lk.use_backend(backend):
            losses = lk.linear_kl_divergence(x, teacher, weight, reduction="none")
            found.append((losses, *torch.autograd.grad(losses.sum(), [x])))
    # A component of dx sums 97 products, of terms of q - p, at most 2 together, and of at most 2.
    bound = 97 * torch.finfo(torch.float32).eps * 2 * 2
    for losses, dx in found[1:]:
        assert torch.equal(losses, found[0][0])
        assert (dx - found[0][1]).abs().max() <= bound


@every_backend
def test_tokens_that_do_not_count_are_as_if_not_there(backend):
    x, teacher, weight = heads()
    counted = torch.arange(13, device=DEVICE) % 3 == 0
    with lk.use_backend(backend):
        masked, alone = (
            lk.linear_kl_divergence(*states, weight, mask=mask)
            for states, mask in (((x, teacher), counted), ((x[counted], teacher[counted]), None))
        )
    torch.testing.assert_close(masked, alone, rtol=1e-6, atol=0)


@every_backend
def test_probabilities_of_nothing(backend):
    """A token that the teacher excludes adds nothing; one that the student alone excludes, inf."""
    x, teacher = torch.ones(2, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    mine, theirs = torch.zeros(2, 5, 1, device=DEVICE)
    theirs[2] = -float("inf")
    with lk.use_backend(backend):
        loss = lk.linear_kl_divergence(x, teacher, mine, teacher_weight=theirs)
        gone = lk.linear_kl_divergence(x, teacher, theirs, teacher_weight=mine)
    assert loss.item() == pytest.approx(torch.tensor(5 / 4).log().item(), rel=1e-6)
    assert gone.item() == float("inf")


@every_backend
def test_a_large_vocabulary(backend):
    if backend == "triton" and gpu.INTERPRETED:
        pytest.skip("the interpreter takes minutes")
    x, teacher, weight = heads(n=3, d=4, v=262144)
    x.requires_grad_()
    with lk.use_backend(backend):
        loss = lk.linear_kl_divergence(x, teacher, weight)
        (dx,) = torch.autograd.grad(loss, x)
    exact = x.detach().double().requires_grad_()
    truth = plain.linear_kl_divergence(exact, teacher.double(), weight.double())
    (expected,) = torch.autograd.grad(truth, exact)
    # 2^18 terms of at most 1, summed in fp32 by pieces: their square root of roundings.
    bound = 2**9 * torch.finfo(torch.float32).eps
    assert abs(loss.item() - truth.item()) <= bound * truth.item()
    assert (dx - expected).norm() <= bound * expected.norm()


class Peak(TorchDispatchMode):
    """Counts the bytes of storages that are made and live at a time."""

    def __init__(self, *given):
        super().__init__()
        self.live, self.peak = 0, 0
        self.held = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._hold(t.untyped_storage())
        return out

    def _hold(self, storage):
        key = storage._cdata
        if key in self.held:
            return
        size = storage.nbytes()
        self.held.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key, size):
        self.held.discard(key)
        self.live -= size


def test_memory_is_a_twentieth_of_plain(monkeypatch):
    """Of 8192 tokens, 4096 wide, 128k words in bf16: by the allocations on a device without one."""
    monkeypatch.setattr(matmul, "MKL_IS_SLOW", False)  # the products of a GPU
    monkeypatch.setattr(matmul, "EMULATED", set())
    states = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(128256, 4096, dtype=torch.bfloat16, device="meta")
    mask = torch.ones(8192, dtype=torch.bool, device="meta")
    x = states.clone().requires_grad_()
    with Peak(x, states, weight) as theirs:
        torch.autograd.grad(plain.linear_kl_divergence(x, states, weight), x)
    forward = library._ops["linear_kl_divergence"].implementations["triton"]["forward"]
    with Peak(states, weight, mask) as ours, torch.no_grad():
        forward.func(
            *(states, states, weight, weight, mask, 1.0, False, True, False),
            divergence=lambda *_: None,
        )
    assert 0 < 20 * ours.peak <= theirs.peak


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1)])
def test_flops_are_exact(wanted, reduction):
    x, teacher, weight = heads()
    leaves = [t for i, t in enumerate((x, weight)) if i in wanted]
    for t in leaves:
        t.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        losses = lk.linear_kl_divergence(x, teacher, weight, reduction=reduction)
        if leaves:
            torch.autograd.grad(losses.sum(), leaves)
    products = 2 + len(wanted)
    products += 2 * (reduction == "none" and 1 in wanted)  # both logits again
    assert counter.get_total_flops() == products * 2 * 13 * 16 * 97


BAD = {
    "temperature of 0": (ValueError, "above 0 and finite, got 0", {"temperature": 0}),
    "no number": (ValueError, "got nan", {"temperature": float("nan")}),
    "reduction": (ValueError, "'max'", {"reduction": "max"}),
    "mask's dtype": (TypeError, "torch.float32", {"mask": torch.ones(13)}),
    "mask's shape": (ValueError, r"got \(12,\)", {"mask": torch.ones(12, dtype=torch.bool)}),
    "a list": (TypeError, "list", {"mask": [True] * 13}),
    "teacher's head": (ValueError, r"\(90, 16\)", {"teacher_weight": torch.ones(90, 16)}),
    "its dtype": (TypeError, "float16", {"teacher_weight": torch.ones(97, 16).half()}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, message, options = BAD[case]
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        lk.linear_kl_divergence(*heads(), **options)


def test_states_of_other_sizes_are_named():
    x, teacher, weight = heads()
    for states in ((x[:5], teacher), (x[:, :7], teacher), (x, teacher[:, :7])):
        with pytest.raises(ValueError, match=r"x \(\.\.\., D\), teacher \(\.\.\., E\)"):
            lk.linear_kl_divergence(*states, weight)
