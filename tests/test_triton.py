"""What holds for the Triton kernels alone: what they launch and allocate, and their tiles.

Runs where Triton does: on a GPU, or in its interpreter (TRITON_INTERPRET=1).
"""

import importlib
from unittest import mock

import pytest
import torch
from op_cases import CASES
from test_ops import DEVICE, as_tuple, convert, draw, move
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import llamapro_kernels as lk
from benchmarks.plain import attention as plain_attention
from llamapro_kernels import attention_triton, gpu, library, matmul

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or gpu.INTERPRETED), reason="needs a GPU or the interpreter"
)


class Allocations(TorchDispatchMode):
    """The sizes, in elements, of all memory that is asked for."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        given |= {
            t.untyped_storage()._cdata for t in (kwargs or {}).values() if hasattr(t, "dtype")
        }
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, list) else as_tuple(result)
        for t in (t for t in results if isinstance(t, torch.Tensor)):
            if t.numel() and t.untyped_storage()._cdata not in given:
                self.sizes.append(t.numel())
        return result


class Recorder:
    """The kernels that are launched, and what the launchers allocate, while it is entered."""

    def __init__(self, op):
        self.implementation = library._ops[op].implementations["triton"]
        self.kernels, self.allocated, self.descriptors = [], [], False

    def __enter__(self):
        self.patches = [mock.patch.object(gpu, "launch", self.launch)]
        counted = {kind: self.counted(f) for kind, f in self.implementation.items()}
        self.patches.append(mock.patch.dict(self.implementation, counted))
        for patch in self.patches:
            patch.__enter__()
        return self

    def __exit__(self, *error):
        for patch in reversed(self.patches):
            patch.__exit__(*error)

    def launch(self, kernel, grid, *args, launch=gpu.launch, **options):
        self.kernels.append(kernel.fn.__name__.removesuffix("_kernel"))
        self.descriptors |= options.get("TMA", False)
        with _disable_current_modes():  # the interpreter allocates for itself
            launch(kernel, grid, *args, **options)

    def counted(self, function):
        def call(*args):
            with Allocations() as allocations:
                result = function(*args)
            self.allocated += allocations.sizes
            return result

        return call


# What backward launches for each set of wanted inputs, and the memory it asks for: as much as these
# inputs have, "delta" for a number a row, "stats" for two, "logits" and "gate_up" for these
# intermediates.
DWEIGHT = ["rms_norm_backward", "sum_of_rows"]
BACKWARD = {
    ("rms_norm", "x"): (["rms_norm_backward"], ["x"]),
    ("rms_norm", "weight"): (DWEIGHT, ["weight", "weight"]),  # partial sums, sum
    ("rms_norm", "x weight"): (DWEIGHT, ["x", "weight", "weight"]),
    ("add_rms_norm", "residual"): (["rms_norm_backward"], ["x"]),
    ("add_rms_norm", "x residual"): (["rms_norm_backward"], ["x"]),
    ("add_rms_norm", "weight"): (DWEIGHT, ["weight", "weight"]),
    ("rope", "q"): (["rope"], ["q"]),
    ("rope", "k"): (["rope"], ["k"]),
    ("rope", "q k"): (["rope"], ["q", "k"]),
    ("swiglu", "gate_up"): (["swiglu_backward"], ["gate_up"]),
    ("attention", "q"): (["attention_delta", "attention_dq"], ["q", "delta"]),
    ("attention", "k"): (["attention_delta", "attention_dkv"], ["k", "delta"]),
    ("attention", "v"): (["attention_dkv"], ["v"]),
    ("attention", "k v"): (["attention_delta", "attention_dkv"], ["k", "v", "delta"]),
    ("attention", "q k v"): (
        ["attention_delta", "attention_dq", "attention_dkv"],
        ["q", "k", "v", "delta"],
    ),
    ("linear_swiglu", "x"): (["swiglu_backward"], ["gate_up", "gate_up", "x"]),
    ("linear_swiglu", "weight"): (["swiglu_backward"], ["gate_up", "gate_up", "weight"]),
    # The loss computes its gradients forward; only dweight of single losses needs the logits again.
    ("cross_entropy_mean", "x"): ([], []),
    ("cross_entropy_mean", "weight"): ([], []),
    ("cross_entropy_none", "x"): ([], []),
    ("cross_entropy_none", "weight"): (["dlogits"] * 2, ["logits", "weight"]),
}
FORWARD = {
    ("rms_norm", ""): (["rms_norm_forward"], ["x", "rows"]),
    ("add_rms_norm", ""): (["rms_norm_forward"], ["x", "x", "rows"]),
    ("rope", ""): (["rope"], ["q", "k"]),
    ("swiglu", ""): (["swiglu_forward"], ["y"]),
    ("linear_swiglu", ""): (["linear_swiglu"], ["y"]),
    ("attention", ""): (["attention_forward"], ["q", "stats"]),
    ("cross_entropy_sum", ""): (["cross_entropy"] * 2, ["logits", "rows", "stats", "one"]),
    ("cross_entropy_sum", "x"): (
        ["cross_entropy", "dlogits"] * 2,
        ["logits", "rows", "stats", "one", "x"],
    ),
    ("cross_entropy_sum", "weight"): (
        ["cross_entropy", "dlogits"] * 2,
        ["logits", "rows", "stats", "one", "weight"],
    ),
}


@pytest.fixture(autouse=True)
def products_of_a_gpu(monkeypatch):
    """In the interpreter too: what is counted is what a GPU would be asked for."""
    monkeypatch.setattr(matmul, "MKL_IS_SLOW", False)
    monkeypatch.setattr(matmul, "EMULATED", set())


@pytest.fixture
def two_chunks(monkeypatch):
    """The 21 tokens of the loss's typical case in chunks of 11."""
    head, loss = (
        importlib.import_module(f"llamapro_kernels.{name}")
        for name in ("linear_head", "linear_cross_entropy")
    )
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 11 * 97)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 1)
    monkeypatch.setattr(head, "CHUNK_TOKENS_CPU", 1)
    monkeypatch.setattr(loss, "_check_targets", lambda *_: None)  # a GPU does without


