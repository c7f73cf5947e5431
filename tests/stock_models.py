"""Tiny random models of transformers."""

import pytest
import torch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # so that attention is not all alike
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<pad>", "<end>", "<system>", "<user>", "<assistant>"]
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def random_model(model_type, dtype=torch.float32, **settings):
    """Builds one whose norms and biases are not the ones and zeros of a fresh model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model
