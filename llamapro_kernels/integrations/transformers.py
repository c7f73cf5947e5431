"""Models of transformers on the ops of this package: `apply(model)`, and `revert(model)`.

Importing this file makes `attn_implementation="llamapro"` known to transformers, and changes
nothing else. `apply` exchanges the classes of the modules of one model, no other model and no
function of transformers; parameters, their names and what `save_pretrained` writes stay as they
are.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from llamapro_kernels.block import RECOMPUTE
from llamapro_kernels.integrations import transformers_attention as attention_module
from llamapro_kernels.integrations import transformers_layers as layers_module
from llamapro_kernels.integrations.transformers_attention import NAME

# Decoder layers that are one block of ours, and where their window is said, if they have one.
BLOCKS = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
LOSSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
APPLIED = "applied"

attention_module.register()


@dataclass
class Applied:
    """What `apply` did to a model, for `revert`."""

    attention: str | None = None
    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    joined: list[nn.Parameter] = field(default_factory=list)

    def exchange(self, module: nn.Module, made: type) -> None:
        self.classes.append((module, type(module)))
        module.__class__ = made


def apply(
    model: nn.Module,
    *,
    block: bool = True,
    attention: bool = True,
    rms_norm: bool = True,
    rope: bool = True,
    swiglu: bool = True,
    loss: bool = True,
    recompute: str | None = None,
) -> dict[str, str]:
    """Let a decoder of transformers compute by these ops, in place.

    Call it on a model, or on what peft made of one, before or after adapters are added. Each call
    of each layer decides anew: what it cannot serve (adapters, hooks, quantized or sharded weights,
    caches, `output_attentions`, dropout) computes as transformers has it.

    Args:
        block: Whole decoder layers of Llama, Mistral, Qwen2 and Qwen3 as one autograd node.
            Gradient checkpointing that a trainer turns on becomes its recomputation.
        attention: `attn_implementation="llamapro"`; the block needs its masks.
        rms_norm, rope, swiglu: These pieces, wherever a layer is not one node.
        loss: Head and loss as one op in training, where `logits` are None then.
        recompute: What a block's backward computes again, see `decoder_block`; by default "none".

    Returns:
        A value for each piece: "applied", or why it was not.

    Raises:
        ValueError: The model has no decoder layers, is quantized, or was applied to before; nothing
            is changed then.

    The weights of q, k and v, and of gate and up, are moved into one storage where nothing else
    shares theirs; each stays the parameter that it is.
    """
    model = _base_of(model)
    layers = _layers_of(model)
    _check(model, layers, recompute)
    state = Applied()
    said = {"attention": _apply_attention(model, state) if attention else "not asked for"}
    said["block"] = "not asked for"
    if block:
        said["block"] = _apply_block(layers, state, recompute or "none", said["attention"])
    pieces = (
        ("rms_norm", rms_norm, _apply_rms_norm),
        ("rope", rope, _apply_rope),
        ("swiglu", swiglu, _apply_swiglu),
        ("loss", loss, _apply_loss),
    )
    for name, wanted, function in pieces:
        said[name] = function(model, state) if wanted else "not asked for"
    model.llamapro_applied = state
    return said


def revert(model: nn.Module) -> None:
    """Give a model back its own classes, attention and storages; ValueError without `apply`."""
    model = _base_of(model)
    state = vars(model).get("llamapro_applied")
    if state is None:
        raise ValueError(f"a model that apply was called on expected, got {type(model).__name__}")
    for module, original in reversed(state.classes):
        module.__class__ = original
        for name in ("llamapro_window", "llamapro_recompute"):
            vars(module).pop(name, None)
    for parameter in state.joined:
        parameter.data = parameter.data.clone()
    if state.attention is not None:
        model.set_attn_implementation(state.attention)
    del model.llamapro_applied


def _base_of(model):
    """The model of transformers inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _layers_of(model):
    """The decoder layers: the longest list of modules that have a self_attn."""
    stacks = [
        list(m)
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and all(hasattr(c, "self_attn") for c in m)
    ]
    return max(stacks, key=len, default=[])


def _check(model, layers, recompute):
    name = type(model).__name__
    if recompute is not None and recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE} or None, got {recompute!r}")
    if not layers or not hasattr(model, "config"):
        raise ValueError(f"a model of transformers with decoder layers expected, got {name}")
    if "llamapro_applied" in vars(model):
        raise ValueError(f"apply was called on this {name} before: revert(model) first")
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"a model that is not quantized expected, got a quantized {name}")


def _apply_attention(model, state):
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has no exchangeable attention"
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its scores have a soft cap"
    state.attention = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return APPLIED


