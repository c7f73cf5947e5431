"""A Llama's configuration, as config.json has it: checked, because files come from anywhere."""

import re
from dataclasses import Field, dataclass, field, fields
from typing import get_args

from llamapro.architectures import LAYER_TYPES, OPTIONAL, OURS, Architecture, architecture_of
from llamapro.storage import shown

# The rotary embeddings served here, and the settings that each needs.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Settings of config.json that would change the mathematics, and the only value served here.
FIXED_SETTINGS = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "quantization_config": None,
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# The parts of a block's fused matrices, rows after rows.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
LARGEST = 2**31 - 1
LARGEST_FLOAT = 1e38  # of fp32, in which positions are rotated
# The numbers that a setting may have, first and last; those of other sizes are 1 to LARGEST.
RANGES = {
    "num_hidden_layers": (1, 1000),  # eight times the deepest Llama
    "bos_token_id": (-1, LARGEST),
    "eos_token_id": (-1, LARGEST),
    "rms_norm_eps": (0, LARGEST_FLOAT),
    "rope_theta": (1e-38, LARGEST_FLOAT),
    "initializer_range": (0, LARGEST_FLOAT),
    "max_window_layers": (0, LARGEST),
}


@dataclass
class LlamaConfig:
    """A Llama's shape, under the names and with the defaults of Hugging Face's config.json.

    `model_type` may also be "mistral", "qwen2" or "qwen3", which are Llamas with a sliding window,
    with biases of q, k and v alone, or with head norms. `num_key_value_heads` and `head_dim`
    follow from the others when None. `rope_scaling` holds "rope_type" (default, linear or llama3)
    and its settings. A query of a block that slides sees itself and the `sliding_window` - 1 tokens
    before it, see `windows`. `llama_pro` records block expansion: {"new_blocks": positions,
    "base_blocks": count, "base": name}. `other` keeps every further field of a file that was read,
    and is written back unchanged.
    Raises ValueError for what this model does not compute.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    model_type: str = "llama"
    sliding_window: int | None = None
    use_sliding_window: bool = True
    max_window_layers: int = 0
    llama_pro: dict | None = None
    other: dict = field(default_factory=dict)

    def __post_init__(self):
        check_settings(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even, at least 2, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {self.num_attention_heads},"
                f" got {self.num_key_value_heads}"
            )
        self._check_rope()
        self._check_settings_of_others()
        self._check_windows()

    def _check_rope(self):
        scaling = self.rope_scaling or {}
        rope_type = scaling.get("rope_type", "default")
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            served = tuple(ROPE_TYPES)
            raise ValueError(f"rope type must be one of {served}, got {shown(rope_type)}")
        for name in ROPE_TYPES[rope_type]:
            value = scaling.get(name)
            if not _is_number(value) or not 0 < value <= LARGEST_FLOAT:
                raise ValueError(f"{rope_type} rope needs a positive {name}, got {shown(value)}")
        if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(
                "llama3 rope needs a high_freq_factor above low_freq_factor ="
                f" {scaling['low_freq_factor']}, got {scaling['high_freq_factor']}"
            )

    def _check_settings_of_others(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name in self._foreign and value != setting.default:
                raise ValueError(f"a {self.model_type} has no {setting.name}, got {shown(value)}")

    def _check_windows(self):
        """Fill in layer_types where its architecture has them, as transformers does."""
        full, sliding = LAYER_TYPES
        served = LAYER_TYPES if self._window else (full,)
        if not self.architecture.layer_types:
            served = (sliding if self._window else full,)
        elif self.other.get("layer_types") is None:
            blocks = self.num_hidden_layers
            slides = [bool(self._window) and i >= self.max_window_layers for i in range(blocks)]
            kinds = [sliding if slide else full for slide in slides]
            self.other = {**self.other, "layer_types": kinds}
        kinds = self.other.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind not in served for kind in kinds):
            raise ValueError(f"layer_types must be {' or '.join(served)}, got {shown(kinds)}")
        if self.architecture.layer_types and len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must have num_hidden_layers = {self.num_hidden_layers} entries,"
                f" got {len(kinds)}"
            )

    @property
    def architecture(self) -> Architecture:
        """What its model_type has and others do not."""
        return architecture_of({"model_type": self.model_type}, OURS)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases; o_proj has one where `attention_bias` says so."""
        return self.architecture.qkv_bias or self.attention_bias

    @property
    def windows(self) -> list[int | None]:
        """The tokens that a query of each block sees, itself among them; None for all before it."""
        if not self.architecture.layer_types:
            return [self._window] * self.num_hidden_layers
        kinds = self.other["layer_types"]
        return [self._window if kind == LAYER_TYPES[1] else None for kind in kinds]

    @property
    def _window(self) -> int | None:
        return self.sliding_window if self.use_sliding_window else None

    @property
    def _foreign(self) -> frozenset[str]:
        """Settings that only other architectures have."""
        return OPTIONAL - {*self.architecture.settings}

    @property
    def new_blocks(self) -> list[int]:
        """Positions of the blocks that expansion added; empty for a base model."""
        return list((self.llama_pro or {}).get("new_blocks", []))

    @classmethod
    def from_dict(cls, raw: dict) -> "LlamaConfig":
        """From config.json of transformers 4 or 5. Refuses, by name, what `Llama` does not compute.

        What is not there has transformers' default for its model_type. So has what is null where
        that has no meaning of its own: a null sliding_window is none.
        """
        architecture = architecture_of(raw, OURS)
        for name, served in FIXED_SETTINGS.items():
            if (raw.get(name) or served) != served:
                raise ValueError(f"{name} must be {served!r}, got {shown(raw[name])}")
        foreign = OPTIONAL - {*architecture.settings}
        if "sliding_window" in foreign and raw.get("sliding_window"):
            raise ValueError(f"sliding_window must be None, got {shown(raw['sliding_window'])}")
        raw = _with_one_rope(raw)
        known = {f.name: f for f in fields(cls) if f.name not in foreign | {"other"}}
        present = {
            name: value
            for name, value in raw.items()
            if name in known and (value is not None or type(None) in get_args(known[name].type))
        }
        other = {name: value for name, value in raw.items() if name not in known}
        return cls(**{**architecture.defaults, **present}, other=other)

    def to_dict(self) -> dict:
        """For config.json: every field, rope in the form of transformers 4 and of 5."""
        absent = {"other", *self._foreign}
        if self.llama_pro is None:
            absent.add("llama_pro")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in absent}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default", **(self.rope_scaling or {})}
        return {
            "architectures": [self.architecture.causal_lm],
            "hidden_act": "silu",
            **self.other,
            **own,
            "rope_parameters": rope,
        }


