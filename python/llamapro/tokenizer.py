"""The tokenizer of a model directory."""

import hashlib
from pathlib import Path

from llamapro.model_files import MAX_COMPANION_BYTES, CheckpointError, file_in, read_object
from llamapro.storage import one_line, shown


def load_tokenizer(model):
    """The `tokenizers.Tokenizer` of a model directory, without its settings to pad and to cut.

    Needs the "train" extra. Raises FileNotFoundError when there is none.
    """
    from tokenizers import Tokenizer

    path = _file(model)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{path}: not a tokenizer: {one_line(error)}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_fingerprint(model) -> str:
    """A hash of the tokenizer of a model directory."""
    return hashlib.blake2b(_file(model).read_bytes(), digest_size=16).hexdigest()


def _file(model) -> Path:
    try:
        return file_in(Path(model), "tokenizer.json", MAX_COMPANION_BYTES)
    except FileNotFoundError:
        raise FileNotFoundError(f"{model}: tokenizer.json expected, got none") from None


def stop_ids(path: Path, tokenizer=None) -> list[int]:
    """The ids that end an answer: by generation_config.json, or else config.json, and the
    tokenizer's end of sequence, which a chat template puts after a turn."""
    named = "generation_config.json"
    ids = read_object(path, named if (path / named).exists() else "config.json").get("eos_token_id")
    ids = list(ids) if isinstance(ids, list) else [ids]
    if tokenizer and (path / "tokenizer_config.json").exists():
        eos = read_object(path, "tokenizer_config.json").get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        ids.append(tokenizer.token_to_id(eos) if eos else None)
    return sorted({i for i in ids if i is not None})


def encode(tokenizer, text: str) -> list[int]:
    """The ids of a text. Raises ValueError where the tokenizer has none for a part of it."""
    try:
        return tokenizer.encode(text).ids
    except Exception as error:  # the library raises no narrower class
        raise ValueError(
            f"a tokenizer that takes {shown(text)} expected: {one_line(error)}"
        ) from None
