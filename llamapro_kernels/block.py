"""A whole Llama block as one autograd node, which keeps only what the wanted gradients need.

    h = x + o_proj(attention(rope(qkv(norm(x)))))        y = h + down_proj(swiglu(gate_up(norm(h))))

x and y are (B, T, N). The node runs the ops of this package and the library's matrix products, in
the order in which their composition would; q, k and v stay where the projection put them, and so
do their gradients. Its backward goes down from y and stops below the last tensor that wants a
gradient; a frozen block computes input gradients alone. `recompute` says what backward computes a
second time; the rest is saved for it, in numbers a token (H query heads, Hkv key heads, head
dimension D, MLP width I):

    "none"     2 N + (2 H + 2 Hkv) D + 2 I    x, h, q, k, v, o, gate_up, and fp32 statistics
    "mlp"      2 N + (2 H + 2 Hkv) D          recomputes gate_up: 4 N I FLOPs
    "block"    N                              recomputes everything but the last product

Norms and SwiGLU are always recomputed where a weight's gradient needs their result: that costs less
than saving it.

Source: Touvron et al. 2023, "LLaMA"; an identity block (Wu et al. 2024, "LLaMA Pro") is one whose
o_proj and down_proj are zero.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from llamapro_kernels import library
from llamapro_kernels.attention import (
    check_causal,
    check_documents,
    check_operands,
    check_window,
)
from llamapro_kernels.matmul import linear, matmul
from llamapro_kernels.rope import check_constant

Cache = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
RECOMPUTE = ("none", "mlp", "block")
ops = torch.ops.llamapro


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


REQUIRED = BlockWeights._fields[:6]


class Settings(NamedTuple):
    """Everything but x and the weights; none of it wants a gradient."""

    cos: torch.Tensor
    sin: torch.Tensor
    cu_seqlens: torch.Tensor | None
    eps: float
    window: int | None
    recompute: str


class SavedActivations(NamedTuple):
    """What forward computes and backward reads; None for what is not saved or not needed."""

    x: torch.Tensor | None = None
    x_rstd: torch.Tensor | None = None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    o: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    h: torch.Tensor | None = None
    h_rstd: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None


class NeededGrads:
    """Which gradients are needed, and what backward therefore has to compute on its way down."""

    def __init__(self, x: bool, weights: list[bool]):
        self.x, self.weights = x, BlockWeights(*weights)
        w = self.weights
        self.normed_x = x or w.attention_norm
        self.qkv = self.normed_x or w.qkv or w.qkv_bias
        self.h = self.qkv or w.o_proj or w.o_proj_bias
        self.normed_h = self.h or w.mlp_norm
        self.gate_up = self.normed_h or w.gate_up or w.gate_up_bias

    def inputs_of_backward(self, saved: SavedActivations, recompute: str) -> SavedActivations:
        """The part of `saved` that backward reads, or that it starts from to compute the rest."""
        if recompute == "block":
            return SavedActivations(x=saved.x)
        w = self.weights
        reads = {
            "x": self.normed_x or w.qkv,
            "x_rstd": self.normed_x,
            **dict.fromkeys(("q", "k", "v", "stats"), self.qkv),
            "o": self.qkv or w.o_proj,
            "h": self.normed_h or w.gate_up or recompute == "mlp",
            "h_rstd": self.normed_h,
            "gate_up": recompute == "none" and (self.gate_up or w.down_proj),
        }
        read = {name: value for name, value in saved._asdict().items() if reads[name]}
        return SavedActivations(**read)


def _attention_half(x, w, settings, cache=None):
    """Compute x to o: the operands of attention and what it gives."""
    batch, length, _ = x.shape
    dim = settings.cos.shape[-1]
    heads = w.o_proj.shape[1] // dim
    kv_heads = (w.qkv.shape[0] // dim - heads) // 2
    normed, rstd = ops.rms_norm(x, w.attention_norm, settings.eps)  # (B, T, N), (B, T, 1)
    # A product of matrices: the version of its result counts what is done to views of it.
    qkv = linear(normed.flatten(0, 1), w.qkv, w.qkv_bias)  # (B T, (H + 2 Hkv) D)
    qkv = qkv.view(batch, length, heads + 2 * kv_heads, dim)
    ops.rope_inplace(qkv[:, :, : heads + kv_heads], settings.cos, settings.sin, False)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)  # q (B, T, H, D), k and v (B, T, Hkv, D)
    if cache is not None:
        k, v = cache(k, v)  # (B, S, Hkv, D)
        check_operands(q, k, v)
        check_causal(q, k)
    # o (B, T, H, D), stats (B, H, 2, T)
    o, stats = ops.flash_attention(q, k, v, settings.cu_seqlens, True, dim**-0.5, settings.window)
    return SavedActivations(x, rstd, q, k, v, o, stats)


def _mlp_half(saved, w, settings):
    """Compute o to gate_up."""
    attended = linear(saved.o.flatten(2), w.o_proj, w.o_proj_bias)  # (B, T, H D) to (B, T, N)
    normed, h, rstd = ops.add_rms_norm(attended, saved.x, w.mlp_norm, settings.eps)
    gate_up = linear(normed, w.gate_up, w.gate_up_bias)  # (B, T, 2 I)
    return saved._replace(h=h, h_rstd=rstd, gate_up=gate_up)


def _forward(x, w, settings, cache=None):
    saved = _mlp_half(_attention_half(x, w, settings, cache), w, settings)
    return linear(ops.swiglu(saved.gate_up), w.down_proj, w.down_proj_bias, saved.h), saved


def _recompute(saved, w, settings):
    """Compute what backward reads and was not saved, as forward computed it."""
    if settings.recompute == "block":
        return _mlp_half(_attention_half(saved.x, w, settings), w, settings)
    if settings.recompute == "mlp":
        normed = _normed(saved.h, w.mlp_norm, settings)
        return saved._replace(gate_up=linear(normed, w.gate_up, w.gate_up_bias))
    return saved


def _backward(dy, saved, w, settings, needed):
    """Compute dx and the gradients of the weights, None where not needed."""
    grads = {}
    _projection_gradients(grads, "down_proj", needed, dy, lambda: ops.swiglu(saved.gate_up))
    dh = _mlp_backward(dy, saved, w, settings, needed, grads) if needed.gate_up else None
    dx = _attention_backward(dh, saved, w, settings, needed, grads) if needed.h else None
    return dx, [grads.get(name) for name in BlockWeights._fields]


def _mlp_backward(dy, saved, w, settings, needed, grads):
    dgate_up = ops.swiglu_backward(matmul(dy, w.down_proj), saved.gate_up)  # (B, T, 2 I)
    normed = partial(_normed, saved.h, w.mlp_norm, settings)
    _projection_gradients(grads, "gate_up", needed, dgate_up, normed)
    if not needed.normed_h:
        return None
    dh, grads["mlp_norm"] = _norm_backward(
        matmul(dgate_up, w.gate_up), dy, saved.h, w.mlp_norm, saved.h_rstd, needed.h,
        needed.weights.mlp_norm,
    )  # fmt: skip
    return dh


def _attention_backward(dh, saved, w, settings, needed, grads):
    _projection_gradients(grads, "o_proj", needed, dh, lambda: saved.o.flatten(2))
    if not needed.qkv:
        return None
    do = matmul(dh, w.o_proj).view(saved.o.shape)  # (B, T, H D) as (B, T, H, D)
    dqkv = _qkv_backward(do, saved, settings)  # (B, T, (H + 2 Hkv) D)
    normed = partial(_normed, saved.x, w.attention_norm, settings)
    _projection_gradients(grads, "qkv", needed, dqkv, normed)
    if not needed.normed_x:
        return None
    dx, grads["attention_norm"] = _norm_backward(
        matmul(dqkv, w.qkv), dh, saved.x, w.attention_norm, saved.x_rstd, needed.x,
        needed.weights.attention_norm,
    )  # fmt: skip
    return dx


def _qkv_backward(do, saved, settings):
    dqkv = ops.flash_attention_backward_packed(
        *(do, saved.q, saved.k, saved.v, saved.o, saved.stats, settings.cu_seqlens),
        *(True, saved.q.shape[-1] ** -0.5, settings.window),
    )  # (B, T, H + 2 Hkv, D)
    rotated = saved.q.shape[2] + saved.k.shape[2]
    ops.rope_inplace(dqkv[:, :, :rotated], settings.cos, settings.sin, True)
    return dqkv.flatten(2)


def _norm_backward(dnormed, dsum, x, weight, rstd, want_x, want_weight):
    """The gradient of what was normed, to which its other use adds dsum, and of the weight."""
    dx, dweight = ops.add_rms_norm_backward(
        dnormed,
        dsum if want_x else None,
        x,
        weight if want_x else None,
        rstd,
        weight.dtype if want_weight else None,
    )
    return dx if want_x else None, dweight if want_weight else None


def _normed(x, weight, settings):
    return ops.rms_norm(x, weight, settings.eps)[0]


def _projection_gradients(grads, name, needed, dy, x):
    """Add to grads those of the weight and the bias of y = projection(x()).

    x is computed where it is needed.
    """
    if getattr(needed.weights, name):
        grads[name] = matmul(dy.flatten(0, 1).T, x().flatten(0, 1))  # (out, B T) (B T, in)
    if getattr(needed.weights, f"{name}_bias"):
        grads[f"{name}_bias"] = dy.sum((0, 1))


class _Block(torch.autograd.Function):
    """Weights come last: there are as many as `BlockWeights` has fields."""

    @staticmethod
    def forward(ctx, x, cos, sin, cu_seqlens, eps, window, recompute, *weights):
        settings = Settings(cos, sin, cu_seqlens, eps, window, recompute)
        w = BlockWeights(*weights)
        y, saved = _forward(x, w, settings)
        needed = NeededGrads(ctx.needs_input_grad[0], ctx.needs_input_grad[-len(weights) :])
        saved = needed.inputs_of_backward(saved, recompute)
        ctx.save_for_backward(*saved, cos, sin, cu_seqlens, *weights)
        ctx.options = eps, window, recompute
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("decoder_block has no second derivative (create_graph=True)")
        tensors = ctx.saved_tensors  # once: each time unpacks all of them
        count = len(SavedActivations._fields)
        saved, w = SavedActivations(*tensors[:count]), BlockWeights(*tensors[count + 3 :])
        settings = Settings(*tensors[count : count + 3], *ctx.options)
        needed = NeededGrads(ctx.needs_input_grad[0], ctx.needs_input_grad[-len(w) :])
        with library.without_autocast(dy.device.type):  # forward has settled the dtypes
            dx, dweights = _backward(dy, _recompute(saved, w, settings), w, settings, needed)
        return dx, *(None,) * 6, *dweights


def decoder_block(
    x: torch.Tensor,
    weights: BlockWeights,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = 1e-5,
    window: int | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cache: Cache | None = None,
    recompute: str = "none",
) -> torch.Tensor:
    """One Llama block, causal: x (B, T, N) -> (B, T, N) in x's dtype.

    cos, sin: (T, D) as `rope` takes them, which also gives the head dimension; the head counts
    follow from the weights. The weights are of x's dtype; those of the norms may be of any.
    `window` and `cu_seqlens` as in `flash_attention`. `recompute`: what backward computes a
    second time instead of reading it, "none", "mlp" or "block" (the module's docstring has the
    table); it changes memory and time, and no bit of the gradients.
    `cache` is called with this block's rotated keys and its values, (B, T, Hkv, D), and returns all
    keys and values to attend to, (B, S, Hkv, D); there are no gradients through it. Under autocast
    the block computes in autocast's dtype. Raises TypeError for dtypes, and ValueError for shapes
    and options that do not fit. Source: Touvron et al. 2023.
    """
    _check(x, weights, cos, sin, eps, window, cu_seqlens, recompute)
    # float: a default that Dynamo makes a symbol (dynamic=True) cannot enter the next block's node.
    settings = Settings(cos, sin, cu_seqlens, float(eps), window, recompute)
    computed, *weights = library.in_autocast(x, *weights)
    weights = BlockWeights(*weights)
    _check_dtypes(computed, weights)
    with library.without_autocast(x.device.type):
        return _run(computed, weights, settings, cache).to(x.dtype)


def _run(x, weights, settings, cache):
    tensors = (x, *(w for w in weights if w is not None))
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _forward(x, weights, settings, cache)[0]
    if cache is not None:
        raise ValueError("there are no gradients through a cache: call under torch.no_grad()")
    return _Block.apply(x, *settings, *weights)


def _check(x, w, cos, sin, eps, window, cu_seqlens, recompute):
    if not isinstance(w, BlockWeights):
        raise TypeError(f"weights must be BlockWeights, got {type(w).__name__}")
    given = {name: t for name, t in w._asdict().items() if t is not None or name in REQUIRED}
    library.check_floating(x=x, cos=cos, sin=sin, **given)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
    if x.dim() != 3 or cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != x.shape[1]:
        raise ValueError(
            f"x (B, T, N), cos and sin (T, D) expected,"
            f" got {tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    check_constant(cos, sin)
    _check_shapes(x.shape[2], cos.shape[1], {name: tuple(t.shape) for name, t in given.items()})
    check_window(window)
    library.check_eps(eps)
    if cu_seqlens is not None:
        check_documents(x, x, cu_seqlens)


def _check_shapes(width, dim, shapes):
    rows, values = (*shapes["qkv"], 0)[0], (0, *shapes["o_proj"])[-1]
    inner = (0, *shapes["down_proj"])[-1]
    expected = {
        **dict.fromkeys(("attention_norm", "mlp_norm", "o_proj_bias", "down_proj_bias"), (width,)),
        **{"qkv": (rows, width), "qkv_bias": (rows,), "o_proj": (width, values)},
        **{"gate_up": (2 * inner, width), "gate_up_bias": (2 * inner,)},
        "down_proj": (width, inner),
    }
    for name, shape in shapes.items():
        if expected[name] != shape:
            raise ValueError(f"{name} must be {expected[name]} for N = {width}, got {shape}")
    heads = values // max(1, dim)
    kv_heads = (rows - values) // max(1, 2 * dim)
    whole = values == heads * dim and rows == (heads + 2 * kv_heads) * dim and dim % 2 == 0
    if not whole or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"qkv ((H + 2 Hkv) D, N) and o_proj (N, H D), H a multiple of Hkv, expected for an even"
            f" D = {dim}, that of cos and sin, got {shapes['qkv']} and {shapes['o_proj']}"
        )


def _check_dtypes(x, w):
    for name, t in w._asdict().items():
        if t is not None and not name.endswith("norm") and t.dtype != x.dtype:
            raise TypeError(f"{name} must be of x's dtype, {x.dtype}, got {t.dtype}")
