import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llamapro.data import tokens
from llamapro.data.prepare import prepare
from llamapro.data.tokens import (
    DataError,
    TokenDataset,
    check_tokenizer,
    fingerprint,
    load_tokens,
)
from llamapro.eval.perplexity import evenly_spaced_indices, perplexity
from llamapro.train import train
from run_files import flip, one_document


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


def prepared(corpus, tokenizer, out):
    """A data directory, its meta.json, and the hash of its token files."""
    meta = prepare([corpus], tokenizer, out)
    tokens = b"".join((out / f"{part}.bin").read_bytes() for part in ("train", "heldout"))
    return out, meta, hashlib.blake2b(tokens, digest_size=16).hexdigest()


def test_the_digest_is_that_of_the_tokens(corpus, tokenizer, tmp_path):
    out, meta, hashed = prepared(corpus, tokenizer, tmp_path / "a")
    assert meta["digest"] == hashed and hashed in fingerprint(out)
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

    monkeypatch.setattr("llamapro.inference._load", None)
    directory = token_data()
    for settings, message in (
        ({"seq_len": 0}, "seq_len must"),
        ({"seq_len": 16, "max_tokens": 0}, "max_tokens must"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.evaluate(tiny_path, directory, **settings)


def test_data_of_another_tokenizer_is_refused(config, tokenizer, corpus, tmp_path):
    """Before anything is written, in training and evaluation; of several corpora too."""
    prepare([corpus], tokenizer, tmp_path / "own")
    model = Path(config.model)
    shutil.copy(tokenizer / "tokenizer.json", model)
    check_tokenizer(tmp_path / "own", model)
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace('"id": 0', '"id":  0'))
    prepare([corpus], tokenizer, tmp_path / "other")
    both = (str(tmp_path / "own"), str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"other: prepared with another tokenizer than .*expanded"):
        train(replace(config, data=both))
    assert not Path(config.out).exists()
    (model / "tokenizer.json").unlink()  # a model that has none takes what it is given
    check_tokenizer(tmp_path / "other", model)
