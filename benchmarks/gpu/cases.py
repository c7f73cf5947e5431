"""What `benchmarks.gpu` checks and measures, in order, and the cases that are not attention."""

import importlib
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import llamapro_kernels as lk
from benchmarks import plain
from benchmarks.gpu.attention import attention, packed, windowed
from benchmarks.gpu.measure import Case, Peer

EPS = 1e-5


@dataclass(frozen=True)
class Llama:
    width: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Scale:
    """How large everything is, so that a CPU can run all of it too."""

    models: dict[str, Llama]  # of the names below
    lengths: tuple[int, ...]  # of attention: short, the usual one, long, and once the longest
    tokens: int  # rows of the other ops, and tokens of an attention batch
    elements: int  # of the largest tensor: there offsets must not wrap
    copy_bytes: int
    matmul: int
    seconds: float  # of timing, a row
    test_seconds: float  # most for the op tests
    compiler: str  # the backend of torch.compile


GPU = Scale(
    models={
        "1B": Llama(2048, 32, 8, 64, 8192, 128256),
        "7B": Llama(4096, 32, 32, 128, 11008, 32000),
        "70B": Llama(8192, 64, 8, 128, 28672, 128256),
    },
    lengths=(1024, 4096, 8192, 16384),
    tokens=8192,
    elements=2**31,
    copy_bytes=2**31,
    matmul=8192,
    seconds=1.0,
    test_seconds=120,
    compiler="inductor",
)


def public(op):
    """Our op, looked up when it is called: an op that is absent fails in its own row only."""
    return lambda *inputs: getattr(lk, op)(*inputs)


def normal(*shape, scale=1.0, **where):
    return torch.randn(*shape, **where).mul_(scale)


def liger(device, file, name, *options):
    """Liger's function where it is installed. Its rope writes into its inputs: not a peer."""
    try:
        function = getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name)
    except (ImportError, AttributeError):
        return {}
    return {"Liger": Peer(lambda *x: function.apply(*x, *options))} if device == "cuda" else {}


NORMS = {  # inputs, Liger's file and name, tensors moved forward and backward
    "rms_norm": (("x",), "rms_norm", "LigerRMSNormFunction", 2, 3),
    "add_rms_norm": (
        ("x", "residual"),
        "fused_add_rms_norm",
        "LigerFusedAddRMSNormFunction",
        4,
        4,
    ),
}


def norm(op, name, model, rows, device, trainable, **more):
    """x, the residual and, where it is trainable, the weight want gradients."""
    inputs, file, function, forward, backward = NORMS[op]
    formula = partial(getattr(plain, op), eps=EPS)

    def make(device, dtype):
        where = {"device": device, "dtype": dtype}
        weight = 1 + normal(model.width, scale=0.1, **where)
        return {**{n: normal(rows, model.width, **where) for n in inputs}, "weight": weight}

    in_place = False  # or Liger writes its result into the incoming gradient
    return Case(
        op,
        f"{name}, {rows} x {model.width}",
        make,
        public(op),
        formula,
        (*inputs, "weight") if trainable else inputs,
        "bytes",
        forward=forward * 2 * rows * model.width,
        backward=backward * 2 * rows * model.width,
        terms=max(rows, model.width),
        peers={
            "plain": Peer(formula),
            **liger(device, file, function, EPS, 0.0, "llama", in_place),
        },
        **more,
    )


def swiglu(name, model, rows, device, **more):
    return Case(
        "swiglu",
        f"{name}, {rows} x 2 x {model.inner}",
        lambda device, dtype: {
            "gate_up": normal(rows, 2 * model.inner, device=device, dtype=dtype)
        },
        public("swiglu"),
        plain.swiglu,
        ("gate_up",),
        "bytes",
        forward=3 * 2 * rows * model.inner,
        backward=5 * 2 * rows * model.inner,
        terms=1,
        peers={
            "plain": Peer(plain.swiglu),
            **liger(device, "swiglu", "LigerFusedGateUpSiLUMulFunction", False),
        },
        **more,
    )


