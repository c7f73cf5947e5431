import json
import os
import socket
import subprocess
import sys
import tempfile

import pytest
from llamapro import Llama, model_files
from llamapro.expansion import expand_checkpoint
from llamapro.hf import Checkpoint
from llamapro.model_files import COMPANIONS, CheckpointError, file_in
from llamapro.tokenizer import encode, load_tokenizer


@pytest.fixture
def outside(tiny, tmp_path):
    """A whole model beside the directory, which no name and no link may lead to."""
    return tiny().save_pretrained(tmp_path / "outside")


def index_to(directory, name):
    weights = dict.fromkeys(Checkpoint(directory).tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


@pytest.mark.parametrize(
    "name", ["../outside/model.safetensors", "/", "", ".", "a\nb", "x" * 300, 5]
)
def test_names_that_lead_elsewhere(tiny_path, outside, name):
    index_to(tiny_path, name)
    with pytest.raises(CheckpointError, match="names of files relative to it"):
        Llama.from_pretrained(tiny_path)


def test_an_absolute_name(tiny_path, outside):
    index_to(tiny_path, str(outside / "model.safetensors"))
    with pytest.raises(CheckpointError, match="names of files relative to it"):
        Llama.from_pretrained(tiny_path)


def test_weights_in_a_folder_below(tiny_path):
    index_to(tiny_path, "weights/model.safetensors")
    (tiny_path / "weights").mkdir()
    (tiny_path / "model.safetensors").rename(tiny_path / "weights" / "model.safetensors")
    assert Checkpoint(tiny_path).files == [tiny_path / "weights" / "model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_that_lead_elsewhere(tiny_path, outside, name):
    (tiny_path / name).unlink()
    (tiny_path / name).symlink_to(outside / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a file inside .* got a link to {outside}"):
        Llama.from_pretrained(tiny_path)


def test_a_private_file_is_not_published(tiny_path, tmp_path):
    private = tmp_path / "private"
    private.write_text("secret")
    (tiny_path / "vocab.txt").symlink_to(private)
    with pytest.raises(CheckpointError, match=r"vocab\.txt: a file inside"):
        expand_checkpoint(tiny_path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_link_within_the_directory_is_followed(tiny_path):
    (tiny_path / "model.safetensors").rename(tiny_path / "weights")
    (tiny_path / "model.safetensors").symlink_to("weights")
    Llama.from_pretrained(tiny_path)


@pytest.fixture
def snapshot(tiny_path, tmp_path):
    """A model as the Hub's cache holds it: links into its own store."""
    home = tmp_path / "models--a--b"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    revision = tiny_path.rename(home / "snapshots" / "0123")
    for i, file in enumerate(revision.iterdir()):
        target = file.rename(home / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{target.name}")
    return revision


def test_a_snapshot_of_the_hub_is_read(snapshot):
    Llama.from_pretrained(snapshot)


def test_a_store_that_is_itself_a_link_is_refused(snapshot, tmp_path):
    (snapshot.parent.parent / "blobs").rename(tmp_path / "moved")
    (snapshot.parent.parent / "blobs").symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="a file inside"):
        Llama.from_pretrained(snapshot)


def socket_at(path):
    # The name that a socket is bound to is limited to 107 bytes; the file's is not.
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as opened:
        opened.bind(f"{short}/socket")
        os.rename(f"{short}/socket", path)


@pytest.mark.parametrize("make", [os.mkfifo, socket_at, os.mkdir], ids=["FIFO", "socket", "folder"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"]
)
def test_what_is_no_regular_file_is_not_opened(tiny_path, name, make):
    """Opening a FIFO would wait for ever."""
    (tiny_path / name).unlink(missing_ok=True)
    make(tiny_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a regular file expected, got a"):
        Llama.from_pretrained(tiny_path)


def test_links_in_a_circle(tiny_path):
    (tiny_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_tokenizer(tiny_path)


@pytest.mark.parametrize(
    "name, size, message",
    [
        ("config.json", 33 * 2**20, "at most 33.55 MB expected, got 34.60 MB"),
        ("tokenizer.json", 101 * 2**20, "at most 104.86 MB expected, got 105.91 MB"),
    ],
)
def test_sizes_are_bounded(tiny_path, name, size, message):
    with open(tiny_path / name, "ab") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        Llama.from_pretrained(tiny_path)


def test_only_known_companions_are_copied(tiny_path, tmp_path):
    for name in (*COMPANIONS, "notes.txt", "training_args.json", "LICENSE.secret"):
        if name != "tokenizer.json":  # it would be used
            (tiny_path / name).write_text("{}")
    expand_checkpoint(tiny_path, tmp_path / "out", 2)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    weights = {name for name in names if name.endswith((".safetensors", ".index.json"))}
    assert names - weights == {*COMPANIONS, "config.json"} - {"tokenizer.json"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\xff", "not JSON: 'utf-8' codec"),
        (b'{"a": NaN}', "finite numbers expected, got NaN"),
        (b'{"a": 1e999}', "finite numbers expected, got 1e999"),
        (b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}", "at most 50 levels expected"),
        (b"[" * 10**6, "not JSON: maximum recursion depth"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
    ids=["latin-1", "NaN", "infinite", "deep", "deeper", "long"],
)
def test_json_that_is_none(tiny_path, content, message):
    (tiny_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}") as caught:
        model_files.read_config(tiny_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": 1}])
def test_an_index_without_a_map(tiny_path, index):
    (tiny_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json: a weight_map expected, got"):
        Llama.from_pretrained(tiny_path)


def test_json_is_utf_8_whatever_the_locale(tiny_path, tmp_path):
    file = tiny_path / "config.json"
    raw = {**json.loads(file.read_text()), "_name_or_path": "llama-été-漢字"}
    file.write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    code = f"""if True:
        import locale
        from llamapro.expansion import expand_checkpoint
        assert locale.getpreferredencoding(False) != "UTF-8"
        expand_checkpoint({str(tiny_path)!r}, {str(tmp_path / "out")!r}, 2)
    """
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **plain, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    out = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert out["_name_or_path"] == raw["_name_or_path"]


def test_a_file_that_is_not_there(tiny_path):
    with pytest.raises(FileNotFoundError):
        file_in(tiny_path, "tokenizer.json")


def test_a_tokenizer_neither_pads_nor_cuts(tiny_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    made.enable_padding(length=10**9)
    made.enable_truncation(1)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tiny_path / "tokenizer.json"))
    assert encode(load_tokenizer(tiny_path), "a b") == [0, 0]


def test_the_proofs_tokens_are_in_the_vocabulary(tiny_path, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for vocabulary, message in (({"a": 61}, "got up to 61"), ({}, "got none")):
        model = tokenizers.models.WordLevel(vocabulary, unk_token="a")
        if not vocabulary:
            model = tokenizers.models.BPE()
        tokenizers.Tokenizer(model).save(str(tiny_path / "tokenizer.json"))
        with pytest.raises(CheckpointError, match=f"ids below vocab_size = 61 .* {message}"):
            expand_checkpoint(tiny_path, tmp_path / "out", 2)
