"""Writing that is whole or not at all, and kept apart from other processes; reading of JSON."""

import errno
import fcntl
import json
import math
import os
import reprlib
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_JSON_BYTES = 32 * 2**20  # a hundred times the index of the largest Llama
MAX_JSON_DEPTH = 50
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_new(out) -> Path:
    """The absolute path. Raises FileExistsError when there is something."""
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; a new directory was expected, nothing was written")
    return out


@contextmanager
def new_directory(out, *, needs: int = 0, resumes: bool = False) -> Iterator[Path]:
    """A directory that appears at `out` complete and on disk, or never.

    Yields a temporary directory beside it, empty, unless the caller `resumes`: then it holds what a
    killed process left there, and Ctrl-C leaves it as it is. Raises FileExistsError when `out`
    exists, OSError (no space) when the disk has less than `needs` bytes free, and BlockingIOError
    when another process is writing `out`, all before anything is written.
    """
    out = check_new(out)
    free = shutil.disk_usage(next(p for p in out.parents if p.exists())).free
    if free < needs:
        raise OSError(errno.ENOSPC, f"{out} needs {byte_count(needs)}, free are {byte_count(free)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(exist_ok=True)
    with lock(partial), _no_room_named(out):
        if not resumes:
            clear(partial)
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            os.rename(partial, out)
        except BaseException as error:
            kept = resumes and isinstance(error, KeyboardInterrupt) and any(partial.iterdir())
            if not kept:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(out.parent)


def clear(directory: Path) -> None:
    """Remove the files of a directory."""
    for file in directory.iterdir():
        file.unlink()


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory; the lock ends with the process, however it ends.

    Raises BlockingIOError when another process works there.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(directory))
        except OSError:
            mine = False
        if not mine:
            raise BlockingIOError(f"{directory}: another process is writing there")
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value) -> None:
    """Replace a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with _no_room_named(path):
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    sync(path.parent)


@contextmanager
def _no_room_named(path: Path) -> Iterator[None]:
    """The error of a full disk, or of a file that may not grow, names it: by itself it does not."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict:
    """The JSON object in a file that may come from anywhere: regular, not too large, in UTF-8.

    Raises ValueError, which names the file, for what is none, is nested too deep to be written
    again, or holds a number that is not finite; OSError when it cannot be read.
    """
    check_regular(path, MAX_JSON_BYTES)
    return _object(path.read_bytes(), path)


def read_json_lines(path: Path) -> list[dict]:
    """The JSON objects in a file of lines; see `read_json`. Empty lines count for nothing."""
    check_regular(path, MAX_JSON_BYTES)
    lines = enumerate(path.read_bytes().split(b"\n"), 1)
    return [_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _object(content: bytes, place) -> dict:
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
        _check_depth(value, MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a JSON object expected, got {type(value).__name__}")
    return value


def check_regular(path: Path, max_bytes: int | None = None) -> None:
    """Raise ValueError unless this is a regular file, not larger; it is not opened, as a FIFO that
    nobody writes to would wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a device, FIFO or socket"
        raise ValueError(f"{path}: a regular file expected, got {kind}")
    if max_bytes is not None and status.st_size > max_bytes:
        limit, got = byte_count(max_bytes), byte_count(status.st_size)
        raise ValueError(f"{path}: at most {limit} expected, got {got}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"finite numbers expected, got {text[:20]}")
    return number


def _check_depth(value, levels: int) -> None:
    if not levels:
        raise ValueError(f"at most {MAX_JSON_DEPTH} levels expected, got more")
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, dict | list) else ():
        _check_depth(part, levels - 1)


def byte_count(count: int) -> str:
    """For people: 1.50 GB, 12.00 MB, 4.00 kB or 12 bytes."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 100


def shown(value) -> str:
    """A value as a message shows it: on one line, and no longer than one."""
    return _shortener.repr(value)


def one_line(text, most: int = 1000) -> str:
    """What another library says, for a message: on one line that ends somewhere."""
    text = " ".join(str(text).split())
    return text if len(text) <= most else f"{text[:most]} ..."
