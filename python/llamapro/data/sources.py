"""Where documents come from: text files, of which each is one, and rows of files or of the hub."""

import gzip
import hashlib
import importlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from llamapro.data.tokens import DataError
from llamapro.storage import check_regular, one_line, shown

HUB = "hf:"
SPLITS = ("train", "validation", "test")
ROW_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".parquet")
TEXT_FILES = "text files"
# What a row is read from is the first of these that its source's first row has.
COLUMNS = (
    *(("text",), ("messages",), ("conversations",), ("prompt", "completion")),
    *(("prompt", "response"), ("instruction", "output"), ("instruction", "response")),
)
INPUTS = ("input", "context")  # Alpaca's name for what an instruction is about, and Dolly's
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}
MAX_DOCUMENT = 2**26  # characters, or bytes of a row in JSON; to encode them takes some 2 GB
PIECE = 2**22  # characters that are read at a time
BATCH_ROWS = 256  # rows of a parquet file that are read at a time
log = logging.getLogger("llamapro")


class Document(NamedTuple):
    """A document that is not yet read."""

    source: int  # which of the sources it belongs to
    place: str  # as messages name it
    name: str  # what a place in an order of all documents may be made from: no folder is in it
    read: Callable[[], str | list[dict]]  # its text or messages; DataError, without the place
    named: bool = True  # it must be readable; a file that is just found in a folder need not be


class Part(NamedTuple):
    """A file, or a dataset of the hub, and its rows, numbered from 1; with some columns alone."""

    place: str
    name: str
    rows: Callable[..., Iterator[tuple[int, dict]]]

    def numbered(self, columns=None) -> Iterator[tuple[int, dict]]:
        try:
            for number, row in self.rows(columns):
                if not isinstance(row, dict):
                    got = shown(row)
                    raise DataError(
                        f"row {number}: an object with named fields expected, got {got}"
                    )
                yield number, row
        except DataError as error:
            raise DataError(f"{self.place}: {error}") from None
        except Exception as error:  # five libraries read rows, and share no narrower class
            got = f"{type(error).__name__}: {one_line(error)}"
            raise DataError(f"{self.place}: rows expected, got {got}") from error


@dataclass
class Source:
    """What an argument of `prepare` names: text files, or parts with rows that have `columns`."""

    name: str
    licence: str | None
    parts: tuple[Part, ...] = ()
    columns: tuple[str, ...] = ()

    @property
    def rows(self) -> str:
        return " + ".join(self.columns) or TEXT_FILES


@dataclass
class Corpus:
    """Sources; what of them is a text file stands apart, as their files are mixed."""

    sources: list[Source]
    text_files: list[Document]
    is_chat: bool

    def documents(self) -> Iterator[Document]:
        """Text files, in an order that is fixed and mixes folders, then rows in their own."""
        yield from self.text_files
        for index, source in enumerate(self.sources):
            wanted = (*source.columns, *(INPUTS if "instruction" in source.columns else ()))
            for part in source.parts:
                for number, row in part.numbered(wanted):
                    read = partial(_content, row, source.columns, self.is_chat)
                    name = f"{part.name}:{number}"
                    yield Document(index, f"{part.place}, row {number}", name, read)


def open_corpus(sources, pattern="*", text_field=None, licence=None) -> Corpus:
    """The corpus of files, folders and `hf:NAME[:CONFIG][:SPLIT]`.

    A file is read as rows by its suffix (ROW_FILES); but .json in a folder is a text as all others
    are, so that code stays whole, unless `pattern` names that suffix. Of a name with one word more,
    that is a configuration unless it is one of SPLITS; the split is "train" unless it is said.
    Raises DataError for a source that is not there, has no row, or has rows without known columns,
    and for text and chat side by side.
    """
    opened, texts, seen = [], {}, set()
    named = {Path(s).resolve() for s in sources if not _is_hub(s)}
    for index, source in enumerate(sources):
        if _is_hub(source):
            opened.append(_open_hub(str(source), licence))
            continue
        parts = []
        for file, name in sorted(_search(Path(source), pattern)):
            path = file.resolve()
            rows = file.name.endswith(ROW_FILES) and (
                file.suffix != ".json" or path in named or ".json" in pattern
            )
            if path not in seen:  # one that is named twice is there once
                seen.add(path)
                if rows:
                    parts.append(rows_of(file, str(name)))
                else:
                    texts[path] = Document(
                        index, str(file), str(name), partial(read_text, file), path in named
                    )
        opened.append(Source(str(source), licence, tuple(parts)))
    if not texts and not any(source.parts for source in opened):
        where = [str(source) for source in sources]
        raise DataError(f"text expected, got no file matching {pattern!r} in {where}")
    return Corpus(opened, _in_order(texts), _is_chat(opened, texts, text_field))


