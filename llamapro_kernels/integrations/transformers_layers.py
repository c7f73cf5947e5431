"""Modules of transformers that compute by the ops of this package, where a call lets them.

Each function takes the class of a module and makes a subclass of it with the same name, whose
`forward` asks first whether this very call fits: an adapter, a hook or a quantized weight may come
and go at any time. Where it does not fit, the module computes as it always did. An instance gets
its class exchanged and nothing else, so parameters, names and what is saved stay as they are.

A `forward` that is bound to an instance instead would silently end gradient checkpointing.
"""

import functools
import types

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

import llamapro_kernels as lk
from llamapro_kernels.block_weights import BlockWeights
from llamapro_kernels.integrations.transformers_attention import documents, is_dense
from llamapro_kernels.library import autocast_dtype

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def counterpart(original: type, forward) -> type:
    """A subclass of the same name that computes by `forward`; `original` stays in its bases."""
    functools.update_wrapper(forward, original.forward)
    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    # Gradient checkpointing wraps the forward of each new class, also of those that FSDP makes.
    made = type(original.__name__, (original,), {**namespace, "__init_subclass__": _as_it_is})
    made.forward = forward
    made.original = original
    return made


@classmethod
def _as_it_is(cls, **kwargs):
    pass


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its class says: no hook, no exchanged forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks
    hooks += module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in vars(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is PyTorch's own linear layer with a tensor of its own for a weight."""
    if type(module) is not nn.Linear or not is_plain(module):
        return False
    return type(module.weight) in (nn.Parameter, torch.Tensor)  # no DTensor, no quantized one


@functools.cache
def decoder_layer(original: type) -> type:
    """A decoder layer as one autograd node; `window` and `recompute` are set on the instance."""

    def forward(self, hidden_states, *args, **kwargs):
        if args or not _block_fits(self, hidden_states, kwargs):
            return _stock_layer(self, hidden_states, *args, **kwargs)
        x, (cos, sin) = hidden_states, kwargs["position_embeddings"]
        batch, length, width = x.shape
        cu_seqlens = documents(kwargs.get("attention_mask"), batch, kwargs)
        if cu_seqlens is not None:
            x = x.reshape(1, batch * length, width)
            cos, sin = (_by_token(t, batch) for t in (cos, sin))
        elif len(cos) == 1:
            cos, sin = cos[0], sin[0]
        checkpointed = self.gradient_checkpointing and self.training
        y = lk.decoder_block(
            x,
            _block_weights(self),
            cos,
            sin,
            eps=self.input_layernorm.variance_epsilon,
            window=self.llamapro_window,
            cu_seqlens=cu_seqlens,
            recompute="block" if checkpointed else self.llamapro_recompute,
        )
        return y.view(batch, length, width)

    return counterpart(original, forward)


def _block_fits(layer, x, kwargs) -> bool:
    """Whether this call is training or evaluation of a plain layer, on whole rows."""
    if kwargs.get("past_key_values") is not None or kwargs.get("position_embeddings") is None:
        return False
    if is_dense(kwargs.get("attention_mask")) or kwargs.get("output_attentions"):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    if attention.config._attn_implementation != "llamapro" or attention.config.output_attentions:
        return False
    if layer.training and attention.attention_dropout:
        return False
    norms = [m for name, m in attention.named_children() if name.endswith("norm")]
    norms += layer.input_layernorm, layer.post_attention_layernorm
    if not all(is_plain(m) for m in (attention, mlp, *norms)):
        return False
    linears = [layer.get_submodule(name) for name in LINEARS]
    if not all(map(is_plain_linear, linears)):
        return False
    if autocast_dtype(x.device.type) is not None:
        return True
    return all(m.weight.dtype == x.dtype for m in (*linears, *norms))


def _stock_layer(layer, *args, **kwargs):
    """The layer as transformers has it, checkpointed as transformers would."""
    stock = functools.partial(layer.original.forward, layer, **kwargs)
    if not (layer.gradient_checkpointing and layer.training):
        return stock(*args)
    if kwargs.get("past_key_values") is not None:
        stock = functools.partial(stock, past_key_values=None, use_cache=False)
    return layer._gradient_checkpointing_func(stock, *args)


def _by_token(table, batch):
    """Rotary angles (1 or B, T, D) as (B T, D)."""
    return table.expand(batch, -1, -1).flatten(0, 1)


def _block_weights(layer) -> BlockWeights:
    attention, mlp = layer.self_attn, layer.mlp
    q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return BlockWeights(
        attention_norm=layer.input_layernorm.weight,
        qkv=(q.weight, k.weight, v.weight),
        o_proj=o.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=(gate.weight, up.weight),
        down_proj=down.weight,
        qkv_bias=None if q.bias is None else (q.bias, k.bias, v.bias),
        o_proj_bias=o.bias,
        gate_up_bias=None if gate.bias is None else (gate.bias, up.bias),
        down_proj_bias=down.bias,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
    )


@functools.cache
def rms_norm(original: type) -> type:
    """An RMSNorm with `weight` and `variance_epsilon`."""

    def forward(self, hidden_states):
        if self.weight.dtype != hidden_states.dtype:  # the result would be of another dtype
            return original.forward(self, hidden_states)
        return lk.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    return counterpart(original, forward)


@functools.cache
def gated_mlp(original: type) -> type:
    """An MLP whose activation is SiLU, its gate and up apart or in one projection."""

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):
            gate_up = self.gate_up_proj(x)
        else:
            gate_up = torch.cat((self.gate_proj(x), self.up_proj(x)), -1)
        return self.down_proj(lk.swiglu(gate_up))

    return counterpart(original, forward)


