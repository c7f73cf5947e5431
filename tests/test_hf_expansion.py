import pytest
import torch

transformers = pytest.importorskip("transformers")
lpt = pytest.importorskip("llamapro.integrations.transformers")

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, **KINDS},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **KINDS},
    "gemma3_text": {"head_dim": 8, **KINDS},
    "olmo2": {},
}


def build(kind="llama", **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**TINY, **ARCHITECTURES[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():  # zeros and ones are told from nothing
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


TOKENS = torch.arange(40).view(2, 20) % 61


@torch.no_grad()
def seen(model):
    """Logits, and what is generated with a cache."""
    generated = model.generate(TOKENS, max_new_tokens=9, do_sample=False)
    return model(TOKENS).logits, generated


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("placement", ["interleaved", "top_half", "suffix", [0, 2, 5]], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_expansion_changes_no_bit(kind, placement, tmp_path):
    model = build(kind)
    before = seen(model)
    count = 3 if isinstance(placement, list) else 2
    assert lpt.expand(model, count, placement) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 4 + count
    assert same(before, seen(model))
    model.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.config.llama_pro == model.config.llama_pro
    assert same(before, seen(back))
