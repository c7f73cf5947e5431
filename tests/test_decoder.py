"""Expansion on disk of architectures that transformers alone runs, against transformers."""

import json
import logging
import sys

import pytest
import torch
from llamapro.architectures import OTHERS
from llamapro.decoder import open_checkpoint
from llamapro.expansion import expand_checkpoint
from llamapro.hf import Checkpoint
from llamapro.model_files import CheckpointError
from llamapro.proof import IdentityError
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "sliding_window": 5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CASES = {  # name: model_type, settings
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"attention_bias": True}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 2}),
    "olmo2": ("olmo2", {"attention_bias": True}),
}


def save(path, model_type, dtype=torch.float32, **settings):
    """A random model's directory."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # not the zeros and ones of a fresh model
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(params=CASES)
def base(request, tmp_path):
    model_type, settings = CASES[request.param]
    return save(tmp_path / "base", model_type, **settings)


def logits(path, tokens, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    with torch.no_grad():
        return model(tokens).logits


def test_a(base, tmp_path):
    tokens = torch.randint(61, (2, 16))
    expand_checkpoint(base, tmp_path / "out", 2)
    print(json.loads((tmp_path / "out/config.json").read_text()))
    assert torch.equal(logits(base, tokens), logits(tmp_path / "out", tokens))
