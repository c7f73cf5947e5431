"""The ``llamapro::`` operator namespace, and which backend serves an op.

An op file calls `define` once for the schema and `Op.register` once for each backend that can
serve it. Callers see one ``torch.ops.llamapro.<name>`` whatever runs underneath, so adding a
backend never touches a caller.

Triton is optional: without it, or a GPU, the kernels stay plain functions that nothing calls. An op
file says ``from __future__ import annotations``, so that ``tl.constexpr`` in a signature needs no
Triton.
"""

import ctypes
import functools
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from torch.autograd import forward_ad

from llamapro_kernels.flops import register_flop_formula

# Triton takes half a second to import: that is for those who can run it, in its interpreter too, or
# who compile its kernels for another machine (LLAMAPRO_TRITON=1). It looks when a kernel is
# defined, so changing these variables after the import does nothing.
triton = tl = TensorDescriptor = None
if "1" in map(os.environ.get, ("TRITON_INTERPRET", "LLAMAPRO_TRITON")) or torch.cuda.is_available():
    with suppress(ImportError):
        import triton
        from triton import language as tl  # noqa: F401
        from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: F401

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

BACKENDS = ("triton", "cpp", "reference")  # in order of preference
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_namespace = torch.library.Library("llamapro", "DEF")
_ops: dict[str, "Op"] = {}
# Process-wide, not a context variable: autograd runs backward in threads of its own. The last
# one counts; each `use_backend` takes its own entry away, in whatever order threads leave.
_forced: list[list[str]] = []


class Op:
    """One op: the backends that serve it, with a function for each of its schemas."""

    def __init__(self, name: str):
        self.name = name
        self.implementations: dict[str, dict[str, Callable]] = {}

    def register(self, backend: str, **functions: Callable) -> None:
        """Serve this op by `backend`: one function for each of the op's schemas, by its suffix."""
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
        self.implementations[backend] = functions

    def backend_for(self, device_type: str, dtype: torch.dtype) -> str:
        """The backend that serves tensors of this device and dtype now."""
        if _forced:
            (forced,) = _forced[-1]
            if forced not in self.implementations:
                raise RuntimeError(
                    f"{self.name} has no {forced!r} backend, it has {sorted(self.implementations)}"
                )
            if forced == "cpp" and WHY_NO_EXTENSION:
                raise RuntimeError(f"{self.name} has no 'cpp' backend here: {WHY_NO_EXTENSION}")
            return forced
        return next(
            b for b in BACKENDS if b in self.implementations and _runs_on(b, device_type, dtype)
        )

    def autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Attach the derivative formula; a second derivative raises instead of being zero."""

        def once(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{self.name} has no second derivative, so its gradient cannot be taken with"
                    " create_graph=True"
                )
            return backward(ctx, *grads)

        torch.library.register_autograd(
            f"llamapro::{self.name}", once, setup_context=setup_context, lib=_namespace
        )

    def _router(self, kind: str, check: Callable) -> Callable:
        def serve(*args):
            check(*args)
            tensor = next(a for a in args if isinstance(a, torch.Tensor))
            backend = self.backend_for(tensor.device.type, tensor.dtype)
            if backend == "reference" and tensor.device.type == "cpu":
                _say_once_that_cpu_ops_are_missing()
            with without_autocast(tensor.device.type):  # sums stay in fp32
                outputs = self.implementations[backend][kind](*args)
            if isinstance(outputs, torch.Tensor):
                return outputs.contiguous()  # as the fakes promise
            return None if outputs is None else tuple(t.contiguous() for t in outputs)

        return serve


def define(
    name: str,
    *,
    fakes: dict[str, Callable],
    checks: dict[str, Callable],
    flops: dict[str, Callable] | None = None,
    **schemas: str,
) -> Op:
    """Define ``llamapro::<name>`` by the schema `forward`, and ``llamapro::<name>_<kind>`` by each
    other one: `backward`, and what an op needs besides.

    `fakes` holds the shape functions, under the same names; `checks` raises for operands that a
    kernel would read or write beyond, since a registered op is there for everybody; `flops`, for
    ops with matrix products inside, functions from the arguments, tensors as shapes, to their
    FLOPs, for ``torch.utils.flop_counter``.
    """
    op = _ops[name] = Op(name)
    for kind, schema in schemas.items():
        qualified = name if kind == "forward" else f"{name}_{kind}"
        _namespace.define(qualified + schema, tags=torch.Tag.pt2_compliant_tag)
        check, fake = checks[kind], fakes[kind]
        _namespace.impl(qualified, op._router(kind, check), "CompositeExplicitAutograd")
        checked = functools.partial(_checked, check, fake)
        torch.library.register_fake(f"llamapro::{qualified}", checked, lib=_namespace)
        if flops:
            register_flop_formula(getattr(torch.ops.llamapro, qualified), flops[kind])
    return op


def _checked(check, function, *args):
    check(*args)
    return function(*args)


def backends(device: str | None = None) -> dict[str, str]:
    """Which backend serves each op, e.g. ``{"rms_norm": "reference", ...}``.

    device: "cuda" or "cpu"; by default CUDA when there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {name: op.backend_for(device, torch.float32) for name, op in sorted(_ops.items())}


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op by `backend` within the block, for the whole process.

    Raises ValueError for an unknown backend and RuntimeError, at the first call, for an op that
    lacks it: never another backend silently.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    entry = [backend]
    _forced.append(entry)
    try:
        yield
    finally:
        _forced[:] = [other for other in _forced if other is not entry]


