"""The op kit: every op on every backend that serves it here passes the same tests.

Truth is plain PyTorch in fp64. The three-way rule: our largest error is at most twice that of
plain PyTorch in the same dtype, plus one rounding of the largest true value to that dtype (the
result has to be stored), plus the rounding of the accumulator over the longest sum of products
of two inputs (terms may cancel, so that the true value is small and the terms are not).
"""

import itertools

import pytest
import torch
from op_cases import BY_MASK, CASES, SIZES
from torch.utils._python_dispatch import TorchDispatchMode

import llamapro_kernels as lk
from llamapro_kernels import library, linear_head, matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST_SUM = 128  # of all cases: the vocabulary, rounded up
INTERPRETED = "triton" if DEVICE == "cpu" else None  # the backend that is slow, and without bf16


def dtypes(backend):
    exact = [torch.float64] if backend == "reference" else []
    half = [torch.float16] if backend == INTERPRETED else [torch.float16, torch.bfloat16]
    return [*exact, torch.float32, *half]


# Every case on every backend that can run here.
PAIRS = [
    (name, backend)
    for name, case in CASES.items()
    for backend in library._ops[case.op].implementations
    if library._runs_on(backend, DEVICE, torch.float32)
]
TYPED = [(name, backend, dtype) for name, backend in PAIRS for dtype in dtypes(backend)]
every_pair = pytest.mark.parametrize(
    "name, backend", [p for p in PAIRS if p[1] != INTERPRETED or p[0] not in BY_MASK]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that the loss takes several chunks of these few tokens, its gradients a few rows each."""
    monkeypatch.setattr(linear_head, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(linear_head, "CHUNK_TOKENS", 3)
    monkeypatch.setattr(linear_head, "CHUNK_TOKENS_CPU", 3)
    monkeypatch.setattr(linear_head, "SCALED_ELEMENTS", 100)
    monkeypatch.setattr(matmul, "ADDED", 100)


@pytest.fixture(autouse=True)
def poisoned_empty():
    """torch.empty gives NaN, so an output that is not written fails."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def strided(x):
    """The same values, every second element of a larger tensor, last dimension included."""
    wide = torch.stack((x, torch.full_like(x, float("nan"))), -1)
    return wide[..., 0]


def expanded(x):
    """The first slice of the first dimension, shared by all of it."""
    return x[:1].expand_as(x) if x.numel() > 1 else x


LAYOUTS = {"contiguous": lambda x: x, "strided": strided, "expanded": expanded}


def arrange(name, tensors, layout):
    """The tensors in the layout that is under test."""
    plain = CASES[name].never_expanded if layout == "expanded" else ()
    return {k: v if k in plain else LAYOUTS[layout](v) for k, v in tensors.items()}


def draw(name, size, layout="contiguous"):
    """fp64 inputs, constants and incoming gradients, in the values that the layout shares."""
    case = CASES[name]
    inputs = arrange(name, case.make(size), layout)
    constants = case.constants(size)
    outputs = as_tuple(case.plain(**inputs, **constants))
    return inputs, constants, [LAYOUTS[layout](o) for o in (torch.randn_like(o) for o in outputs)]


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def convert(tensors, dtype):
    """Contiguous, on the device and in the dtype."""
    return {k: v.contiguous().to(DEVICE, dtype) for k, v in tensors.items()}


def run(function, inputs, constants, grads, wanted=None):
    """Outputs and the gradients of the wanted inputs (all by default), None for the others."""
    wanted = inputs.keys() if wanted is None else wanted
    leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in inputs.items()}
    outputs = as_tuple(function(**leaves, **constants))
    if wanted:
        torch.autograd.backward(
            outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        )
    return [o.detach() for o in outputs], {k: v.grad for k, v in leaves.items()}


def move(constants):
    return {k: v.to(DEVICE) for k, v in constants.items()}


def assert_three_way(ours, plain, truth, dtype, term, what):
    """`term`: the size of the largest term that sums to the truth."""
    assert ours.shape == truth.shape and ours.isfinite().all(), what
    if not truth.numel():
        return
    error, peer = ((x.double().cpu() - truth).abs().max().item() for x in (ours, plain))
    stored = torch.finfo(dtype).eps / 2 * truth.abs().max().item()
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    summed = LONGEST_SUM * torch.finfo(accumulator).eps / 2 * term
    bound = 2 * peer + stored + summed
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}, plain {peer:.3e}"


# One row, or none, is expanded as it is. The slow interpreter changes one thing at a time: layout,
# dtype or mask.
VALUES = [
    (name, backend, dtype, size, layout)
    for (name, backend, dtype), size, layout in itertools.product(TYPED, SIZES, LAYOUTS)
    if (layout != "expanded" or size in ("typical", "odd"))
    and (
        backend != INTERPRETED
        or (layout != "contiguous") + (dtype != torch.float32) + (name in BY_MASK) <= 1
    )
]


