"""The inside of the sandbox: a script of the standard library that `sandbox` starts, alone.

Its first process enters namespaces of its own. The second is process 1 there: it mounts what may be
read, keeps the time and gives the verdict. The third gives up every right and runs the program.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback

# linux/sched.h: mounts, cgroups, host name, IPC, users, processes, network
NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8  # linux/mount.h, for mounts and their attributes
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
DETACH, AT_RECURSIVE, MOUNT_SETATTR = 2, 0x8000, 442
DEATH_SIGNAL, DUMPABLE, DROP_BOUND, NO_NEW_PRIVILEGES = 1, 4, 24, 38  # linux/prctl.h
NOBODY = 65534
# Besides Python's own folders: what its shared libraries and subprocesses need.
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache")
SYSTEM += ("/etc/alternatives",)
DEVICES = ("null", "zero", "urandom")
LARGEST_FILE, SCRATCH, PROCESSES, OPEN_FILES = 32 * 2**20, "size=64m,nr_inodes=4096", 64, 64
TOKEN_BYTES = 32


def main(settings: dict) -> None:
    status = settings["status"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a handler would let process 1 be signalled
    os.umask(0o022)  # nobody has to read the folders that are made
    source = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        if settings["isolated"]:
            _enter_namespaces()
            _build_root(settings["readable"])
            _prctl(DUMPABLE, 0)  # the program, a copy of this process, may not read its own memory
        sys.path += settings["packages"]
        said = _supervise(source, settings)
    except OSError as error:
        said = {"error": str(error)}
    os.write(status, json.dumps(said).encode())
    os._exit(0)


# Namespaces


def _enter_namespaces() -> None:
    """Return in process 1 of new namespaces; the caller's own process only waits for it."""
    uid, gid = os.geteuid(), os.getegid()
    mapped = _map_from_outside() if uid == 0 else None
    _check(_libc().unshare(NAMESPACES), "unshare")
    if mapped:
        mapped()
    else:
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        _write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
    go, tell = os.pipe()
    first = os.fork()
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        os.write(tell, b".")
        os.waitpid(first, 0)  # when it has ended, so has everything in the namespaces
        os._exit(0)
    os.close(tell)
    # Everything here dies with the process outside, also when that one is dead already.
    _prctl(DEATH_SIGNAL, signal.SIGKILL)
    if not os.read(go, 1):
        os._exit(1)
    os.close(go)


def _map_from_outside():
    """For root: a process outside stands by to map all users, root to mount the files of any and
    nobody to run the program. Returns what tells it to."""
    go, tell = os.pipe()
    mapper = os.fork()
    if not mapper:
        os.close(tell)
        try:
            os.read(go, 1)
            for kind in ("uid_map", "gid_map"):
                with open(f"/proc/self/{kind}") as file:
                    known = [line.split() for line in file]
                same = "".join(f"{start} {start} {count}\n" for start, _, count in known)
                _write(f"/proc/{os.getppid()}/{kind}", same)
            os._exit(0)
        except OSError as error:
            os._exit(error.errno)

    def mapped():
        os.close(tell)
        number = os.waitstatus_to_exitcode(os.waitpid(mapper, 0)[1])
        os.close(go)
        if number:
            raise OSError(number, f"uid_map: {os.strerror(number)}")

    return mapped


