"""The `compare` fixture: ours and its peers, interleaved, as ratios and as a share of the roof."""

import statistics
import time

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 15
COPY_BYTES = 2**28  # past every cache


def _seconds(function) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _roofs() -> dict:
    """What one copy and one matrix product reach here: callables and the work they do."""
    source = torch.randn(COPY_BYTES // 4, device=DEVICE)
    target = torch.empty_like(source)
    size = 8192 if DEVICE == "cuda" else 1024
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in "ab")
    return {
        "bytes": (lambda: target.copy_(source), 2 * COPY_BYTES),
        "flops": (lambda: a @ b, 2 * size**3),
    }


@pytest.fixture
def compare(benchmark):
    """compare(ours, peers, bytes=... or flops=...).

    ours, peers: functions of no argument that return the tensors to check; a speed is reported
    only when all agree. bytes, flops: the least work that the result takes.
    """

    def run(ours, peers: dict, *, rtol=1e-3, atol=1e-3, **work):
        truth = ours()
        for name, peer in peers.items():
            for a, b in zip(truth, peer(), strict=True):
                torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=f"{name} disagrees")
        (kind, amount), *_ = work.items()
        roof, roof_amount = _roofs()[kind]
        timed = {"ours": ours, **peers, "roof": roof}
        samples = {name: [] for name in timed}
        for _ in range(ROUNDS):
            for name, function in timed.items():
                samples[name].append(_seconds(function))
        medians = {name: statistics.median(values) for name, values in samples.items()}
        share = (amount / medians["ours"]) / (roof_amount / medians["roof"])
        benchmark.extra_info |= {
            "device": DEVICE,
            "torch": torch.__version__,
            f"share of the {kind} roof": round(share, 3),
            **{f"{name} / ours": round(medians[name] / medians["ours"], 2) for name in peers},
        }
        benchmark.pedantic(ours, rounds=5)

    return run


def pytest_terminal_summary(terminalreporter):
    """The ratios, which pytest-benchmark's table leaves out; above 1 the peer is slower."""
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    for bench in session.benchmarks if session else []:
        facts = ", ".join(f"{k}: {v}" for k, v in bench.extra_info.items())
        terminalreporter.write_line(f"{bench.name}  {facts}")
