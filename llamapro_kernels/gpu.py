"""Triton where it can run, what a launch needs of it, and what the launchers ask of a GPU.

Triton is optional: without it, or a GPU, the kernels stay plain functions that nothing calls. An op
file says ``from __future__ import annotations``, so that ``tl.constexpr`` in a signature needs no
Triton.
"""

import functools
import os
from collections.abc import Callable
from contextlib import suppress

import torch

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


def row_tile(x: torch.Tensor, elements: int = 2048) -> dict[str, int]:
    """Whole rows of x (M, K), several where they are shorter than so many elements."""
    block = max(1, triton.next_power_of_2(x.shape[1]))
    rows = max(1, elements // block)
    most_warps = 8 if block <= 8192 else 16
    warps = min(most_warps, warps_for(rows * block, x.device))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def describable(matrix: torch.Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can read it: rows apart, and at 16-byte boundaries."""
    row, column = matrix.stride()
    aligned = matrix.data_ptr() % 16 == 0 and row * matrix.element_size() % 16 == 0
    return matrix.numel() > 0 and aligned and column == 1 and row >= matrix.shape[1]
