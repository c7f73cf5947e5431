"""Text to token files; `tokens.py` says how they look."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llamapro.data.tokens import DataError
from llamapro.model_files import read_object
from llamapro.storage import new_directory
from llamapro.tokenizer import load_tokenizer

BATCH = 2**22  # characters that are read or encoded at a time
log = logging.getLogger("llamapro")


def prepare(sources, tokenizer, out, *, pattern="*", heldout=0.1, separator=None) -> dict:
    """Tokenize files into the new data directory `out` and return its meta.json.

    sources: UTF-8 files, or folders searched for `pattern`; there, what is hidden is left out, and
    what is not UTF-8 text is skipped and counted. tokenizer: a model directory. heldout: the share
    of the text set aside, by whole files: no file is in both parts. separator: the token after
    each document, by default the model's end of sequence; no beginning-of-sequence token is added.
    Files are read twice, to split them and to encode them; memory holds some megabytes of text and
    their encodings, or the largest file and its. Raises DataError for a source or a setting that
    is not what it should be and when there is no text, FileExistsError when `out` exists.
    """
    if not 0 <= heldout <= 1:
        raise DataError(f"heldout must be a share between 0 and 1, got {heldout}")
    encode = load_tokenizer(tokenizer)
    encode.encode_special_tokens = True  # text that looks like a special token stays text
    separator_id = _separator_id(encode, tokenizer, separator)
    files = _files([Path(s) for s in sources], pattern)
    with new_directory(out) as directory:
        sizes, skipped = _sizes(files)
        parts = _split(sizes, heldout)
        meta = {
            "vocab_size": encode.get_vocab_size(),
            "separator": separator_id,
            "documents": {part: len(documents) for part, documents in parts.items()},
            "skipped": skipped,
            **_write(directory, parts, encode, separator_id),
        }
        text = json.dumps(meta, indent=2) + "\n"
        (directory / "meta.json").write_text(text, encoding="utf-8")
    return meta


def _files(sources: list[Path], pattern: str) -> dict[Path, bool]:
    """Files, and whether each is itself a source, in an order that is fixed and mixes folders: by
    a hash of the path. A file that is named twice is there once."""
    found: dict[Path, bytes] = {}
    for source in sources:
        for file, name in _search(source, pattern):
            found.setdefault(file.resolve(), hashlib.sha256(str(name).encode()).digest())
    if not found:
        where = [str(source) for source in sources]
        raise DataError(f"text expected, got no file matching {pattern!r} in {where}")
    named = {source.resolve() for source in sources}
    return {file: file in named for file in sorted(found, key=lambda file: (found[file], file))}


def _search(source: Path, pattern: str) -> Iterator[tuple[Path, Path]]:
    """Files and their names below the source, without what is hidden there, such as .git."""
    if not source.exists():
        raise DataError(f"{source}: text expected, got no such file or folder")
    if not source.is_dir():
        yield source, Path(source.name)
        return
    for file in source.rglob(pattern):
        name = file.relative_to(source)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield file, name


def _sizes(files: dict[Path, bool]) -> tuple[dict[Path, int], int]:
    """Characters of each file that has text, and how many were skipped: they are not UTF-8."""
    sizes, skipped = {}, []
    for file, is_source in files.items():
        try:
            sizes[file] = _size(file)
        except DataError:
            if is_source:
                raise
            skipped.append(file)
    if skipped:
        log.warning("skipped %d files that are not UTF-8 text: %s", len(skipped), _listed(skipped))
    sizes = {file: size for file, size in sizes.items() if size}
    if not sizes:
        names = _listed([*files])
        raise DataError(f"{len(files)} files match, none is UTF-8 text that is not blank: {names}")
    return sizes, len(skipped)


def _listed(files: list[Path]) -> str:
    return ", ".join([*map(str, files[:3]), *["..."] * (len(files) > 3)])


def _size(file: Path) -> int:
    """In characters; 0 for a file that is blank."""
    size, blank = 0, True
    for piece in _pieces(file):
        size += len(piece)
        blank = blank and piece.isspace()
    return 0 if blank else size


def _pieces(file: Path) -> Iterator[str]:
    """A file's text, so that one that is none need not fit in memory. Raises DataError there."""
    try:
        with open(file, encoding="utf-8-sig") as text:
            while piece := text.read(BATCH):
                if "\0" in piece:
                    raise DataError(f"{file}: UTF-8 text expected, got a NUL character")
                yield piece
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.end]
        raise DataError(f"{file}: UTF-8 text expected, got {wrong} ({error.reason})") from None


def _split(sizes: dict[Path, int], heldout: float) -> dict[str, list[Path]]:
    """Whole documents, in order, until the share is reached; not one that would double it."""
    aside = heldout * sum(sizes.values())
    taken, parts = 0, {"train": [], "heldout": []}
    for file, size in sizes.items():
        fits = taken < aside and taken + size <= 2 * aside
        parts["heldout" if fits or heldout == 1 else "train"].append(file)
        taken += size if fits else 0
    if 0 < heldout < 1 and not parts["heldout"]:
        smallest = min(parts["train"], key=sizes.get)
        parts["train"].remove(smallest)
        parts["heldout"].append(smallest)
    if heldout < 1 and not parts["train"]:
        raise DataError(
            f"{len(sizes)} document cannot be split by file into training and held-out text;"
            " more files, or heldout 0 or 1, expected"
        )
    return parts


def _separator_id(encode, tokenizer, separator: str | None) -> int:
    if separator is not None:
        token_id = encode.token_to_id(separator)
        if token_id is None:
            raise DataError(f"separator {separator!r} is not in the vocabulary")
        return token_id
    eos = read_object(Path(tokenizer), "config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise DataError(f"{tokenizer}: no eos_token_id in config.json, name a separator")
    return eos


def _write(directory: Path, parts: dict[str, list[Path]], encode, separator_id: int) -> dict:
    """The token files; what meta.json says of them."""
    highest = max(encode.get_vocab_size() - 1, separator_id)
    dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)
    digest, tokens, max_token = hashlib.blake2b(digest_size=16), {}, 0
    for part, files in parts.items():
        tokens[part] = 0
        with open(directory / f"{part}.bin", "wb") as file:
            for batch in _batches("".join(_pieces(document)) for document in files):
                ids = _encode(encode, batch, separator_id, dtype)
                file.write(ids.data)
                digest.update(ids.data)
                tokens[part] += len(ids)
                max_token = max(max_token, int(ids.max()))
    hashed = digest.hexdigest()
    return {"dtype": dtype.name, "tokens": tokens, "max_token": max_token, "digest": hashed}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Some documents at a time: encodings take 30 times the memory of their text."""
    batch, held = [], 0
    for document in documents:
        batch.append(document)
        held += len(document)
        if held >= BATCH:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encode(encode, documents: list[str], separator_id: int, dtype) -> np.ndarray:
    encoded = encode.encode_batch(documents, add_special_tokens=False)
    return np.concatenate([np.array([*d.ids, separator_id], dtype=dtype) for d in encoded])
