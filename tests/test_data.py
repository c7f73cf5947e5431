import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from llamapro.data import prepare as module
from llamapro.data import tokens
from llamapro.data.prepare import prepare
from llamapro.data.tokens import DataError, TokenDataset, fingerprint, load_tokens
from llamapro.eval.perplexity import evenly_spaced_indices, perplexity
from llamapro.tokenizer import load_tokenizer
from run_files import flip, one_document


@pytest.fixture
def tokenizer(tmp_path):
    """A model directory with a byte-level tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path / "model"
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def f(x): return x"], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"eos_token_id": 0}')
    return directory


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus" / "deep"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"f{i}.py").write_text(f"value_{i} = {i}\n" * 10)
    (folder / "notes.txt").write_text("not code")
    (folder / "empty.py").write_text("\n")
    return tmp_path / "corpus"


def documents(directory, part, vocab=300):
    tokens = load_tokens(directory, part, vocab)
    return [tuple(d) for d in np.split(tokens.ids, tokens.ends)[:-1]]


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


def test_token_files_are_checked(token_data):
    directory = token_data()
    with pytest.raises(DataError, match="vocabulary's 60 expected, got 60"):
        load_tokens(directory, "train", 60)
    with pytest.raises(DataError, match="made by `llamapro prepare`"):
        load_tokens(directory.parent, "train", 61)
    file = directory / "train.bin"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match="8000 bytes expected, got 7997"):
        load_tokens(directory, "train", 61)


def test_an_empty_part_is_refused(token_data):
    with pytest.raises(DataError, match="empty file"):
        load_tokens(token_data(train=0), "train", 61)


def test_a_corpus_shorter_than_a_row():
    with pytest.raises(DataError, match="seq_len \\+ 1 = 9 tokens expected, got 8"):
        TokenDataset(one_document(np.arange(8)), 8)


def test_rows_cover_the_file_once_an_epoch():
    rows = TokenDataset(one_document(np.arange(101, dtype=np.uint16)), seq_len=10, seed=3)
    assert len(rows) == 10
    seen = torch.cat([rows.batch(start, 2)[0] for start in range(0, 10, 2)])
    assert sorted(seen.flatten().tolist()) == list(range(100))
    tokens, targets = rows.batch(10, 10)[:2]
    assert torch.equal(targets, tokens + 1)
    assert not torch.equal(tokens, seen)  # another order in the next epoch
    assert torch.equal(torch.sort(tokens[:, 0]).values, torch.arange(0, 100, 10))


def test_a_batch_depends_on_its_place_alone():
    rows = TokenDataset(one_document(np.arange(1000)), seq_len=7)
    whole = rows.batch(300, 6)[0]
    parts = torch.cat([rows.batch(300, 2)[0], rows.batch(302, 4)[0]])
    assert torch.equal(whole, parts)


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

    def change(sizes, heldout):
        (folder / "a").write_bytes(content)
        return split(sizes, heldout)

    monkeypatch.setattr(module, "_split", change)
    content = LATIN
    with pytest.raises(DataError, match="a: UTF-8 text expected"):
        prepare([folder], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "a").write_bytes(b"a")
    content = b"longer"
    prepare([folder], tokenizer, tmp_path / "out")
    assert texts(tmp_path / "out", tokenizer) == {"longer", "b"}


def test_a_full_disk_is_named(corpus, tokenizer, tmp_path, monkeypatch):
    def full(path, mode="r", **settings):
        return open("/dev/full" if mode == "wb" else path, mode, **settings)

    monkeypatch.setattr(module, "open", full, raising=False)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'out'}'"):
        prepare([corpus], tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_is_not_held_in_memory(tokenizer, tmp_path, monkeypatch):
    """A batch is read when the one before it is written."""
    monkeypatch.setattr(module, "BATCH", 100)
    folder = write(tmp_path / "text", {f"{i}": b"ab " * 20 for i in range(30)})
    pieces, encode, read, batches = module._pieces, module._encode, [], []

    def encoded(tokenizer, documents, *rest):
        batches.append((len(documents), len(read)))
        return encode(tokenizer, documents, *rest)

    monkeypatch.setattr(module, "_pieces", lambda file: read.append(file) or pieces(file))
    monkeypatch.setattr(module, "_encode", encoded)
    prepare([folder], tokenizer, tmp_path / "out", heldout=0)
    assert batches == [(2, 30 + done) for done in range(2, 31, 2)]


@pytest.mark.parametrize("size", [1, 200])
def test_batches_change_nothing(corpus, tokenizer, tmp_path, monkeypatch, size):
    prepare([corpus], tokenizer, tmp_path / "whole")
    monkeypatch.setattr(module, "BATCH", size)
    prepare([corpus], tokenizer, tmp_path / "parts")
    for name in ("train.bin", "heldout.bin", "meta.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def prepared(corpus, tokenizer, out):
    """A data directory, its meta.json, and the hash of its token files."""
    meta = prepare([corpus], tokenizer, out)
    tokens = b"".join((out / f"{part}.bin").read_bytes() for part in ("train", "heldout"))
    return out, meta, hashlib.blake2b(tokens, digest_size=16).hexdigest()


def test_the_digest_is_that_of_the_tokens(corpus, tokenizer, tmp_path):
    out, meta, hashed = prepared(corpus, tokenizer, tmp_path / "a")
    assert meta["digest"] == hashed and fingerprint(out).endswith(hashed)
    again, _, _ = prepared(corpus, tokenizer, tmp_path / "b")
    assert fingerprint(again) == fingerprint(out)
    prepare([corpus], tokenizer, tmp_path / "c", pattern="*.py")
    assert fingerprint(tmp_path / "c") != fingerprint(out)


def test_tokens_that_were_rewritten_are_refused(corpus, tokenizer, tmp_path):
    out, meta, hashed = prepared(corpus, tokenizer, tmp_path / "a")
    flip(out / "heldout.bin", 0)
    with pytest.raises(DataError, match=f"a: train.bin .* the digest {hashed} of meta"):
        fingerprint(out)
    del meta["digest"]  # as before there was one
    (out / "meta.json").write_text(json.dumps(meta))
    assert fingerprint(out)


def test_the_digest_names_what_is_missing(token_data):
    directory = token_data()
    (directory / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin: a token file expected, got none"):
        fingerprint(directory)


def test_json_is_utf8_whatever_the_locale(token_data, tmp_path):
    meta = token_data() / "meta.json"
    text = json.dumps({**json.loads(meta.read_text()), "of": "ä"}, ensure_ascii=False)
    meta.write_text(text, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"eos_token_id": 7, "of": "ä"}', encoding="utf-8")
    code = f"""
