"""Documents that hold a question of a benchmark."""

import json
import re
import time

import numpy as np
import pytest
from llamapro.data import decontaminate as module
from llamapro.data.decontaminate import Questions
from llamapro.data.prepare import prepare
from llamapro.data.sources import open_corpus
from llamapro.data.tokens import DataError

LONG = "One two, three-four five: six 'seven' EIGHT nine ten eleven (twelve) thirteen fourteen?"
WORDS = re.findall(r"\w+", LONG.lower())
SHORT = "Only twelve words are in this question, which is not looked for"


def benchmark(root, files):
    for name, rows in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_thirteen_words_in_a_row(tmp_path, caplog):
    caplog.set_level("INFO", "llamapro")
    rows = [{"question": LONG, "answer": "an " * 20}, {"question": SHORT}]
    questions = Questions(benchmark(tmp_path, {"arc/test.jsonl": rows}))
    first, last = WORDS[:13], WORDS[1:]
    for held in (LONG, " ".join(first), "so\n" + "\n".join(last) + ".", "_”".join(["é", *first])):
        assert questions.are_in(held) and questions.are_in(f"before {held} after".upper())
    for held in ("", SHORT, "an " * 20, *(" ".join(WORDS[:i] + WORDS[i + 1 :]) for i in (5, 7))):
        assert not questions.are_in(held)
    assert not questions.are_in(" ".join([*first[:-1], "other", *last[1:]]))
    assert not questions.are_in(" ".join(reversed(WORDS)))
    said = "2 questions, 1 of them too short to be looked for: of less than 13 words"
    assert caplog.messages == [f"{tmp_path}: {said}"]


def test_which_files_and_fields_are_questions(tmp_path):
    def words(name):
        return " ".join(f"{name}{i}" for i in range(13))

    fields = ("question", "prompt", "ctx", "sentence", "text", "problem")
    rows = [{name: words(name), "choices": words("choice"), "id": 3} for name in fields]
    other = [{"question": words("other")}]
    files = {"a/test.jsonl": rows, "b/train.part0.jsonl": other, "b/dev.jsonl": other}
    questions = Questions(benchmark(tmp_path, files))
    assert all(questions.are_in(words(name)) for name in fields)
    assert not questions.are_in(words("choice")) and not questions.are_in(words("other"))


@pytest.mark.parametrize("bits", [2, 24])
def test_words_are_those_of_a_search(tmp_path, monkeypatch, bits):
    """Against the plain way: words by a regular expression, every run compared as text."""
    monkeypatch.setattr(module, "SEEN_BITS", bits)
    chance = np.random.default_rng(0)
    letters = [*"aB1_ -.\né漢“”ß٣\u0301İΣ", " ", " "]

    def text(size):
        return "".join(chance.choice(letters, size))

    asked = [text(60) for _ in range(20)]
    questions = Questions(benchmark(tmp_path, {"q.jsonl": [{"question": q} for q in asked]}))

    def runs(text):
        words = re.findall(r"[^\W_]+", text.lower())
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    known = set().union(*map(runs, asked))
    outcomes = set()
    for trial in range(300):
        cut = asked[trial % 20][: chance.integers(20, 60)]
        document = text(20) + " " + cut + " " + text(20)
        found = bool(runs(document) & known)
        assert questions.are_in(document) == found
        outcomes.add(found)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "with questions as question, prompt, .* got none"),
        ([{"text": "a"}], "13 words or more"),
    ],
)
def test_a_folder_without_questions(tmp_path, rows, message):
    with pytest.raises(DataError, match=f"{tmp_path}: .*{message}"):
        Questions(benchmark(tmp_path, {"test.jsonl": rows}))


def test_contaminated_documents_are_dropped(tokenizer, tmp_path, caplog):
    caplog.set_level("INFO", "llamapro")
    root = benchmark(tmp_path / "bench", {"test.jsonl": [{"question": LONG}]})
    texts = [f"document {i}" if i % 4 else f"{i} {LONG}" for i in range(12)]
    folder = benchmark(tmp_path / "rows", {"a.jsonl": [{"text": text} for text in texts]})
    asked = {"decontaminate": root, "heldout": 0.3}
    meta = prepare([folder / "a.jsonl"], tokenizer, tmp_path / "out", **asked)
    assert meta["contaminated"] == 3 and sum(meta["documents"].values()) == 9
    assert meta["sources"][0]["documents"] == 9
    assert "dropped 3 documents that hold a question of a benchmark" in caplog.messages
    benchmark(folder, {"a.jsonl": [{"text": LONG}]})
    with pytest.raises(DataError, match="all 1 documents hold a question"):
        prepare([folder / "a.jsonl"], tokenizer, tmp_path / "none", **asked)
    assert not list(tmp_path.glob("*none*"))


def test_real_benchmarks(real_data):
    """Their own test questions are found, and other text is not; at 5 MB/s or more."""
    questions = Questions(real_data / "bench")
    rows = open_corpus([real_data / "bench" / "gsm8k" / "test.jsonl"], text_field="question")
    asked = [row.read() for row in rows.documents()]
    assert sum(map(questions.are_in, asked)) >= 0.99 * len(asked)
    corpus = open_corpus([real_data / "text" / "legal"], pattern="*.jsonl")
    opinions = [opinion.read() for opinion in corpus.documents()]
    start = time.process_time()
    found = sum(map(questions.are_in, opinions))
    took = time.process_time() - start
    assert found <= 0.01 * len(opinions)
    assert sum(map(len, opinions)) / took > 5e6