def stock_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Stock names and shapes of a whole model, by arithmetic alone: no model is built."""
    table = (config.vocab_size, config.hidden_size)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    block = block_shapes(config)
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Stock names, without the block's, and shapes of a block's tensors."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    biases = dict.fromkeys(PARTS["qkv"], config.qkv_bias)
    biases |= dict.fromkeys(PARTS["o_proj"], config.attention_bias)
    shapes = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    if config.architecture.head_norms:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    for name, shape in matrices.items():
        shapes[f"{name}.weight"] = shape
        if biases.get(name, config.mlp_bias):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _with_one_rope(raw: dict) -> dict:
    """rope_theta and rope_scaling: transformers 5 writes rope_parameters instead of both."""
    raw, rope = dict(raw), {}
    for name in ("rope_parameters", "rope_scaling"):
        part = raw.pop(name, None) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{name} must be an object, got {shown(part)}")
        rope |= part
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    theta = rope.pop("rope_theta", None)
    raw["rope_theta"] = raw.get("rope_theta") if theta is None else theta
    raw["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return raw


def check_settings(config) -> None:
    """Raise ValueError, by name, for a value of the wrong kind or out of range in a dataclass of
    settings."""
    for setting in fields(config):
        value = getattr(config, setting.name)
        _check_kind(setting, value)
        for number in filter(_is_number, value if isinstance(value, list) else [value]):
            check_range(setting.name, number)
    new = (config.llama_pro or {}).get("new_blocks", [])
    fits = _are_whole(new) and all(0 <= i < config.num_hidden_layers for i in new)
    if not fits or len(set(new)) < len(new):
        raise ValueError(
            f"llama_pro.new_blocks must be distinct positions below num_hidden_layers ="
            f" {config.num_hidden_layers}, got {shown(new)}"
        )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_whole(values) -> bool:
    return isinstance(values, list) and all(map(_is_whole, values))


def _check_kind(setting: Field, value) -> None:
    whole, missing = _is_whole(value), value is None
    kinds = {
        int: ("a whole number", whole),
        int | None: ("a whole number", whole or missing),
        int | list[int] | None: ("whole numbers", whole or missing or _are_whole(value)),
        float: ("a number", _is_number(value)),
        str: ("text", isinstance(value, str)),
        bool: ("true or false", isinstance(value, bool)),
        dict: ("an object", isinstance(value, dict)),
        dict | None: ("an object", isinstance(value, dict) or missing),
    }
    expected, fits = kinds[setting.type]
    if not fits:
        raise ValueError(f"{setting.name} must be {expected}, got {shown(value)}")


def check_range(name: str, value) -> None:
    """Raise ValueError for a number that a setting of this name cannot have."""
    low, high = RANGES.get(name, (1, LARGEST))
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {shown(value)}")
