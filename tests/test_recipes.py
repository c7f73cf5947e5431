"""docs/trainers.md, run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apply_cases import model_of
from test_trainers import SHARD_ON_CPU
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

PAGE = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE, re.M | re.S))
HERE = ("Trainer", "TRL", "Keeping what the base knows", "accelerate, FSDP2")
HERE += ("peft beside new blocks", "Attention alone")


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    """What the page says is there: a model, rows of token ids, and for TRL a tokenizer."""
    monkeypatch.chdir(tmp_path)
    model_of("llama").save_pretrained("path/to/llama")
    torch.manual_seed(0)
    words = models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1"
    )
    return {"rows": torch.randint(2, 64, (32, 12)).tolist(), "tokenizer": tokenizer}


@pytest.mark.parametrize("name", HERE)
def test_snippets_are_short(name):
    assert len(SECTIONS[name].splitlines()) <= 15


def test_the_trainer(surroundings, tmp_path):
    exec(SECTIONS["Trainer"], surroundings)
    saved = tmp_path / "runs/trainer/checkpoint-2/new_blocks"
    assert {file.name for file in saved.iterdir()} == {
        "new_blocks.json",
        "new_blocks.safetensors",
    }


def test_trl(surroundings):
    exec(SECTIONS["TRL"], surroundings)


def test_keeping(surroundings):
    exec(SECTIONS["Keeping what the base knows"], surroundings)
    model, stock = surroundings["model"], AutoModelForCausalLM.from_pretrained("path/to/llama")
    tokens = torch.tensor(surroundings["rows"][:2])
    kept = [row["labels"] for row in surroundings["data"]].count([-101] * 12)
    assert kept == len(surroundings["samples"]) == 16
    with surroundings["lpt"].new_blocks_off(model.eval()):
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
    assert not torch.equal(model(tokens).logits, stock(tokens).logits)


def test_peft(surroundings):
    exec(SECTIONS["peft beside new blocks"], surroundings)
    model = surroundings["model"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    new = tuple(f"base_model.model.model.layers.{i}." for i in surroundings["new"])
    assert (
        sum(name.startswith(new) for name in trained) == 2 * 16
    )  # seven matrices and biases, two norms
    assert all("lora" in name for name in trained if not name.startswith(new))
    tokens = torch.tensor(surroundings["rows"][:2])
    model.train()(input_ids=tokens, labels=tokens).loss.backward()


def test_attention_alone(surroundings):
    exec(SECTIONS["Attention alone"], surroundings)
    tokens = torch.tensor(surroundings["rows"][:2])
    stock = AutoModelForCausalLM.from_pretrained("path/to/llama")
    torch.testing.assert_close(surroundings["model"](tokens).logits, stock(tokens).logits)


def test_accelerate(surroundings, tmp_path):
    script = tmp_path / "script.py"
    rows = f"rows = {surroundings['rows'][:4]}\n"
    snippet = SECTIONS["accelerate, FSDP2"]
    script.write_text(SHARD_ON_CPU + rows + snippet + "\nprint(type(model).__name__)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FSDPLlamaForCausalLM" in done.stdout


def test_patterns_are_as_the_page_says():
    from llamapro.integrations import transformers as lpt

    new = {"new_blocks": [4, 9], "base_blocks": 8, "base": None}
    config = AutoConfig.for_model("llama", num_hidden_layers=10, llama_pro=new)
    for pattern in lpt.new_block_patterns(config):
        assert f"  - {pattern}" in PAGE