def _apply_block(layers, state, recompute, attention):
    name = type(layers[0]).__name__
    if name not in BLOCKS or not type(layers[0]).__module__.startswith("transformers."):
        return f"a layer of {', '.join(BLOCKS)} expected, got {name}"
    config = layers[0].self_attn.config
    if attention != APPLIED:
        return f"needs its attention: {attention}"
    if config.hidden_act != "silu":
        return f"its activation must be silu, got {config.hidden_act}"
    rope = config.rope_parameters or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or layers[0].self_attn.head_dim % 2:
        return "whole heads of an even dimension must be rotated"
    for layer in layers:
        window = BLOCKS[name](layer.self_attn)
        state.exchange(layer, layers_module.decoder_layer(type(layer)))
        layer.llamapro_window, layer.llamapro_recompute = window, recompute
        attention, mlp = layer.self_attn, layer.mlp
        for parts in ((attention.q_proj, attention.k_proj, attention.v_proj),
                      (mlp.gate_proj, mlp.up_proj)):  # fmt: skip
            if all(map(layers_module.is_plain_linear, parts)):
                _join([part.weight for part in parts], state)
    return APPLIED


@torch.no_grad()
def _join(weights, state):
    """Move weights into one storage, one after the other, unless somebody else uses theirs."""
    first = weights[0]
    for w in weights:
        alike = w.dtype == first.dtype and w.device == first.device and not w.is_meta
        whole = alike and w.is_contiguous() and w.untyped_storage().nbytes() == w.nbytes
        if not whole or w.is_shared():
            return
    for w, rows in zip(weights, torch.cat(weights).split([len(w) for w in weights]), strict=True):
        w.data = rows
        state.joined.append(w)


def _apply_rms_norm(model, state):
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    served = [m for m in norms if _is_served_norm(m)]
    for m in served:
        state.exchange(m, layers_module.rms_norm(type(m)))
    if not served:
        return f"computed otherwise by {type(norms[0]).__name__}" if norms else "there is none"
    return APPLIED


@torch.no_grad()
def _is_served_norm(norm):
    """Whether a norm computes what `lk.rms_norm` does: Gemma's, for one, multiplies by 1 + w."""
    if not hasattr(norm, "variance_epsilon") or not isinstance(norm.weight, torch.Tensor):
        return False
    probe = torch.nn.Module()
    probe.__class__ = type(norm)
    probe.weight = torch.linspace(0.5, 2.0, 8)
    probe.variance_epsilon = norm.variance_epsilon
    x = torch.linspace(-3.0, 2.0, 16).view(2, 8)
    ours = layers_module.rms_norm(type(norm)).forward(probe, x)
    return torch.allclose(type(norm).forward(probe, x), ours, rtol=1e-5, atol=1e-6)


def _apply_rope(model, state):
    attentions = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    rotating = [
        m for m in attentions
        if "apply_rotary_pos_emb" in type(m).forward.__code__.co_names and _is_served_rope(type(m))
    ]  # fmt: skip
    for m in rotating:
        state.exchange(m, layers_module.rotating_attention(type(m)))
    return APPLIED if rotating else "its attention rotates otherwise"


@torch.no_grad()
def _is_served_rope(attention: type):
    """Whether its rotation, of whole heads by halves, is that of `lk.rope`."""
    angles = torch.linspace(0.1, 1.5, 12).view(1, 3, 4).repeat(1, 1, 2)
    q = torch.linspace(-1.0, 1.0, 48).view(1, 2, 3, 8)
    operands = q, q[:, :1], angles.cos(), angles.sin()
    theirs = attention.forward.__globals__["apply_rotary_pos_emb"]
    try:
        results = zip(theirs(*operands), layers_module.rotate(*operands), strict=True)
    except (TypeError, ValueError, RuntimeError):
        return False  # it takes other arguments
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in results)


def _apply_swiglu(model, state):
    served = 0
    for m in list(model.modules()):
        parts = {name for name, _ in m.named_children()}
        gated = {"down_proj"} < parts and (
            {"gate_proj", "up_proj"} < parts or "gate_up_proj" in parts
        )
        activation = getattr(m, "act_fn", getattr(m, "activation_fn", None))
        if gated and type(activation).__name__ in ("SiLU", "SiLUActivation"):
            state.exchange(m, layers_module.gated_mlp(type(m)))
            served += 1
    return APPLIED if served else "no MLP of it has a gate with SiLU"


def _apply_loss(model, state):
    name = type(model).__name__
    if name not in LOSSES:
        return f"a model of {', '.join(LOSSES)} expected, got {name}"
    state.exchange(model, layers_module.causal_lm(type(model)))
    return APPLIED
