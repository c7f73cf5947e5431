"""Checkpoints of a run: folders named by their step, whole or not there, the newest two of them.

state.json           the step, place in the data, random state, what is frozen, what metrics go on
                     from, and digests of all of it
state.safetensors    masters and moments of a run on one device; of ranks, see `train.sharded`
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llamapro import storage
from llamapro.hf import entries_of, write_safetensors
from llamapro.model_files import CheckpointError
from llamapro.proof import digest, digests
from llamapro.ranks import is_shard

KEPT = 2
TENSORS = "state.safetensors"
log = logging.getLogger("llamapro")


class Writer:
    """Writes the checkpoints of one process, each before `write` returns."""

    failed = False  # since `write` returned

    def write(self, out: Path, tensors: dict[str, torch.Tensor], state: dict, *, last: bool):
        """Write a folder, whole or not at all. Raises OSError when it cannot be written."""
        entries, state = entries_of(tensors), {**state, "tensors": digests(tensors)}
        with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
            write_state(directory, state)
            write_safetensors(directory / TENSORS, entries)
        drop_old(out.parent)

    def close(self) -> None:
        """There is nothing to wait for."""


def write_state(directory: Path, state: dict) -> None:
    """state.json, with a digest of what is in it."""
    storage.write_json(directory / "state.json", {**state, "digest": _digest(state)})


def read_state(folder: Path) -> dict:
    """What `write_state` wrote. Raises ValueError for anything else."""
    state = storage.read_json(folder / "state.json")
    said, got = state.get("digest"), _digest({k: v for k, v in state.items() if k != "digest"})
    if said != got:
        raise ValueError(f"state.json: the digest {got} expected, got {said}")
    return state


def _digest(state: dict) -> str:
    text = json.dumps(state, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_tensors(
    folder: Path, state: dict, like: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a folder that a `Writer` wrote; of those that are shards in `like`, the shard.
    Raises ValueError for other names, shapes or dtypes, and for digests that differ."""
    file, tensors = folder / TENSORS, {}
    storage.check_regular(file)
    with safe_open(file, "pt") as saved:
        pieces = {name: saved.get_slice(name) for name in saved.keys()}  # noqa: SIM118 (no dict)
        got = {n: (tuple(p.get_shape()), p.get_dtype()) for n, p in pieces.items()}
        check_layout({name: (tuple(t.shape), "F32") for name, t in like.items()}, got)
        for name, tensor in like.items():
            whole = saved.get_tensor(name)
            was, now = state["tensors"].get(name), digest(whole)
            if was != now:
                raise ValueError(f"{TENSORS}: the digest of {name} was {was}, is {now}")
            tensors[name] = _shard_of(whole, tensor) if is_shard(tensor) else whole
    return tensors


def _shard_of(whole: torch.Tensor, like) -> torch.Tensor:
    from torch.distributed.tensor import distribute_tensor

    where = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), *where, src_data_rank=None)  # nothing is sent


def check_layout(expected: dict[str, tuple], got: dict[str, tuple]) -> None:
    """Raise ValueError for the first name whose shape and dtype are others."""
    for name in sorted(expected | got):
        if expected.get(name) != got.get(name):
            raise ValueError(f"{name}: {expected.get(name)} expected, got {got.get(name)}")


@contextmanager
def damage_said(saved: list[Path]) -> Iterator[None]:
    """Raise CheckpointError for what is wrong with the newest of these, and say what to do."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        instead = f"go on from {saved[-2].name}" if len(saved) > 1 else "start anew"
        said = storage.one_line(error)
        raise CheckpointError(f"{saved[-1]} is damaged: {said}; remove it to {instead}") from None


def checkpoints(run) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return _complete(Path(run) / "checkpoints")


def _complete(directory: Path) -> list[Path]:
    folders = directory.glob("step-" + "[0-9]" * 8)
    return sorted(folder for folder in folders if folder.is_dir())


def drop_old(directory: Path) -> None:
    """Remove all checkpoints but the newest; one that stays is said."""
    for folder in _complete(directory)[:-KEPT]:
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            os.rename(folder, partial)  # half of it must not look whole
            shutil.rmtree(partial)
        except OSError as error:
            log.warning("an old checkpoint could not be removed: %s", error)
