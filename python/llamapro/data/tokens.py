"""Token files, and rows of them for training and evaluation.

A data directory holds train.bin and heldout.bin, documents one after the other as uint16 or uint32,
and meta.json. The model's end-of-sequence token separates documents, it stands after each; no
beginning-of-sequence token is added.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from llamapro.model_files import file_in
from llamapro.storage import read_json, shown

WHOLE = 4 * 10**9  # bytes of tokens that are hashed in seconds; of more, blocks
BLOCKS, BLOCK = 1024, 2**20  # of bytes
PARTS = ("train", "heldout")


class DataError(ValueError):
    """A corpus or token file is not what it should be."""


def fingerprint(data, *, verify: bool = False) -> str:
    """The dtype, sizes and a hash of a data directory's train.bin and heldout.bin, in this order.

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
        whole = _hash(files)
        if meta.get("digest", whole) != whole:
            raise DataError(
                f"{data}: train.bin and heldout.bin changed since they were prepared: the digest"
                f" {meta['digest']} of meta.json expected, got {whole}"
            )
    return f"{meta['dtype']} {sizes} {_hash(files, BLOCKS) if sampled else whole}"


def _hash(files: list[Path], blocks: int | None = None) -> str:
    """Of these files, one after the other, or of so many blocks of each, from end to end."""
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


def load_tokens(data, part: str, vocab_size: int) -> np.ndarray:
    """train.bin or heldout.bin of a data directory, memory-mapped.

    Raises DataError when the files do not fit each other or the model's vocabulary.
    """
    directory = Path(data)
    meta = _meta(directory)
    dtype, count = np.dtype(meta["dtype"]), meta["tokens"].get(part, 0)
    path = directory / f"{part}.bin"
    size = file_in(directory, path.name).stat().st_size if path.exists() else 0
    if size != count * dtype.itemsize:
        raise DataError(
            f"{path}: {count} tokens, {count * dtype.itemsize} bytes expected, got {size}"
        )
    if not count:
        raise DataError(f"{path}: tokens expected, got an empty file; see prepare's heldout")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    if meta["max_token"] >= vocab_size:
        raise DataError(
            f"{data}: token ids below the vocabulary's {vocab_size} expected,"
            f" got {meta['max_token']}"
        )
    return tokens


def _meta(directory: Path) -> dict:
    """meta.json of a data directory; what is read of it has the right kinds."""
    if not (directory / "meta.json").exists():
        raise DataError(
            f"{directory}: a directory made by `llamapro prepare` expected, no meta.json"
        )
    meta = read_json(file_in(directory, "meta.json"))
    tokens = meta.get("tokens")
    counts = [*tokens.values(), meta.get("max_token")] if isinstance(tokens, dict) else [None]
    if meta.get("dtype") not in ("uint16", "uint32") or not all(type(n) is int for n in counts):
        got = shown({name: meta.get(name) for name in ("dtype", "tokens", "max_token")})
        raise DataError(f"{directory}/meta.json: not by `llamapro prepare`: {got}")
    return meta


@dataclass(frozen=True)
class TokenDataset:
    """A token file cut into rows of `seq_len` tokens, each with the tokens that follow.

    Rows come in a new random order each epoch, which depends on `seed` alone: the place in the
    data is a number of rows, and going on after a stop needs no other state.
    Raises DataError when there is not one row, or seq_len is below 1.
    """

    tokens: np.ndarray
    seq_len: int
    seed: int = 0

    def __post_init__(self):
        if self.seq_len < 1:
            raise DataError(f"seq_len must be at least 1, got {self.seq_len}")
        if len(self) < 1:
            where = f"{self.tokens.filename}: " if hasattr(self.tokens, "filename") else ""
            raise DataError(
                f"{where}at least seq_len + 1 = {self.seq_len + 1} tokens expected,"
                f" got {len(self.tokens)}"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def row(self, index: int) -> torch.Tensor:
        """(seq_len + 1,) int64."""
        start = index * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))

    def batch(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, (count, seq_len) each, of shuffled rows start .. start + count."""
        numbers = range(start, start + count)
        places = [
            _epoch_order(len(self), self.seed, n // len(self))[n % len(self)] for n in numbers
        ]
        rows = torch.stack([self.row(place) for place in places])
        return rows[:, :-1], rows[:, 1:]


@lru_cache(maxsize=2)
def _epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)
