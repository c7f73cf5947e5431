"""Several runs at once, each in a process of its own."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process

import torch


@contextmanager
def workers(count: int, preload: str) -> Iterator[Callable]:
    """Gives what maps a function over tasks: `map` itself, or one that has so many processes, which
    import `preload` once. They end as soon as this one does, however it ends."""
    if count == 1:
        yield map
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    with ProcessPoolExecutor(count, context, _begin, (count,)) as pool:
        try:
            yield pool.map
        except BaseException:
            for process in active_children():
                process.kill()
            raise


def _begin(count: int) -> None:
    """Take a share of the threads, say nothing, and end with the process that waits for this."""
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # several progress bars would cover each other
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)
