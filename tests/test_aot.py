"""What the compiler makes of every Triton kernel, for GPUs that need not be here.

The launches of aot_cases.py are compiled as a real launch would compile them. No kernel may spill
or need more memory than the chip has; matrix products must use the matrix instructions, and 16-bit
operands the widest loads. Nor may a kernel get worse than in the table recorded in tests/aot for
the installed minor version of Triton; for a version without a table only the limits count.

A row of the table has the fingerprint of what was compiled for it. While that is the same the
compiler would make the same of it, and only some rows are compiled to see that it does. That of
another tile is no row of the table, which has every launch.

    python tests/test_aot.py     # records what has changed, and prints it

The tests print the rows that they compile: pytest shows them with -rP.
"""

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

from aot_cases import CASES, OPS, TARGETS, UNITS, fingerprint, launches  # noqa: E402

from llamapro_kernels import library  # noqa: E402

VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).parent / "aot" / f"triton-{VERSION}.json"
RECORD = "python tests/test_aot.py"


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


def compile_all(rows):
    """{row: (launch, what was compiled)}, several at once."""
    with (
        mock.patch.dict(os.environ, {"TRITON_DISABLE_LINE_INFO": "1"}),  # a quarter faster
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        found = list(pool.map(compiled, rows.values()))
    return {row: (rows[row], result) for row, result in zip(rows, found, strict=True)}


def read_table():
    """What was recorded for this Triton, by row; None where nothing was."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else None


def read_or_skip():
    table = read_table()
    if table is None:
        pytest.skip(f"no table for Triton {VERSION}: {RECORD} records one")
    return table


def is_recorded(launch, recorded):
    """Whether a row is of this launch, and of this compiler; older tables do not say."""
    return "fingerprint" in recorded and recorded["fingerprint"] == fingerprint(launch)


def test_every_op_has_cases():
    served = {name for name, op in library._ops.items() if "triton" in op.implementations}
    launch_the_same = {"linear_cross_entropy_frozen"}  # as linear_cross_entropy
    assert served - launch_the_same <= CASES.keys()


def test_a_table_is_recorded_of_what_is_launched():
    rows = {row for target in TARGETS for row in launches(target)}
    assert read_or_skip().keys() == rows, f"other launches than recorded: {RECORD}"


def test_what_is_recorded_is_within_limits():
    for row, recorded in read_or_skip().items():
        target = TARGETS[row.split(" | ")[0]]
        assert recorded["spilled"] <= target.spill_limit, row
        assert recorded["shared"] <= target.shared_limit, row


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("target", TARGETS)
def test_within_limits_and_no_worse_than_recorded(target, op):
    rows = {row: launch for row, launch in launches(target).items() if launch.op == op}
    if not rows and (target == "sm_86" or (op == "quantize_rows" and target not in UNITS)):
        pytest.skip("the tiles of sm_80, or no 8 bits")
    assert rows, "nothing is launched"
    table, problems = read_table() or {}, []
    changed = {row: at for row, at in rows.items() if not is_recorded(at, table.get(row, {}))}
    for row, (launch, found) in compile_all(changed).items():
        print(line(row, found))
        wrong = [*over_limits(launch, found), *(worse(found, table[row]) if row in table else ())]
        problems += [f"{row}: {what}" for what in wrong]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("op", OPS)
def test_what_is_recorded_is_what_the_compiler_makes(op):
    """Of the first launch, for the chip with most of them."""
    table = read_or_skip()
    row, launch = next((r, at) for r, at in launches("sm_90").items() if at.op == op)
    if not is_recorded(launch, table.get(row, {})):
        pytest.skip("it has changed: that it is no worse is tested above")
    found = compiled(launch)
    print(line(row, found))
    assert {**values_of(found), "fingerprint": fingerprint(launch)} == table[row]
    assert not [*over_limits(launch, found)]


def values_of(found):
    return {kind: getattr(found, kind) for kind in (*COUNTS, "instructions")}


def record():
    """Compile what is not recorded as it is now, and write the table; nothing that is over a limit
    is recorded."""
    rows = {row: launch for target in TARGETS for row, launch in launches(target).items()}
    before, problems = read_table() or {}, []
    changed = {row: at for row, at in rows.items() if not is_recorded(at, before.get(row, {}))}
    table = {row: before.get(row) for row in rows}
    for row, (launch, found) in compile_all(changed).items():
        print(line(row, found))
        problems += [f"{row}: {what}" for what in over_limits(launch, found)]
        table[row] = {**values_of(found), "fingerprint": fingerprint(launch)}
    if problems:
        raise SystemExit("\n".join(["nothing is recorded:", *problems]))
    lines = [f"{json.dumps(row)}: {json.dumps(values)}" for row, values in table.items()]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(changed)} of {len(table)} launches recorded in {TABLE}")


if __name__ == "__main__":
    record()