@functools.cache
def cpu_words() -> set[str]:
    """What Linux says of the CPU, its maker and its flags among it; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def _runnable_builds() -> list[str]:
    """The builds of csrc/ that this CPU can run, best first; LLAMAPRO_CPU_CAPABILITY names one."""
    needed = {
        "avx2": {"avx2", "fma", "f16c", "bmi2", "movbe"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    runnable = ["baseline"]
    for name, more in needed.items():
        if platform.machine() != "x86_64" or not cpu_words() >= more:
            break
        if name == "amx" and not _tiles_are_granted():
            break
        runnable.insert(0, name)
    asked = os.environ.get("LLAMAPRO_CPU_CAPABILITY")  # after Linux was asked for the tiles
    return [asked] if asked else runnable


def _tiles_are_granted() -> bool:
    """Whether Linux lends this process the tiles of AMX, which it does when asked."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _load_extension() -> tuple[str | None, str | None]:
    """Load the compiled CPU ops as torch.ops.llamapro_cpp: which build, or why there is none."""
    if os.environ.get("LLAMAPRO_NO_EXTENSION") == "1":
        return None, "LLAMAPRO_NO_EXTENSION is 1"
    paths = {name: Path(__file__).parent / f"cpu_{name}.so" for name in _runnable_builds()}
    built = [name for name, path in paths.items() if path.exists()]
    if not built:
        return None, f"{next(iter(paths.values())).name} was not built"
    try:
        torch.ops.load_library(paths[built[0]])
    except OSError as error:
        return None, f"{paths[built[0]].name} does not load: {error}"
    return built[0], None


cpp = torch.ops.llamapro_cpp
CPU_BUILD, WHY_NO_EXTENSION = _load_extension()


