"""The GPU benchmark's every path, on the CPU and at tiny shapes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch

import llamapro_kernels as lk
from benchmarks import plain
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import step
from benchmarks.gpu.cases import Llama, Scale
from benchmarks.gpu.measure import Cpu, Cuda, Peer

GROUPED, PLAIN = Llama(32, 4, 2, 8, 48, 61), Llama(24, 2, 2, 16, 40, 53)
TINY = Scale(
    models={"1B": GROUPED, "7B": PLAIN, "70B": GROUPED},
    lengths=(16, 24, 40, 48),
    tokens=48,
    elements=2**12,
    copy_bytes=2**16,
    matmul=64,
    seconds=0.0,
    test_seconds=20,
    compiler="eager",
)
NEEDS_A_GPU = {"flash varlen"}


@contextmanager
def quick():
    """One thread, two rounds a row, and op tests without the plugins that nothing here needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        mock.patch.object(gpu_measure, "ROUNDS", (2, 2)),
        mock.patch.dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
    ):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    """What stands for the op tests: one passes, one fails."""
    path = tmp_path_factory.mktemp("op_tests") / "test_two.py"
    path.write_text("def test_right(): pass\ndef test_not(): assert 0\n")
    return path


@pytest.fixture(scope="module")
def path(tests, tmp_path_factory):
    with quick():
        return gpu.benchmark(Cpu(), TINY, tmp_path_factory.mktemp("out"), 8, [tests], commit="abc")


@pytest.fixture(scope="module")
def report(path):
    return strict_json(path)


@pytest.fixture
def benchmark_of(monkeypatch, tmp_path, tests):
    """Runs the benchmark with these cases only, no op tests, and returns its report."""

    def run(*cases, minutes=8):
        monkeypatch.setattr(gpu_cases, "checked", lambda scale, device: cases)
        monkeypatch.setattr(gpu_cases, "huge", lambda scale, device: [])
        monkeypatch.setattr(gpu_cases, "measured", lambda scale, device: cases)
        with quick():
            scale = replace(TINY, test_seconds=0)
            path = gpu.benchmark(Cpu(), scale, tmp_path, minutes, [tests])
        return strict_json(path)

    return run


