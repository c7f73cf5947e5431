"""Hugging Face Llama directories, in and out: checked before use, written whole or not at all."""

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llamapro.model import Block, Llama, LlamaConfig
from llamapro.storage import new_directory

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
# Some old files carry these; they follow from the configuration.
DERIVED = ("rotary_emb.inv_freq",)


class CheckpointError(ValueError):
    """A model directory is not what it should be."""


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
        self.path = _resolve(path, ["*.safetensors", *COMPANIONS])
        self.config = _parse_config(self.path)
        self.tensors: dict[str, TensorEntry] = {}
        self._open_file: tuple[Path, object] | None = None
        for file in self._files():
            self._read_header(file)
        self._check_layout()

    @property
    def dtype(self) -> torch.dtype:
        return main_dtype(self.tensors.values())

    def _files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        elif (self.path / "model.safetensors").exists():
            names = ["model.safetensors"]
        else:
            pickles = [p.name for p in self.path.glob("*.bin")] + [
                p.name for p in self.path.glob("*.pt*")
            ]
            got = f"pickled weights {pickles}, which are refused" if pickles else "neither"
            raise CheckpointError(
                f"{self.path}: model.safetensors or its index expected, got {got}"
            )
        missing = [name for name in names if not (self.path / name).exists()]
        if missing:
            raise CheckpointError(
                f"{self.path}: the index names {len(names)} shards, missing: {missing}"
            )
        return [self.path / name for name in names]

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dict)
                    piece = shard.get_slice(name)
                    if piece.get_dtype() not in DTYPES:
                        raise CheckpointError(
                            f"{file}: {name} must be one of {sorted(DTYPES)},"
                            f" got {piece.get_dtype()}"
                        )
                    self.tensors[name] = TensorEntry(
                        name,
                        DTYPES[piece.get_dtype()],
                        tuple(piece.get_shape()),
                        lambda name=name: self._load(file, name),
                    )
        except SafetensorError as error:
            raise CheckpointError(
                f"{file}: truncated or not safetensors, {file.stat().st_size} bytes: {error}"
            ) from None

    def _check_layout(self) -> None:
        if self.config.tie_word_embeddings:
            self._drop_second_name()
        with torch.device("meta"):
            expected = stock_tensors(Llama(self.config))
        missing = sorted(expected.keys() - self.tensors.keys())
        extra = sorted(
            name for name in self.tensors.keys() - expected.keys() if not name.endswith(DERIVED)
        )
        wrong = [
            f"{name} {self.tensors[name].shape}, expected {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in self.tensors and self.tensors[name].shape != tuple(tensor.shape)
        ]
        for what, names in (("missing", missing), ("unexpected", extra), ("wrong shapes", wrong)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise CheckpointError(f"{self.path}: {what}: {', '.join(names[:5])}{more}")

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


def load(path, *, dtype: torch.dtype | None = None, device="cpu") -> Llama:
    """See `Llama.from_pretrained`."""
    checkpoint = Checkpoint(path)
    with torch.device("meta"):
        model = Llama(checkpoint.config).to(dtype or checkpoint.dtype)
    model.to_empty(device=device)
    model.tie()
    fill(stock_tensors(model), checkpoint)
    checkpoint.close()
    return model


@torch.no_grad()
def load_block(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> Block:
    """One block alone, on the CPU."""
    with torch.device("meta"):
        block = Block(checkpoint.config).to(dtype)
    block.to_empty(device="cpu")
    fill(block_tensors(block, checkpoint.config, f"model.layers.{index}."), checkpoint)
    return block


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's values into these tensors, by stock name."""
    for name, tensor in tensors.items():
        tensor.copy_(checkpoint.tensors[name].load())


def save(model: Llama, out, *, files_from=None) -> Path:
    """See `Llama.save_pretrained`."""
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.embed_tokens.weight:
        raise ValueError("embeddings are tied, but lm_head.weight is another parameter: call tie()")
    entries = entries_of({name: t.detach() for name, t in stock_tensors(model).items()})
    with new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        write_model(directory, model.config, entries, files_from=files_from)
    return Path(out)


def write_model(
    directory: Path,
    config: LlamaConfig,
    entries: list[TensorEntry],
    *,
    files_from=None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill an empty directory: config.json, weights, and companions copied from `files_from`."""
    dtype = str(main_dtype(entries)).removeprefix("torch.")
    raw = {**config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
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
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def companions(directory: Path) -> list[Path]:
    """The tokenizer, chat template and generation files of a model directory."""
    return [
        file
        for pattern in COMPANIONS
        for file in sorted(directory.glob(pattern))
        if file.name != "config.json" and not file.name.endswith(".index.json")
    ]


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


def stock_tensors(model: Llama) -> dict[str, torch.Tensor]:
    """Every tensor under its stock Hugging Face name; parts of fused matrices as views."""
    tensors = {"model.embed_tokens.weight": model.embed_tokens.weight}
    for i, block in enumerate(model.blocks):
        tensors |= block_tensors(block, model.config, f"model.layers.{i}.")
    tensors["model.norm.weight"] = model.norm
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight
    return tensors


def block_tensors(block: Block, config: LlamaConfig, prefix: str) -> dict[str, torch.Tensor]:
    """A block's tensors under their stock names."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    parts = (
        (block.qkv, "self_attn", ("q_proj", "k_proj", "v_proj"), (queries, keys, keys)),
        (block.o_proj, "self_attn", ("o_proj",), (config.hidden_size,)),
        (block.gate_up, "mlp", ("gate_proj", "up_proj"), (config.intermediate_size,) * 2),
        (block.down_proj, "mlp", ("down_proj",), (config.hidden_size,)),
    )
    tensors = {
        f"{prefix}input_layernorm.weight": block.attention_norm,
        f"{prefix}post_attention_layernorm.weight": block.mlp_norm,
    }
    for linear, owner, names, rows in parts:
        for kind, parameter in linear.named_parameters():
            pieces = zip(names, parameter.split(rows), strict=True)
            tensors |= {f"{prefix}{owner}.{name}.{kind}": piece for name, piece in pieces}
    return tensors


def _shards(entries: list[TensorEntry], max_bytes: int) -> list[list[TensorEntry]]:
    shards, size = [[]], 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def read_config(path) -> LlamaConfig:
    """The configuration of a model directory or Hub name; no weight is looked at."""
    return _parse_config(_resolve(path, ["config.json"]))


def _parse_config(directory: Path) -> LlamaConfig:
    raw = _read_json(directory / "config.json")
    try:
        return LlamaConfig.from_dict(raw)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory}/config.json: {error}") from None


def _resolve(path, patterns: list[str]) -> Path:
    """A local directory as it is; "owner/name" from the Hub, when huggingface_hub is there."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: a model directory expected, got no such directory")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"{path}: neither a directory here nor a model that the Hub gave: {error}"
        ) from error


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise CheckpointError(f"{path.parent}: not a Hugging Face model, it has no {path.name}")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object expected, got {type(value).__name__}")
    return value