@functools.cache
def _say_once_that_cpu_ops_are_missing() -> None:
    if not _forced and WHY_NO_EXTENSION and os.environ.get("LLAMAPRO_NO_EXTENSION") != "1":
        warnings.warn(
            f"llamapro_kernels: PyTorch serves the ops on a CPU, more slowly: {WHY_NO_EXTENSION}."
            " `pip install --no-build-isolation` builds them where there is a C++ compiler.",
            stacklevel=2,
        )


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is on; None elsewhere, and on meta, which has none."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def in_autocast(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Operands cast as autocast casts those of PyTorch's products: to its dtype, except fp64."""
    dtype = autocast_dtype(tensors[0].device.type)
    keep = dtype is None
    return [t if keep or t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


def without_autocast(device_type: str):
    """A context in which autocast is off."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def jit(function: Callable) -> Callable:
    """``triton.jit`` where there is Triton."""
    return function if triton is None else triton.jit(function)


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch a Triton kernel on the device of its first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
        kernel[grid](*args, enable_fp_fusion=True, **options)  # off by default from Triton 3.10 on


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; a few for the interpreter."""
    if INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """What the tile rules call this GPU: any of AMD's gfx942, one of NVIDIA's without a name here
    sm_86, which has least shared memory."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100"}.get((major, minor), "sm_86")


def warps_for(elements: int, device: torch.device) -> int:
    """Warps that give each lane eight elements: in 16-bit dtypes one widest load."""
    lanes = 64 if architecture(device).startswith("gfx") else 32
    return max(1, min(16, elements // (8 * lanes)))


def describable(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can read it: rows apart, and at 16-byte boundaries."""
    row, column = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return matrix.numel() > 0 and aligned and column == 1 and row >= matrix.shape[1]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., N) as (rows, N): a view wherever strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def contiguous_fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    """For what an op in C++ reads once or in small: a norm's weight, a rotary table, dloss."""
    return None if x is None else x.float().contiguous()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are accumulated in: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_if(wanted: bool, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous gradient for `like`, or zero bytes where nobody wants it.

    A schema has a fixed number of outputs, so the unwanted ones are empty tensors.
    """
    return like.new_empty(like.shape if wanted else 0)


def expect(shape, like: torch.Tensor, dtype: torch.dtype | None = None, **tensors) -> None:
    """Raise ValueError unless the tensors, but those that are None, have this shape, the device of
    `like`, and the dtype, by default that of `like`."""
    dtype = dtype or like.dtype
    for name, t in tensors.items():
        if t is not None and (t.shape != shape or t.dtype != dtype or t.device != like.device):
            raise ValueError(
                f"{name} must be {tuple(shape)}, {dtype}, on {like.device},"
                f" got {tuple(t.shape)}, {t.dtype}, on {t.device}"
            )


def recordable(x: torch.Tensor) -> torch.Tensor:
    """x, or where autograd refuses to save it, a copy: a tensor made in inference mode."""
    if torch.compiler.is_compiling() or not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    return x.clone()


def check_floating(**tensors: torch.Tensor) -> None:
    """Raise TypeError unless all are tensors of 16, 32 or 64 bits, ValueError unless on one device.

    Also RuntimeError in forward-mode differentiation, which would otherwise give silent zeros, and
    under the transforms of torch.func.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError("llamapro ops have no forward-mode derivative")
    if not torch.compiler.is_compiling() and _in_transform():
        raise RuntimeError(
            "llamapro ops do not work under torch.func's grad, vmap and the like;"
            " torch.autograd.grad and backward() expected"
        )
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in FLOATING:
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of 16, 32 or 64 bit floats, got {got}")
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device}, {first_name} on {first.device}: one device expected"
            )


def check_eps(eps: float) -> None:
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")


def _in_transform() -> bool:
    transform = torch._C._functorch.peek_interpreter_stack()
    functionalize = torch._C._functorch.TransformType.Functionalize
    return transform is not None and transform.key() != functionalize


def _runs_on(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    if backend == "reference":
        return True
    if dtype == torch.float64:  # kernels accumulate in fp32; only the reference keeps fp64
        return False
    if backend == "triton":
        # The interpreter's bf16 is wrong: its dot reads the bits as integers, its add gives NaN.
        interpretable = INTERPRETED and dtype != torch.bfloat16
        return triton is not None and (device_type == "cuda" or interpretable)
    return device_type == "cpu" and WHY_NO_EXTENSION is None