def rope(name, model, batch, length, wanted=("q", "k"), **more):
    heads = {"q": model.heads, "k": model.kv_heads}

    def make(device, dtype):
        angles = torch.rand(length, model.dim // 2, device=device).mul_(6.28).repeat(1, 2)
        tensors = {
            n: normal(batch, length, count, model.dim, device=device, dtype=dtype)
            for n, count in heads.items()
        }
        return {**tensors, "cos": angles.cos(), "sin": angles.sin()}

    head = 2 * 2 * batch * length * model.dim  # read and written, in 16 bits
    return Case(
        "rope",
        f"{name}, {batch} x {length}, {model.heads} and {model.kv_heads} heads of {model.dim}",
        make,
        public("rope"),
        plain.rope,
        wanted,
        "bytes",
        forward=head * sum(heads.values()),
        backward=head * sum(heads[n] for n in wanted),
        terms=2,
        peers={"plain": Peer(plain.rope)},
        **more,
    )


def bf16_loss(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight), targets)


def loss(name, model, tokens, device, wanted, **more):
    """A forward that wants no gradient may skip them; otherwise forward and backward together."""

    def make(device, dtype):
        where = {"device": device, "dtype": dtype}
        return {
            "x": normal(tokens, model.width, **where),
            "weight": normal(model.vocabulary, model.width, scale=model.width**-0.5, **where),
            "targets": torch.randint(model.vocabulary, (tokens,), device=device),
        }

    file, function = "fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"
    first = {
        n: Peer(lambda *x, p=p: p.run(*x)[0]) for n, p in liger(device, file, function).items()
    }
    product = 2 * tokens * model.width * model.vocabulary
    return Case(
        "linear_cross_entropy",
        f"{name}, {tokens} x {model.width}, vocabulary {model.vocabulary}",
        make,
        public("linear_cross_entropy"),
        plain.linear_cross_entropy,
        wanted,
        "flops",
        forward=product,
        backward=len(wanted) * product,
        terms=max(tokens, model.width),
        **{
            "peers": {
                "plain": Peer(plain.linear_cross_entropy),
                "plain, 16-bit loss": Peer(bf16_loss),
                **first,
            },
            "passes": ("both",) if wanted else ("forward",),
            **more,
        },
    )


def linear_swiglu(name, model, tokens, wanted, **more):
    """The fused product against the vendor's product and a SwiGLU of its own."""

    def make(device, dtype):
        where = {"device": device, "dtype": dtype}
        weight = normal(2 * model.inner, model.width, scale=model.width**-0.5, **where)
        return {"x": normal(tokens, model.width, **where), "weight": weight}

    product = 2 * tokens * model.width * 2 * model.inner
    return Case(
        "linear_swiglu",
        f"{name}, {tokens} x {model.width} to 2 x {model.inner}",
        make,
        public("linear_swiglu"),
        plain.linear_swiglu,
        wanted,
        "flops",
        forward=product,
        backward=len(wanted) * product,
        terms=max(tokens, 2 * model.inner),
        peers={
            "matmul, lk.swiglu": Peer(lambda x, weight: lk.swiglu(F.linear(x, weight))),
            "plain": Peer(plain.linear_swiglu),
        },
        **more,
    )


