"""Several corpora, drawn by weight."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from llamapro.data.mixture import Mixture, absolute, corpora
from llamapro.data.packing import PackedDataset
from llamapro.data.tokens import DataError, TokenDataset, Tokens
from llamapro.train import train
from run_files import one_document, records

WEIGHTS = {"math": 1.0, "code": 1.5, "general": 0.2}
SHARES = tuple(WEIGHTS.values())


def mixture(rows=(70, 40, 11), weights=SHARES, seed=0):
    """Corpora whose tokens say where they come from: thousands for the first, and so on."""
    sets = [
        TokenDataset(one_document(np.arange(count * 4 + 1) + 10_000 * i), 4, seed)
        for i, count in enumerate(rows)
    ]
    return Mixture([str(i) for i in range(len(sets))], sets, [*weights])


def drawn(mixed, start, count):
    """The first token of each row."""
    return mixed.batch(start, count).tokens[:, 0].tolist()


@pytest.mark.parametrize("weights", [(1.0, 1.5, 0.2), (1, 1), (3.0,), (0.95, 0.05), (0.1,) * 7])
def test_each_corpus_gives_its_share(weights):
    mixed = mixture([50] * len(weights), weights)
    total = sum(weights)
    for number in range(10_000):
        mixed.batch(number, 1)
        for weight, taken in zip(weights, mixed.taken, strict=True):
            assert abs(taken - (number + 1) * weight / total) < 1


def test_every_row_of_a_corpus_comes_once_before_any_comes_twice():
    mixed = mixture()
    seen = Counter()
    order = drawn(mixed, 0, 2000)
    for corpus, rows in enumerate((70, 40, 11)):
        mine = [token for token in order if token // 10_000 == corpus]
        for start in range(0, len(mine) - rows, rows):
            assert len(set(mine[start : start + rows])) == rows
        seen.update(mine)
    assert len(seen) == 121 and min(mixed.epochs.values()) > 10


def test_a_batch_depends_on_its_place_alone():
    """Also where it is asked for again, or after a jump."""
    whole = drawn(mixture(), 0, 300)
    mixed = mixture()
    for start in (0, 100, 290, 17, 17, 250):
        assert drawn(mixed, start, 10) == whole[start : start + 10]


def test_packed_corpora_share_a_batch():
    sets = [
        PackedDataset(Tokens(np.arange(90) + 100 * i, np.array([40, 47, 90])), 16) for i in range(2)
    ]
    batch = Mixture(["a", "b"], sets, [1.0, 1.0]).batch(0, 4)
    assert batch.tokens.shape == (1, 64) and batch.cu_seqlens[-1] == 64
    assert {int(t) // 100 for t in batch.tokens[0]} == {0, 1}


@pytest.mark.parametrize(
    "data, message",
    [
        (["a=0"], "a weight above 0 and finite expected, got 'a=0'"),
        (["a=-1"], "above 0"),
        (["a=nan"], "above 0"),
        (["a=inf"], "above 0"),
        (["a=much"], "DIR=WEIGHT with a number expected, got 'a=much'"),
        (["x/a", "y/a=2"], "different names expected, got 'a' twice"),
        ([], "a data directory expected, got none"),
    ],
)
def test_bad_mixtures_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        corpora(data)


def test_a_directory_may_have_an_equals_sign_in_its_name(tmp_path):
    (tmp_path / "lr=1").mkdir()
    path = str(tmp_path / "lr=1")
    assert corpora([path]) == {"lr=1": (path, 1.0)}
    assert corpora([f"{path}=2"]) == {"lr=1": (path, 2.0)}


def test_a_weight_keeps_every_digit(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    whole = absolute(["a=0.12345678", "nowhere=2"])
    assert whole == [f"{tmp_path}/a=0.12345678", "nowhere=2.0"]
    assert absolute(whole) == whole and absolute("a") == [f"{tmp_path}/a"]


def test_documents_of_a_mixture_are_counted_by_its_weights():
    """Rows of 16: two documents of 8 in one corpus, one of 16 in the other."""
    ends = (np.arange(9, 91, 9), np.arange(17, 86, 17))
    sets = [PackedDataset(Tokens(np.arange(e[-1]), e), 16) for e in ends]
    mixed = Mixture(["a", "b"], sets, [1.0, 3.0])
    assert mixed.spread == ((8, 0.5), (16, 0.75))


@pytest.fixture
def mixed_config(config, token_data):
    """Three corpora, of which the smallest is exhausted again and again."""
    sizes = {"math": 1500, "code": 700, "general": 40}
    data = [f"{token_data(name, train=n)}={WEIGHTS[name]}" for name, n in sizes.items()]
    return replace(config, data=tuple(data), checkpoint_every=3)


def test_a_run_over_a_mixture_says_what_it_takes(mixed_config, capsys):
    summary = train(mixed_config)
    out = capsys.readouterr().out
    assert "code 1.5 of 2.7: " in out and " epochs of 700 tokens" in out
    assert set(summary["perplexity_after"]) == {"math", "code", "general"}
    epochs = list(records(mixed_config, "epochs").values())
    assert set(epochs[-1]) == set(WEIGHTS) and epochs[-1]["general"] > 1
    steps = records(mixed_config, "tokens"), records(mixed_config, "padding")
    for tokens, padding in zip(*(step.values() for step in steps), strict=True):
        assert tokens == pytest.approx(64 * (1 - padding))


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
from llamapro.train import TrainConfig, train

config, kills = TrainConfig(**json.loads(sys.argv[1])), 0
metrics, chance = Path(config.out) / "metrics.jsonl", random.Random(3)
while not (Path(config.out) / "summary.json").exists():
    started = Path(config.out, "config.json").exists()
    child = os.fork()  # nothing has run in torch yet
    if not child:
        train(config, resume=started)
        os._exit(0)
    size = metrics.stat().st_size if metrics.exists() else 0
    more, wait = chance.randint(1, 500), chance.random() / 20
    while kills < 8 and os.waitpid(child, os.WNOHANG) == (0, 0):
        if metrics.exists() and metrics.stat().st_size > size + more:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
            kills += 1
            break
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        pass
print(kills)
"""


def test_killed_at_random_it_goes_on_bitwise(mixed_config, tmp_path):
    """Killed 8 times: the same losses, epochs of each corpus, perplexities and weights."""
    mixed_config = replace(mixed_config, steps=24)
    train(mixed_config)
    other = replace(mixed_config, out=str(tmp_path / "other"))
    command = [sys.executable, "-c", KILLER, json.dumps(asdict(other))]
    environment = {**os.environ, "PYTHONPATH": "python:."}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == 8
    for key in ("loss", "epochs", "documents", "perplexity"):
        assert records(mixed_config, key) == records(other, key)
    files = [Path(c.out) / "final" / "model.safetensors" for c in (mixed_config, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
