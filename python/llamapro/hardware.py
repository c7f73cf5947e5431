"""What the machine at hand can do: device, dtype, measured matmul rate, and memory of a process."""

import ctypes
import platform
import re
import time
from pathlib import Path

import torch

from llamapro_kernels import __version__, cpu
from llamapro_kernels.matmul import matmul


def pick_device(device: str = "auto") -> torch.device:
    """ "auto" is CUDA when there is one, otherwise the CPU. Raises ValueError for what is not."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} asked for, but there is no CUDA here; cpu expected")
    return torch.device(device)


def pick_dtype(device: torch.device) -> str:
    """ "bfloat16", half the memory, unless this CPU multiplies "float32" twice as fast."""
    if device.type == "cuda":
        return "bfloat16"
    half, single = (matmul_rate(device, dtype) for dtype in (torch.bfloat16, torch.float32))
    return "bfloat16" if 2 * half > single else "float32"


def pick_sampling_dtype(device: torch.device) -> str:
    """ "bfloat16" where a few rows are multiplied fast in it: PyTorch's own products, which serve
    them, are many times slower than in "float32" on a CPU without instructions for it."""
    has_some = device.type == "cuda" or cpu.BUILD in ("avx512_bf16", "amx")
    return "bfloat16" if has_some else "float32"


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product: the median of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    times = []
    for _ in range(6):  # the first one warms up
        _wait(device)
        start = time.perf_counter()
        matmul(a, b)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(times[1:])[2]


def environment(device: torch.device) -> dict:
    """What the bits of a result depend on besides the settings of a run."""
    versions = {"version": __version__, "torch": torch.__version__}
    if device.type == "cuda":
        return {**versions, "processor": torch.cuda.get_device_name(device)}
    threads = torch.get_num_threads()
    return {**versions, "processor": _cpu(), "build": cpu.BUILD, "threads": threads}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return model[1] if model else platform.machine()


def keep_freed_memory(keep: bool = True) -> None:
    """Let the C library of a Linux process keep what tensors on a CPU free, up to its peak.

    Otherwise it goes back to the system and comes anew, zeroed page by page, in every step. With
    keep=False all of it goes back at once: slower, but no memory lies in holes between tensors.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 2**30 if keep else 2**16)  # M_MMAP_THRESHOLD
    mallopt(-1, 2**31 - 1 if keep else 2**17)  # M_TRIM_THRESHOLD


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, the process's largest resident set otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_memory("VmHWM")


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return _process_memory("VmRSS")


def _process_memory(kind: str) -> int:
    """Of Linux; elsewhere the largest resident set, which is all that Python can ask for."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        return int(re.search(rf"{kind}:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