def checked(scale, device):
    """One case for each op and variant, to be checked in every dtype."""
    model, length = scale.models["7B"], scale.lengths[1]
    grouped = scale.models["1B"]
    yield attention("7B", model, 1, length, device)
    yield attention("1B", grouped, 1, length, device)
    yield packed("1B", grouped, length, device)
    yield windowed("1B", grouped, length, length // 4, device)
    yield norm("rms_norm", "7B", model, scale.tokens, device, True)
    yield norm("add_rms_norm", "7B", model, scale.tokens, device, True)
    yield swiglu("7B", model, scale.tokens, device)
    yield rope("1B", grouped, 2, length)
    yield loss("7B", model, scale.tokens // 2, device, ("x", "weight"))
    yield linear_swiglu("7B", model, scale.tokens // 2, ("x", "weight"))


def huge(scale, device):
    """Tensors just above `elements`, for ops whose first and last rows can be checked alone."""
    model, length = scale.models["7B"], scale.lengths[1]
    head = replace(model, kv_heads=1)
    yield norm("rms_norm", "7B", model, scale.elements // model.width + 3, device, False)
    yield swiglu("7B", model, scale.elements // (2 * model.inner) + 3, device)
    yield rope("7B", head, scale.elements // (length * model.heads * model.dim) + 3, length)


def batched(scale, name, length, device, **more):
    """Attention over as many sequences as there are tokens for."""
    batch = max(1, scale.tokens // length)
    return attention(name, scale.models[name], batch, length, device, **more)


def measured(scale, device):
    """All that is timed, by importance."""
    short, usual, long, _ = scale.lengths
    model, tokens = scale.models["7B"], scale.tokens
    yield batched(scale, "7B", usual, device, passes=("forward", "backward", "both"))
    yield batched(scale, "7B", long, device)
    yield batched(scale, "7B", short, device)
    for op in ("rms_norm", "add_rms_norm"):
        yield norm(op, "7B", model, tokens, device, False)
        yield norm(op, "7B", model, tokens, device, True, passes=("backward",))
    yield swiglu("7B", model, tokens, device)
    yield loss("7B", model, tokens, device, ("x",))
    yield loss("7B", model, tokens, device, ("x", "weight"))
    yield rope("7B", model, max(1, tokens // usual), usual)
    yield batched(scale, "7B", usual, device, wanted=("q",), passes=("backward",))
    yield batched(scale, "7B", usual, device, wanted=("k", "v"), passes=("backward",))
    yield linear_swiglu("7B", model, tokens, ("x",))
    yield packed("7B", model, long, device)
    yield windowed("7B", model, long, usual // 4, device)
    for length in (usual, long, short):
        yield batched(scale, "1B", length, device)
        yield batched(scale, "70B", length, device)
    yield from rest(scale, device)
    yield from compiled(scale, device)


def rest(scale, device):
    """What completes the picture."""
    tokens, usual = scale.tokens, scale.lengths[1]
    seven = scale.models["7B"]
    yield loss("7B", seven, tokens, device, ("weight",))
    yield loss("7B", seven, tokens, device, ())
    yield linear_swiglu("7B", seven, tokens, ("x", "weight"), passes=("backward",))
    for name in ("70B", "1B"):
        model = scale.models[name]
        for op in ("rms_norm", "add_rms_norm"):
            yield norm(op, name, model, tokens, device, False)
            yield norm(op, name, model, tokens, device, True, passes=("backward",))
        yield swiglu(name, model, tokens, device)
        yield rope(name, model, max(1, tokens // usual), usual)
        yield loss(name, model, tokens // 2, device, ("x",))
        yield loss(name, model, tokens // 2, device, ("x", "weight"))
        yield linear_swiglu(name, model, tokens, ("x",))
    yield batched(scale, "7B", scale.lengths[3], device)
    yield rope("7B", seven, max(1, tokens // usual), usual, ("q",), passes=("backward",))


def compiled(scale, device):
    """The elementwise ops against torch.compile, last because it is slow to start."""
    model, tokens = scale.models["7B"], scale.tokens
    for case in (
        norm("rms_norm", "7B", model, tokens, device, False),
        norm("add_rms_norm", "7B", model, tokens, device, True),
        swiglu("7B", model, tokens, device),
        rope("7B", model, max(1, tokens // scale.lengths[1]), scale.lengths[1]),
        loss("7B", model, tokens, device, ("x",)),
    ):
        function = torch.compile(case.formula, backend=scale.compiler, dynamic=False)
        # Its backward cannot run twice over one graph, so it is timed together with its forward.
        passes = ("forward", "both") if "both" not in case.passes else case.passes
        yield replace(case, peers={"compiled": Peer(function)}, passes=passes, most_seconds=60)