def _build_root(readable: list[str]) -> None:
    """Make a root of what may be read, and of a small /tmp that may be written, the only one."""
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    os.mkdir("new")
    _mount("tmpfs", "new", "tmpfs", NOSUID, "mode=755")
    _check(_libc().pivot_root(b".", b"old"), "pivot_root")
    os.chdir("/")
    for folder in ("tmp", "proc", "dev"):
        os.mkdir(f"/new/{folder}")
    # First of all: Python may lie in the old /tmp.
    _mount("tmpfs", "/new/tmp", "tmpfs", NOSUID | NODEV, f"mode=1777,{SCRATCH}")
    # Shorter paths first, so that what lies in a folder that is there already is not bound twice.
    for path in sorted({*SYSTEM, *readable}, key=len):
        _show(path)
    for name in DEVICES:
        _write(f"/new/dev/{name}", "")
    _set("/new", RDONLY | NOSUID | NODEV, flags=AT_RECURSIVE)
    _set("/new/tmp", clear=RDONLY)
    for name in DEVICES:  # only now that no device works on what is there
        _mount(f"/old/dev/{name}", f"/new/dev/{name}", None, BIND)
    _mount("proc", "/new/proc", "proc", NOSUID | NODEV | NOEXEC)
    # In a namespace of its own making a program would mount a larger /tmp.
    _write("/new/proc/sys/user/max_user_namespaces", "0")
    _set("/new/proc", RDONLY)
    os.chdir("/new")
    _check(_libc().pivot_root(b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", DETACH), "umount2")
    os.chdir("/tmp")


def _show(path: str) -> None:
    """Bind a path of the old root, links followed, to the same one of the new; not if it is
    there."""
    source, target = f"/old{path}", f"/new{path}"
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source) and path in SYSTEM:
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        _write(target, "")
    _mount(source, target, None, BIND | RECURSIVE)


def _set(path: str, attributes: int = 0, clear: int = 0, flags: int = 0) -> None:
    """Set and clear attributes of a mount, or of all below it."""
    change = (ctypes.c_uint64 * 4)(attributes, clear)  # struct mount_attr
    size = ctypes.c_size_t(ctypes.sizeof(change))
    done = _libc().syscall(MOUNT_SETATTR, -1, path.encode(), flags, change, size)
    _check(done, "mount_setattr (Linux 5.12)")


def _mount(source, target: str, kind, flags: int, options: str = "") -> None:
    text = [None if word is None else word.encode() for word in (source, target, kind, options)]
    done = _libc().mount(*text[:3], ctypes.c_ulong(flags), text[3])
    _check(done, f"mount of {source} on {target}")


def _give_up_rights() -> None:
    """Become nobody, without any capability and without a way to get one."""
    for capability in range(64):
        _libc().prctl(DROP_BOUND, capability, 0, 0, 0)  # fails past the last one
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _check(_libc().capset(header, none), "capset")
    _prctl(NO_NEW_PRIVILEGES, 1)
    _prctl(DUMPABLE, 0)  # a change of user may have set it


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    _check(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0), "prctl")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# The program


def _supervise(source: str, settings: dict) -> dict:
    """Run the program in a child, and say how it ended.

    It has passed only if the child sends back a token that is made after the child, so that no copy
    of it lies in the child's memory before it asks.
    """
    challenge, give = os.pipe()
    answers, answer = os.pipe()
    child = os.fork()
    if not child:
        for descriptor in (settings["status"], give, answers):
            os.close(descriptor)
        _run(source, challenge, answer, settings)
    os.close(answer)
    token = os.urandom(TOKEN_BYTES)
    os.write(give, token)
    os.close(give)
    os.close(challenge)
    code = _wait(child, settings["timeout"])
    os.set_blocking(answers, False)
    try:
        answered = os.read(answers, TOKEN_BYTES + 1)
    except BlockingIOError:
        answered = b""
    return {"code": code, "ended": code == 0 and answered == token}


def _wait(child: int, timeout: float) -> int | None:
    """The child's exit code, negative for a signal; None when the time is over before."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)  # process 1 has to reap orphans too
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if not pid:
            time.sleep(0.002)
    return None


def _run(source: str, challenge: int, answer: int, settings: dict, leave=os._exit) -> None:
    """Run the program, and then send the token back. Never returns.

    While the program runs, the token lies on the interpreter's value stack alone: no name, frame,
    closure or object that the garbage collector knows leads to it, nor can what will be called be
    replaced. Globals are empty as in human-eval, so `__name__` is not "__main__".
    """
    code = 1
    try:
        _limit(settings)
        if settings["isolated"]:
            _give_up_rights()
        program = compile(source, "<program>", "exec")
        os.write(answer, (os.read(challenge, TOKEN_BYTES), exec(program, {}), _end())[0])
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException as error:
        lines = traceback.format_exception_only(type(error), error)
        with contextlib.suppress(OSError):  # the program may have closed it
            os.write(2, "".join(lines).encode("utf-8", "replace")[-2000:])
    finally:
        with contextlib.suppress(Exception):  # what sys.stdout is, the program may have decided
            sys.stdout.flush()
        leave(code & 0xFF)


def _end() -> None:
    """Do what an interpreter does at its end: wait for threads, write what was printed."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()


def _limit(settings: dict) -> None:
    limits = {
        "RLIMIT_AS": settings["memory"],
        "RLIMIT_CPU": int(settings["timeout"]) + 2,
        "RLIMIT_FSIZE": LARGEST_FILE,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    if settings["isolated"]:  # elsewhere it would count all of the user's processes
        limits["RLIMIT_NPROC"] = PROCESSES
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
