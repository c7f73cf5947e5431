"""Correctness and speed of every op on one GPU, in one command and within minutes.

    python -m benchmarks.gpu --out DIR          # writes DIR/<device>-<date>.json and .md
    python -m benchmarks.gpu --table FILE.json  # prints the Markdown of such a file

From the repository's root, with it and `python/` on the path. First the op tests and, at the same
time, checks at large shapes; then the measured roofs; then the timings, by importance, each row
only when the check of its own case has passed. What goes wrong in a row stands in that row. Both
files are replaced whole after every row, so a run that is cut off keeps what it has.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from llamapro.storage import write_json, write_text

import llamapro_kernels as lk
from benchmarks.gpu import cases, measure
from benchmarks.gpu.measure import Check, Cuda, attempt
from benchmarks.gpu.report import describe, markdown

ROOT = Path(__file__).resolve().parents[2]
OP_TESTS = ("tests/test_ops.py", "tests/test_triton.py")
TIMED = torch.bfloat16


class Run:
    """One run: its report, where it is written, and how much time is left."""

    def __init__(self, device, scale, out: Path, minutes: float, commit: str | None = None):
        self.device, self.scale = device, scale
        self.start, self.limit = time.monotonic(), 60 * minutes
        lists = {kind: [] for kind in ("checks", "rows", "not_started")}
        self.report = {**about(device, commit), "tests": {}, "roofs": {}, **lists}
        name = re.sub(r"[^a-z0-9]+", "-", self.report["device"].lower()).strip("-")
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"{name}-{self.report['date']}.json"
        self.write()

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def may_start(self, case, share=1.0) -> bool:
        """Whether a case surely ends within this share of the time."""
        return self.seconds() + case.most_seconds < share * self.limit

    def write(self, finished=False):
        self.report |= {"seconds": round(self.seconds(), 1), "finished": finished}
        write_json(self.path, self.report)
        write_text(self.path.with_suffix(".md"), markdown(self.report))

    def add(self, kind: str, row: dict):
        self.report[kind].append(row)
        self.write()
        print(f"{self.seconds():5.0f} s  {describe(row)}", flush=True)


def about(device, commit) -> dict:
    """Device, versions, commit and date: what a figure must come with."""
    return {
        "device": device.label(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **measure.installed("triton", "liger-kernel", "llamapro-kernels"),
        "commit": first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty") or commit,
        "date": datetime.date.today().isoformat(),
        "backends": lk.backends(device.name),
    }


def first_line(*command) -> str | None:
    """What a command prints first; None where it is missing or fails."""
    run, _ = attempt(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    )
    return (run.stdout.splitlines() or [None])[0] if run else None


@contextmanager
def op_tests(run, paths):
    """The op tests in a process of their own, beside what the block does, and ended with it."""
    log = run.path.with_suffix(".tests.txt")
    parallel = run.device.name == "cuda" and importlib.util.find_spec("xdist")
    workers = ["-n", str(max(1, os.cpu_count() - 2))] if parallel else []
    options = ["-v", "-rN", "-p", "no:cacheprovider", "-k", "not reference", *workers]
    command = [sys.executable, "-m", "pytest", *options]
    with (
        log.open("w") as text,
        subprocess.Popen(
            [*command, *map(str, paths)], stdout=text, stderr=text, cwd=ROOT
        ) as process,
    ):
        try:
            yield
            attempt(process.wait, max(0.0, run.scale.test_seconds - run.seconds()))
        finally:
            code = process.poll()
            process.send_signal(signal.SIGINT)  # to write what it has
            attempt(process.wait, 5)
            process.kill()
            run.report["tests"] = test_summary(log, "cut off" if code is None else code)
            run.write()


def test_summary(log: Path, exit_code) -> dict:
    """Counted from the lines of the single tests, which a run that is cut off has too."""
    outcomes = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    lines = [line for line in log.read_text(errors="replace").splitlines() if "%]" in line]
    by_outcome = {o: [line for line in lines if re.search(rf"\b{o}\b", line)] for o in outcomes}
    marks = re.compile(rf"\[gw\d+\]|\[ *\d+%\]|\b({'|'.join(outcomes)})\b")
    failing = [marks.sub("", line).strip() for o in outcomes[1:3] for line in by_outcome[o]]
    counts = {o.lower(): len(lines) for o, lines in by_outcome.items()}
    return {"log": log.name, "exit_code": exit_code, **counts, "failing": failing[:50]}


def named(case, dtype, **more) -> dict:
    """The part of a row that says what it is about."""
    dtype = str(dtype).removeprefix("torch.")
    return {"op": case.op, "shape": case.shape, "dtype": dtype, "wanted": case.wanted, **more}


def verdict(errors: dict | None, exception: str) -> dict:
    """What `attempt` made of a check, as the part of a row that says how it went."""
    if exception:
        return {"status": "error", "why": exception}
    why = measure.wrong(errors)
    if why:  # which has the figures too; JSON has no word for NaN
        return {"status": "wrong", "why": why}
    return {"status": "ok", "why": "", "errors": errors}


def run_checks(run):
    """Every op against fp64 in three dtypes, and where offsets pass 32 bits."""
    device = run.device.name
    for case in cases.checked(run.scale, device):
        run_check(run, case, torch.bfloat16, check_all)
    for case in cases.huge(run.scale, device):
        run_check(run, case, torch.bfloat16, measure.check_ends)
    for dtype in (torch.float32, torch.float16):
        for case in cases.checked(run.scale, device):
            run_check(run, case, dtype, check_all)


def check_all(case, device, dtype):
    return Check(case, *measure.draw(case, device, dtype, case.formula), dtype).of_ours()


def run_check(run, case, dtype, check):
    row = named(case, dtype)
    if not hasattr(lk, case.op):
        run.add("checks", {**row, "status": "absent", "why": ""})
    elif not run.may_start(case, share=0.5):  # the other half is for the timings
        run.report["not_started"].append(row)
    else:
        torch.manual_seed(0)
        run.add("checks", {**row, **verdict(*attempt(check, case, run.device, dtype))})
        run.device.release()


def run_rows(run):
    for case in cases.measured(run.scale, run.device.name):
        rows = [named(case, TIMED, **{"pass": which}) for which in case.passes]
        if not hasattr(lk, case.op):
            outcome, contest = {"status": "absent", "why": ""}, None
        elif run.may_start(case):
            outcome, contest = prepare(run, case)
        else:
            run.report["not_started"] += rows
            continue
        for row in rows:
            times = timed(run, case, row["pass"], *contest) if contest else {}
            run.add("rows", {**row, **outcome, **times})
        del contest
        run.device.release()


def prepare(run, case) -> tuple[dict, tuple | None]:
    """How the check of ours went; and where it passed, what `timed` needs besides the case."""
    torch.manual_seed(0)
    prepared, exception = attempt(check_and_draw, run.device, case)
    return prepared or (verdict(None, exception), None)


def check_and_draw(device, case):
    """Ours must be right; a peer that is not, or that fails, is left out and says so."""
    first = measure.draw(case, device, TIMED, case.formula)
    check = Check(case, *first, TIMED)
    outcome = verdict(*attempt(check.of_ours))
    if outcome["status"] != "ok":
        return outcome, None
    verdicts = {n: verdict(*attempt(check.of_peer, peer)) for n, peer in case.peers.items()}
    del check  # and with it the fp64 results
    failed = {n: {"error": v["why"]} for n, v in verdicts.items() if v["why"]}
    peers = {n: peer for n, peer in case.peers.items() if n not in failed}
    return outcome, (measure.more_sets(case, device, TIMED, *first), peers, failed)


def timed(run, case, which, sets, peers, failed) -> dict:
    """Times, rates and ratios of one pass, or why there are none."""
    result, exception = attempt(
        measure.time_pass, case, which, run.device, sets, peers, run.scale.seconds
    )
    if exception:
        return {"status": "error", "why": exception}
    rate = case.work(which) / result["ms"] * 1e3
    share = rate / run.report["roofs"][case.unit]
    result["peers"] |= failed
    return {**result, "unit": case.unit, "per_second": rate, "share_of_roof": share}


def benchmark(device, scale, out, minutes, tests, commit=None) -> Path:
    """All of it; returns where the JSON is."""
    run = Run(device, scale, Path(out), minutes, commit)
    with op_tests(run, tests):
        run_checks(run)
    run.report["roofs"] = measure.roofs(device, scale)
    run.device.release()
    run_rows(run)
    run.write(finished=True)
    return run.path


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--minutes", type=float, default=8, help="time for all of it")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print its Markdown")
    args = parser.parse_args()
    if args.table:
        print(markdown(json.loads(args.table.read_text())), end="")
        return
    if not args.out:
        parser.error("one of --out and --table is needed")
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu needs a CUDA GPU, and torch {torch.__version__} sees none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("cut off"))  # ends the op tests too
    # A kernel that hangs cannot be interrupted, only left: what is on the disk is whole.
    watchdog = threading.Timer(60 * args.minutes, os._exit, [1])
    watchdog.daemon = True
    watchdog.start()
    print(benchmark(Cuda(), cases.GPU, args.out, args.minutes, OP_TESTS, args.commit))


if __name__ == "__main__":
    main()