@pytest.mark.parametrize("name, backend, dtype, size, layout", VALUES, ids=str)
def test_values(name, backend, dtype, size, layout):
    """Outputs and gradients obey the three-way rule; nothing that was passed in is changed."""
    case = CASES[name]
    inputs, constants, grads = draw(name, size, layout)
    rounded = {k: v.to(dtype).double() for k, v in inputs.items()}
    given = arrange(name, convert(inputs, dtype), layout)
    upstream = [LAYOUTS[layout](g.contiguous().to(DEVICE)) for g in grads]
    before = [t.clone() for t in (*given.values(), *upstream)]
    with lk.use_backend(backend):
        outputs, gradients = run(case.ours, given, move(constants), upstream)
    for kept, now in zip(before, (*given.values(), *upstream), strict=True):
        assert torch.equal(kept, now), "an input or incoming gradient was changed"
    rounded_grads = [g.to(o.dtype).double() for g, o in zip(grads, outputs, strict=True)]
    truth, true_gradients = run(case.plain, rounded, constants, rounded_grads)
    peer, peer_gradients = run(
        case.plain, {k: v.to(dtype) for k, v in rounded.items()}, constants, rounded_grads
    )
    values = [*rounded.values(), *rounded_grads]
    term = max((v.abs().max().item() for v in values if v.numel()), default=0.0) ** 2
    for i, output in enumerate(outputs):
        assert_three_way(output, peer[i], truth[i], dtype, term, f"output {i}")
    for key, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_three_way(gradient, peer_gradients[key], true_gradients[key], dtype, term, f"d{key}")


