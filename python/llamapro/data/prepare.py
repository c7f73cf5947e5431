"""Text and conversations to token files; `tokens.py` says how they look.

All is read twice: to see how large each document is, what it says, and so which part it belongs
to, and to encode it. In between some 30 bytes are held of a document.
"""

import hashlib
import json
import logging
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamapro.data.chat import ChatTemplate
from llamapro.data.decontaminate import Questions
from llamapro.data.shards import Shards
from llamapro.data.sources import Corpus, Document, open_corpus
from llamapro.data.tokens import PARTS, DataError
from llamapro.model_files import read_object
from llamapro.storage import new_directory
from llamapro.tokenizer import load_tokenizer, tokenizer_fingerprint

BATCH = 2**22  # characters that are encoded at a time; what a killed process loses at most
LEFT_OUT = len(PARTS)  # the part of documents that are blank, duplicates or contaminated
PLAIN_EVERY = 10.0  # seconds between plain lines
log = logging.getLogger("llamapro")


def prepare(
    sources,
    tokenizer,
    out,
    *,
    pattern="*",
    heldout=0.1,
    separator=None,
    text_field=None,
    licence=None,
    decontaminate=None,
) -> dict:
    """Tokenize sources into the new data directory `out` and return its meta.json.

    sources: UTF-8 files, each a document, folders of them, files of rows, and `hf:NAME`, as
    `open_corpus` says; rows have a text, or a conversation that the model's chat template renders.
    In folders, searched for `pattern`, what is hidden is left out, and what is not UTF-8 text is
    skipped and counted; a .json there is text, unless `pattern` names that suffix.
    tokenizer: a model directory. heldout: the share of the text set aside, by whole documents: none
    is in both parts, and those for training that say the same as a held-out one, but for case and
    white space, are dropped. separator: the token after each document of text, by default the
    model's end of sequence; no beginning-of-sequence token is added, and a conversation is what the
    template makes of it. text_field: the column that is the text. licence: noted in meta.json.
    decontaminate: a folder of benchmarks, see `Questions`; documents with a question are dropped.

    Killed or stopped, it goes on when it is called again: with everything the same, down to what
    the sources say, from the last batch that was written. A document is at most 64 million
    characters; memory holds some megabytes of text and their encodings, or one such document and
    its. Raises DataError for a source or a setting that is not what it should be and when there is
    no text, FileExistsError when `out` exists.
    """
    if not 0 <= heldout <= 1:
        raise DataError(f"heldout must be a share between 0 and 1, got {heldout}")
    encoder = load_tokenizer(tokenizer)
    separator_id = _separator_id(encoder, tokenizer, separator)
    corpus = open_corpus(sources, pattern, text_field, licence)
    template = ChatTemplate.of(tokenizer) if corpus.is_chat else None
    questions = None if decontaminate is None else Questions(decontaminate)
    with new_directory(out, resumes=True) as directory:
        survey = _survey(corpus, template, questions)
        parts = _parts(survey, heldout)
        meta = {
            "vocab_size": encoder.get_vocab_size(),
            "separator": separator_id,
            "kind": "chat" if corpus.is_chat else "text",
            "tokenizer": tokenizer_fingerprint(tokenizer),
            **_counts(corpus, survey, parts),
        }
        encode = _Encoder(encoder, template, separator_id)
        identity = _identity(survey, parts, meta, template)
        try:
            meta |= _write(directory, corpus, parts, encode, identity)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on from here") from None
        text = json.dumps(meta, indent=2) + "\n"
        (directory / "meta.json").write_text(text, encoding="utf-8")
    return meta


def _separator_id(encoder, tokenizer, separator: str | None) -> int:
    if separator is not None:
        token_id = encoder.token_to_id(separator)
        if token_id is None:
            raise DataError(f"separator {separator!r} is not in the vocabulary")
        return token_id
    eos = read_object(Path(tokenizer), "config.json").get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise DataError(f"{tokenizer}: no eos_token_id in config.json, name a separator")
    return eos


def _read(document: Document, template: ChatTemplate | None) -> tuple[str, list]:
    """A document's text, and of a conversation what of it is targets."""
    try:
        content = document.read()
        read = (content, []) if template is None else template.targets(content)
        read[0].encode()
    except UnicodeEncodeError as error:  # JSON can name half a character
        raise DataError(f"{document.place}: Unicode expected, got {error.reason}") from None
    except DataError as error:
        raise DataError(f"{document.place}: {error}") from None
    return read


