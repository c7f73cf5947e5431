"""Our Llama as Mistral, Qwen2 and Qwen3, against transformers itself."""

import json

import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.architectures import OURS

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
CASES = {  # name: model_type, settings
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, wide heads, tied": ("mistral", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, upper blocks slide": ("qwen2", {**SLIDING, "max_window_layers": 1}),
}


def theirs_on_disk(case, path, dtype=torch.float32):
    """A random model of transformers, and its directory."""
    model_type, settings = CASES[case]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # not the zeros and ones of a fresh model
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    theirs = theirs_on_disk(case, tmp_path / "theirs")
    ours = Llama.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(61, (2, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits
        print((ours(tokens)- expected).abs().max(), expected.abs().max())
        torch.testing.assert_close(ours(tokens), expected, rtol=1e-3, atol=1e-3)
