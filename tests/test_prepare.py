"""Text to token files; rows and conversations: test_sources.py, test_chat_data.py."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import time

import numpy as np
import pytest
from llamapro.data import prepare as module
from llamapro.data import sources
from llamapro.data.prepare import prepare
from llamapro.data.tokens import DataError
from llamapro.tokenizer import load_tokenizer, tokenizer_fingerprint


def documents(directory, part):
    """As the index divides the token file."""
    tokens = np.fromfile(directory / f"{part}.bin", dtype=np.uint16)
    ends = np.fromfile(directory / f"{part}.bin.index", dtype="<u8").astype(np.int64)
    assert len(tokens) == (ends[-1] if len(ends) else 0)
    return [tuple(d.tolist()) for d in np.split(tokens, ends)[:-1]]


def texts(directory, tokenizer):
    decode = load_tokenizer(tokenizer).decode
    found = [d for part in ("train", "heldout") for d in documents(directory, part)]
    return {decode(list(tokens[:-1])) for tokens in found}


def test_every_file_is_in_one_part(corpus, tokenizer, tmp_path):
    meta = prepare([corpus], tokenizer, tmp_path / "out", pattern="*.py", heldout=0.25)
    train, heldout = (documents(tmp_path / "out", part) for part in ("train", "heldout"))
    assert len(train) + len(heldout) == 20 and len(heldout) == 5
    assert not set(train) & set(heldout)
    assert meta["documents"] == {"heldout": 5, "train": 15}
    assert meta == json.loads((tmp_path / "out" / "meta.json").read_text())


def test_text_survives(corpus, tokenizer, tmp_path):
    prepare([corpus / "deep" / "f3.py"], tokenizer, tmp_path / "out", heldout=0.0)
    (only,) = documents(tmp_path / "out", "train")
    assert load_tokenizer(tokenizer).decode(list(only[:-1])) == "value_3 = 3\n" * 10


def test_the_split_does_not_depend_on_where_the_corpus_lies(corpus, tokenizer, tmp_path):
    prepare([corpus], tokenizer, tmp_path / "a", pattern="f*.py")
    corpus.rename(tmp_path / "moved")
    prepare([tmp_path / "moved"], tokenizer, tmp_path / "b", pattern="f*.py")
    for part in ("train", "heldout"):
        assert documents(tmp_path / "a", part) == documents(tmp_path / "b", part)


def test_a_file_named_twice_is_one_document(corpus, tokenizer, tmp_path):
    sources = [corpus, corpus / "deep" / "f1.py", corpus / "deep" / ".." / "deep"]
    meta = prepare(sources, tokenizer, tmp_path / "out", pattern="f*.py")
    assert sum(meta["documents"].values()) == 20


def test_text_that_looks_like_a_separator_stays_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one <eos> two")
    prepare([tmp_path / "a.txt"], tokenizer, tmp_path / "out", heldout=0.0)
    assert len(documents(tmp_path / "out", "train")) == 1


def test_one_document_cannot_be_split(corpus, tokenizer, tmp_path):
    with pytest.raises(DataError, match="1 document cannot be split by file"):
        prepare([corpus / "deep" / "f1.py"], tokenizer, tmp_path / "out")


def test_a_large_file_stays_in_training(tokenizer, tmp_path):
    for name, size in (("a", 10), ("b", 10), ("c", 5000)):
        (tmp_path / f"{name}.txt").write_text("x " * size)
    sources = [tmp_path / f"{name}.txt" for name in "abc"]
    meta = prepare(sources, tokenizer, tmp_path / "out", heldout=0.1)
    assert meta["tokens"]["train"] > 10 * meta["tokens"]["heldout"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pattern": "*.rs"}, r"no file matching '\*\.rs' in \['.*corpus'\]"),
        ({"heldout": 1.5}, "got 1.5"),
        ({"separator": "<none>"}, "'<none>'"),
    ],
)
def test_bad_settings_write_nothing(corpus, tokenizer, tmp_path, arguments, message):
    with pytest.raises(DataError, match=message):
        prepare([corpus], tokenizer, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_missing_sources_and_tokenizers(corpus, tokenizer, tmp_path):
    with pytest.raises(DataError, match="got no such file"):
        prepare([tmp_path / "nowhere"], tokenizer, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        prepare([corpus], tmp_path, tmp_path / "out")


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


LATIN = "ä b".encode("latin-1")


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_what_is_not_text_is_skipped(tokenizer, tmp_path, caplog):
    good = {"a.txt": "ä\r\nb".encode("utf-8-sig"), "b.txt": b"cd"}
    others = {"latin": LATIN, "wide": "a b".encode("utf-16"), "zero": b"a\0b", "cut": b"a\xc3"}
    folder = write(tmp_path / "text", {**good, **others})
    meta = prepare([folder], tokenizer, tmp_path / "out", heldout=0.5)
    assert meta["documents"] == {"heldout": 1, "train": 1} and meta["skipped"] == 4
    (record,) = caplog.records
    assert record.name == "llamapro" and "\n" not in record.message
    assert record.message.startswith("skipped 4 files that are not UTF-8 text: ")
    assert sum(str(folder / name) in record.message for name in others) == 3
    assert texts(tmp_path / "out", tokenizer) == {"ä\nb", "cd"}


def test_a_named_file_must_be_text(tokenizer, tmp_path):
    folder = write(tmp_path, {"latin": LATIN, "zero": b"a\0b", "good": b"a"})
    with pytest.raises(DataError, match=r"latin: UTF-8 text expected, got b'\\xe4'"):
        prepare([folder / "good", folder / "latin"], tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="zero: UTF-8 text expected, got a NUL"):
        prepare([folder, folder / "zero"], tokenizer, tmp_path / "out", pattern="[gz]*")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_text(tokenizer, tmp_path):
    folder = write(tmp_path / "text", {"latin": LATIN, "zero": b"a\0b", "blank": b" \n"})
    with pytest.raises(DataError, match=r"3 files match, none is UTF-8 text .*text/"):
        prepare([folder], tokenizer, tmp_path / "out")


def test_what_is_hidden_is_not_searched(tokenizer, tmp_path):
    files = {
        ".git/config": b"e f",
        "deep/.cache/x": b"g",
        ".hidden": b"h",
        "a": b"i",
        "deep/b": b"j",
    }
    folder = write(tmp_path / ".text", files)
    assert prepare([folder], tokenizer, tmp_path / "a")["documents"] == {"heldout": 1, "train": 1}
    named = [folder / ".git", folder / ".hidden"]
    assert prepare(named, tokenizer, tmp_path / "b")["documents"] == {"heldout": 1, "train": 1}


def test_a_file_that_changes_while_it_is_read(tokenizer, tmp_path, monkeypatch):
    split, folder = module._split, write(tmp_path / "text", {"a": b"a", "b": b"b"})

    def change(*survey):
        (folder / "a").write_bytes(content)
        return split(*survey)

    monkeypatch.setattr(module, "_split", change)
    content = LATIN
    with pytest.raises(DataError, match="a: UTF-8 text expected"):
        prepare([folder], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "a").write_bytes(b"a")
    content = b"longer"
    prepare([folder], tokenizer, tmp_path / "out")
    assert texts(tmp_path / "out", tokenizer) == {"longer", "b"}


def test_a_full_disk_is_named(corpus, tokenizer, tmp_path, small_files):
    with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'out'}'"):
        prepare([corpus], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_text_is_not_held_in_memory(tokenizer, tmp_path, monkeypatch):
    """A batch is read when the one before it is written."""
    monkeypatch.setattr(module, "BATCH", 100)
    folder = write(tmp_path / "text", {f"{i}": b"ab " * 20 for i in range(30)})
    read_one, encode, read, batches = module._read, module._Encoder.__call__, [], []

    def encoded(encoder, documents):
        batches.append((len(documents), len(read)))
        return encode(encoder, documents)

    monkeypatch.setattr(module, "_read", lambda *of: read.append(of) or read_one(*of))
    monkeypatch.setattr(module._Encoder, "__call__", encoded)
    prepare([folder], tokenizer, tmp_path / "out", heldout=0)
    assert batches == [(2, 30 + done) for done in range(2, 31, 2)]


@pytest.mark.parametrize("size", [1, 200])
def test_batches_change_nothing(corpus, tokenizer, tmp_path, monkeypatch, size):
    prepare([corpus], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH", size)
    prepare([corpus], tokenizer, tmp_path / "parts")
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_token_files_of_a_folder_are_what_they_always_were(corpus, tokenizer, tmp_path):
    """Written anew from the rules: order by a hash of the name, held out until the share is
    reached, but by no document that would double it, the separator after each."""
    (corpus / "large.py").write_text("large = 1\n" * 500)
    prepare([corpus], tokenizer, tmp_path / "out", heldout=0.2)
    found = {str(f.relative_to(corpus)): f.read_text() for f in corpus.rglob("*") if f.is_file()}
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    order = [name for name in order if found[name].strip()]
    share, taken, parts = 0.2 * sum(len(found[n]) for n in order), 0, {"train": [], "heldout": []}
    for name in order:
        fits = taken < share and taken + len(found[name]) <= 2 * share
        taken += len(found[name]) * fits
        ids = load_tokenizer(tokenizer).encode(found[name]).ids
        parts["heldout" if fits else "train"].append([*ids, 0])
    assert min(map(len, parts.values())) > 1
    for part, expected in parts.items():
        written = np.fromfile(tmp_path / "out" / f"{part}.bin", dtype=np.uint16).tolist()
        assert written == [token for document in expected for token in document]
        assert documents(tmp_path / "out", part) == [tuple(d) for d in expected]


def test_what_meta_says(corpus, tokenizer, tmp_path):
    meta = prepare([corpus, corpus / "deep" / "f1.py"], tokenizer, tmp_path / "out", licence="MIT")
    assert meta["kind"] == "text" and meta["tokenizer"] == tokenizer_fingerprint(tokenizer)
    of = {"rows": "text files", "licence": "MIT"}
    assert meta["sources"] == [
        {"name": str(corpus), "documents": 21, **of},
        {"name": str(corpus / "deep" / "f1.py"), "documents": 0, **of},
    ]
    assert {"index", "bin", "json"} == {n.split(".")[-1] for n in files(tmp_path / "out")}


def test_what_is_held_out_is_not_trained_on(tokenizer, tmp_path, caplog):
    """Neither the same text, nor one that differs by case and white space."""
    caplog.set_level("INFO", "llamapro")
    same = [b"One  two\n", b"one two", b" ONE\ttwo ", b"OnE\n\ntwO"]
    files = {f"{i}{j}": b" " * j + text for i, text in enumerate(same) for j in range(5)}
    files |= {f"other{i}": b"another text %d" % i for i in range(9)}
    folder = write(tmp_path / "text", files)
    meta = prepare([folder], tokenizer, tmp_path / "out", heldout=0.3)
    decode = load_tokenizer(tokenizer).decode
    train, aside = (documents(tmp_path / "out", part) for part in ("train", "heldout"))
    train, aside = ([" ".join(decode(d[:-1]).lower().split()) for d in p] for p in (train, aside))
    assert "one two" in aside and not set(train) & set(aside)
    twice = 20 - aside.count("one two")
    assert meta["duplicates"] == twice > 0 and len(train) + len(aside) == 29 - twice
    assert f"dropped {twice} documents for training that are also held out" in caplog.text


def test_nothing_is_left_to_train_on(tokenizer, tmp_path):
    folder = write(tmp_path / "text", {"a": b"same", "b": b"Same"})
    with pytest.raises(
        DataError, match=r"2 documents cannot be split .* 1 said the same as a held"
    ):
        prepare([folder], tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_document_too_large(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT", 100)
    folder = write(tmp_path / "text", {"a": b"a" * 101, "b": b"b" * 100})
    with pytest.raises(DataError, match="a: at most 100 characters in a document expected"):
        prepare([folder / "a", folder / "b"], tokenizer, tmp_path / "out")
    prepare([folder / "b"], tokenizer, tmp_path / "out", heldout=0)
    assert len(texts(tmp_path / "out", tokenizer)) == 1


def test_a_shard_that_is_gone_is_written_again(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 300)
    prepare([corpus], tokenizer, tmp_path / "calm")
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer, tmp_path / "out")
    os.truncate(tmp_path / ".out.partial" / "train.bin", 10)
    prepare([corpus], tokenizer, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "calm")


@pytest.mark.parametrize("terminal", [False, True])
def test_how_far_it_is(corpus, tokenizer, tmp_path, monkeypatch, caplog, capsys, terminal):
    caplog.set_level("INFO", "llamapro")
    monkeypatch.setattr(module, "PLAIN_EVERY", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm")
    prepare([corpus], tokenizer, tmp_path / "out")
    lines = [line for line in caplog.messages if line.startswith(("reading", "encoding"))]
    assert len(lines) == (0 if terminal else 22 + 21)
    assert terminal or re.fullmatch(
        r"encoding: 20 documents, \d\.\d MB/s, 0\.0 min left", lines[-2]
    )
    assert bool(capsys.readouterr().err) == terminal


def interrupted(monkeypatch, after, error=KeyboardInterrupt):
    """The encoder stops at the batch that follows so many; returns how many it was given."""
    encode, given = module._Encoder.__call__, []

    def stop(encoder, documents):
        if len(given) == after:
            raise error
        given.append(documents)
        return encode(encoder, documents)

    monkeypatch.setattr(module._Encoder, "__call__", stop)
    return given


def test_a_stopped_one_goes_on(corpus, tokenizer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "llamapro")
    monkeypatch.setattr(module, "BATCH", 300)
    prepare([corpus], tokenizer, tmp_path / "calm")
    with monkeypatch.context() as patch:
        before = interrupted(patch, after=3)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            prepare([corpus], tokenizer, tmp_path / "out")
    with monkeypatch.context() as patch:
        rest = interrupted(patch, after=None)
        prepare([corpus], tokenizer, tmp_path / "out")
    seen = [text for batch in [*before, *rest] for text, _ in batch]
    assert len(seen) == len(set(seen)) == 21 and rest
    assert files(tmp_path / "out") == files(tmp_path / "calm")
    assert "going on after" in caplog.text and "anew" not in caplog.text


@pytest.mark.parametrize("change", ["text", "heldout", "separator", "sources"])
def test_a_changed_one_starts_anew(corpus, tokenizer, tmp_path, monkeypatch, caplog, change):
    caplog.set_level("INFO", "llamapro")
    monkeypatch.setattr(module, "BATCH", 300)
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tokenizer, tmp_path / "out")
    if change == "text":
        (corpus / "deep" / "notes.txt").write_text("Not code")
    settings = {"heldout": {"heldout": 0.5}, "separator": {"separator": "a"}}.get(change, {})
    where = corpus / "deep" if change == "sources" else corpus
    prepare([where], tokenizer, tmp_path / "out", **settings)
    assert "starting anew: other settings or sources" in caplog.text
    prepare([where], tokenizer, tmp_path / "calm", **settings)
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def test_an_error_leaves_nothing(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 300)
    interrupted(monkeypatch, after=3, error=MemoryError)
    with pytest.raises(MemoryError):
        prepare([corpus], tokenizer, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def in_child(sources, tokenizer, out):
    module.BATCH = 2000
    prepare(sources, tokenizer, out)


def test_killed_at_random_moments(tokenizer, tmp_path):
    """The end is as if there had been no kill, and each kill but the first found some work done."""
    lines = "".join(json.dumps({"text": f"row {i} " * 30}) + "\n" for i in range(400))
    text = write(tmp_path / "text", {f"{i}": f"file {i} ".encode() * 30 for i in range(200)})
    (tmp_path / "rows.jsonl").write_text(lines)
    arguments = ([text, tmp_path / "rows.jsonl"], tokenizer)
    prepare(*arguments, tmp_path / "calm")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tokenizers"])
    chance, done = random.Random(0), [0]
    journal = tmp_path / ".out.partial" / "journal.json"
    for _ in range(5):
        child = context.Process(target=in_child, args=(*arguments, tmp_path / "out"))
        child.start()
        start = time.monotonic()
        while child.is_alive() and documents_done(journal) == done[-1]:
            assert time.monotonic() - start < 60
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        child.kill()
        child.join()
        done.append(documents_done(journal))
    assert done[1] > 0 and done == sorted(set(done)) and done[-1] < 600, done
    prepare(*arguments, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def documents_done(journal):
    return json.loads(journal.read_text())["done"] if journal.exists() else 0
