"""The compiled ops of csrc/: which build this CPU can run, and why there is none."""

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch


@functools.cache
def words() -> set[str]:
    """What Linux says of the CPU, its maker and its flags among it; nothing elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def runnable_builds() -> list[str]:
    """The builds of csrc/ that this CPU can run, best first; LLAMAPRO_CPU_CAPABILITY names one."""
    needed = {
        "avx2": {"avx2", "fma", "f16c", "bmi2", "movbe"},
        "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    runnable = ["baseline"]
    for name, more in needed.items():
        if platform.machine() != "x86_64" or not words() >= more:
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
    paths = {name: Path(__file__).parent / f"cpu_{name}.so" for name in runnable_builds()}
    built = [name for name, path in paths.items() if path.exists()]
    if not built:
        return None, f"{next(iter(paths.values())).name} was not built"
    try:
        torch.ops.load_library(paths[built[0]])
    except OSError as error:
        return None, f"{paths[built[0]].name} does not load: {error}"
    return built[0], None


ops = torch.ops.llamapro_cpp
BUILD, WHY_NO_BUILD = _load_extension()
