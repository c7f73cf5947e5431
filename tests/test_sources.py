"""Rows of files and of datasets, what is read from them, and what is refused."""

import gzip
import sys

import pytest
from llamapro.data import sources as module
from llamapro.data.prepare import prepare
from llamapro.data.sources import open_corpus
from llamapro.data.tokens import DataError
from row_files import as_array, as_lines, write_rows, zstd

ROWS = [{"id": i, "text": f"row {i}\nä{i}", "other": None} for i in range(700)]


def read(*sources, **settings):
    return [d.read() for d in open_corpus(sources, **settings).documents()]


@pytest.mark.parametrize("piece", [16, 2**22])
@pytest.mark.parametrize("suffix", module.ROW_FILES)
def test_rows_of_every_kind_of_file(tmp_path, monkeypatch, suffix, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    file = write_rows(tmp_path / f"a{suffix}", ROWS)
    assert read(file) == [row["text"] for row in ROWS]
    documents = [*open_corpus([file]).documents()]
    assert documents[2].place == f"{file}, row 3" and documents[2].name == f"a{suffix}:3"
    assert len({document.name for document in documents}) == len(ROWS)


def test_json_lines_under_the_name_json_and_blank_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b"\xef\xbb\xbf" + as_lines(ROWS[:2]) + b"\n" + as_lines(ROWS[2:3])
    )
    corpus = open_corpus([tmp_path / "a.json"])
    assert [d.read() for d in corpus.documents()] == [row["text"] for row in ROWS[:3]]
    assert [d.place[-1] for d in corpus.documents()] == ["1", "2", "4"]
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf \n" + as_array(ROWS))
    assert read(tmp_path / "b.json") == [row["text"] for row in ROWS]


def test_files_of_rows_in_a_folder(tmp_path):
    """They are rows; but .json is text, as code is, unless it or its suffix is named."""
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "deep/a.jsonl.gz", "c.json", "d.txt"):
        write_rows(folder / name, [{"text": name}])
    as_text = (folder / "c.json").read_text()
    assert as_text in read(folder, pattern="[bcd].*") and "b.jsonl" in read(folder)
    assert read(folder, pattern="*.jsonl") == ["b.jsonl"]
    assert read(folder, pattern="*.json*") == ["b.jsonl", "c.json", "deep/a.jsonl.gz"]
    both = read(folder, folder / "c.json", pattern="[bcd].*")
    assert "c.json" in both and as_text not in both and len(both) == 3


CHAT = [("user", "q"), ("assistant", "a")]
ALPACA = {"instruction": "do", "input": "this", "output": "a"}


@pytest.mark.parametrize(
    "row, rows, expected",
    [
        ({"messages": [{"role": "user", "content": "q"}]}, "messages", [("user", "q")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]},
            *("conversations", [("system", "s"), ("user", "q")]),
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "conversations", CHAT[1:]),
        ({"prompt": "q", "completion": "a"}, "prompt + completion", CHAT),
        ({"prompt": "q", "response": "a", "chosen": "b"}, "prompt + response", CHAT),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            *("prompt + completion", CHAT),
        ),
        (ALPACA, "instruction + output", [("user", "do\n\nthis"), ("assistant", "a")]),
        (
            {"instruction": "do", "context": "this", "response": "a"},
            *("instruction + response", [("user", "do\n\nthis"), ("assistant", "a")]),
        ),
        (
            {"instruction": "do", "input": "", "output": "a", "text": None},
            *("instruction + output", [("user", "do"), ("assistant", "a")]),
        ),
    ],
)
def test_conversations(tmp_path, caplog, row, rows, expected):
    caplog.set_level("INFO", "llamapro")
    file = write_rows(tmp_path / "a.jsonl", [row])
    corpus = open_corpus([file])
    assert corpus.is_chat and corpus.sources[0].rows == rows
    (document,) = corpus.documents()
    assert [(turn["role"], turn["content"]) for turn in document.read()] == expected
    assert caplog.messages == [f"{file}: a document is a row's {rows}"]


def test_another_column_is_named(tmp_path):
    file = write_rows(tmp_path / "a.parquet", [{"text": "no", "body": "yes", "messages": "no"}])
    assert read(file, text_field="body") == ["yes"]


def test_only_the_columns_that_are_needed_are_read(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "a.parquet", [{**ALPACA, "more": "x" * 100}] * 3)
    kept = []
    content = module._content
    monkeypatch.setattr(module, "_content", lambda row, *of: kept.append(row) or content(row, *of))
    assert len(read(file)) == 3 and kept == [ALPACA] * 3


def write_bytes(path, content):
    path.write_bytes(content)
    return path


