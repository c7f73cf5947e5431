"""Writing that is whole or not at all, and kept apart from other processes."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(out, *, needs: int = 0) -> Iterator[Path]:
    """A directory that appears at `out` complete and on disk, or never.

    Yields a temporary directory beside it. Raises FileExistsError when `out` exists, OSError (no
    space) when the disk has less than `needs` bytes free, and BlockingIOError when another process
    is writing `out`, all before anything is written.
    """
    out = Path(out).absolute()
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists; a new directory was expected, nothing was written")
    free = shutil.disk_usage(next(p for p in out.parents if p.exists())).free
    if free < needs:
        raise OSError(
            errno.ENOSPC, f"{out} needs {needs / 1e9:.2f} GB, free are {free / 1e9:.2f} GB"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(exist_ok=True)
    with lock(partial):
        for left_by_a_killed_process in partial.iterdir():
            left_by_a_killed_process.unlink()
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            sync(partial)
            os.rename(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(out.parent)


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
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
