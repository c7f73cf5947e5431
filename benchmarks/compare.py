"""The `compare` fixture: ours and its peers, interleaved, as ratios and as a share of the roof."""

import statistics
import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of a result's norm
ROUNDS = 15
FLUSH_BYTES = 2**28  # past every cache


def interleave(functions: dict, rounds: int) -> dict:
    """Median seconds of each; before each call the caches are filled with something else."""
    flush = torch.zeros(FLUSH_BYTES // 4, device=DEVICE)
    samples = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            flush.add_(1)
            samples[name].append(_seconds(function))
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(function) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _roof(work: dict, dtype):
    """A function that does nothing but the work, and how many times the work it does.

    bytes: a copy of that many, half of them read and half written, like every result to memory
    that was just allocated. flops: a large matrix product.
    """
    (kind, amount), *_ = work.items()
    if kind == "bytes":
        source = torch.ones(amount // 8, device=DEVICE)
        return source.clone, 2 * source.nbytes / amount
    size = 8192 if DEVICE == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in "ab")
    return lambda: a @ b, 2 * size**3 / amount


@pytest.fixture
def compare(benchmark):
    """compare(ours, peers, bytes=... or flops=... or roof=...).

    ours, peers: functions of no argument that return the tensors to check; a speed is reported
    only when all agree as far as `dtype` allows. bytes, flops: the least work that the result
    takes; roof: a function that does just that work.
    """

    def run(ours, peers: dict, *, dtype=torch.float32, rounds=ROUNDS, roof=None, **work):
        truth = ours()
        for name, peer in peers.items():
            for a, b in zip(truth, peer(), strict=True):
                error = (a.double() - b.double()).norm() / b.double().norm()
                assert error < TOLERANCE[dtype], f"{name} differs by {error:.1e} of the norm"
        roof, times = (roof, 1) if roof else _roof(work, dtype)
        medians = interleave({"ours": ours, **peers, "roof": roof}, rounds)
        benchmark.extra_info |= {
            "device": DEVICE,
            "torch": torch.__version__,
            f"share of the {next(iter(work), 'matmul')} roof": round(
                medians["roof"] / times / medians["ours"], 3
            ),
            **{f"{name} / ours": round(medians[name] / medians["ours"], 2) for name in peers},
        }
        benchmark.pedantic(ours, rounds=1)

    return run


def pytest_terminal_summary(terminalreporter):
    """The ratios, which pytest-benchmark's table leaves out; above 1 the peer is slower."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        facts = ", ".join(f"{k}: {v}" for k, v in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}  {facts}")