def _in_order(texts: dict[Path, Document]) -> list[Document]:
    """By a hash of the name, which mixes folders."""
    order = sorted(texts, key=lambda f: (hashlib.sha256(texts[f].name.encode()).digest(), f))
    return [texts[file] for file in order]


def _is_chat(sources: list[Source], texts: dict[Path, Document], text_field: str | None) -> bool:
    """Sets the columns of each source; says whether these are conversations."""
    kinds = {}
    for source in sources:
        if source.parts:
            source.columns = _columns(source, text_field)
            log.info("%s: a document is a row's %s", source.name, source.rows)
            is_text = source.columns in (("text",), (text_field,))
            kinds.setdefault("text" if is_text else "chat", f"{source.name} ({source.rows})")
    if texts:
        kinds["text"] = sources[next(iter(texts.values())).source].name
    if len(kinds) == 2:
        raise DataError(
            f"sources that are all text or all chat expected, got text from {kinds['text']}"
            f" and chat from {kinds['chat']}"
        )
    return "chat" in kinds


def _columns(source: Source, text_field: str | None) -> tuple[str, ...]:
    """The columns that documents are read from, as the first row shows."""
    known = COLUMNS if text_field is None else ((text_field,),)
    for part in source.parts:
        for number, row in part.numbered():
            has = [c for c in known if all(row.get(name) is not None for name in c)]
            if not has:
                expected = " or ".join(" + ".join(columns) for columns in known)
                raise DataError(
                    f"{part.place}, row {number}: columns {expected} expected, got {shown([*row])}"
                )
            return has[0]
    raise DataError(f"{source.name}: rows expected, got none")


def _content(row: dict, columns: tuple[str, ...], is_chat: bool) -> str | list[dict]:
    """The text, or the messages, of a row."""
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        raise DataError(f"{' + '.join(columns)}, as in the first row, expected, got {shown(row)}")
    values = [row[name] for name in columns]
    if columns == ("messages",):
        return _turns(*values)
    if columns == ("conversations",):
        return [_from_to_role(turn) for turn in _turns(*values)]
    if columns[0] == "prompt":
        return [*_turns(values[0], "user"), *_turns(values[1], "assistant")]
    if is_chat:
        about = [row[name] for name in INPUTS if row.get(name)]
        values[0] = "\n\n".join(_string(value) for value in (values[0], *about))
        return [*_turns(values[0], "user"), *_turns(_string(values[1]), "assistant")]
    return _string(*values)


def _string(value) -> str:
    if not isinstance(value, str) or len(value) > MAX_DOCUMENT:
        got = f"{len(value)} characters" if isinstance(value, str) else shown(value)
        raise DataError(f"a text of at most {MAX_DOCUMENT} characters expected, got {got}")
    return value


