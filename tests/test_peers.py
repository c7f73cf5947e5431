"""What users of other kernel libraries reported as bugs, each as a test that passes here.

The op kit (test_ops.py) covers the rest of that list for every op: inputs and incoming gradients
that are written, expanded gradients, `reduction="none"`, a frozen body under a trainable head, all
subsets of frozen inputs, backward twice, torch.compile with ignored targets. Here run whatever
backends serve the tensors: the reference, on a GPU or in the interpreter Triton.
"""

import pytest
import torch
import torch.nn.functional as F

import llamapro_kernels as lk
from llamapro_kernels import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16


def far_rows(rows, *shape):
    """Rows 2^30 elements apart, so that offsets pass 32 bits; only what is used takes memory."""
    step = 2**30
    base = torch.empty(0, dtype=DTYPE, device=DEVICE)
    base = base.set_(torch.UntypedStorage((rows * step) * base.itemsize, device=DEVICE))
    strides = torch.empty(shape).stride()
    far = base.as_strided((rows, *shape), (step, *strides))
    near = torch.randn(rows, *shape, device=DEVICE).to(DTYPE)
    return far.copy_(near).requires_grad_(), near.clone().requires_grad_()


FAR = {  # what takes the far rows
    "rms_norm": (lambda x: lk.rms_norm(x, torch.ones(32, device=DEVICE)), (32,)),
    "rms_norm, looped": (lambda x: lk.rms_norm(x, torch.ones(16390, device=DEVICE)), (16390,)),
    "add_rms_norm": (lambda x: lk.add_rms_norm(x, x, torch.ones(32, device=DEVICE))[0], (32,)),
    "swiglu": (lk.swiglu, (32,)),
    "rope": (lambda x: lk.rope(x, x, *[torch.ones(5, 16, device=DEVICE)] * 2)[0], (5, 2, 16)),
    "attention": (lambda x: lk.flash_attention(x, x, x), (5, 2, 16)),
    "attention in time": (lambda x: lk.flash_attention(*[x[None]] * 3), (2, 16)),
    "linear_swiglu": (lambda x: lk.linear_swiglu(x, x[:2]), (32,)),
}


@pytest.mark.parametrize("name", FAR)
def test_offsets_beyond_32_bits(name):
    """An offset that is a product of 32-bit numbers wraps, and reads somewhere else."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("needs 16 GB of GPU memory")
    function, shape = FAR[name]
    far, near = far_rows(5, *shape)
    outputs = [function(x) for x in (far, near)]
    grads = [torch.autograd.grad(o.sum(), x)[0] for o, x in zip(outputs, (far, near), strict=True)]
    assert torch.equal(*outputs) and torch.equal(*grads)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_tokens_ignored(reduction):
    """0 and zero gradients, where a mean over nothing would be NaN."""
    x = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    targets = torch.full((6,), -100, device=DEVICE)
    loss = lk.linear_cross_entropy(x, weight, targets, reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 1000])
def test_ignored_targets_under_compile(ignore_index):
    """The index may lie inside the vocabulary; compiled and eager agree with PyTorch."""
    x, weight = torch.randn(9, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    targets = torch.randint(40, (9,), device=DEVICE)
    targets[::2] = ignore_index

    def loss(x):
        return lk.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index)

    expected = F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss(x), expected)
    torch.testing.assert_close(compiled(x), expected)


def test_a_frozen_body_under_a_trainable_head():
    """The head's gradient exists, and a second backward does not double it."""
    x = torch.randn(6, 16, device=DEVICE)
    weight = torch.randn(40, 16, device=DEVICE, requires_grad=True)
    targets = torch.randint(40, (6,), device=DEVICE)
    loss = lk.linear_cross_entropy(x, weight, targets)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    (expected,) = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), targets), weight)
    torch.testing.assert_close(first, expected)
    assert torch.equal(first, second)


def test_rows_that_see_nothing():
    """More queries than keys, which the public function refuses and the registered op takes: the
    first ones attend to nothing, and give 0 instead of NaN."""
    q = torch.randn(1, 7, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 4, 2, 16, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="as many keys as queries"):
        lk.flash_attention(q, k, k)
    o, _ = torch.ops.llamapro.flash_attention(q, k, k, None, True, 0.25, None)
    o.sum().backward()
    assert not o[:, :3].any() and not q.grad[:, :3].any()
    assert o.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="nothing to wait for")
def test_nothing_waits_for_the_gpu():
    """No .item(), no comparison of values on the host."""
    q = torch.randn(1, 64, 2, 32, device=DEVICE, requires_grad=True)
    weight = torch.randn(90, 64, device=DEVICE, requires_grad=True)
    targets = torch.randint(90, (64,), device=DEVICE)
    cuts = torch.tensor([0, 20, 64], dtype=torch.int32, device=DEVICE)
    norm = torch.ones(64, device=DEVICE, requires_grad=True)
    angles = torch.ones(64, 32, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rotated, k = lk.rope(q, q, angles, angles)
        o = lk.flash_attention(rotated, k, q, cu_seqlens=cuts).flatten(2)
        y, total = lk.add_rms_norm(lk.rms_norm(o, norm), o, norm)
        gate_up = torch.cat((y, total), -1)
        hidden = lk.swiglu(gate_up) + lk.linear_swiglu(y, weight[:, :].repeat(2, 1)[:128])
        lk.linear_cross_entropy(hidden[0], weight, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_backend_is_what_is_said():
    """No silent fallback: what serves these tests is what `backends` names."""
    expected = "triton" if DEVICE == "cuda" or gpu.INTERPRETED else None
    assert expected is None or set(lk.backends().values()) == {expected}