@dataclass
class Survey:
    """What the first reading shows; arrays have an entry for each document."""

    sizes: np.ndarray  # in characters; 0 for what is blank, no text, or contaminated
    keys: np.ndarray  # their order decides what is held out
    hashes: np.ndarray  # of what they say, without case and white space
    sources: np.ndarray
    skipped: int
    contaminated: int
    digest: bytes  # of all that was read


def _survey(corpus: Corpus, template: ChatTemplate | None, questions: Questions | None) -> Survey:
    sizes, keys, hashes, sources = array("I"), array("Q"), array("Q"), array("I")
    skipped, contaminated, blank = [], 0, 0
    whole = hashlib.blake2b(digest_size=16)
    with _Progress("reading") as progress:
        for document in corpus.documents():
            text = ""
            try:
                text, _ = _read(document, template)
            except DataError:
                if document.named:
                    raise
                skipped.append(document.place)
            normal = " ".join(text.casefold().split())
            found = bool(normal) and questions is not None and questions.are_in(text)
            contaminated += found
            blank += not normal
            sizes.append(len(text) if normal and not found else 0)
            keys.append(int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big"))
            hashed = hashlib.blake2b(normal.encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(hashed, "big"))
            sources.append(document.source)
            whole.update(b"%d:" % len(text) + text.encode())
            progress.advance(len(text))
    if skipped:
        log.warning("skipped %d files that are not UTF-8 text: %s", len(skipped), _listed(skipped))
    if blank == len(sizes):
        found = _listed([d.place for d in corpus.text_files] or [s.name for s in corpus.sources])
        what = f"{blank} files match" if corpus.text_files else f"rows read: {blank}"
        raise DataError(f"{what}, none is UTF-8 text that is not blank: {found}")
    if blank + contaminated == len(sizes):
        raise DataError(f"all {contaminated} documents hold a question of a benchmark")
    if contaminated:
        log.info("dropped %d documents that hold a question of a benchmark", contaminated)
    columns = (np.asarray(column) for column in (sizes, keys, hashes, sources))
    return Survey(*columns, len(skipped), contaminated, whole.digest())


def _listed(names: list[str]) -> str:
    return ", ".join([*names[:3], *["..."] * (len(names) > 3)])


def _parts(survey: Survey, heldout: float) -> np.ndarray:
    """The part of each document, as its place in PARTS, or LEFT_OUT."""
    parts = _split(survey.sizes, survey.keys, heldout)
    train, aside = (parts == PARTS.index(part) for part in PARTS)
    twice = train & np.isin(survey.hashes, survey.hashes[aside])
    parts[twice] = LEFT_OUT
    if twice.any():
        log.info("dropped %d documents for training that are also held out", twice.sum())
    if heldout < 1 and not (parts == PARTS.index("train")).any():
        count = int((survey.sizes > 0).sum())
        raise DataError(
            f"{count} document{'s' * (count > 1)} cannot be split by file or row into training and"
            f" held-out text, {twice.sum()} said the same as a held-out one; more of them, or"
            " heldout 0 or 1, expected"
        )
    return parts


def _split(sizes: np.ndarray, keys: np.ndarray, heldout: float) -> np.ndarray:
    """Whole documents, in order, until the share is reached; not one that would double it."""
    train, aside = (PARTS.index(part) for part in PARTS)
    order = np.argsort(keys, kind="stable")
    order = order[sizes[order] > 0]
    parts = np.full(len(sizes), LEFT_OUT, dtype=np.uint8)
    parts[order] = aside if heldout == 1 else train
    share, taken = heldout * int(sizes.sum(dtype=np.int64)), 0
    for place in order if heldout < 1 else ():
        if taken >= share:
            break
        size = int(sizes[place])
        if taken + size <= 2 * share:
            parts[place] = aside
            taken += size
    if 0 < heldout < 1 and not taken:
        parts[order[np.argmin(sizes[order])]] = aside
    return parts


def _counts(corpus: Corpus, survey: Survey, parts: np.ndarray) -> dict:
    """What meta.json says of the documents."""
    kept = parts != LEFT_OUT
    documents = np.bincount(survey.sources[kept], minlength=len(corpus.sources)).tolist()
    listed = zip(corpus.sources, documents, strict=True)
    return {
        "sources": [
            {"name": s.name, "rows": s.rows, "documents": count, "licence": s.licence}
            for s, count in listed
        ],
        "documents": {part: int((parts == i).sum()) for i, part in enumerate(PARTS)},
        "skipped": survey.skipped,
        "duplicates": int((survey.sizes[~kept] > 0).sum()),
        "contaminated": survey.contaminated,
    }


def _identity(survey: Survey, parts: np.ndarray, meta: dict, template: ChatTemplate | None) -> str:
    """A hash of all that decides what is written."""
    said = [meta["tokenizer"], meta["separator"], template and template.template]
    said = json.dumps(said).encode()
    return hashlib.blake2b(survey.digest + parts.tobytes() + said, digest_size=16).hexdigest()


class _Encoder:
    """Token ids of documents, and of conversations also which of them are targets."""

    def __init__(self, tokenizer, template: ChatTemplate | None, separator: int):
        self.tokenizer, self.template, self.separator = tokenizer, template, separator
        tokenizer.encode_special_tokens = True  # text that looks like a special token stays text
        highest = max(tokenizer.get_vocab_size() - 1, separator)
        self.dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)

    def __call__(self, documents: list[tuple[str, list]]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.template is not None:
            encoded = self.template.encode_all(documents)
            return [(np.array(ids, dtype=self.dtype), mask) for ids, mask in encoded]
        texts = [text for text, _ in documents]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [(np.array([*e.ids, self.separator], dtype=self.dtype), None) for e in encoded]


def _write(directory: Path, corpus: Corpus, parts: np.ndarray, encode: _Encoder, identity) -> dict:
    """The token files; what meta.json says of them."""
    template, total = encode.template, int((parts != LEFT_OUT).sum())
    with Shards(directory, identity, encode.dtype, corpus.is_chat) as shards:
        done = int((parts[: shards.done] != LEFT_OUT).sum())
        with _Progress("encoding", total, done) as progress:
            for batch, place in _batches(corpus, template, parts, shards.done):
                encoded = encode([document for _, document in batch])
                for number, part in enumerate(PARTS):
                    of_part = zip(batch, encoded, strict=True)
                    shards.append(part, [e for (belongs, _), e in of_part if belongs == number])
                shards.finish(place)
                for _, (text, _) in batch:
                    progress.advance(len(text))
    return shards.summary()


def _batches(corpus, template, parts: np.ndarray, start: int) -> Iterator[tuple[list, int]]:
    """Some documents at a time, each with its part, and how many of all have then been seen:
    encodings take 30 times the memory of their text."""
    batch, held, place = [], 0, 0
    for place, document in enumerate(corpus.documents(), start=1):
        if start < place <= len(parts) and parts[place - 1] != LEFT_OUT:
            batch.append((parts[place - 1], _read(document, template)))
            held += len(batch[-1][1][0])
        if held >= BATCH:
            yield batch, place
            batch, held = [], 0
    if place != len(parts):
        raise DataError(f"{len(parts)} documents expected, got {place}: a source has changed")
    if batch:
        yield batch, place


class _Progress:
    """Says how far the work is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, what: str, documents: int | None = None, done: int = 0):
        self.what, self.total, self.first, self.done = what, documents, done, done
        self.size, self.began = 0, time.perf_counter()
        self.said = self.began
        self.bar = _bar(documents) if sys.stderr.isatty() else None

    def advance(self, size: int) -> None:
        """One more document, of so many characters."""
        self.done, self.size = self.done + 1, self.size + size
        now = time.perf_counter()
        if now - self.said < (0.1 if self.bar else PLAIN_EVERY):
            return
        self.said, took = now, now - self.began
        text = f"{self.what}: {self.done:,} documents, {self.size / took / 1e6:.1f} MB/s"
        if self.total is not None:
            left = took / (self.done - self.first) * (self.total - self.done)
            text += f", {left / 60:.1f} min left"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.done, description=text)
        else:
            log.info("%s", text)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


def _bar(total: int | None):
    try:
        from rich import console, progress
    except ImportError:  # the "train" extra is not installed
        return None
    columns = (progress.BarColumn(), progress.TextColumn("{task.description}"))
    bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    bar.add_task("", total=total)
    return bar
