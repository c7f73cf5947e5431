"""A directory of new blocks, without their base: what is in it, and which base it belongs to.

new_blocks.safetensors holds their tensors under the stock names of the expanded model, and
new_blocks.json says:

positions, sources    where each is in the expanded stack, and which block of the base it copies
base, base_blocks     the base's name and how many blocks it has
base_fingerprint      one digest of the base's tensors and of every setting that is computed with
base_dtype            the dtype in which these tensors were; null: each in one of its own
dtype, digest         of the new blocks' tensors

The base is fingerprinted as it is computed with: stored in bf16 and loaded in fp32 it is still the
same base, since no value differs.
"""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from llamapro.config import LAYER, LlamaConfig
from llamapro.hf import DTYPES, TensorEntry, main_dtype, read_header, write_safetensors
from llamapro.model_files import CheckpointError, file_in
from llamapro.placement import Slot, place_blocks
from llamapro.proof import combined, digest, settings
from llamapro.storage import new_directory, one_line, read_json, shown, write_json

WEIGHTS, ABOUT = "new_blocks.safetensors", "new_blocks.json"
PREFIX = "model.layers."
MOST_BLOCKS = 1000  # as of a configuration
DIGEST = re.compile("[0-9a-f]{32}")  # of `combined`
log = logging.getLogger("llamapro")
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


@dataclass(frozen=True)
class Base:
    """What new blocks belong to: its settings that are computed with, and its tensors."""

    settings: dict[str, str]
    entries: list[TensorEntry]

    @property
    def blocks(self) -> int:
        names = (LAYER.fullmatch(entry.name) for entry in self.entries)
        return len({match[1] for match in names if match})

    @property
    def dtype(self) -> torch.dtype | None:
        """That of all tensors, if it is one."""
        dtypes = {entry.dtype for entry in self.entries}
        return dtypes.pop() if len(dtypes) == 1 else None

    def shapes(self, block: int) -> dict[str, tuple]:
        """Of a block's tensors, under their names without the block's."""
        prefix = f"{PREFIX}{block}."
        ours = (entry for entry in self.entries if entry.name.startswith(prefix))
        return {entry.name.removeprefix(prefix): entry.shape for entry in ours}

    def fingerprint(self, dtype: torch.dtype | None) -> str:
        """One digest of everything, the tensors turned into `dtype` first if that is given."""
        tensors = {e.name: digest(e.load().to(dtype or e.dtype)) for e in self.entries}
        return combined({**self.settings, **tensors})


def base_settings(config: LlamaConfig) -> dict[str, str]:
    """What a base computes with. 10000 and 10000.0 are one number: libraries write either."""
    base = settings(replace(config, llama_pro=None))
    return {name: json.dumps(json.loads(v, parse_int=float)) for name, v in base.items()}


@dataclass(frozen=True)
class NewBlocks:
    """A directory of new blocks, opened: what it says, checked, and its tensors."""

    path: Path
    positions: list[int]
    sources: list[int]
    base: str | None
    base_blocks: int
    base_fingerprint: str
    base_dtype: torch.dtype | None
    digest: str
    tensors: dict[str, TensorEntry]

    @property
    def slots(self) -> list[Slot]:
        """The expanded stack, bottom to top."""
        stack = place_blocks(self.base_blocks, None, self.positions)
        sources = iter(self.sources)
        return [Slot(next(sources), True) if slot.new else slot for slot in stack]

    def check(self, base: Base, whose) -> None:
        """Raise CheckpointError unless these blocks were made for this base, and are undamaged.

        Says so when they have more digits than the base, whose dtype they will have.
        """
        if base.blocks != self.base_blocks:
            raise CheckpointError(
                f"{self.path}: a base of {self.base_blocks} blocks expected,"
                f" got {whose} with {base.blocks}"
            )
        self._check_shapes(base)
        got = base.fingerprint(self.base_dtype)
        if got != self.base_fingerprint:
            raise CheckpointError(
                f"{self.path}: made for {one_line(self.base or 'a base')} with the fingerprint"
                f" {self.base_fingerprint} (in {DTYPE_NAMES.get(self.base_dtype, 'its dtypes')}),"
                f" got {whose} with {got}"
            )
        got = digest_of(self.tensors.values())
        if got != self.digest:
            raise CheckpointError(
                f"{self.path / WEIGHTS} is damaged: the digest {self.digest} expected, got {got}"
            )
        ours, theirs = main_dtype(self.tensors.values()), main_dtype(base.entries)
        if ours.itemsize > theirs.itemsize:
            names = DTYPE_NAMES[ours], whose, DTYPE_NAMES[theirs]
            log.warning("%s: in %s, rounded now as %s is in %s", self.path, *names)

    def _check_shapes(self, base: Base) -> None:
        expected = {
            f"{PREFIX}{position}.{name}": shape
            for position, source in zip(self.positions, self.sources, strict=True)
            for name, shape in base.shapes(source).items()
        }
        got = {name: entry.shape for name, entry in self.tensors.items()}
        for name in sorted(expected.keys() | got.keys()):
            want, have = (shapes.get(name, "no such tensor") for shapes in (expected, got))
            if want != have:
                raise CheckpointError(
                    f"{self.path / WEIGHTS}: {shown(name)}: {want} expected, got {have}"
                )


