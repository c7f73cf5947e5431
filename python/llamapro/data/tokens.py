"""Token files, and rows of them for training and evaluation.

A data directory holds train.bin and heldout.bin, documents one after the other as uint16 or uint32,
and meta.json. Beside each stands .bin.index, where documents end, in tokens, as uint64, and, of
chat, .bin.loss, a byte for each token: whether it counts as a target. (datatrove's layout.) In text
the model's end-of-sequence token stands after each document; no beginning-of-sequence token is
added.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llamapro.model_files import file_in
from llamapro.storage import read_json, shown
from llamapro.tokenizer import tokenizer_fingerprint

WHOLE = 4 * 10**9  # bytes of tokens that are hashed in seconds; of more, blocks
BLOCKS, BLOCK = 1024, 2**20  # of bytes
PARTS = ("train", "heldout")
BESIDE = (".index", ".loss")
IGNORED = -100  # as a target


class DataError(ValueError):
    """A corpus or token file is not what it should be."""


def fingerprint(data, *, verify: bool = False) -> str:
    """The dtype, sizes and a hash of a data directory's train.bin and heldout.bin, in this order,
    and one of what stands beside them.

    All of them is hashed, or, where that is more than 4 GB, blocks that are evenly spread. Raises
    DataError when all is hashed, as `verify` asks for whatever the size, and meta.json, unless it
    was made before it had a digest, has another one.
    """
    files = [Path(data) / f"{part}.bin" for part in PARTS]
    for file in files:
        if not file.exists():
            raise DataError(f"{file}: a token file expected, got none")
    meta = _meta(Path(data))
    sizes = [file.stat().st_size for file in files]
    sampled = sum(sizes) > WHOLE
    if verify or not sampled:
        whole = hash_of(files)
        if meta.get("digest", whole) != whole:
            raise DataError(
                f"{data}: train.bin and heldout.bin changed since they were prepared: the digest"
                f" {meta['digest']} of meta.json expected, got {whole}"
            )
    beside = [Path(f"{file}{suffix}") for file in files for suffix in BESIDE]
    beside = [file for file in beside if file.exists()]
    hashed = [hash_of(files, BLOCKS) if sampled else whole, *([hash_of(beside)] if beside else [])]
    return f"{meta['dtype']} {sizes} {' '.join(hashed)}"


def hash_of(files: list[Path], blocks: int | None = None) -> str:
    """A hash of these files, one after the other, or of so many blocks of each, end to end."""
    hashed = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        places = range(0, size, BLOCK)
        if blocks is not None:
            places = [max(0, size - BLOCK) * i // (blocks - 1) for i in range(blocks)]
        with open(path, "rb") as file:
            for place in places:
                file.seek(place)
                hashed.update(file.read(BLOCK))
    return hashed.hexdigest()


@dataclass(frozen=True)
class Tokens:
    """A token file: ids (n,), the ends of its documents, increasing to n, and, of chat, which ids
    count as targets (n,), all memory-mapped where files have them."""

    ids: np.ndarray
    ends: np.ndarray
    counted: np.ndarray | None = None
    name: str = "tokens"


def load_tokens(data, part: str, vocab_size: int) -> Tokens:
    """train.bin or heldout.bin of a data directory, and what stands beside it.

    Raises DataError when the files do not fit each other or the model's vocabulary.
    """
    directory = Path(data)
    meta = _meta(directory)
    count, path = meta["tokens"].get(part, 0), directory / f"{part}.bin"
    ids = _mapped(path, np.dtype(meta["dtype"]), count)
    if not count:
        raise DataError(f"{path}: tokens expected, got an empty file; see prepare's heldout")
    if meta["max_token"] >= vocab_size:
        raise DataError(
            f"{data}: token ids below the vocabulary's {vocab_size} expected,"
            f" got {meta['max_token']}"
        )
    counted = directory / f"{part}.bin.loss"
    counted = _mapped(counted, np.dtype(bool), count) if counted.exists() else None
    return Tokens(ids, _ends(path, ids, meta), counted, str(path))


def check_tokenizer(data, model) -> None:
    """Raise DataError when a data directory was prepared with another tokenizer than the model's;
    directories that do not say, and models that have none, are taken as they are."""
    said = _meta(Path(data)).get("tokenizer")
    if said is None or not (Path(model) / "tokenizer.json").exists():
        return
    if said != (own := tokenizer_fingerprint(model)):
        raise DataError(
            f"{data}: prepared with another tokenizer than {model} has: fingerprint {own} expected,"
            f" got {said}"
        )


def are_samples(data) -> bool:
    """Whether a data directory holds a model's own samples, which `llamapro replay` makes."""
    return "samples" in _meta(Path(data))