def _turns(value, role: str | None = None) -> list[dict]:
    """Messages as they are, or one of a text, where its role is known."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": _string(value)}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"a list of messages expected, got {shown(value)}")
    return value


def _from_to_role(turn: dict) -> dict:
    """ShareGPT's names of a turn's fields and roles to those of messages."""
    role = turn.get("from")
    if role not in ROLES:
        raise DataError(f"a turn from one of {[*ROLES]} expected, got from {shown(role)}")
    return {"role": ROLES[role], "content": turn.get("value")}


def _search(source: Path, pattern: str) -> Iterator[tuple[Path, Path]]:
    """Files and their names below the source, without what is hidden there, such as .git."""
    if not source.exists():
        raise DataError(f"{source}: text expected, got no such file or folder")
    if not source.is_dir():
        check_regular(source)  # it is read twice
        yield source, Path(source.name)
        return
    for file in source.rglob(pattern):
        name = file.relative_to(source)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield file, name


def read_text(file: Path) -> str:
    """A text file, but that a file which is none, or is too large, need not fit in memory."""
    pieces, size = [], 0
    try:
        with open(file, encoding="utf-8-sig") as text:
            while piece := text.read(PIECE):
                size += len(piece)
                if "\0" in piece:
                    raise DataError("UTF-8 text expected, got a NUL character")
                if size > MAX_DOCUMENT:
                    most = f"at most {MAX_DOCUMENT} characters"
                    raise DataError(f"{most} in a document expected, got more: split the file")
                pieces.append(piece)
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.end]
        raise DataError(f"UTF-8 text expected, got {wrong} ({error.reason})") from None
    return "".join(pieces)


def rows_of(file: Path, name: str = "") -> Part:
    """The rows of a file of ROW_FILES."""
    read = _parquet_rows if file.suffix == ".parquet" else _json_rows
    return Part(str(file), name, partial(read, file))


def _parquet_rows(file: Path, columns) -> Iterator[tuple[int, dict]]:
    parquet = needed("pyarrow.parquet")
    with parquet.ParquetFile(file) as table:
        batches = table.iter_batches(BATCH_ROWS, columns=columns and [*columns])
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _json_rows(file: Path, columns=None) -> Iterator[tuple[int, dict]]:
    with _decompressed(file) as stream:
        if file.suffix == ".json" and stream.read(PIECE).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            stream.seek(0)
            yield from enumerate(_array(io.TextIOWrapper(stream, encoding="utf-8-sig")), start=1)
            return
        if file.suffix == ".json":
            stream.seek(0)
        number = 0
        while line := stream.readline(MAX_DOCUMENT + 1):
            number += 1
            if len(line) > MAX_DOCUMENT:
                raise DataError(f"row {number}: at most {MAX_DOCUMENT} bytes expected, got more")
            if not line.isspace():
                yield number, _json(json.loads, line, number)


def _decompressed(file: Path):
    if file.suffix == ".gz":
        return gzip.open(file)
    if file.suffix == ".zst":
        stream = needed("pyarrow").CompressedInputStream(str(file), "zstd")
        return io.BufferedReader(stream, PIECE)
    return open(file, "rb")


def _json(load: Callable, text, number: int):
    try:
        return load(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"row {number}: JSON expected: {one_line(error)}") from None


def _array(text) -> Iterator:
    """The elements of a JSON array; a piece of it is held at a time."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    held, start = text.read(PIECE).lstrip()[1:], 0
    while True:
        start = between.match(held, start).end()
        try:
            row, start = decode(held, start)
        except ValueError as error:
            if held.startswith("]", start):
                return
            left = len(held) - start
            more = text.read(max(PIECE, left)) if left <= MAX_DOCUMENT else ""
            if not more:
                raise DataError(f"an array of JSON objects expected: {error.msg}") from None
            held, start = held[start:] + more, 0
        else:
            yield row


def _is_hub(source) -> bool:
    return str(source).startswith(HUB)


def _open_hub(source: str, licence: str | None) -> Source:
    name, *words = source.removeprefix(HUB).split(":")
    if len(words) == 1 and words[0] in SPLITS:
        words = ["", *words]
    config, split = [*words, "", ""][:2]
    datasets = needed("datasets")
    try:
        dataset = datasets.load_dataset(
            name, config or None, split=split or SPLITS[0], streaming=True
        )
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{source}: a dataset expected: {one_line(error)}") from error
    part = Part(source, source, partial(_hub_rows, dataset))
    return Source(source, licence or _card_licence(name), (part,))


def _hub_rows(dataset, columns=None) -> Iterator[tuple[int, dict]]:
    known = dataset.column_names or ()
    if columns and (present := [name for name in columns if name in known]):
        dataset = dataset.select_columns(present)
    return enumerate(dataset, start=1)


def _card_licence(name: str) -> str | None:
    """As a dataset's card has it; not every dataset has a card, nor every card a licence."""
    hub = needed("huggingface_hub")
    card = Path(name) / "README.md" if Path(name).is_dir() else name
    try:
        found = hub.DatasetCard.load(card).data.get("license")
    except (OSError, ValueError):
        return None
    return ", ".join(found) if isinstance(found, list) else found


def needed(module: str):
    """A module of the "data" extra. Raises DataError when it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'the "data" extra is needed: pip install "llamapro-kernels[data]" ({error})'
        ) from None