from llamapro.data.prepare import _separator_id
from llamapro.data.tokens import fingerprint, load_tokens
assert len(load_tokens({str(meta.parent)!r}, "train", 61).ids) == 4000
assert fingerprint({str(meta.parent)!r})
assert _separator_id(None, {str(tmp_path)!r}, None) == 7
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_many_tokens_are_sampled_and_verified_when_asked(corpus, tokenizer, tmp_path, monkeypatch):
    """Blocks at both ends are among them; what lies between them is seen by `verify` alone."""
    for name, value in {"WHOLE": 1000, "BLOCKS": 3, "BLOCK": 8}.items():
        monkeypatch.setattr(tokens, name, value)
    out, _, hashed = prepared(corpus, tokenizer, tmp_path / "a")
    before, size = fingerprint(out), (out / "train.bin").stat().st_size
    assert size > 1000 and not before.endswith(hashed)
    assert fingerprint(out, verify=True) == before
    for place in (0, size // 2, size - 1):
        flip(out / "train.bin", place)
        assert fingerprint(out) != before
        flip(out / "train.bin", place)
    flip(out / "train.bin", 20)
    assert fingerprint(out) == before
    with pytest.raises(DataError, match="changed since they were prepared"):
        fingerprint(out, verify=True)


def test_a_token_file_without_a_row_is_named(token_data):
    tokens = load_tokens(token_data(heldout=9), "heldout", 61)
    with pytest.raises(DataError, match=r"data/heldout\.bin: .* 129 tokens expected, got 9"):
        TokenDataset(tokens, 128)


@pytest.mark.parametrize("seq_len", [0, -1])
def test_rows_of_nothing(seq_len):
    with pytest.raises(ValueError, match=f"seq_len must be at least 1, got {seq_len}"):
        TokenDataset(one_document(np.arange(8)), seq_len)


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_an_evaluation_of_nothing(tiny, max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, got {max_tokens}"):
        perplexity(tiny(), TokenDataset(one_document(np.arange(61)), 8), max_tokens)


def test_rows_that_are_evaluated_are_spread():
    rows = TokenDataset(one_document(np.arange(101)), 10)
    assert evenly_spaced_indices(rows) == evenly_spaced_indices(rows, 1000) == list(range(10))
    assert evenly_spaced_indices(rows, 59) == [0, 2, 4, 6, 8]
    assert evenly_spaced_indices(rows, 1) == [0]


def test_eval_checks_its_numbers_before_it_loads(tiny_path, token_data, monkeypatch):
    pytest.importorskip("tyro")
    from llamapro import cli

    monkeypatch.setattr(cli, "_load", None)
    directory = token_data()
    for settings, message in (((0,), "seq_len must"), ((16, 0), "max_tokens must")):
        with pytest.raises(ValueError, match=message):
            cli.evaluate(tiny_path, directory, *settings)
