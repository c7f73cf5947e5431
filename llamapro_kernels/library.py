"""The ``llamapro::`` operator namespace, and which backend serves an op.

An op file calls `define` once for the schema and `Op.register` once for each backend that can
serve it. Callers see one ``torch.ops.llamapro.<name>`` whatever runs underneath, so adding a
backend never touches a caller.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.autograd import forward_ad

from llamapro_kernels import cpu, gpu
from llamapro_kernels.flops import register_flop_formula

BACKENDS = ("triton", "cpp", "reference")  # in order of preference
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

PLAIN = (torch.Tensor, torch.nn.Parameter)

_namespace = torch.library.Library("llamapro", "DEF")
# torch.ops.llamapro for callers that take no derivative of a single op: the same functions, without
# the dispatcher where it would do nothing (of a small RMSNorm's 60 microseconds on a CPU, 17).
ops = SimpleNamespace()
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
            if forced == "cpp" and cpu.WHY_NO_BUILD:
                raise RuntimeError(f"{self.name} has no 'cpp' backend here: {cpu.WHY_NO_BUILD}")
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
        router, registered = op._router(kind, check), getattr(torch.ops.llamapro, qualified)
        _namespace.impl(qualified, router, "CompositeExplicitAutograd")
        setattr(ops, qualified, _shortcut(router, registered))
        checked = functools.partial(_checked, check, fake)
        torch.library.register_fake(f"llamapro::{qualified}", checked, lib=_namespace)
        if flops:
            register_flop_formula(registered, flops[kind])
    return op


def _shortcut(router, registered):
    def call(*args):
        if torch.compiler.is_compiling() or _for_dispatcher(args):
            return registered(*args)
        return router(*args)

    return call


def _for_dispatcher(args) -> bool:
    """Whether somebody listens: autograd, a mode, a transform, the profiler, a tensor of another
    class or without memory."""
    return (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(isinstance(a, torch.Tensor) and (type(a) not in PLAIN or a.is_meta) for a in args)
    )


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
def _say_once_that_cpu_ops_are_missing() -> None:
    if not _forced and cpu.WHY_NO_BUILD and os.environ.get("LLAMAPRO_NO_EXTENSION") != "1":
        warnings.warn(
            f"llamapro_kernels: PyTorch serves the ops on a CPU, more slowly: {cpu.WHY_NO_BUILD}."
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


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape x (..., N) to (rows, N): a view wherever strides allow one."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def contiguous_fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    """Copy what an op in C++ reads once or in small: a norm's weight, a rotary table, dloss."""
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
    """Return x, or where autograd refuses to save it, a copy: a tensor made in inference mode."""
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
        interpretable = gpu.INTERPRETED and dtype != torch.bfloat16
        return gpu.triton is not None and (device_type == "cuda" or interpretable)
    return device_type == "cpu" and cpu.WHY_NO_BUILD is None