def digest_of(entries: Iterable[TensorEntry]) -> str:
    """One digest of named tensors."""
    return combined({entry.name: digest(entry.load()) for entry in entries})


def describe(
    entries: list[TensorEntry], positions: list[int], sources: list[int], name, base: Base
) -> dict:
    """What new_blocks.json says of these tensors."""
    return {
        "positions": positions,
        "sources": sources,
        "base": name,
        "base_blocks": base.blocks,
        "base_fingerprint": base.fingerprint(base.dtype),
        "base_dtype": DTYPE_NAMES.get(base.dtype),
        "dtype": DTYPE_NAMES[main_dtype(entries)],
        "digest": digest_of(entries),
    }


def write_new_blocks(out, entries: list[TensorEntry], about: dict) -> Path:
    """Write tensors of new blocks and their description to the new directory `out`."""
    with new_directory(out, needs=sum(entry.nbytes for entry in entries)) as directory:
        write_json(directory / ABOUT, about)
        write_safetensors(directory / WEIGHTS, entries)
    return Path(out)


def open_new_blocks(path) -> NewBlocks:
    """Open a directory of new blocks; CheckpointError says what is wrong with it."""
    path = Path(path)
    try:
        about, weights = read_json(file_in(path, ABOUT)), file_in(path, WEIGHTS)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: new blocks expected, {ABOUT} and {WEIGHTS}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    try:
        described = _checked(about)
    except ValueError as error:
        raise CheckpointError(f"{path / ABOUT}: {error}") from None
    return NewBlocks(path=path, **described, tensors=read_header(weights, _load))


def _checked(about: dict) -> dict:
    """What new_blocks.json says. Raises ValueError for what `write_new_blocks` does not write."""
    positions, sources, blocks = (about.get(n) for n in ("positions", "sources", "base_blocks"))
    if not _whole(blocks, 1, MOST_BLOCKS):
        raise ValueError(f"base_blocks must be from 1 to {MOST_BLOCKS}, got {shown(blocks)}")
    total = blocks + (len(positions) if isinstance(positions, list) else 0)
    if not _are_whole(positions, total) or positions != sorted(set(positions)):
        raise ValueError(f"positions must ascend from 0 up to {total - 1}, got {shown(positions)}")
    if not _are_whole(sources, blocks) or len(sources) != len(positions):
        raise ValueError(f"sources must be a base block for each position, got {shown(sources)}")
    texts = {name: about.get(name) for name in ("base", "base_fingerprint", "digest")}
    if not isinstance(texts["base"], str | None):
        raise ValueError(f"base must be text, got {shown(texts['base'])}")
    for name in ("base_fingerprint", "digest"):
        if not (isinstance(texts[name], str) and DIGEST.fullmatch(texts[name])):
            raise ValueError(f"{name} must be 32 hexadecimal digits, got {shown(texts[name])}")
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {None: None}
    dtype = about.get("base_dtype")
    if not isinstance(dtype, str | None) or dtype not in dtypes:
        raise ValueError(f"base_dtype must be one of {list(dtypes)}, got {shown(dtype)}")
    numbers = {"positions": positions, "sources": sources, "base_blocks": blocks}
    return {**numbers, **texts, "base_dtype": dtypes[dtype]}


def _whole(value, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are_whole(values, end: int) -> bool:
    fits = isinstance(values, list) and 0 < len(values) <= MOST_BLOCKS
    return fits and all(_whole(value, 0, end - 1) for value in values)


def _load(file: Path, name: str) -> torch.Tensor:
    """Opened each time: what is mapped for a tensor goes with it."""
    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)
