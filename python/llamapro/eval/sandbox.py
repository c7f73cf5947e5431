"""Running programs that a model wrote: in namespaces of their own, or not at all.

A program is given no network, no home folder, no device, no environment, and one small folder to
write to; it is stopped at a time, and nothing of it is left. What that does not cover: faults of
the kernel; memory of many processes together, 64 at most; native code, ctypes too, that searches
its own process for what says that it passed; and what makes a program's tests mean something else,
as an `__eq__` that is always True does, or skips them, as a trace function can.
"""

import functools
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llamapro.storage import one_line

INIT = Path(__file__).with_name("sandbox_init.py")
MEMORY = 2**30
MAX_OUTPUT = 2**20
START_SECONDS = 20.0  # to start, on a busy machine: the program's own time is kept inside
# The address space would go to threads of linear algebra.
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/tmp", **THREADS}
log = logging.getLogger(__name__)


class IsolationError(RuntimeError):
    """Programs cannot be isolated here."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended; it passed only if it ran to its very end.

    reason: "passed", "timeout", "killed by SIGSEGV", "exit 1: AssertionError", "exit 0 before the
    program's end", ... stdout: what it printed, of which more than 1 MiB ends it.
    """

    passed: bool
    reason: str
    stdout: str = ""


def run(
    program: str, *, timeout: float = 3.0, memory: int = MEMORY, allow_unsafe: bool = False
) -> Outcome:
    """How a Python program ends. Each of its processes may take `memory` bytes of addresses.

    Raises IsolationError where programs cannot be isolated, unless `allow_unsafe`: then a program
    can do what the user can, within limits of time and memory.
    """
    check(allow_unsafe)
    missing = isolation()
    if not missing:
        return _outcome(*_start(program, timeout, memory, isolated=True))
    _warn(missing)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _outcome(*_start(program, timeout, memory, isolated=False, folder=folder))


def run_all(programs: Sequence[str], *, workers: int = 2, **settings) -> list[Outcome]:
    """How programs end, `workers` side by side; in their order. settings: of `run`."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run(program, **settings), programs))


def check(allow_unsafe: bool = False) -> None:
    """Raise IsolationError where `run` would."""
    missing = None if allow_unsafe else isolation()
    if missing:
        raise IsolationError(
            f"a model's programs run isolated only, and here that fails: {missing}; "
            "allow_unsafe runs them with all the rights of this user"
        )


@functools.cache
def isolation() -> str | None:
    """What is missing for programs to be isolated here, found by trying; None if nothing is."""
    if sys.platform != "linux":
        return f"Linux expected, got {sys.platform}"
    said, _, stderr = _start("", 10.0, MEMORY, isolated=True)
    if said.get("ended"):
        return None
    return one_line(said.get("error") or stderr or said, 200)


@functools.cache
def _warn(missing: str) -> None:
    log.warning("no isolation (%s): programs run with all the rights of this user", missing)


def _start(program, timeout, memory, *, isolated, folder=None) -> tuple[dict, str, str]:
    """What process 1 says of a program, and what that wrote to stdout and stderr."""
    status, theirs = os.pipe()
    settings = {"status": theirs, "isolated": isolated, "timeout": timeout, "memory": memory}
    settings["readable"] = _python_folders()
    settings["packages"] = sorted({sysconfig.get_path(kind) for kind in ("purelib", "platlib")})
    with tempfile.TemporaryFile() as source, open(status, "rb", buffering=0) as says:
        try:
            source.write(program.encode("utf-8", "surrogatepass"))
            source.seek(0)
            # Without `site`, whose .pth files would run, and take longer than all the rest.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(INIT), json.dumps(settings)],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs],
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        with process:
            try:
                said, *texts = _read(process, says, timeout + START_SECONDS)
            finally:
                _stop(process, isolated)
    return said, *(text.decode("utf-8", "replace") for text in texts)


def _python_folders() -> list[str]:
    return sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix})


def _read(process, says, seconds: float) -> tuple[dict, bytes, bytes]:
    """Read until process 1 has spoken and ended, too much is printed, or time is over."""
    pipes = (says, process.stdout, process.stderr)
    texts = {pipe: bytearray() for pipe in pipes}
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as ready:
        for pipe in pipes:
            os.set_blocking(pipe.fileno(), False)
            ready.register(pipe, selectors.EVENT_READ)
        ended = False
        while not ended:
            left = end - time.monotonic()
            if left <= 0:
                return {"code": None}, *(bytes(texts[pipe]) for pipe in pipes[1:])
            for key, _ in ready.select(left):
                if _drain(key.fileobj, texts[key.fileobj]):
                    ready.unregister(key.fileobj)
                    ended |= key.fileobj is says
            if max(map(len, texts.values())) > MAX_OUTPUT:
                return {"printed": True}, *(bytes(texts[pipe]) for pipe in pipes[1:])
    for pipe in pipes[1:]:
        _drain(pipe, texts[pipe])
    said = json.loads(texts[says]) if texts[says] else {}
    return said, bytes(texts[process.stdout]), bytes(texts[process.stderr])


def _drain(pipe, text: bytearray) -> bool:
    """Take what a pipe holds, up to a little more than may be printed; True at its end."""
    while len(text) <= MAX_OUTPUT:
        try:
            piece = os.read(pipe.fileno(), 2**16)
        except BlockingIOError:
            return False
        if not piece:
            return True
        text += piece
    return False


def _stop(process, isolated: bool) -> None:
    """End what is left. The first process of a sandbox ends when all others have."""
    if isolated:
        process.terminate()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


def _outcome(said: dict, stdout: str, stderr: str) -> Outcome:
    last = stderr.strip().rpartition("\n")[2]
    if "error" in said:
        raise IsolationError(f"a program was not started: {said['error']}")
    if said.get("ended"):
        return Outcome(True, "passed", stdout)
    if said.get("printed"):
        return Outcome(False, f"more than {MAX_OUTPUT} bytes printed", stdout)
    if "code" not in said:
        return Outcome(False, f"the sandbox died: {one_line(last, 200)}", stdout)
    code = said["code"]
    if code is None:
        return Outcome(False, "timeout", stdout)
    if code < 0:
        return Outcome(False, f"killed by {signal.Signals(-code).name}", stdout)
    why = f": {one_line(last, 200)}" if last and code else " before the program's end"
    return Outcome(False, f"exit {code}{why}", stdout)