BAD = {
    "truncated.jsonl.gz": (gzip.compress(as_lines(ROWS))[:-20], "rows expected, got EOFError"),
    "other.jsonl.gz": (b"not gzip", "rows expected, got BadGzipFile"),
    "truncated.jsonl.zst": (zstd(as_lines(ROWS))[:-20], "rows expected, got OSError: Truncated"),
    "other.parquet": (b"not parquet", "rows expected, got ArrowInvalid"),
    "cut.jsonl": (as_lines(ROWS)[:-5], "row 700: JSON expected: "),
    "cut.json": (as_array(ROWS)[:-5], "an array of JSON objects expected: "),
    "scalars.jsonl": (b"1\n2\n", "an object with named fields expected, got 1"),
    "latin.jsonl": (b'{"text": "\xe4"}\n', "row 1: JSON expected: "),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "row 1: Unicode expected, got surrogates"),
    "deep.jsonl": (b"[" * 10**5 + b"\n", "row 1: JSON expected: "),
    "empty.jsonl": (b"", "rows expected, got none"),
    "none.jsonl": (b'{"text": null}\n', r"row 1: columns text or .* expected, got \['text'\]"),
    "number.jsonl": (b'{"text": 1}\n', "row 1: a text of at most .* expected, got 1"),
    "mixed.jsonl": (
        as_lines([ROWS[0], {"messages": []}]),
        "row 2: text, as in the first row, expected, got {'messages'",
    ),
    "strings.jsonl": (b'{"messages": ["a"]}\n', "row 1: a list of messages expected, got"),
    "from.jsonl": (b'{"conversations": [{"from": "x"}]}\n', "a turn from one of .* got from 'x'"),
    "blank.jsonl": (b'{"text": " "}\n', "rows read: 1, none is UTF-8 text that is not blank"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_leave_nothing(tokenizer, tmp_path, name):
    content, message = BAD[name]
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}")
    file = write_bytes(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        prepare([file], tokenizer, tmp_path / "out")
    assert str(file) in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_a_parquet_file_without_the_column(tokenizer, tmp_path):
    first = write_rows(tmp_path / "a.parquet", [{"text": "a"}])
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "a.parquet", [{"text": "a"}])
    write_rows(tmp_path / "folder" / "b.parquet", [{"body": "a"}])
    with pytest.raises(
        DataError, match=r"a\.parquet, row 1: columns body expected, got \['text'\]"
    ):
        prepare([first], tokenizer, tmp_path / "out", text_field="body")
    with pytest.raises(DataError, match=r"b\.parquet, row 1: text, as in the first row, expected"):
        prepare([tmp_path / "folder"], tokenizer, tmp_path / "out", pattern="*.parquet")
    assert not list(tmp_path.glob("*out*"))


def test_text_and_chat_are_not_mixed(tmp_path):
    text, chat = write_rows(tmp_path / "t.jsonl", ROWS), write_rows(tmp_path / "c.jsonl", [ALPACA])
    file = write_bytes(tmp_path / "f.txt", b"a")
    for one in (text, file):
        with pytest.raises(
            DataError, match=f"got text from .*{one.name}.* and chat from .*c.jsonl"
        ):
            open_corpus([chat, one])
    assert not open_corpus([text, file]).is_chat


def test_a_row_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_DOCUMENT", 1000)
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "a" * 1000}])
    with pytest.raises(DataError, match=r"a\.jsonl: row 2: at most 1000 bytes expected, got more"):
        read(file)
    file = write_rows(tmp_path / "a.parquet", [{"text": "a" * 1001}])
    with pytest.raises(DataError, match="at most 1000 characters expected, got 1001 characters"):
        read(file)


@pytest.fixture
def dataset(tmp_path):
    """A dataset as the hub has it, but that it lies here."""
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_rows(folder / "train.parquet", ROWS[:5])
    write_rows(folder / "test.parquet", ROWS[5:7])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_dataset_of_the_hub(dataset, tokenizer, tmp_path):
    assert read(f"hf:{dataset}") == [row["text"] for row in ROWS[:5]]
    for named in (f"hf:{dataset}:test", f"hf:{dataset}::test", f"hf:{dataset}:default:test"):
        assert read(named) == [row["text"] for row in ROWS[5:7]]
    with pytest.raises(DataError, match=r"hf:.*:nothing: a dataset expected: "):
        read(f"hf:{dataset}::nothing")
    meta = prepare([f"hf:{dataset}"], tokenizer, tmp_path / "out", heldout=0)
    assert meta["sources"] == [
        {"name": f"hf:{dataset}", "rows": "text", "documents": 5, "licence": "mit"}
    ]
    (dataset / "README.md").unlink()
    assert open_corpus([f"hf:{dataset}"]).sources[0].licence is None
    assert open_corpus([f"hf:{dataset}"], licence="CC0").sources[0].licence == "CC0"


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'the "data" extra is needed: .*\[data\]'):
        open_corpus(["hf:name"])


def test_a_source_that_changes_between_the_readings(tokenizer, tmp_path, monkeypatch):
    from llamapro.data import prepare as prepare_module

    file, split = write_rows(tmp_path / "a.jsonl", ROWS), prepare_module._split

    def change(*of):
        write_rows(file, rows)
        return split(*of)

    monkeypatch.setattr(prepare_module, "_split", change)
    for rows in (ROWS[:-1], [*ROWS, ROWS[0]]):
        write_rows(file, ROWS)
        with pytest.raises(DataError, match=f"700 documents expected, got {len(rows)}"):
            prepare([file], tokenizer, tmp_path / "out")
        assert not list(tmp_path.glob("*out*"))
