"""Checkpoints of ranks that share a model, in PyTorch's distributed format (DCP).

Each rank writes its shards, __*.distcp, while training goes on; .metadata says what is where, so
that any number of ranks can read them, and one device too. state.json comes last, with digests of
those files: a folder that has its name is whole. All ranks must see one file system. PyTorch reads
.metadata with pickle: go on only with runs that you trust.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import safe_open

from llamapro import storage
from llamapro.config import LlamaConfig
from llamapro.model import Block, Llama, block_tensors
from llamapro.ranks import Ranks
from llamapro.train.checkpoint import TENSORS, check_layout, drop_old, write_state

METADATA = ".metadata"
AT_ONCE = 2**24  # bytes of a file that are hashed
REST = {  # stock names of what trains beside blocks, and ours
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm",
    "lm_head.weight": "lm_head.weight",
}
log = logging.getLogger("llamapro")


class ShardedWriter:
    """Writes the checkpoints of ranks, which go on meanwhile."""

    def __init__(self, ranks: Ranks, timeout: float):
        self.ranks, self.pending = ranks, None
        self.worker = ThreadPoolExecutor(1)
        # Of its own: what a thread sends must not mix with what training sends.
        wait = timedelta(seconds=timeout)
        self.group = torch.distributed.new_group(backend="gloo", timeout=wait)

    def write(self, out: Path, tensors: dict[str, torch.Tensor], state: dict, *, last: bool):
        """Begin to write a folder, once the one before is whole; a `last` one is waited for.

        Raises OSError, on all ranks, when that one, or the last, could not be written; instead of
        one that failed the last is written.
        """
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        try:
            self._finish()
        except OSError as error:
            if not last:
                raise
            log.warning("a checkpoint could not be written: %s", error)
        needs, stack = sum(t.numel() * t.itemsize for t in tensors.values()), ExitStack()
        new = storage.new_directory(out, needs=needs)
        directory = Path(self.ranks.of_first(lambda: str(stack.enter_context(new))))
        saving = async_save(
            dict(tensors),
            storage_writer=FileSystemWriter(directory, overwrite=True),
            process_group=self.group,
        )
        complete = partial(_complete, saving, directory, state, stack) if self.ranks.first else None
        self.pending = self.worker.submit(complete or partial(_result, saving, directory))
        if last:
            self._finish()

    @property
    def failed(self) -> bool:
        """Whether what is written could not be, as far as this rank knows by now."""
        pending = self.pending
        return pending is not None and pending.done() and pending.exception() is not None

    def _finish(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            self.ranks.agree(pending.result)

    def close(self) -> None:
        """Let the checkpoint that is being written become whole, if the others are still there."""
        self.worker.shutdown()
        torch.distributed.destroy_process_group(self.group)


@contextmanager
def _failures_named(directory: Path) -> Iterator[None]:
    """Make an OSError of what DCP raises, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures = "; ".join(f"rank {r}: {e[0]}" for r, e in error.failures.items())
        raise OSError(f"{directory}: {storage.one_line(failures, 300)}") from None


def _result(saving: Future, directory: Path) -> None:
    with _failures_named(directory):
        saving.result()


def _complete(saving: Future, directory: Path, state: dict, stack: ExitStack) -> None:
    """What the first rank does when all have written: the folder takes its name as it ends."""
    with stack:
        _result(saving, directory)
        files = {file.name: _file_digest(file) for file in sorted(directory.iterdir())}
        write_state(directory, {**state, "files": files})
    drop_old(directory.parent)


def _file_digest(file: Path) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as content:
        while piece := content.read(AT_ONCE):
            hashed.update(piece)
    return hashed.hexdigest()


def check(folder: Path, state: dict, like: dict[str, torch.Tensor], ranks: Ranks) -> None:
    """Raise ValueError for a file with another digest, each of shards looked at by one rank, and
    for names, shapes or dtypes that are not those in `like`."""
    from torch.distributed.checkpoint import FileSystemReader

    shards = sorted(state["files"].keys() - {METADATA})
    for name in [METADATA, *shards[ranks.rank :: ranks.size]]:
        was, now = state["files"][name], _file_digest(folder / name)
        if was != now:
            raise ValueError(f"{name}: the digest was {was}, is {now}")
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    got = {name: (tuple(one.size), one.properties.dtype) for name, one in saved.items()}
    check_layout({name: (tuple(t.shape), t.dtype) for name, t in like.items()}, got)


def read_tensors(folder: Path, like: dict[str, torch.Tensor], ranks: Ranks) -> dict:
    """The tensors of a folder, by all ranks together, laid out as those in `like`, whatever they
    were saved from."""
    tensors = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    _load(folder, tensors, alone=ranks.size == 1)
    return tensors


def _load(folder: Path, tensors: dict[str, torch.Tensor], *, alone: bool) -> None:
    """Read these tensors, in place; alone, or by all ranks together."""
    from torch.distributed.checkpoint import FileSystemReader, load

    with _failures_named(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the intent is to load in a single process")
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=alone)


def _load_alone(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As `_load`, from a folder that one process may have written, too."""
    if not (folder / TENSORS).exists():
        _load(folder, tensors, alone=True)
        return
    with safe_open(folder / TENSORS, "pt") as saved:
        for name, tensor in tensors.items():
            tensor.copy_(saved.get_tensor(name))


def trained_tensors(folder: Path, model: Llama, dtype: torch.dtype) -> dict[str, Callable]:
    """What reads each trained tensor of a model from a folder, by stock name, rounded to `dtype`;
    a block at a time, so that no rank has the model whole."""
    trained, config = {n for n, p in model.named_parameters() if p.requires_grad}, model.config

    @lru_cache(maxsize=1)
    def of_block(i: int) -> dict[str, torch.Tensor]:
        block = _empty(config, i, "cpu")
        masters = {f"master.blocks.{i}.{n}": p.detach() for n, p in block.named_parameters()}
        _load_alone(folder, masters)
        return block_tensors(block, config, f"model.layers.{i}.")

    def of_rest(name: str) -> torch.Tensor:
        whole = torch.empty(model.get_parameter(name).shape, dtype=torch.float32)
        _load_alone(folder, {f"master.{name}": whole})
        return whole

    found = {stock: partial(of_rest, name) for stock, name in REST.items() if name in trained}
    for i in range(config.num_hidden_layers):
        if f"blocks.{i}.attention_norm" in trained:
            names = block_tensors(_empty(config, i, "meta"), config, f"model.layers.{i}.")
            found |= {name: partial(lambda i, name: of_block(i)[name], i, name) for name in names}
    return {n: lambda read=read: read().detach().to(dtype) for n, read in found.items()}


def _empty(config: LlamaConfig, i: int, device: str) -> Block:
    """A block for masters."""
    with torch.device("meta"):
        return Block(config, config.windows[i]).float().to_empty(device=device)