class Calls(TorchDispatchMode):
    """Records every llamapro op that runs, with its arguments and outputs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "llamapro":
            self.seen.append((function, args, as_tuple(result)))
        return result


@every_pair
def test_wanted_gradients_only(name, backend):
    """For every subset: the same bits as with all, None and no memory for the others."""
    case = CASES[name]
    inputs, constants, grads = draw(name, "odd")
    inputs, constants = convert(inputs, torch.float32), move(constants)
    grads = [g.to(DEVICE) for g in grads]
    with lk.use_backend(backend):
        _, complete = run(case.ours, inputs, constants, grads)
        for count in range(len(inputs) + 1):
            for wanted in itertools.combinations(inputs, count):
                saved = []
                with (
                    Calls() as calls,
                    torch.autograd.graph.saved_tensors_hooks(
                        lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t
                    ),
                ):
                    _, gradients = run(case.ours, inputs, constants, grads, wanted)
                assert bool(saved) == bool(wanted), "saves exactly when a gradient is wanted"
                for key in inputs:
                    if key in wanted:
                        assert torch.equal(gradients[key], complete[key]), (wanted, key)
                    else:
                        assert gradients[key] is None, (wanted, key)
                # add_rms_norm has one gradient for x and residual.
                distinct = {("x" if k == "residual" else k) for k in wanted}
                assert gradient_outputs(calls) == len(distinct), wanted


def gradient_outputs(calls):
    """How many gradients with memory the ops returned, the forward of the loss included."""
    count = 0
    for function, _, outputs in calls.seen:
        name = function.name()
        if "_backward" in name:
            count += sum(o.numel() > 0 for o in outputs)
        elif "linear_cross_entropy" in name or "linear_kl_divergence" in name:
            count += sum(o.numel() > 0 for o in outputs[2:])
    return count


@every_pair
def test_part_of_the_outputs(name, backend):
    """An output that nothing uses has no gradient, and the others are still right."""
    case = CASES[name]
    inputs, constants, _ = draw(name, "odd")
    inputs, constants = convert(inputs, torch.float32), move(constants)
    with lk.use_backend(backend):
        count = len(as_tuple(case.ours(**inputs, **constants)))
        for used in range(count):
            grads = []
            for function in (case.ours, case.plain):
                leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
                as_tuple(function(**leaves, **constants))[used].sum().backward()
                grads.append([v.grad for v in leaves.values()])
            for ours, plain in zip(*grads, strict=True):
                if ours is None or plain is None:
                    missing = ours if plain is None else plain
                    assert missing is None or not missing.any()
                else:
                    torch.testing.assert_close(ours, plain)


@every_pair
def test_backward_twice(name, backend):
    """retain_graph: the second backward gives the same bits and changes nothing."""
    case = CASES[name]
    inputs, constants, grads = draw(name, "odd")
    leaves = {k: v.requires_grad_() for k, v in convert(inputs, torch.float32).items()}
    with lk.use_backend(backend):
        outputs = as_tuple(case.ours(**leaves, **move(constants)))
        grads = [g.to(DEVICE, o.dtype) for g, o in zip(grads, outputs, strict=True)]
        first, second = (
            torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True)
            for _ in range(2)
        )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@every_pair
def test_second_derivative_is_refused(name, backend):
    case = CASES[name]
    inputs, constants, _ = draw(name, "odd")
    leaves = {k: v.requires_grad_() for k, v in convert(inputs, torch.float32).items()}
    with lk.use_backend(backend), pytest.raises(RuntimeError, match="no second derivative"):
        outputs = as_tuple(case.ours(**leaves, **move(constants)))
        loss = sum(o.sum() for o in outputs)
        torch.autograd.grad(loss, list(leaves.values()), create_graph=True)


@every_pair
def test_opcheck(name, backend):
    """The schemas and fakes of the forward and backward ops, and how they are registered with
    autograd, which does not depend on what serves them."""
    case = CASES[name]
    inputs, constants, grads = draw(name, "odd")
    inputs, constants = convert(inputs, torch.float32), move(constants)
    torch.use_deterministic_algorithms(False)  # opcheck compares unwritten memory of empties
    with lk.use_backend(backend):
        with Calls() as calls:
            run(case.ours, inputs, constants, [g.to(DEVICE) for g in grads])
        for function, args, _ in calls.seen:
            forward = "_backward" not in function.name()
            fresh = [
                a.detach().clone().requires_grad_(forward and a.is_floating_point())
                if isinstance(a, torch.Tensor)
                else a
                for a in args
            ]
            tests = ["test_schema", "test_faketensor"]
            if forward and backend == "reference":
                tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
            torch.library.opcheck(function, tuple(fresh), test_utils=tests)


@every_pair
def test_fullgraph_compile(name, backend):
    """One graph, no break, the same bits as eager."""
    case = CASES[name]
    inputs, constants, grads = draw(name, "odd")
    inputs, constants = convert(inputs, torch.float32), move(constants)
    grads = [g.to(DEVICE) for g in grads]
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    with lk.use_backend(backend):
        expected, expected_gradients = run(case.ours, inputs, constants, grads)
        outputs, gradients = run(compiled, inputs, constants, grads)
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)
    for key, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[key])


KEPT = {
    ("rms_norm", "x"): {"x", "weight"},
    ("rms_norm", "weight"): {"x"},
    ("rope", "q"): set(),
    ("swiglu", "gate_up"): {"gate_up"},
    ("attention", "q"): {"q", "k", "v"},
    ("attention", "v"): {"q", "k"},
    ("cross_entropy_mean", "x"): set(),
    ("cross_entropy_sum", "weight"): set(),
    ("cross_entropy_none", "x"): set(),
    ("cross_entropy_none", "weight"): {"x", "weight"},
    ("kl_mean", "x"): set(),
    ("kl_sum", "weight"): set(),
    ("kl_none", "weight"): {"x", "weight"},
}


@pytest.mark.parametrize("name, wanted", KEPT)
def test_saves_only_what_the_wanted_gradient_needs(name, wanted):
    inputs, constants, grads = draw(name, "odd")
    inputs, saved = convert(inputs, torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(CASES[name].ours, inputs, move(constants), [g.to(DEVICE) for g in grads], {wanted})
    kept = {k for k, v in inputs.items() if any(s.data_ptr() == v.data_ptr() for s in saved)}
    assert kept == KEPT[name, wanted]


def projection(dtype):
    """(qkv, q, k, v): the last three as views of a packed projection of 4, 2 and 2 heads."""
    qkv = torch.randn(2, 19, 4 + 2 * 2, 32, device=DEVICE).to(dtype)
    return qkv, *qkv.split((4, 2, 2), 2)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("_, backend, dtype", [t for t in TYPED if t[0] == "rope"], ids=str)
def test_rope_in_place(_, backend, dtype, inverse):
    """To the bit what the op gives, and nothing else of the projection is touched."""
    qkv, q, k, v = projection(dtype)
    before, angles = v.clone(), torch.rand(19, 16, device=DEVICE).repeat(1, 2)
    table = angles.cos(), angles.sin()
    ops = torch.ops.llamapro
    with lk.use_backend(backend):
        rotated = ops.rope_backward(q, k, *table, True, True) if inverse else ops.rope(q, k, *table)
        assert ops.rope_inplace(qkv[:, :, :6], *table, inverse) is None
    assert torch.equal(qkv, torch.cat((*rotated, before), 2))
    assert qkv._version > 0  # so that whoever keeps the projection sees that it was changed


@pytest.mark.parametrize("documents", [None, [0, 5, 19]], ids=str)
@pytest.mark.parametrize(
    "_, backend, dtype",
    [t for t in TYPED if t[0] == "attention" and t[1:] != (INTERPRETED, torch.float16)],
    ids=str,
)
def test_packed_gradients_of_attention(_, backend, dtype, documents):
    """To the bit those that come apart."""
    _, q, k, v = (t[: 1 if documents else 2] for t in projection(dtype))
    cu_seqlens = documents and torch.tensor(documents, dtype=torch.int32, device=DEVICE)
    options = cu_seqlens, True, 0.2, None if documents else 7
    ops = torch.ops.llamapro
    with lk.use_backend(backend):
        o, stats = ops.flash_attention(q, k, v, *options)
        saved = torch.randn_like(o), q, k, v, o, stats, *options
        apart = ops.flash_attention_backward(*saved, True, True, True)
        assert torch.equal(ops.flash_attention_backward_packed(*saved), torch.cat(apart, 2))
