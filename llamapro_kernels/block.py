"""A whole Llama block: attention and SwiGLU MLP, each behind a norm and added to the residual.

    h = x + o_proj(attention(rope(qkv(norm(x)))))        y = h + down_proj(swiglu(gate_up(norm(h))))

x and y are (B, T, N). This is the composition of the public ops; each of them saves and computes
only what the trainable tensors need.

Source: Touvron et al. 2023, "LLaMA"; an identity block (Wu et al. 2024, "LLaMA Pro") is one whose
o_proj and down_proj are zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from llamapro_kernels.attention import flash_attention
from llamapro_kernels.rms_norm import add_rms_norm, rms_norm
from llamapro_kernels.rope import rope
from llamapro_kernels.swiglu import swiglu

Cache = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class BlockWeights(NamedTuple):
    """The tensors of one block; N is the width, D the head dimension, I the MLP's width."""

    attention_norm: torch.Tensor  # (N,)
    qkv: torch.Tensor  # ((H + 2 Hkv) D, N): queries, then keys, then values
    o_proj: torch.Tensor  # (N, H D)
    mlp_norm: torch.Tensor  # (N,)
    gate_up: torch.Tensor  # (2I, N): gate, then up
    down_proj: torch.Tensor  # (N, I)
    qkv_bias: torch.Tensor | None = None
    o_proj_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_proj_bias: torch.Tensor | None = None


def decoder_block(
    x: torch.Tensor,
    weights: BlockWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-5,
    cu_seqlens: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """One Llama block, causal: x (B, T, N) -> (B, T, N).

    cos, sin: (T, D), which also gives the head dimension; the head counts follow from the weights.
    `cu_seqlens` as in `flash_attention`. `cache` is called with this block's rotated keys and its
    values, (B, T, Hkv, D), and returns all keys and values to attend to, (B, S, Hkv, D).
    Raises what the ops raise for tensors that do not fit together.
    Source: Touvron et al. 2023.
    """
    batch, length, _ = x.shape
    dim = cos.shape[-1]
    heads = weights.o_proj.shape[1] // dim
    normed = rms_norm(x, weights.attention_norm, eps)
    qkv = linear(normed, weights.qkv, weights.qkv_bias)
    kv_heads = (weights.qkv.shape[0] // dim - heads) // 2
    qkv = qkv.view(batch, length, heads + 2 * kv_heads, dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)
    q, k = rope(q, k, cos, sin)
    if cache is not None:
        k, v = cache(k, v)
    attended = flash_attention(q, k, v, cu_seqlens=cu_seqlens).flatten(2)
    attended = linear(attended, weights.o_proj, weights.o_proj_bias)
    normed, x = add_rms_norm(attended, x, weights.mlp_norm, eps)
    hidden = swiglu(linear(normed, weights.gate_up, weights.gate_up_bias))
    return x + linear(hidden, weights.down_proj, weights.down_proj_bias)