def strict_json(path):
    """NaN and Infinity are no JSON."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def swiglu_case(**changes):
    return replace(gpu_cases.swiglu("7B", PLAIN, 8, "cpu"), **changes)


def present(rows):
    return [row for row in rows if hasattr(lk, row["op"])]


def test_every_check_passes(report):
    checks = present(report["checks"])
    assert [c["why"] for c in checks if c["status"] != "ok"] == []
    assert {c["dtype"] for c in checks} == {"bfloat16", "float32", "float16"}
    swiglu = next(c for c in checks if c["op"] == "swiglu")
    assert swiglu["errors"].keys() == {"output 0", "dgate_up"}


def test_every_row_has_a_speed(report):
    assert report["finished"] and not report["not_started"]
    for row in present(report["rows"]):
        assert row["status"] == "ok", row
        low, high = row["ms_10_90"]
        assert 0 < low <= row["ms"] <= high and row["per_second"] > 0 and row["share_of_roof"] > 0
        for name, peer in row["peers"].items():
            assert peer.get("ratio", 0) > 0 or name in NEEDS_A_GPU, (row, name, peer)


def test_what_is_measured(report):
    rows = {(r["op"], r["pass"], tuple(r["wanted"])) for r in report["rows"]}
    attention, loss = "flash_attention", "linear_cross_entropy"
    assert {(attention, p, ("q", "k", "v")) for p in ("forward", "backward", "both")} <= rows
    assert {(attention, "backward", w) for w in (("q",), ("k", "v"))} <= rows
    for op in ("rms_norm", "add_rms_norm"):
        inputs = ("x",) if op == "rms_norm" else ("x", "residual")
        assert {(op, "forward", inputs), (op, "backward", inputs)} <= rows
        assert (op, "backward", (*inputs, "weight")) in rows
    assert {(loss, "both", w) for w in (("x",), ("x", "weight"), ("weight",))} <= rows
    assert (loss, "forward", ()) in rows and ("linear_swiglu", "forward", ("x",)) in rows
    shapes = " ".join(r["shape"] for r in report["rows"])
    assert all(word in shapes for word in ("1B", "7B", "70B", "documents", "window"))


def test_op_tests_are_counted(report):
    tests = report["tests"]
    assert (tests["passed"], tests["failed"], tests["exit_code"]) == (1, 1, 1)
    assert [name.rsplit("::")[-1] for name in tests["failing"]] == ["test_not"]


def test_markdown_comes_from_the_json_alone(path, report, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--table", str(path)])
    gpu.main()
    text = capsys.readouterr().out
    assert text == path.with_suffix(".md").read_text()
    tables = [line for line in text.splitlines() if line.startswith("| ")]
    timed = [r for r in report["rows"] if r["status"] == "ok"]
    checks = [c for c in report["checks"] if c["status"] == "ok"]
    assert len(tables) == len(timed) + len(checks) + 4
    assert "flash varlen: NotImplementedError" in text and "1 passed, 1 failed" in text


def with_another_gradient(gate_up):
    y = plain.swiglu(gate_up)
    return y + 0.1 * (gate_up - gate_up.detach())[..., : y.shape[-1]]


@pytest.mark.parametrize(
    "function, broken",
    [
        (lambda x: plain.swiglu(x) * 1.05, "output 0"),
        (lambda x: plain.swiglu(x) * float("nan"), "output 0"),
        (lambda x: plain.swiglu(x)[:1], "shape"),
        (with_another_gradient, "dgate_up"),
    ],
    ids=["value", "nan", "shape", "gradient"],
)
def test_no_speed_for_wrong_values(benchmark_of, monkeypatch, function, broken):
    monkeypatch.setattr(lk, "swiglu", function)
    report = benchmark_of(swiglu_case(), gpu_cases.norm("rms_norm", "7B", PLAIN, 8, "cpu", True))
    for row in report["checks"] + report["rows"]:
        if row["op"] == "swiglu":
            assert row["status"] in ("wrong", "error") and broken in row["why"] and "ms" not in row
        else:
            assert row["status"] == "ok"


def test_what_raises_stands_in_its_row(benchmark_of, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(lk, "swiglu", fail)
    norm = gpu_cases.norm("rms_norm", "7B", PLAIN, 8, "cpu", False)
    peers = {"failing": Peer(fail), "another": Peer(lambda x, w: 2 * x), **norm.peers}
    report = benchmark_of(swiglu_case(), replace(norm, peers=peers))
    swiglu, rms_norm = (
        [r for r in report["rows"] if r["op"] == op] for op in ("swiglu", "rms_norm")
    )
    assert [r["why"] for r in swiglu] == ["RuntimeError: CUDA out of memory"] * 2
    for row in rms_norm:
        assert row["status"] == "ok" and row["peers"]["plain"]["ratio"] > 0
        assert row["peers"]["failing"] == {"error": "RuntimeError: CUDA out of memory"}
        assert "output 0: error" in row["peers"]["another"]["error"]


def test_absent_op(benchmark_of, monkeypatch):
    monkeypatch.delattr(lk, "swiglu")
    report = benchmark_of(swiglu_case())
    assert {r["status"] for r in report["checks"] + report["rows"]} == {"absent"}


def test_time_limit(benchmark_of, monkeypatch):
    clock = itertools.count()  # half a second each time that somebody looks
    monkeypatch.setattr(gpu.Run, "seconds", lambda run: next(clock) / 2)
    report = benchmark_of(*[swiglu_case()] * 20, minutes=1)
    assert report["finished"] and report["rows"] and len(report["checks"]) < 20
    assert {row.get("pass") for row in report["not_started"]} == {None, "forward", "backward"}
    assert benchmark_of(swiglu_case(), minutes=0)["rows"] == []


CUT_OFF = f"""
import sys, torch
sys.path[:0] = {[str(gpu.ROOT), str(gpu.ROOT / "python"), str(gpu.ROOT / "tests")]}
from test_gpu_benchmark import TINY, Cpu, gpu, gpu_cases, replace, swiglu_case
gpu.Cuda, gpu_cases.GPU = Cpu, replace(TINY, test_seconds=0)
gpu_cases.checked = gpu_cases.huge = lambda *_: []
gpu_cases.measured = lambda *_: [swiglu_case()] * 10**6
gpu.OP_TESTS, sys.argv[1:] = sys.argv[1:2], sys.argv[2:]
torch.set_num_threads(1)
torch.cuda.is_available = lambda: True
gpu.main()
"""


def test_cut_off(tests, tmp_path):
    started = {}
    for kind in (signal.SIGTERM, signal.SIGKILL):
        command = [sys.executable, "-c", CUT_OFF, str(tests), "--out", str(tmp_path / kind.name)]
        started[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for kind, process in started.items():
        with process:
            assert any(" forward (" in line for line in process.stdout)
            process.send_signal(kind)
        assert process.returncode != 0
        (path,) = (tmp_path / kind.name).glob("*.json")
        report = json.loads(path.read_text())
        assert report["rows"] and not report["finished"]
        assert "cut off" in path.with_suffix(".md").read_text()


def test_op_tests_that_take_too_long_are_ended(tmp_path):
    sleeping = tmp_path / "sleeping"
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\ndef test_a(): pass\n"
        f"def test_b(): pathlib.Path({str(sleeping)!r}).touch(), time.sleep(60)\n"
    )
    with quick():
        run = gpu.Run(Cpu(), replace(TINY, test_seconds=0), tmp_path, 8)
        with gpu.op_tests(run, [tmp_path / "test_slow.py"]):
            while not sleeping.exists():
                time.sleep(0.01)
    assert run.seconds() < 60
    assert (run.report["tests"]["passed"], run.report["tests"]["exit_code"]) == (1, "cut off")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        gpu.main()
    assert not (tmp_path / "out").exists()


def test_work_by_hand():
    """7B at 2 x 4096: each of two products has 2 * 2 * 32 * 128 * 4096^2 / 2 FLOPs."""
    case = gpu_cases.batched(gpu_cases.GPU, "7B", 4096, "cuda")
    product = 2 * 2 * 32 * 128 * 4096**2 / 2
    assert (case.work("forward"), case.work("backward")) == (2 * product, 5 * product)
    for wanted, products in ((("q",), 3), (("v",), 2), (("k", "v"), 4)):
        part = gpu_cases.batched(gpu_cases.GPU, "7B", 4096, "cuda", wanted=wanted)
        assert part.backward == products * product
    norm = gpu_cases.norm("rms_norm", "7B", gpu_cases.GPU.models["7B"], 8192, "cuda", True)
    assert norm.work("both") == 5 * 8192 * 4096 * 2


def test_cases_of_a_gpu():
    """They are only made here: the shapes, the peers by name, and tensors beyond 32 bits."""
    cases = list(gpu_cases.measured(gpu_cases.GPU, "cuda"))
    peers = {name for case in cases for name in case.peers}
    assert {"flash", "cuDNN", "cuDNN, k v expanded", "flash varlen", "compiled"} <= peers
    for case in gpu_cases.huge(gpu_cases.GPU, "meta"):
        inputs = case.make("meta", torch.bfloat16)
        assert max(x.numel() for x in inputs.values()) > 2**31


def test_cuda_calls():
    """torch.cuda is asked for nothing it does not have, and time is taken between the events."""
    event = mock.Mock(spec=torch.cuda.Event)
    event.elapsed_time.return_value = 6.0
    names = ("_sleep", "synchronize", "reset_peak_memory_stats", "empty_cache", "get_device_name")
    sizes = {"memory_allocated": 5, "max_memory_allocated": 12}
    with (
        mock.patch("torch.cuda.Event", autospec=True, return_value=event),
        mock.patch.multiple(
            "torch.cuda", **{n: mock.create_autospec(getattr(torch.cuda, n)) for n in names}
        ),
        mock.patch.multiple(
            "torch.cuda",
            **{n: mock.create_autospec(getattr(torch.cuda, n), return_value=v)
               for n, v in sizes.items()},
        ),
    ):  # fmt: skip
        device, calls = Cuda(), [mock.Mock(), mock.Mock()]
        lead = device.warm_up(calls)
        assert device.seconds(calls, lead) == 6e-3 / 2
        assert device.peak_bytes(calls[0]) == 7
        device.release()
        device.label()
        assert 0 < lead <= 0.02 and calls[1].call_count == 3
        torch.cuda._sleep.assert_called_once_with(int(lead * 2e9))


def test_results_of_repeated_heads_are_summed():
    case = gpu_cases.batched(TINY, "1B", 16, "cpu")
    inputs, upstream = gpu_measure.draw(case, Cpu(), torch.float64, case.formula)
    plain, expanded = (
        gpu_measure.evaluate(case.formula, inputs, upstream, case.wanted, group) for group in (1, 2)
    )
    for name in plain:
        torch.testing.assert_close(plain[name], expanded[name])


EVERY_SIDE = """
import json
from benchmarks.gpu import step
sizes = step.TINY, 2, "interleaved", 2, 64, "cpu"
print(json.dumps({side: step.measure(side, *sizes) for side in step.SIDES}))
"""


def test_the_step_of_every_side():
    """On a small model, in a process that the sides may change: one loss of ours and of plain
    PyTorch; and a row as the command has it, in a process of its own, which may fail."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", EVERY_SIDE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows.keys() == set(step.SIDES)
    assert rows["ours"]["loss"] == pytest.approx(rows["composition"]["loss"], rel=1e-2)
    assert all(row["tokens/s"] > 0 and row["peak GB"] > 0 for row in rows.values())
    sizes = 2, "interleaved", 2, 64, "cpu"
    assert step.row_in_a_process(("ours", step.TINY, *sizes))["loss"] == rows["ours"]["loss"]
    failed = step.row_in_a_process(("ours", {"vocab_size": -1}, *sizes))
    assert failed.keys() == {"failed"}