def prepare(name, wanted):
    """The leaves of a case, its constants and gradients, and the sizes by name."""
    inputs, constants, grads = draw(name, "typical")
    leaves = convert(inputs, torch.float32)
    sizes = {key: value.numel() for key, value in leaves.items()} | {"one": 1}
    if "q" in leaves:
        sizes["delta"] = leaves["q"].shape[:3].numel()
        sizes["stats"] = 2 * sizes["delta"]
    if "x" in leaves:
        sizes["rows"] = leaves["x"].shape[:-1].numel()
        sizes["stats"] = 2 * sizes["rows"]
    if "weight" in leaves:
        sizes["gate_up"] = sizes["rows"] * len(leaves["weight"])
        sizes["logits"] = 11 * (-(-len(leaves["weight"]) // 16) * 16)  # rows begin aligned
    for key in wanted.split():
        leaves[key].requires_grad_()
    sizes["y"] = sizes.get("gate_up", 0) // 2
    return leaves, move(constants), [g.to(DEVICE, torch.float32) for g in grads], sizes


@pytest.mark.usefixtures("two_chunks")
@pytest.mark.parametrize("name, wanted", BACKWARD)
def test_backward_launches_and_allocates_for_what_is_wanted(name, wanted):
    kernels, memory = BACKWARD[name, wanted]
    leaves, constants, grads, sizes = prepare(name, wanted)
    with lk.use_backend("triton"):
        outputs = as_tuple(CASES[name].ours(**leaves, **constants))
        with Recorder(CASES[name].op) as seen:
            torch.autograd.backward(outputs, grads)
    assert seen.kernels == kernels
    assert sorted(seen.allocated) == sorted(sizes[key] for key in memory)


@pytest.mark.usefixtures("two_chunks")
@pytest.mark.parametrize("name, wanted", FORWARD)
def test_forward_launches_and_allocates_for_what_is_wanted(name, wanted):
    kernels, memory = FORWARD[name, wanted]
    leaves, constants, _, sizes = prepare(name, wanted)
    with lk.use_backend("triton"), Recorder(CASES[name].op) as seen:
        CASES[name].ours(**leaves, **constants)
    assert seen.kernels == kernels
    assert sorted(seen.allocated) == sorted(sizes[key] for key in memory)


def qkv_slices(batch, length, heads, kv_heads, dim, dtype=torch.float32):
    """q, k, v as a packed projection has them: views with the same rows."""
    qkv = torch.randn(batch, length, heads + 2 * kv_heads, dim, device=DEVICE).to(dtype)
    return qkv.split((heads, kv_heads, kv_heads), 2)


def test_slices_of_a_packed_projection_are_not_copied():
    q, k, v = qkv_slices(2, 19, 4, 2, 32)
    angles = torch.rand(19, 16, device=DEVICE).repeat(1, 2)
    with lk.use_backend("triton"):
        with Recorder("rope") as seen:
            lk.rope(q, k, angles, angles)
        assert seen.allocated == [q.numel(), k.numel()]
        with Recorder("flash_attention") as seen:
            lk.flash_attention(q, k, v)
        assert seen.allocated == [q.numel(), 2 * q.shape[:3].numel()]
        with Recorder("rms_norm") as seen:
            lk.rms_norm(q[:, :, 1], torch.ones(32, device=DEVICE))
        assert seen.allocated == [2 * 19 * 32, 2 * 19]


@pytest.mark.parametrize(
    "keys, together",
    [
        ((1, 4096, 8, 128), 8),  # 512 programs of few heads: all of them, whatever the cache holds
        ((2, 4096, 32, 128), 8),  # as many as the cache holds
        ((1, 2048, 24, 128), 12),  # 16 would leave 8 for the end
        ((1, 0, 8, 128), 8),
        ((0, 4096, 8, 128), 1),
    ],
    ids=str,
)
def test_enough_heads_of_dk_and_dv_run_together(monkeypatch, keys, together):
    """With 132 processors and 64 keys a program; where heads are few, each has eight of queries."""
    monkeypatch.setattr(gpu, "processors", lambda device: 132)
    batch, length, heads, dim = keys
    k = torch.empty(keys, dtype=torch.bfloat16, device="meta")
    q = k.new_empty(batch, length, heads * 8 if heads == 8 else heads, dim)
    assert attention_triton._heads_together(k, q, 64) == together


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", [16384, 16390])
def test_wide_norms(width, add):
    """The last width that stays in registers, and a wider one, which is looped over."""
    name = "add_rms_norm" if add else "rms_norm"
    inputs = {key: torch.randn(3, width, device=DEVICE) for key in ("x", "residual")[: 1 + add]}
    inputs["weight"] = torch.rand(width, device=DEVICE)
    results = []
    for function, dtype in ((CASES[name].ours, torch.float32), (CASES[name].plain, torch.float64)):
        leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in inputs.items()}
        with lk.use_backend("triton"):
            outputs = as_tuple(function(**leaves))
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        results.append([*outputs, *(leaf.grad for leaf in leaves.values())])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-5)


