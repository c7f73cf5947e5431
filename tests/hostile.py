"""Programs that a sandbox has to hold. Each passes where what it tries works, and fails where not.

In braces: what `test_sandbox.py` has outside, see `outside` there.
"""

FIND = """
import gc, os, sys
found, frame = [], sys._getframe()
while frame:
    found += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
    frame = frame.f_back
found += [gc.get_objects(), sys.argv, os.environ, vars(sys.modules["__main__"])]
seen = set()
for _ in range(4):
    found = [o for o in gc.get_referents(*found) if id(o) not in seen and not seen.add(id(o))]
    for value in found:
        if type(value) is bytes and len(value) == 32 and len(set(value)) > 20:
            os.write(sys._getframe(1).f_locals["answer"], value)
os._exit(0)
"""

WRITE = """
done = []
for folder in ["/", "/usr", "/etc", "/dev", "/proc/sys", "/var/tmp", {folder!r}, {python!r}]:
    try:
        open(folder + "/written", "w")
        done.append(folder)
    except OSError:
        pass
assert done
"""

KILL_PARENT = """
import os, signal, time
for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGTERM):
    try:
        os.kill(os.getppid(), number)
    except PermissionError:
        pass
time.sleep(0.1)
os.kill(os.getppid(), 0)
raise ValueError("it lives")
"""

DETACH = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
os._exit(0)
"""

IGNORE = """
import signal
for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
    signal.signal(number, signal.SIG_IGN)
while True:
    pass
"""

FILL = """
for n in range(1000):
    with open(f"/tmp/{{n}}", "wb") as file:
        file.write(bytes(2**20))
"""

LIBC = "import ctypes; libc = ctypes.CDLL(None)\n"
WRITE_ALL = """
import os
for descriptor in range(256):
    try:
        os.write(descriptor, bytes(32))
    except OSError:
        pass
os._exit(0)
"""
PATCHED = "import builtins, os, sys\n"

# name: (program, the reason it fails for)
PROGRAMS = {
    "fork bomb": ("import os\nwhile True: os.fork()", "exit 1: BlockingIOError"),
    "endless output": ("while True: print('x' * 1000)", "more than 1048576 bytes printed"),
    "ten gigabytes": ("x = bytearray(10 * 2**30)", "exit 1: MemoryError"),
    "shadow": ("open('/etc/shadow').read()", "exit 1: FileNotFoundError"),
    "home": ("open({home!r} + '/secret').read()", "exit 1: FileNotFoundError"),
    "loopback": (
        "import socket; socket.create_connection(('127.0.0.1', {port}))",
        "exit 1: (OSError|ConnectionRefusedError)",
    ),
    "outside": (
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'', ('192.0.2.1', 9))",
        "exit 1: OSError: .*unreachable",
    ),
    "unix socket": (
        "import socket; socket.socket(socket.AF_UNIX).connect({socket!r})",
        "exit 1: FileNotFoundError",
    ),
    "abstract socket": (
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0' + {abstract!r})",
        "exit 1: ConnectionRefusedError",
    ),
    "signal to the caller": ("import os; os.kill({pid}, 0)", "exit 1: ProcessLookupError"),
    "signals to the parent": (KILL_PARENT, "exit 1: (ValueError: it lives|PermissionError)"),
    "signal to all": ("import os; os.kill(-1, 9)", "exit 1: ProcessLookupError"),
    "writing outside": (WRITE, "exit 1: AssertionError"),
    "sys.exit": ("import sys; sys.exit(0)", "exit 0 before the program's end"),
    "os._exit": ("import os; os._exit(0)", "exit 0 before the program's end"),
    "patched AssertionError": (
        PATCHED + "builtins.AssertionError = type('Exit', (SystemExit,), {{}})\nassert False",
        "exit 1: AssertionError",
    ),
    "patched ends": (
        PATCHED + "os._exit = os.write = sys.exit = sys.excepthook = builtins.exec = print\nfail",
        "exit 1",
    ),
    "patched BaseException": (
        PATCHED + "builtins.BaseException = builtins.SystemExit = KeyError\nraise ValueError",
        "exit 1",
    ),
    "deep recursion": (
        "import sys; sys.setrecursionlimit(10**9)\n"
        "class Deep:\n    def __repr__(self): return repr(self)\nrepr(Deep())",
        "exit 1: RecursionError|killed by SIGSEGV",
    ),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
    "sleeping": ("import time; time.sleep(1e6)", "timeout"),
    "detached": (DETACH, "exit 0 before the program's end"),
    "ignoring signals": (IGNORE, "timeout"),
    "closing everything": (
        "import os; os.closerange(0, 10**4)",
        "exit 1 before the program's end",
    ),
    "changing Python": (
        "import os; os.utime({python!r} + '/pyvenv.cfg')",
        "exit 1: OSError: .*Read-only file system",
    ),
    "deleting": ("import os; os.remove({folder!r} + '/secret')", "exit 1: FileNotFoundError"),
    "filling the disk": (FILL, "exit 1: OSError: .*No space left"),
    "a large file": (
        "open('/tmp/a', 'wb').truncate(2**40)",
        "exit 1: OSError: .*File too large",
    ),
    "tracing its parent": (
        LIBC + "import os; assert libc.ptrace(16, os.getppid(), 0, 0) == 0",
        "exit 1: AssertionError",
    ),
    "mounting": (
        LIBC + "assert libc.mount(b't', b'/tmp', b'tmpfs', 0, b'') == 0",
        "exit 1: AssertionError",
    ),
    "users of its own": (
        LIBC + "assert libc.unshare(0x10000000) == 0",
        "exit 1: AssertionError",
    ),
    "chroot": ("import os; os.chroot('/tmp')", "exit 1: PermissionError"),
    "becoming root": ("import os; os.setuid(0)", "exit 1: (PermissionError|OSError)"),
    "a device": (
        "import os; os.mknod('/tmp/disk', 0o60666, os.makedev(8, 0))",
        "exit 1: PermissionError",
    ),
    "environment of process 1": (
        "open('/proc/1/environ').read()",
        "exit 1: PermissionError",
    ),
    "environment": ("import os; os.environ['SECRET']", "exit 1: KeyError"),
    "inherited file": ("import os; os.write({descriptor}, b'x')", "exit 1: OSError"),
    "writing everywhere": (WRITE_ALL, "exit 0 before the program's end"),
    "finding the token": (FIND, "exit 0 before the program's end"),
    "asking for the token": (
        "import os, sys; here = sys._getframe(1).f_locals\n"
        "os.write(here['answer'], os.read(here['challenge'], 32)); os._exit(0)",
        "exit 0 before the program's end",
    ),
    "reading its memory": (
        "open('/proc/self/mem', 'rb')",
        "exit 1: PermissionError",
    ),
    "atexit": (
        "import atexit, os; atexit.register(os._exit, 0); raise ValueError",
        "exit 1: ValueError",
    ),
    "endless thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(1e6,)).start()",
        "timeout",
    ),
    "replaced stdout": (
        "import sys; sys.stdout = open(1, 'w'); print('passed'); raise SystemExit(3)",
        "exit 3",
    ),
    "many files": ("x = [open('/dev/null') for _ in range(10**4)]", "exit 1: OSError"),
    "many threads": (
        "import threading, time\n"
        "for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        "exit 1: RuntimeError",
    ),
}
