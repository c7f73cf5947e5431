"""What test_aot.py compiles: the launches of every op's Triton kernels, for GPUs not here.

Every op is called on tensors without memory, once for each target; the launches that come out have
their tiles and argument types.
"""

import functools
import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from unittest import mock

import torch

os.environ.setdefault("LLAMAPRO_TRITON", "1")  # as a script; conftest.py says so for pytest
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from llamapro_kernels import gpu, library


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    processors: int
    shared_limit: int  # bytes a block may have
    matrix: str  # the instruction of a matrix product
    spill_limit: int = 8  # bytes: what ptxas may save to fit more programs; more where time chose


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 163 * 1024, "mma.sync"),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 84, 99 * 1024, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 227 * 1024, "wgmma", 256),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 148, 227 * 1024, "tcgen05"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 64 * 1024, "mfma"),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def meta(dtype, *shape):
    return torch.empty(shape, dtype=dtype, device="meta")


# The cases of an op: (what is special about the call, "forward", "backward" or another schema, the
# arguments of that schema). All sizes are multiples of 16, so that every load can be the widest.

TYPED_WIDTHS = [(BF16, 576), (BF16, 4096), (BF16, 16384), (BF16, 32768), (FP32, 4096)]
FROZEN_NORM = "bf16 4096"


def norm_cases(add):
    for dtype, width in TYPED_WIDTHS:
        name = f"{NAMES[dtype]} {width}"
        x, weight, rstd = meta(dtype, 2048, width), meta(dtype, width), meta(FP32, 2048, 1)
        yield name, "forward", (x, *([x] if add else []), weight, 1e-5)
        all_wanted, *frozen = (True, True), (True, False), (False, True)
        for want_x, want_weight in (all_wanted, *(frozen if name == FROZEN_NORM else ())):
            yield (
                name + " dx" * want_x + " dweight" * want_weight,
                "backward",
                (
                    *(x, *([x] if add else []), x, weight if want_x else None),
                    *(rstd, dtype if want_weight else None),
                ),
            )
    for width in (576, 4096, 16384):
        x, columns, rstd = meta(BF16, 2048, width), meta(FP32, width), meta(FP32, 2048, 1)
        name, weight = f"bf16 {width} 8 bits", meta(BF16, width)
        yield name, "quantized", (x, *([x] if add else []), weight, 1e-5)
        if add:
            yield f"{name} dx", "backward_quantized", (x, x, x, weight, rstd, columns)


def swiglu_cases():
    for dtype, width in ((BF16, 512), (FP16, 14336), (FP32, 14336)):
        y, gate_up = meta(dtype, 2048, width), meta(dtype, 2048, 2 * width)
        yield f"{NAMES[dtype]} {width}", "forward", (gate_up,)
        yield f"{NAMES[dtype]} {width}", "backward", (y, gate_up)
    for width in (1536, 11008, 14336):
        y, gate_up = meta(BF16, 2048, width), meta(BF16, 2048, 2 * width)
        name, columns = f"bf16 {width} 8 bits", meta(FP32, 2 * width)
        yield name, "quantized", (gate_up,)
        yield name, "backward_quantized", (y, gate_up, columns)


def quantize_cases():
    for dtype, width in ((BF16, 576), (BF16, 4096), (BF16, 32768), (FP32, 4096)):
        x, columns = meta(dtype, 2048, width), meta(FP32, width)
        yield f"{NAMES[dtype]} {width}", "forward", (x, None)
        yield f"{NAMES[dtype]} {width} columns", "forward", (x, columns)


def rope_cases():
    shapes = ((BF16, 8, 2, 32), (BF16, 9, 3, 64), (BF16, 32, 8, 128), (FP32, 32, 8, 128))
    for dtype, heads, kv_heads, dim in (*shapes, (BF16, 8, 2, 256)):
        q, k = meta(dtype, 2, 2048, heads, dim), meta(dtype, 2, 2048, kv_heads, dim)
        angles = meta(dtype, 2048, dim), meta(dtype, 2048, dim)
        yield f"{NAMES[dtype]} {dim}", "forward", (q, k, *angles)
    yield "bf16 256 dq", "backward", (q, None, *angles, True, False)
    yield "bf16 256 in place", "inplace", (q, *angles, False)