@functools.cache
def rotating_attention(original: type) -> type:
    """An attention that rotates q and k by `lk.rope`: its own code with that function exchanged."""
    own = original.forward
    names = {**own.__globals__, "apply_rotary_pos_emb": rotate}
    forward = types.FunctionType(
        own.__code__, names, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return counterpart(original, forward)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' apply_rotary_pos_emb, by `lk.rope`: q (B, H, T, D), cos (1 or B, T, D)."""
    if unsqueeze_dim != 1 or cos.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"heads before tokens and whole heads rotated expected, got {unsqueeze_dim=},"
            f" {tuple(q.shape)} and {tuple(cos.shape)}"
        )
    cos, sin = (t[0] if len(t) == 1 else t for t in (cos, sin))
    q, k = lk.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


@functools.cache
def causal_lm(original: type) -> type:
    """A model with a head: in training, the loss without the logits, which are None then."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        inputs = {
            **{"input_ids": input_ids, "attention_mask": attention_mask},
            **{"position_ids": position_ids, "past_key_values": past_key_values},
            **{"inputs_embeds": inputs_embeds, "use_cache": use_cache},
        }
        if self.training and torch.is_grad_enabled() and use_cache is None:
            inputs["use_cache"] = False  # whose keys and values nobody could go on from
        targets = kwargs.get("shift_labels")
        wanted = self.training and (labels is not None or targets is not None)
        if not wanted or logits_to_keep or not _loss_fits(self):
            return original.forward(
                self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs
            )
        return _with_loss(self, inputs, labels, kwargs)

    return counterpart(original, can_return_tuple(functools.wraps(original.forward)(forward)))


def _loss_fits(model) -> bool:
    head = model.lm_head
    return is_plain_linear(head) and head.bias is None and model.loss_function is ForCausalLMLoss


def _with_loss(model, inputs, labels, kwargs):
    targets = kwargs.pop("shift_labels", None)
    count = kwargs.pop("num_items_in_batch", None)
    ignore_index = kwargs.pop("ignore_index", -100)
    outputs = model.model(**inputs, **kwargs)
    hidden = outputs.last_hidden_state  # (B, T, N)
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = lk.linear_cross_entropy(
        hidden,
        model.lm_head.weight,
        targets.to(hidden.device),
        ignore_index=ignore_index,
        reduction="mean" if count is None else "sum",
    )
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
