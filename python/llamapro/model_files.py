"""The files of a model directory, which come from anywhere: what is read or copied is regular,
inside the directory, and of bounded size."""

import os
from pathlib import Path, PurePosixPath

from llamapro.config import LlamaConfig
from llamapro.storage import check_regular, one_line, read_json, shown

# What Hugging Face writes beside a Llama's weights and its configuration.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
)
MAX_COMPANION_BYTES = 100 * 2**20  # three times the largest tokenizer


class CheckpointError(ValueError):
    """A model directory is not what it should be."""


def locate(model, patterns: list[str]) -> Path:
    """A local directory as it is; "owner/name" from the Hub, when huggingface_hub is there."""
    directory = Path(model)
    if directory.is_dir():
        return directory
    if directory.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise CheckpointError(f"{model}: a model directory expected, got no such directory")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"{model}: neither a directory here nor a model that the Hub gave: {one_line(error)}"
        ) from error


def file_in(directory: Path, name: str, max_bytes: int | None = None) -> Path:
    """A file of a model directory by its name, which may come from a file, too.

    Raises CheckpointError unless it is, after links are followed, a regular file inside the
    directory and not larger than `max_bytes`; nothing is opened. FileNotFoundError when there is
    none.
    """
    check_name(directory, name)
    file = directory / name
    try:
        target = file.resolve(strict=True)
        if not _belongs(target, directory):
            raise ValueError(f"{file}: a file inside {directory} expected, got a link to {target}")
        check_regular(file, max_bytes)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise CheckpointError(str(error)) from None
    return file


def check_name(directory: Path, name) -> None:
    """Raise CheckpointError unless this is a relative file name that does not lead upwards."""
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.name or path.is_absolute() or ".." in path.parts or not _is_plain(name):
        raise CheckpointError(
            f'{directory}: names of files relative to it, without "..", expected, got {shown(name)}'
        )


def _is_plain(name: str) -> bool:
    return name.isprintable() and len(name) <= 255


def _belongs(target: Path, directory: Path) -> bool:
    """Of a snapshot in the Hub's cache, .../snapshots/<revision>/, files may be links to the
    store of the same model, .../blobs/."""
    root = directory.resolve()
    store = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.is_relative_to(store)
    )


def read_config(model) -> LlamaConfig:
    """The configuration of a model directory or Hub name; no weight is looked at."""
    return parse_config(locate(model, ["config.json"]))


def parse_config(directory: Path) -> LlamaConfig:
    """The configuration of a local model directory."""
    raw = read_object(directory, "config.json")
    try:
        return LlamaConfig.from_dict(raw)
    except ValueError as error:
        raise CheckpointError(f"{directory}/config.json: {error}") from None


def read_object(directory: Path, name: str) -> dict:
    """The object in a JSON file of a model directory."""
    try:
        return read_json(file_in(directory, name))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not a Hugging Face model, it has no {name}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def companions(directory: Path) -> list[Path]:
    """The tokenizer, chat template, generation and licence files of a model directory.

    Raises CheckpointError for one that is not to be copied, see `file_in`.
    """
    names = [name for name in COMPANIONS if os.path.lexists(directory / name)]
    return [file_in(directory, name, MAX_COMPANION_BYTES) for name in names]
