"""What a run would do, and settings from files."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from llamapro import planner_ranks
from llamapro.data.tokens import DataError
from llamapro.storage import write_json
from llamapro.train import TrainConfig, train
from llamapro.train.config import as_options, options_in
from rich.text import Text

tyro = pytest.importorskip("tyro")
cli = pytest.importorskip("llamapro.cli")
command_line = pytest.importorskip("llamapro.command_line")
dry = pytest.importorskip("llamapro.train.dry_run")


@pytest.fixture
def with_tokenizer(config):
    """A tokenizer of one word for each id, in the model's directory."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {f"w{i}": i for i in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.save(f"{config.model}/tokenizer.json")
    return config


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(with_tokenizer, capsys):
    cli.main(["train", *as_options(asdict(with_tokenizer)), "--dry-run"])
    out = capsys.readouterr().out
    assert "data 1 of 1: " in out and "epochs of 4,000 tokens" in out
    assert "held out, domain: 600 tokens" in out
    assert "20 steps of 2 x 2 x 16 tokens in bfloat16" in out and "GFLOPs a token" in out
    assert "the first micro-batch of 32 tokens" in out and "[w" in out
    assert not Path(with_tokenizer.out).exists()


def test_a_dry_run_of_several_ranks_plans_one_of_them(with_tokenizer, capsys, monkeypatch):
    memory, planned = [], planner_ranks.rank_memory
    monkeypatch.setattr(dry, "rank_memory", lambda *a: memory.append(a[2:]) or planned(*a))
    for count, shard in ((1, "auto"), (2, "none"), (2, "full")):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        dry.dry_run(replace(with_tokenizer, shard=shard))
        out = capsys.readouterr().out
        assert (f" GB on each of 2 ranks, --shard {shard}\n" in out) == (count == 2)
    assert memory == [(2, "none", 2), (2, "full", 2)]
    with pytest.raises(ValueError, match="that the number of GPUs divides expected, got 3 rows"):
        dry.dry_run(replace(with_tokenizer, batch_size=3, shard="none"))


def test_samples_that_would_be_made_are_said_and_data_that_is_missing_is_not(
    with_tokenizer, capsys, tmp_path
):
    dry.dry_run(replace(with_tokenizer, keep=0.25))
    made = f"{with_tokenizer.out}-samples"
    assert f"tokens of the base would be sampled to {made}" in capsys.readouterr().out
    assert not Path(made).exists()
    with pytest.raises(DataError, match=r"no meta\.json"):
        dry.dry_run(replace(with_tokenizer, keep=0.25, keep_data=str(tmp_path / "none")))


def test_the_mask_of_a_conversation_is_shown(with_tokenizer, tmp_path):
    """What counts is green, or, without colour, between brackets."""
    directory = Path(with_tokenizer.data[0])
    np.arange(3, 43, dtype=np.uint16).tofile(directory / "train.bin")
    np.array([40], np.uint64).tofile(directory / "train.bin.index")
    (np.arange(40) % 10 > 6).tofile(directory / "train.bin.loss")
    meta = json.loads((directory / "meta.json").read_text())
    meta["tokens"]["train"] = 40
    write_json(directory / "meta.json", meta)
    rows, _ = dry.open_data(
        replace(with_tokenizer, seq_len=64), dry.Checkpoint(with_tokenizer.model).config
    )
    tokenizer = dry.load_tokenizer(with_tokenizer.model)
    (shown,) = dry._documents(rows.batch(0, 1), tokenizer, brackets=True)
    words = [f"w{i}" for i in range(3, 43)]
    expected = "".join(
        (" ".join(words[i : i + 7]) + "[" + " ".join(words[i + 7 : i + 10]) + "]")
        for i in range(0, 40, 10)
    )
    assert shown.plain == expected
    (coloured,) = dry._documents(rows.batch(0, 1), tokenizer, brackets=False)
    green = [coloured.plain[s.start : s.end] for s in coloured.spans if s.style == "green"]
    assert isinstance(coloured, Text) and green == [
        " ".join(words[i + 7 : i + 10]) for i in range(0, 40, 10)
    ]


def test_the_file_of_a_run_repeats_it(config, tmp_path):
    """Its config.json has every setting; what the command line says wins."""
    train(config)
    file = str(Path(config.out) / "config.json")
    arguments = command_line.with_config_file(
        ["train", "--config", file, "--out", str(tmp_path / "again")]
    )
    again = tyro.cli(TrainConfig, args=arguments[1:])
    assert again == replace(config, out=str(tmp_path / "again"))
    assert train(again)["perplexity_after"] == train(config, resume=True)["perplexity_after"]


def test_settings_in_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nout: o\ndata: [a=2, b]\nlearning-rate: 3e-4\nverify: true\n"
        "evaluate: {general: g}\nbetas: [0.8, 0.9]\nreport_to: tensorboard\nmemory: null\n"
    )
    words = command_line.with_config_file(
        ["train", f"--config={file}", "--learning_rate=1e-3", "--resume"]
    )
    assert words[-2:] == ["--learning_rate=1e-3", "--resume"]
    config = tyro.cli(TrainConfig, args=words[1:-1])
    assert (config.data, config.betas, config.verify) == (("a=2", "b"), (0.8, 0.9), True)
    assert config.evaluate == {"general": "g"} and config.report_to == ("tensorboard",)
    assert config.learning_rate == 1e-3


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "not YAML"),
        ("- model", "settings by name expected"),
        ("model: m\nlr: 1\n", r"settings of `llamapro train` expected, got \['lr'\]"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        options_in(file, leave_out=set())


def test_a_config_that_is_not_there(capsys):
    for words in (["--config"], ["--config", "nowhere.yaml"]):
        with pytest.raises(SystemExit, match="llamapro: "):
            cli.main(["train", *words])
