"""Files changed at random, then read, as fuzz.py has it.

Nothing outside their directory is opened, by Python or by the libraries it calls: the kernel
reports every opening there. A further target is a further entry of TARGETS, and a fixture of its
name that gives the directory to be changed.
"""

import ctypes
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fuzz import change_file, try_changes
from hypothesis import strategies as st
from llamapro import Llama, LlamaConfig
from llamapro import expand as expand_in_memory
from llamapro.data.chat import ChatTemplate
from llamapro.data.sources import open_corpus
from llamapro.data.tokens import TokenDataset, load_tokens
from llamapro.expansion import expand_checkpoint
from llamapro.hf import entries_of, write_model
from llamapro.model import stock_tensors
from llamapro.new_blocks import merge, save_new_blocks
from llamapro.tokenizer import encode, load_tokenizer
from llamapro.train import loop as train_module
from llamapro.train import train
from llamapro.train.loop import take_step
from row_files import write_rows

tokenizers = pytest.importorskip("tokenizers")
STEP = "checkpoints/step-00000002"
IN_OPEN = 0x20  # of inotify(7)


def load_model(directory, _):
    model = Llama.from_pretrained(directory)
    model(torch.tensor([[1, 2, 3]]))


@contextmanager
def nothing_left_behind(out):
    try:
        yield
    except BaseException:
        assert not out.exists() and not out.with_name(f".{out.name}.partial").exists()
        raise


@contextmanager
def whole_or_not_at_all(out):
    with nothing_left_behind(out):
        yield
    load_model(out, None)


def expand(directory, out):
    with whole_or_not_at_all(out):
        expand_checkpoint(directory, out, 1)


def expand_by_transformers(directory, out):
    with nothing_left_behind(out):
        expand_checkpoint(directory, out, 1)


def join(directory, out):
    with whole_or_not_at_all(out):
        merge(SETTINGS["base"], directory, out)


def use_tokenizer(directory, _):
    encode(load_tokenizer(directory), "to be or not to be")


def use_template(directory, _):
    ChatTemplate.of(directory).encode(TURNS)


def read_documents(directory, _):
    for file in ROW_FILES:
        for document in open_corpus([directory / file]).documents():
            document.read()


def read_rows(directory, _):
    TokenDataset(load_tokens(directory, "train", 61), 16).batch(0, 2)


def resume(directory, _):
    train(replace(SETTINGS["run"], out=str(directory)), resume=True)


TURNS = [{"role": "user", "content": "to be"}, {"role": "assistant", "content": "or not"}]
ROW_FILES = ("a.json", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.parquet")
SETTINGS = {}  # of the run that is resumed, and the base of the new blocks
# By name: the files that are changed, what reads them, given the directory and a place to write
# to, and how many changes are tried.
TARGETS = {
    "model": (
        ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        load_model,
        300,
    ),
    "expansion": (
        ("config.json", "model-00002-of-00002.safetensors", "tokenizer.json", "LICENSE"),
        expand,
        150,
    ),
    "decoder": (("config.json", "model.safetensors"), expand_by_transformers, 80),
    "new blocks": (("new_blocks.json", "new_blocks.safetensors"), join, 300),
    "tokenizer": (("tokenizer.json",), use_tokenizer, 150),
    "chat": (("tokenizer_config.json", "chat_template.jinja"), use_template, 150),
    "documents": (ROW_FILES, read_documents, 300),
    "data": (("meta.json", "train.bin"), read_rows, 150),
    "run": (
        ("config.json", "metrics.jsonl", f"{STEP}/state.json", f"{STEP}/state.safetensors"),
        resume,
        60,
    ),
}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A model of two shards with a tokenizer."""
    directory = tmp_path_factory.mktemp("pristine") / "model"
    directory.mkdir()
    config = LlamaConfig(
        32, 8, 8, 2, 2, 1, eos_token_id=[2], rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    torch.manual_seed(0)
    entries = entries_of({n: t.detach() for n, t in stock_tensors(Llama(config)).items()})
    write_model(directory, config, entries, max_shard_bytes=3000)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "to", "be", "or", "not", " "])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.enable_truncation(512)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "LICENSE").write_text("free")
    return directory


@pytest.fixture
def decoder_directory(tmp_path):
    """A model that our own Llama does not compute."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = transformers.Gemma2Config(**sizes, **heads)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path / "decoder")
    return tmp_path / "decoder"


@pytest.fixture
def run_directory(config, monkeypatch):
    """A run that stopped after two of its three steps."""

    def stop(*arguments):
        if arguments[-1] == 2:
            raise MemoryError("stopped by the test")
        return take_step(*arguments)

    SETTINGS["run"] = replace(
        config, steps=3, gradient_accumulation_steps=1, eval_every=3, checkpoint_every=2
    )
    monkeypatch.setattr(train_module, "take_step", stop)
    with pytest.raises(MemoryError):
        train(SETTINGS["run"])
    monkeypatch.undo()
    return Path(config.out)


@pytest.fixture
def new_blocks_directory(model_directory, tmp_path):
    SETTINGS["base"] = model_directory
    model = expand_in_memory(Llama.from_pretrained(model_directory), 2)
    return save_new_blocks(model, tmp_path / "new_blocks")


@pytest.fixture
def chat_directory(model_directory, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "chat")
    text = "{% for m in messages %}{{ bos_token }}{{ m.role + m.content }}\n{% endfor %}"
    (directory / "chat_template.jinja").write_text(text)
    special = {"bos_token": {"content": "[UNK]"}, "chat_template": [{"name": "default"}]}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


@pytest.fixture
def documents_directory(tmp_path):
    (tmp_path / "documents").mkdir()
    for name in ROW_FILES[1:]:
        write_rows(tmp_path / "documents" / name, [{"messages": TURNS}] * 2)
    (tmp_path / "documents" / ROW_FILES[0]).write_text(json.dumps({"messages": TURNS}))
    return tmp_path / "documents"


@pytest.fixture
def pristine(request, model_directory, token_data):
    """The directory that a target reads."""

    def directory(target):
        if target == "data":
            return token_data("pristine")
        if target in ("run", "decoder", "new blocks", "chat", "documents"):
            return request.getfixturevalue(f"{target.replace(' ', '_')}_directory")
        return request.getfixturevalue("model_directory")

    return directory


class Watch:
    """Everything that is opened in a directory, by whatever code."""

    def __init__(self, directory: Path):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        added = libc.inotify_add_watch(self.descriptor, os.fsencode(directory), IN_OPEN)
        assert self.descriptor >= 0 and added >= 0, os.strerror(ctypes.get_errno())

    def opened(self) -> bytes:
        """Since the last call; names are in it."""
        try:
            return os.read(self.descriptor, 2**16)
        except BlockingIOError:
            return b""


@pytest.mark.parametrize("target", TARGETS)
def test_files_that_were_changed(target, pristine, tmp_path):
    files, read, examples = TARGETS[target]
    source = pristine(target)
    shutil.copytree(source, tmp_path / "outside")
    watch = Watch(tmp_path / "outside")
    (tmp_path / "outside" / files[0]).read_bytes()
    assert os.fsencode(files[0]) in watch.opened()  # it does see
    directory, out = tmp_path / "changed", tmp_path / "out"

    def change(draw):
        for left in (directory, out):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(source, directory)
        change_file(directory / draw(st.sampled_from(files)), draw)

    def nothing_outside_was_opened(_):
        # A run and documents may lie wherever their owner likes.
        assert target in ("run", "documents") or watch.opened() == b""

    try_changes(examples, change, lambda _: read(directory, out), nothing_outside_was_opened)
