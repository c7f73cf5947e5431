"""The processes that work on one run: who they are, and what they tell each other.

`torchrun` starts them and sets RANK, WORLD_SIZE and LOCAL_RANK. A process that it did not start, or
that it started alone, is ALONE: what it tells the others, it tells itself.
"""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch

from llamapro.storage import one_line

# What a user can mend, and what is told to the other ranks.
ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError, LookupError, ImportError, MemoryError)
TIMES = count()  # that this process has joined others
PATIENCE = timedelta(days=30)  # with a rank that works alone, while it lives


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes. Numbers that they add up go over the CPU: no device is waited for.

    restarted: torchrun started them anew after one of them had died. patient: a process group in
    which they wait for each other as long as it takes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarted: bool = False
    patient: object = None

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value, added up over the ranks in fp64."""
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(together)
        return together.tolist()

    def any(self, *asked: bool) -> list[bool]:
        """Of each, whether it is so on one of the ranks."""
        return [bool(count) for count in self.sum(*map(bool, asked))]

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of this rank's device, added up over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value, group=None) -> list:
        """What each rank has, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    def deal(self, items: list) -> list[tuple]:
        """This rank's share of the items, and whether each counts: all ranks get as many, so that
        they meet where they gather weights; one that has fewer takes some that do not count."""
        counted = [(item, True) for item in items[self.rank :: self.size]]
        missing = -(-len(items) // self.size) - len(counted)
        return counted + [(item, False) for item in items[:1] * missing]

    def agree(self, work: Callable, group=None):
        """The result of `work` on this rank, once it is done on all of them; no rank speaks to the
        others meanwhile.

        An error of one is raised on all. It names the rank, where not all of them have it, and on
        all but the first it is `told`, see `is_told`.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except ERRORS as raised:
            error = raised
        told = self.gather(None if error is None else (type(error), one_line(error)), group)
        raised = [rank for rank, said in enumerate(told) if said is not None]
        if not raised:
            return result
        if error is None or len(raised) < self.size:
            kind, text = told[raised[0]]
            error = _of_rank(kind, text, raised[0])
        raise self.alike(error)

    def of_first(self, work: Callable):
        """The result of `work`, which the first rank alone does, and may take as long as it needs
        to; all get it, or its error."""
        return self.gather(self.agree(lambda: work() if self.first else None, self.patient))[0]

    def alike(self, error: Exception) -> Exception:
        """An error that every rank raises: the first alone tells of it."""
        error.told = not self.first
        return error

    def check_same(self, what: dict[str, str]) -> None:
        """Raise RuntimeError, on all ranks, when one has something else than the first."""

        def compare():
            mine, expected = all_of[self.rank], all_of[0]
            for name in mine | expected:
                if mine.get(name) != expected.get(name):
                    raise RuntimeError(
                        f"{name}: the same on every rank expected, rank 0 has"
                        f" {expected.get(name)}, this one {mine.get(name)}"
                    )

        all_of = self.gather(what)
        self.agree(compare)


ALONE = Ranks()


def _of_rank(kind: type, text: str, rank: int) -> Exception:
    """The error of another rank. Some kinds need more than a text."""
    try:
        return kind(f"rank {rank}: {text}")
    except TypeError:
        return RuntimeError(f"rank {rank}: {text}")


def speaks() -> bool:
    """Whether this process is the first, or the only one, that torchrun started."""
    return int(os.environ.get("RANK", 0)) == 0


def started_together() -> int:
    """How many processes torchrun started, of which this is one; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_alone() -> None:
    """Raise RuntimeError in each of several processes, which would do the same work."""
    count = started_together()
    if count > 1:
        error = RuntimeError(f"one process expected, torchrun started {count}: train alone shares")
        error.told = not speaks()
        raise error


def is_told(error: BaseException) -> bool:
    """Whether another rank tells the user of this error."""
    return getattr(error, "told", False)


@contextmanager
def started(device: str, timeout: float) -> Iterator[Ranks]:
    """The rank that torchrun made this process, joined with the others while inside `with`.

    device: "cuda" for GPUs, one a rank, or "cpu". timeout: seconds to wait for another rank,
    now and whenever they meet. A process group that is there already is taken, and left. Raises
    RuntimeError when a rank is missing.
    """
    size = started_together()
    if size == 1:
        yield ALONE
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if rank:  # warnings are said once
        logging.getLogger("llamapro").setLevel(logging.ERROR)
    joined = torch.distributed.is_initialized()
    if not joined:
        _join(rank, size, local, device, timeout, restarts)
    try:
        patient = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank, size, local, restarts > 0, patient)
        gc.collect()  # FSDP's modules hold memory and groups, and refer to each other
        if joined:
            torch.distributed.destroy_process_group(patient)
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        raise RuntimeError(
            f"rank {rank} lost another rank, or waited {timeout:g} s for one:"
            f" {one_line(error, 200)}"
        ) from None
    finally:
        if not joined:
            torch.distributed.destroy_process_group()


def _join(rank: int, size: int, local: int, device: str, timeout: float, restarts: int) -> None:
    """Meet under a name of its own: torchrun's store still has where ranks were before a restart,
    or before they parted, and who reads that calls in vain."""
    import torch.distributed as dist

    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    wait = timedelta(seconds=timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=wait))
        store = dist.PrefixStore(f"llamapro {restarts} {next(TIMES)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {rank} of {size} waited {timeout:g} s for the others: {one_line(error, 300)}"
        ) from None


def is_shard(tensor) -> bool:
    """Whether this is a DTensor, without loading torch.distributed."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor; memory is shared."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, without a graph; of one that is sharded, ranks gather it."""
    return tensor.detach().full_tensor() if is_shard(tensor) else tensor.detach()