def _ends(path: Path, ids: np.ndarray, meta: dict) -> np.ndarray:
    """Where documents end; without an index, as directories were made before, after separators."""
    index = path.with_name(f"{path.name}.index")
    if index.exists():
        ends = _mapped(index, np.dtype("<u8"), index.stat().st_size // 8)
    else:
        ends = np.flatnonzero(ids == meta["separator"]) + 1
        if not len(ends) or ends[-1] != len(ids):
            ends = np.append(ends, len(ids))
    if not len(ends) or ends[-1] != len(ids):
        raise DataError(f"{index}: an end at token {len(ids)} expected, got {shown([*ends[-1:]])}")
    return ends


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = file_in(path.parent, path.name).stat().st_size if path.exists() else 0
    if size != count * dtype.itemsize:
        raise DataError(
            f"{path}: {count} entries, {count * dtype.itemsize} bytes expected, got {size}"
        )
    return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype)


def _meta(directory: Path) -> dict:
    """meta.json of a data directory; what is read of it has the right kinds."""
    if not (directory / "meta.json").exists():
        raise DataError(
            f"{directory}: a directory made by `llamapro prepare` expected, no meta.json"
        )
    meta = read_json(file_in(directory, "meta.json"))
    tokens, numbers = meta.get("tokens"), ("max_token", "separator")
    counts = [*tokens.values()] if isinstance(tokens, dict) else [None]
    counts += map(meta.get, numbers)
    if meta.get("dtype") not in ("uint16", "uint32") or not all(type(n) is int for n in counts):
        got = shown({name: meta.get(name) for name in ("dtype", "tokens", *numbers)})
        raise DataError(f"{directory}/meta.json: not by `llamapro prepare`: {got}")
    return meta


class Batch(NamedTuple):
    """Rows of a micro-batch. Packed documents lie one after the other in a batch of one."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -100 where none counts
    cu_seqlens: torch.Tensor | None = None  # (documents + 1,) int32, see `lk.flash_attention`
    documents: int | None = None  # that are packed, or pieces of them
    padding: int = 0  # tokens that fill rows
    kept: "Batch | None" = None  # the last rows once more, where they are the base's, see `Mixture`

    @property
    def counted(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())


@dataclass(frozen=True)
class TokenDataset:
    """A token file cut into rows of `seq_len` tokens, each with the tokens that follow.

    Rows run across documents ("wrapped"). They come in a new random order each epoch, which depends
    on `seed` alone: the place in the data is a number of rows, and going on after a stop needs no
    other state. Raises DataError when there is not one row, or seq_len is below 1.
    """

    tokens: Tokens
    seq_len: int
    seed: int = 0

    def __post_init__(self):
        if self.seq_len < 1:
            raise DataError(f"seq_len must be at least 1, got {self.seq_len}")
        if len(self) < 1:
            raise DataError(self._too_short())

    def _too_short(self) -> str:
        return (
            f"{self.tokens.name}: at least seq_len + 1 = {self.seq_len + 1} tokens expected,"
            f" got {len(self.tokens.ids)}"
        )

    def __len__(self) -> int:
        return (len(self.tokens.ids) - 1) // self.seq_len

    @property
    def spread(self) -> tuple[tuple[int, float], ...]:
        """The lengths that documents, or pieces of them, have, and how many of each a row holds on
        average: here a row is as one document."""
        return ((self.seq_len, 1.0),)

    def row(self, place: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and targets, (seq_len,) int64 each, and the lengths of the documents in them."""
        return *self._piece(place * self.seq_len, self.seq_len), [self.seq_len]

    def _piece(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `start` on, and their targets."""
        ids = self.tokens.ids[start : start + length + 1].astype(np.int64)
        targets = ids[1:]
        if self.tokens.counted is not None:
            counted = self.tokens.counted[start + 1 : start + length + 1]
            targets = np.where(counted, targets, IGNORED)
        return ids[:-1], targets

    def rows(self, places) -> Batch:
        """The rows at these places of the file, as one batch."""
        return self.collate([self.row(place) for place in places])

    def collate(self, rows: list, kept: int = 0) -> Batch:
        """(B, seq_len), of which the last `kept` rows are the base's."""
        tokens, targets, _ = zip(*rows, strict=True)
        tokens, targets = (torch.from_numpy(np.stack(part)) for part in (tokens, targets))
        last = Batch(tokens[-kept:], targets[-kept:]) if kept else None
        return Batch(tokens, targets, kept=last)

    def drawn(self, number: int) -> int:
        """The place of the row that is drawn after `number` others."""
        return self._order[number]

    def batch(self, start: int, count: int) -> Batch:
        """The rows that are drawn after `start` others."""
        return self.rows([self.drawn(number) for number in range(start, start + count)])

    @cached_property
    def _order(self) -> "EpochOrder":
        return EpochOrder(len(self), self.seed)


class EpochOrder:
    """Rows in the order in which they are drawn: all of them, then all in another order."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.epoch = rows, seed, None

    def __getitem__(self, number: int) -> int:
        epoch, at = divmod(number, self.rows)
        if epoch != self.epoch:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            self.epoch = epoch
        return int(self.order[at])