MASKS = {  # (documents, causal, window)
    "causal": (False, True, None),
    "full": (False, False, None),
    "packed": (True, True, 1024),  # with a window, for that needs most registers
}
ATTENTION = [  # (dtype, head dimension, layout, mask); what is expanded has no descriptors
    *((BF16, dim, "plain", "causal") for dim in (32, 64, 128, 256)),
    *((BF16, dim, "expanded", "causal") for dim in (128, 256)),
    *((BF16, 64, "plain", "full"), (BF16, 128, "plain", "packed")),
    *((FP32, dim, "plain", "causal") for dim in (64, 128, 256)),
]


def attention_cases():
    for dtype, dim, layout, mask in ATTENTION:
        packed, *options = MASKS[mask]
        batch, length = 1 if packed else 2, 2048
        q, k = meta(dtype, batch, length, 8, dim), meta(dtype, batch, length, 2, dim)
        if layout == "expanded":
            k = k[:1].expand_as(k)
        options = (meta(torch.int32, 5) if packed else None, options[0], dim**-0.5, options[1])
        name = f"{NAMES[dtype]} {dim} {layout} {mask}"
        yield name, "forward", (q, k, k, *options)
        saved = (q, q, k, k, q, meta(FP32, batch, 8, 2, length))
        yield f"{name} dq dk dv", "backward", (*saved, *options, True, True, True)
        if (dtype, dim, layout, mask) == (BF16, 128, "plain", "causal"):
            only_dv = (q, q, k, None, None, saved[-1])
            yield f"{name} dv", "backward", (*only_dv, *options, False, False, True)


def cross_entropy_cases():
    for dtype, width, vocabulary in ((BF16, 576, 49152), (FP16, 4096, 32000)):
        x, weight = meta(dtype, 4096, width), meta(dtype, vocabulary, width)
        targets, dloss, stats = meta(torch.int64, 4096), meta(FP32, 4096), meta(FP32, 2, 4096)
        name = f"{NAMES[dtype]} {width} {vocabulary}"
        for per_token, want_x, want_weight in itertools.product((False, True), repeat=3):
            wanted = " dx" * want_x + " dweight" * want_weight
            settings = (-100, per_token, want_x, want_weight)
            if not (per_token and want_weight):  # that is for the backward below
                yield (
                    name + " none" * per_token + wanted,
                    "forward",
                    (x, weight, targets, *settings),
                )
        yield f"{name} none dweight", "backward", (dloss, x, weight, targets, stats, -100)


def kl_divergence_cases():
    for dtype, width, vocabulary in ((BF16, 576, 49152), (FP16, 4096, 32000)):
        x, weight = meta(dtype, 4096, width), meta(dtype, vocabulary, width)
        mask, dloss, stats = meta(torch.bool, 4096), meta(FP32, 4096), meta(FP32, 4, 4096)
        name, heads = f"{NAMES[dtype]} {width} {vocabulary}", (weight, weight, mask)
        for wanted in ((False, False), (True, False), (True, True)):
            words = " dx" * wanted[0] + " dweight" * wanted[1]
            yield f"{name}{words}", "forward", (x, x, *heads, 1.0, False, *wanted)
        yield f"{name} none dweight", "backward", (dloss, x, x, *heads, stats, 2.0)


def linear_swiglu_cases():
    for dtype, width, inner in ((BF16, 576, 1536), (BF16, 4096, 14336), (FP32, 4096, 14336)):
        x, weight = meta(dtype, 2048, width), meta(dtype, 2 * inner, width)
        name = f"{NAMES[dtype]} {width} {inner}"
        yield name, "forward", (x, weight)
        yield f"{name} expanded", "forward", (x[:1].expand_as(x), weight)  # without descriptors


