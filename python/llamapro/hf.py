"""Hugging Face Llama directories, in and out: checked before use, written whole or not at all."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llamapro.config import LAYER, stock_shapes
from llamapro.model_files import (
    COMPANIONS,
    CheckpointError,
    check_name,
    companions,
    file_in,
    locate,
    parse_config,
    read_object,
)
from llamapro.storage import one_line, shown, write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
FILES = ["*.safetensors", INDEX, "config.json", *COMPANIONS]
MAX_SHARD_BYTES = 5 * 10**9
# Some old files carry these; they follow from the configuration.
DERIVED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, or about to be: `load` reads it, alone."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def entries_of(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    """Of tensors in memory, by name. Raises ValueError for those that are shards of others."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor, without loading torch.distributed
            raise ValueError(f"{name} is sharded: a whole tensor expected, see its full_tensor()")
    return [
        TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


def main_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    """The dtype most bytes are in."""
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    return max(sizes, key=sizes.get)


class Checkpoint:
    """A model directory opened for reading: configuration and tensor headers, checked."""

    def __init__(self, path):
        self.path = locate(path, FILES)
        self.config = self._read_config()
        companions(self.path)  # checked now: they are copied when a run of hours has ended
        self.files = self._files()
        self.tensors: dict[str, TensorEntry] = {}
        self._open_file: tuple[Path, object] | None = None
        for file in self.files:
            self.tensors |= read_header(file, self._load)
        self._check_layout()

    def _read_config(self):
        return parse_config(self.path)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What the files must hold: names and shapes."""
        return stock_shapes(self.config)

    @property
    def dtype(self) -> torch.dtype:
        return main_dtype(self.tensors.values())

    def _files(self) -> list[Path]:
        names = self._file_names()
        missing = [name for name in names if not (self.path / name).exists()]
        if missing:
            raise CheckpointError(
                f"{self.path}: the index names {len(names)} shards, missing: {shown(missing)}"
            )
        return [file_in(self.path, name) for name in names]

    def _file_names(self) -> list[str]:
        if os.path.lexists(self.path / INDEX):
            where = read_object(self.path, INDEX).get("weight_map")
            if not isinstance(where, dict) or not where:
                raise CheckpointError(
                    f"{self.path / INDEX}: a weight_map expected, got {shown(where)}"
                )
            for name in where.values():
                check_name(self.path, name)
            return sorted(set(where.values()))
        if os.path.lexists(self.path / "model.safetensors"):
            return ["model.safetensors"]
        pickles = [file.name for kind in ("*.bin", "*.pt*") for file in self.path.glob(kind)]
        got = f"pickled weights {shown(pickles)}, which are refused" if pickles else "neither"
        raise CheckpointError(f"{self.path}: model.safetensors or its index expected, got {got}")

    def _check_layout(self) -> None:
        layers = {match[1] for match in map(LAYER.fullmatch, self.tensors) if match}
        if len(layers) != self.config.num_hidden_layers:  # before as many names are made
            raise CheckpointError(
                f"{self.path}: num_hidden_layers = {len(layers)} expected, as in the weights;"
                f" config.json says {self.config.num_hidden_layers}"
            )
        if self.config.tie_word_embeddings:
            self._drop_second_name()
        expected = self._shapes()
        missing = sorted(expected.keys() - self.tensors.keys())
        extra = sorted(
            name for name in self.tensors.keys() - expected.keys() if not name.endswith(DERIVED)
        )
        wrong = [
            f"{name} {self.tensors[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in self.tensors and self.tensors[name].shape != shape
        ]
        for what, names in (("missing", missing), ("unexpected", extra), ("wrong shapes", wrong)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                listed = ", ".join(map(shown, names[:5]))
                raise CheckpointError(f"{self.path}: {what}: {listed}{more}")

    def _drop_second_name(self) -> None:
        """Some files hold the one tied matrix under both names."""
        head = self.tensors.pop("lm_head.weight", None)
        embedding = self.tensors.get("model.embed_tokens.weight")
        if head and embedding and not torch.equal(head.load(), embedding.load()):
            raise CheckpointError(
                f"{self.path}: embeddings are tied, but lm_head.weight differs from"
                " model.embed_tokens.weight; equal ones expected"
            )

    def _load(self, file: Path, name: str) -> torch.Tensor:
        """One file is open at a time, so that no more than one shard is mapped."""
        if self._open_file is None or self._open_file[0] != file:
            self.close()
            self._open_file = (file, safe_open(file, "pt"))
        return self._open_file[1].get_tensor(name)

    def close(self) -> None:
        """Let go of the mapped file."""
        self._open_file = None


def read_header(file: Path, load: Callable[[Path, str], torch.Tensor]) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name; `load` reads one when it is asked for."""
    tensors = {}
    try:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                piece = weights.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{file}: {shown(name)} must be one of {sorted(DTYPES)},"
                        f" got {piece.get_dtype()}"
                    )
                dtype, shape = DTYPES[piece.get_dtype()], tuple(piece.get_shape())
                tensors[name] = TensorEntry(name, dtype, shape, partial(load, file, name))
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: truncated or not safetensors, {file.stat().st_size} bytes: {one_line(error)}"
        ) from None
    return tensors


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's values into these tensors, by stock name."""
    for name, tensor in tensors.items():
        tensor.copy_(checkpoint.tensors[name].load())


def write_model(
    directory: Path,
    config,
    entries: list[TensorEntry],
    *,
    files_from=None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill an empty directory: config.json, which is `config.to_dict()`, weights, and companions
    copied from `files_from`."""
    dtype = str(main_dtype(entries)).removeprefix("torch.")
    raw = {**config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
    write_json(directory / "config.json", dict(sorted(raw.items())))  # whatever it was read from
    for file in companions(Path(files_from)) if files_from else []:
        shutil.copyfile(file, directory / file.name)
    shards = _shards(entries, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard)
    if len(shards) > 1:
        where = {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard}
        total = sum(entry.nbytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(directory / INDEX, index)


def write_safetensors(path: Path, entries: Iterable[TensorEntry]) -> None:
    """One safetensors file, a tensor at a time: the library's writer holds a file twice over.

    Format: 8 bytes little-endian header length, JSON header padded to 8 bytes, the values.
    """
    entries = sorted(entries, key=lambda e: -e.dtype.itemsize)  # keeps every tensor aligned
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            values = entry.load().to("cpu", entry.dtype).contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def _shards(entries: list[TensorEntry], max_bytes: int) -> list[list[TensorEntry]]:
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