MASKS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 40},  # some tiles are left out
    "packed": {"cu_seqlens": [0, 1, 130, 131, 140]},
    "packed window": {"cu_seqlens": [0, 100, 140], "window": 40},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_attention_in_the_tiles_of_gpus(chip, mask, monkeypatch):
    """Sequences of several shipped tiles that end within one; sm_90 reads by descriptors."""
    check_attention(chip, (1, 140, 140), dict(MASKS[mask]), monkeypatch)


@pytest.mark.parametrize("queries, keys", [(128, 256), (70, 200), (201, 129)])
def test_attention_by_descriptors_in_a_batch(queries, keys, monkeypatch):
    """No tile reaches into the next sequence of the batch; and S != T."""
    options = {"causal": False} if queries > keys else {}
    check_attention("sm_90", (2, queries, keys), options, monkeypatch)


@pytest.mark.parametrize("dim", [20, 80, 136, 256])
@pytest.mark.parametrize("chip", ["sm_86", "sm_90"])
def test_attention_with_other_heads(chip, dim, monkeypatch):
    """Padded to the next power of two; beyond 128 dk and dv are launched apart."""
    check_attention(chip, (1, 70, 70), {}, monkeypatch, dim)


def test_attention_by_descriptors_of_any_order(monkeypatch):
    """Heads before positions in memory, as PyTorch's attention has them, and a part of a row."""
    check_attention("sm_90", (2, 70, 70), {}, monkeypatch, arrange=heads_first)
    check_attention("sm_90", (2, 70, 70), {}, monkeypatch, arrange=within_a_row)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def within_a_row(x):
    return torch.cat((x, x), 2)[:, :, : x.shape[2]]


def check_attention(chip, sizes, options, monkeypatch, dim=64, arrange=lambda x: x):
    old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
    if chip == "sm_90" and old_gpu:
        pytest.skip("this GPU has no tensor descriptors")
    monkeypatch.setattr(gpu, "architecture", lambda device: chip)
    documents = options.pop("cu_seqlens", None)
    if documents is not None:
        documents = torch.tensor(documents, dtype=torch.int32)
    batch, queries, keys = sizes
    shapes = [(batch, queries, 2, dim), (batch, keys, 1, dim), (batch, keys, 1, dim)]
    inputs = [torch.randn(shape).half() for shape in (*shapes, shapes[0])]

    def run(function, dtype, device):
        *leaves, do = (arrange(x.to(device, dtype)) for x in inputs)
        leaves = [x.requires_grad_() for x in leaves]
        cuts = {"cu_seqlens": documents.to(device)} if documents is not None else {}
        o = function(*leaves, **options, **cuts)
        return [x.detach().cpu().double() for x in (o, *torch.autograd.grad(o, leaves, do))]

    with lk.use_backend("triton"), Recorder("flash_attention") as seen:
        results = run(lk.flash_attention, torch.float16, DEVICE)
    assert seen.descriptors == (chip == "sm_90" and dim % 8 == 0)
    peer, truth = (run(plain_attention, dtype, "cpu") for dtype in (torch.float16, torch.float64))
    for ours, plain, true in zip(results, peer, truth, strict=True):
        stored = torch.finfo(torch.float16).eps / 2 * true.abs().max()
        assert (ours - true).abs().max() <= 2 * (plain - true).abs().max() + stored
