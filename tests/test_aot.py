"""What the compiler makes of every Triton kernel, for GPUs that need not be here.

Every op is called on tensors without memory, once for each target; the launches that come out,
with their tiles and argument types, are compiled as a real launch would compile them. No kernel may
spill or need more memory than the chip has; matrix products must use the matrix instructions, and
16-bit operands the widest loads. Nor may a kernel get worse than in the table recorded in tests/aot
for the installed minor version of Triton; for a version without a table only the limits count.

    python tests/test_aot.py     # records the table of the installed Triton, and prints it

The tests print the rows of the table that they look at: pytest shows them with -rP.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

os.environ.setdefault("LLAMAPRO_TRITON", "1")  # as a script; conftest.py says so for pytest
from llamapro_kernels import gpu, library

triton = pytest.importorskip("triton")
if gpu.INTERPRETED:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

pytestmark = pytest.mark.xdist_group("aot")  # one process compiles all, in threads of its own


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
VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).parent / "aot" / f"triton-{VERSION}.json"
RECORD = "python tests/test_aot.py"

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


def swiglu_cases():
    for dtype, width in ((BF16, 512), (FP16, 14336), (FP32, 14336)):
        y, gate_up = meta(dtype, 2048, width), meta(dtype, 2048, 2 * width)
        yield f"{NAMES[dtype]} {width}", "forward", (gate_up,)
        yield f"{NAMES[dtype]} {width}", "backward", (y, gate_up)


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
    "linear_swiglu": linear_swiglu_cases,
}
OPS = [op for op in CASES if "triton" in library._ops[op].implementations]
# Exact fp32 attention takes the compiler longest, and has the same code on all NVIDIA chips.
SKIPPED = {("flash_attention", "fp32", target) for target in ("sm_80", "sm_86", "sm_100")}


@dataclass(frozen=True)
class Launch:
    target: str
    op: str
    name: str  # with the target, its row in the table
    kernel: JITFunction
    source: ASTSource
    options: dict


def launches():
    """Every distinct launch of every op on every target, by its row in the table."""
    rows, known = {}, set()
    for target, op in itertools.product(TARGETS, OPS):
        for case, kind, arguments in CASES[op]():
            if (op, case.split()[0], target) in SKIPPED:
                continue
            function = library._ops[op].implementations["triton"][kind]
            for launch in recorded(target, op, case, function, arguments):
                same = (
                    launch.source.hash(),
                    launch.options["num_warps"],
                    launch.options["num_stages"],
                )
                if (target, same) in known or (target == "sm_86" and ("sm_80", same) in known):
                    continue  # sm_86 stands for all other chips: only its own tiles are of interest
                known.add((target, same))
                row = f"{target} | {launch.name}"
                assert row not in rows, f"two launches are called {row}"
                rows[row] = launch
    return rows


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
    return Launch(target, op, name, kernel, ASTSource(kernel, *source), settings.__dict__)


@dataclass
class Compiled:
    registers: int
    spilled: int  # bytes
    shared: int  # bytes
    narrow: int  # instructions that load a single 16-bit element
    instructions: list[str]  # the kinds of matrix instruction and 128-bit load
    tensor_memory: int  # columns
    multiplies: bool  # has a dot that matrix instructions can take


COUNTS = ("registers", "spilled", "shared", "narrow")  # recorded, as are the instructions


def compiled(launch):
    target = TARGETS[launch.target].gpu
    kernel = triton.compile(launch.source, target=target, options=launch.options)
    if target.backend == "hip":
        code = kernel.asm["amdgcn"]
        registers, spilled = amd_resources(code)
    else:
        code = kernel.asm["ptx"]
        registers, spilled = nvidia_resources(kernel.asm["cubin"])
    return Compiled(
        registers,
        spilled,
        kernel.metadata.shared,
        len(re.findall(NARROW_LOAD, code)),
        [name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, code)],
        getattr(kernel.metadata, "tmem_size", None) or 0,
        any(map(fits_matrix_instructions, kernel.asm["ttir"].splitlines())),
    )


def nvidia_resources(cubin):
    """Registers a thread and bytes of stack, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def amd_resources(code):
    """Vector registers a lane and bytes of scratch memory, unless it is reserved and not used."""
    registers, scratch = (
        int(re.search(rf"\.{name}:\s*(\d+)", code)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, scratch if re.search(r"\bscratch_(load|store)", code) else 0


INSTRUCTIONS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma_",
    "load": r"\bld\.global[\w.:]*\.(v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32|v4\.[bfu]64)\b"
    r"|\b(global|buffer)_load_dwordx4\b",
    "cp.async": r"\bcp\.async\.c[ag]\.shared\.global[^;]*, (0x10|16)\b",
    "tma": r"\bcp\.async\.bulk\.tensor",
}
WIDE_LOADS = {"load", "cp.async", "tma"}
NARROW_LOAD = r"\bld\.global[\w.:]*\.[bus]16\b|\b(?:global|buffer)_load_(?:u?short|[su]16)"


def fits_matrix_instructions(line):
    """Whether this line of Triton IR is a dot of anything but exact fp32."""
    dot = re.search(r"\btt\.dot\b.*: tensor<[\dx]+x(\w+)", line)
    return bool(dot) and (dot[1] != "f32" or "inputPrecision" in line)


def over_limits(launch, found):
    """In words, the limits that this launch is over."""
    target = TARGETS[launch.target]
    if found.spilled > target.spill_limit:
        yield f"{found.spilled} bytes spilled"
    if found.shared > target.shared_limit:
        yield f"{found.shared} bytes of shared memory, the chip has {target.shared_limit}"
    if found.tensor_memory > 512:
        yield f"{found.tensor_memory} columns of tensor memory, the chip has 512"
    # Without descriptors newer GPUs take the tiles of older ones, some too small for their own.
    matrix = {target.matrix} if "tma" in found.instructions else {target.matrix, "mma.sync"}
    if found.multiplies and not matrix.intersection(found.instructions):
        yield f"a dot without {target.matrix}"
    reads_16_bit = re.search(r"(\*|tensordesc<)(bf|fp)16", str(launch.source.signature))
    if reads_16_bit and not WIDE_LOADS.intersection(found.instructions):
        yield "no 128-bit load"


def worse(found, recorded):
    """In words, what is worse than recorded."""
    for kind in COUNTS:
        if getattr(found, kind) > recorded[kind]:
            yield f"{kind} {getattr(found, kind)}, recorded {recorded[kind]}"
    for lost in set(recorded["instructions"]) - set(found.instructions):
        yield f"{lost} is recorded and not there"


def line(row, found):
    return (
        f"{found.registers:4} registers {found.spilled:4} spilled {found.shared:7} shared"
        f" {found.narrow:3} narrow {'+'.join(found.instructions):22} {row}"
    )


@contextmanager
def compiling():
    """Futures of all launches: {row: (launch, future of Compiled)}."""
    pool = ThreadPoolExecutor(os.cpu_count())
    with mock.patch.dict(os.environ, {"TRITON_DISABLE_LINE_INFO": "1"}):  # a quarter faster
        try:
            rows = launches()
            yield {row: (launch, pool.submit(compiled, launch)) for row, launch in rows.items()}
        finally:
            pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def futures():
    with compiling() as futures:
        yield futures


@pytest.fixture(params=itertools.product(TARGETS, OPS), ids="-".join)
def found(request, futures):
    """(target and op, {row: (launch, what was compiled)}) of one op on one target."""
    mine = {
        row: (launch, future)
        for row, (launch, future) in futures.items()
        if (launch.target, launch.op) == request.param
    }
    if not mine and request.param[0] == "sm_86":
        pytest.skip("the tiles of sm_80")
    assert mine, "nothing is launched"
    results = {row: (launch, future.result()) for row, (launch, future) in mine.items()}
    print(*(line(row, result) for row, (_, result) in results.items()), sep="\n")
    return request.param, results


def test_every_op_has_cases():
    served = {name for name, op in library._ops.items() if "triton" in op.implementations}
    assert served <= CASES.keys()


def test_limits(found):
    _, results = found
    over = [
        f"{row}: {what}"
        for row, (launch, result) in results.items()
        for what in over_limits(launch, result)
    ]
    assert not over, "\n".join(over)


def test_no_worse_than_recorded(found):
    (target, op), results = found
    if not TABLE.exists():
        pytest.skip(f"no table for Triton {VERSION}: {RECORD} records one")
    table = {
        row: recorded
        for row, recorded in json.loads(TABLE.read_text()).items()
        if row.startswith(f"{target} | {op} | ")
    }
    assert table.keys() == results.keys(), f"other launches than recorded: {RECORD}"
    regressions = [f"{row}: {what}" for row in table for what in worse(results[row][1], table[row])]
    assert not regressions, "\n".join(regressions)


def record():
    with compiling() as futures:
        rows = {row: (launch, future.result()) for row, (launch, future) in futures.items()}
    table = []
    for row, (launch, result) in rows.items():
        print(line(row, result), *over_limits(launch, result), sep="  !! ")
        values = {kind: getattr(result, kind) for kind in (*COUNTS, "instructions")}
        table.append(f"{json.dumps(row)}: {json.dumps(values)}")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join(table) + "\n}\n")
    print(f"{len(rows)} launches recorded in {TABLE}")


if __name__ == "__main__":
    record()
