"""The decoders that can be expanded, and what sets each apart, as transformers 5 builds them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llamapro.storage import shown

LAYER_TYPES = ("full_attention", "sliding_attention")
_QWEN_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers")
_QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


@dataclass(frozen=True)
class Architecture:
    """One value of config.json's model_type."""

    causal_lm: str  # its class in transformers, in config.json's architectures
    settings: tuple[str, ...] = ()  # those that LlamaConfig has and only some architectures do
    defaults: dict = field(default_factory=dict)  # where they differ from LlamaConfig's
    layer_types: bool = False  # whether they say which blocks slide, or all do
    qkv_bias: bool = False  # whatever the settings say; o_proj has none then
    head_norms: bool = False  # q_norm and k_norm, of each head before rotation
    post_norm: bool = False  # a norm between an output projection and the residual


# Those that `Llama` computes: model_type to what it is.
OURS = {
    "llama": Architecture("LlamaForCausalLM", ("attention_bias", "mlp_bias")),
    "mistral": Architecture(
        "MistralForCausalLM",
        ("sliding_window",),
        {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", _QWEN_WINDOW, _QWEN_DEFAULTS, layer_types=True, qkv_bias=True
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        ("attention_bias", *_QWEN_WINDOW),
        {**_QWEN_DEFAULTS, "head_dim": 128},
        layer_types=True,
        head_norms=True,
    ),
}
# Those that are expanded on disk besides, and proven by transformers.
OTHERS = {
    "phi3": Architecture("Phi3ForCausalLM"),
    "gemma": Architecture("GemmaForCausalLM"),
    "gemma2": Architecture("Gemma2ForCausalLM", post_norm=True),
    "gemma3_text": Architecture("Gemma3ForCausalLM", post_norm=True),
    "olmo2": Architecture("Olmo2ForCausalLM", post_norm=True),
}
ARCHITECTURES = OURS | OTHERS
OPTIONAL = frozenset(name for architecture in OURS.values() for name in architecture.settings)


def architecture_of(raw: dict, served: Mapping[str, Architecture]) -> Architecture:
    """That of a config.json. Raises ValueError, by name, for what is not among `served`."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in served:
        raise ValueError(f"model_type must be one of {tuple(served)}, got {shown(name)}")
    expected = served[name].causal_lm
    classes = raw.get("architectures") or [expected]
    if classes != [expected]:
        raise ValueError(f"architecture {expected} expected, got {shown(classes)}")
    return served[name]