CASES = {
    "rms_norm": lambda: norm_cases(add=False),
    "add_rms_norm": lambda: norm_cases(add=True),
    "swiglu": swiglu_cases,
    "rope": rope_cases,
    "flash_attention": attention_cases,
    "linear_cross_entropy": cross_entropy_cases,
    "linear_kl_divergence": kl_divergence_cases,
    "linear_swiglu": linear_swiglu_cases,
    "quantize_rows": quantize_cases,
}
OPS = [op for op in CASES if "triton" in library._ops[op].implementations]
# Exact fp32 attention takes the compiler longest, and has the same code on all NVIDIA chips.
# Elsewhere there are no such numbers, and nothing is launched in 8 bits.
UNITS = {"sm_90", "sm_100"}
SKIPPED = {("flash_attention", "fp32", target) for target in ("sm_80", "sm_86", "sm_100")}


@dataclass(frozen=True)
class Launch:
    target: str
    op: str
    case: str
    name: str  # with the target, its row in the table
    kernel: JITFunction
    source: ASTSource
    options: dict


@functools.cache
def launches(target):
    """Every distinct launch of every op on a target, by its row in the table."""
    # sm_86 stands for all other chips: only its own tiles are of interest.
    known = {same(launch) for launch in launches("sm_80").values()} if target == "sm_86" else set()
    rows = {}
    for op in OPS:
        for case, kind, arguments in CASES[op]():
            in_8_bits = op == "quantize_rows" or kind.endswith("quantized")
            if (op, case.split()[0], target) in SKIPPED or (in_8_bits and target not in UNITS):
                continue
            function = library._ops[op].implementations["triton"][kind]
            for launch in recorded(target, op, case, function, arguments):
                if same(launch) not in known:
                    known.add(same(launch))
                    row = f"{target} | {launch.name}"
                    assert row not in rows, f"two launches are called {row}"
                    rows[row] = launch
    return rows


def same(launch):
    """What two launches with the same code share."""
    return launch.source.hash(), launch.options["num_warps"], launch.options["num_stages"]


def recorded(target, op, case, function, arguments):
    """The launches of one call on one target."""
    calls = []

    def run(kernel, *args, grid, warmup, **options):
        calls.append((kernel, args, options))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(gpu, "architecture", lambda device: target),
        mock.patch.object(gpu, "processors", lambda device: TARGETS[target].processors),
    ):
        function(*arguments)
    return [specialised(target, op, case, *call) for call in calls]


def specialised(target, op, case, kernel, args, options):
    """What Triton compiles for these arguments: the first half of `JITFunction.run`."""
    backend = make_backend(TARGETS[target].gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*args, **options)
    settings, *source = kernel._pack_args(backend, options, bound, specialisation, {})
    tile = {k: v for k, v in bound.items() if k in options}
    tile |= {k: v for k, v in options.items() if k.startswith("num_")}
    tile = " ".join(f"{k.removeprefix('num_').lower()}={v}" for k, v in tile.items())
    name = f"{op} | {case} | {kernel.fn.__name__} | {tile}"
    return Launch(target, op, case, name, kernel, ASTSource(kernel, *source), settings.__dict__)


def fingerprint(launch):
    """Of all that decides what is compiled: the kernel as Triton reads it, before anything is
    optimized, the options, and the compiler."""
    backend = make_backend(TARGETS[launch.target].gpu)
    options = backend.parse_options(dict(launch.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    helpers = backend.get_codegen_implementation(options), backend.get_module_map()
    module = launch.source.make_ir(TARGETS[launch.target].gpu, options, *helpers, context)
    lines = [line for line in str(module).splitlines() if not line.startswith("#loc")]
    code = re.sub(r" loc\(.*?\)(?=$| |,|\))", "", "\n".join(lines), flags=re.MULTILINE)
    # Not where the libraries of this installation lie.
    said = {name: value for name, value in vars(options).items() if name != "extern_libs"}
    return hashlib.sha256(f"{triton.__version__} {said} {code}".encode()).hexdigest()[:16]
