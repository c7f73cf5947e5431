"""A whole Llama block as one autograd node, which keeps only what the wanted gradients need.

    h = x + o_proj(attention(rope(qkv(norm(x)))))        y = h + down_proj(swiglu(gate_up(norm(h))))

x and y are (B, T, N). q and k may be normed, each head by itself, before they are rotated. The node
runs the ops of this package and the library's matrix products, in
the order in which their composition would; q, k and v stay where the projection put them, and so
do their gradients. Its backward goes down from y and stops below the last tensor that wants a
gradient; a frozen block computes input gradients alone. `recompute` says what backward computes a
second time; the rest is saved for it, in numbers a token (H query heads, Hkv key heads, head
dimension D, MLP width I):

    "none"     2 N + (2 H + 2 Hkv) D + 2 I    x, h, q, k, v, o, gate_up, and fp32 statistics
    "mlp"      2 N + (2 H + 2 Hkv) D          recomputes gate_up: 4 N I FLOPs
    "block"    N                              recomputes everything but the last product

Where a frozen projection has 8 bits, what it reads, and what its input gradient reads, is written
in 8 bits by what computes it. Norms and SwiGLU are always recomputed where a gradient needs their
result, the norms of heads with the rotation after them: that costs less than saving it.

Source: Touvron et al. 2023, "LLaMA"; an identity block (Wu et al. 2024, "LLaMA Pro") is one whose
o_proj and down_proj are zero.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from llamapro_kernels import library
from llamapro_kernels.attention import (
    attend_seen,
    check_causal,
    check_documents,
    check_operands,
    check_window,
)
from llamapro_kernels.block_weights import (
    BlockWeights,
    as_flat_as,
    check_dtypes,
    check_shapes,
    flat_and_layout,
    floats,
    mapped,
    unflat,
)
from llamapro_kernels.projection import (
    add_normed_for,
    bias_gradient,
    in_rows,
    input_gradient,
    normed_for,
    project,
    rows,
    swiglu_for,
    weight_gradient,
)
from llamapro_kernels.quantize import QuantizedRows
from llamapro_kernels.rope import check_constant, check_tables

Cache = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
RECOMPUTE = ("none", "mlp", "block")
ops = library.ops


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
    q: torch.Tensor | None = None  # rotated, but where heads have norms: there as projected
    k: torch.Tensor | None = None  # likewise
    v: torch.Tensor | None = None
    o: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    h: torch.Tensor | None = None
    h_rstd: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None


class NeededGrads:
    """Which gradients are needed, and what backward therefore has to compute on its way down."""

    def __init__(self, x: bool, pieces: BlockWeights):
        self.x, self.pieces = x, pieces
        w = BlockWeights(*(any(p) if isinstance(p, tuple) else p for p in pieces))
        self.weights = w
        self.normed_x = x or w.attention_norm
        self.qkv = self.normed_x or w.qkv or w.qkv_bias
        self.attention = self.qkv or w.q_norm or w.k_norm
        self.h = self.attention or w.o_proj or w.o_proj_bias
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
            **dict.fromkeys(("q", "k", "v", "stats"), self.attention),
            "o": self.attention or w.o_proj,
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
    kv_heads = (rows(w.qkv) // dim - heads) // 2
    normed, rstd = normed_for(w.qkv, x, w.attention_norm, settings.eps)  # (B T, N), (B, T, 1)
    # A product of matrices: the version of its result counts what is done to views of it.
    qkv = project(normed, w.qkv, w.qkv_bias)  # (B T, (H + 2 Hkv) D)
    qkv = qkv.view(batch, length, heads + 2 * kv_heads, dim)
    if w.q_norm is None:
        ops.rope_inplace(qkv[:, :, : heads + kv_heads], settings.cos, settings.sin, False)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 2)  # q (B, T, H, D), k and v (B, T, Hkv, D)
    rotated, keys = _rotated(q, w.q_norm, settings)[0], _rotated(k, w.k_norm, settings)[0]
    values = v
    if cache is not None:
        keys, values, *seen = cache(keys, v)  # (B, S, Hkv, D), and perhaps (B, S)
        check_operands(rotated, keys, values)
        if seen:
            return SavedActivations(x, rstd, q, k, v, attend_seen(rotated, keys, values, *seen))
        check_causal(rotated, keys)
    # o (B, T, H, D), stats (B, H, 2, T)
    o, stats = ops.flash_attention(
        rotated, keys, values, settings.cu_seqlens, True, dim**-0.5, settings.window
    )
    return SavedActivations(x, rstd, q, k, v, o, stats)


def _rotated(heads, norm, settings):
    """Heads as attention takes them, and the rstd of their norm, if they have one."""
    if norm is None:
        return heads, None  # they were rotated where they are
    normed, rstd = ops.rms_norm(heads, norm, settings.eps)
    ops.rope_inplace(normed, settings.cos, settings.sin, False)
    return normed, rstd


def _mlp_half(saved, w, settings):
    """Compute o to gate_up."""
    attended = project(saved.o.flatten(2), w.o_proj, w.o_proj_bias)  # (B, T, H D) to (B, T, N)
    normed, h, rstd = add_normed_for(w.gate_up, attended, saved.x, w.mlp_norm, settings.eps)
    return saved._replace(h=h, h_rstd=rstd, gate_up=_gate_up(normed, w, h))


def _gate_up(normed, w, h):
    """(B T, N) to (B, T, 2 I)."""
    gate_up = project(normed, w.gate_up, w.gate_up_bias)
    return gate_up.view(*h.shape[:2], gate_up.shape[1])


def _forward(x, w, settings, cache=None):
    saved = _mlp_half(_attention_half(x, w, settings, cache), w, settings)
    inner = swiglu_for(w.down_proj, saved.gate_up)  # (B T, I)
    y = project(inner, w.down_proj, w.down_proj_bias, saved.h.flatten(0, 1))
    return y.view(x.shape), saved


def _recompute(saved, w, settings):
    """Compute what backward reads and was not saved, as forward computed it."""
    if settings.recompute == "block":
        return _mlp_half(_attention_half(saved.x, w, settings), w, settings)
    if settings.recompute == "mlp":
        normed, _ = normed_for(w.gate_up, saved.h, w.mlp_norm, settings.eps)
        return saved._replace(gate_up=_gate_up(normed, w, saved.h))
    return saved


def _backward(dy, saved, w, settings, needed):
    """Compute dx and the gradients of the weights, None where not needed."""
    grads = {}
    _projection_gradients(grads, "down_proj", w, needed, dy, lambda: ops.swiglu(saved.gate_up))
    dh = for_o_proj = dx = None
    if needed.gate_up:
        dh, for_o_proj = _mlp_backward(dy, saved, w, settings, needed, grads)
    if needed.h:
        dx = _attention_backward(dh, for_o_proj, saved, w, settings, needed, grads)
    return dx, [grads.get(name) for name in BlockWeights._fields]


def _mlp_backward(dy, saved, w, settings, needed, grads):
    """Compute dh, also as the product with o_proj reads it."""
    dgate_up = _dgate_up(dy, saved, w, needed)  # (B T, 2 I)
    normed = partial(_normed, saved.h, w.mlp_norm, settings)
    _projection_gradients(grads, "gate_up", w, needed, dgate_up, normed)
    if not needed.normed_h:
        return None, None
    dnormed = input_gradient(dgate_up, w.gate_up).view(dy.shape)
    frozen = in_rows(w.o_proj)
    if needed.h and frozen is not None and not needed.weights.mlp_norm:
        dh, *rows = ops.add_rms_norm_backward_quantized(
            dnormed, dy, saved.h, w.mlp_norm, saved.h_rstd, frozen.columns
        )
        return dh, QuantizedRows.flat(*rows, dh.dtype)
    dh, grads["mlp_norm"] = _norm_backward(
        dnormed, dy, saved.h, w.mlp_norm, saved.h_rstd, needed.h, needed.weights.mlp_norm
    )
    return dh, dh


def _dgate_up(dy, saved, w, needed):
    """The gradient of gate_up; in 8 bits where the product with gate_up alone reads it."""
    dinner, frozen = input_gradient(dy, w.down_proj), in_rows(w.gate_up)  # (B, T, I)
    if frozen is None or needed.weights.gate_up_bias:
        return ops.swiglu_backward(dinner, saved.gate_up).flatten(0, 1)
    rows = ops.swiglu_backward_quantized(dinner, saved.gate_up, frozen.columns)
    return QuantizedRows.flat(*rows, dy.dtype)


def _attention_backward(dh, for_o_proj, saved, w, settings, needed, grads):
    _projection_gradients(grads, "o_proj", w, needed, dh, lambda: saved.o.flatten(2))
    if not needed.attention:
        return None
    do = input_gradient(for_o_proj, w.o_proj).view(saved.o.shape)  # (B, T, H D) as (B, T, H, D)
    dqkv = _qkv_backward(do, saved, w, settings, needed, grads)  # (B, T, (H + 2 Hkv) D)
    normed = partial(_normed, saved.x, w.attention_norm, settings)
    _projection_gradients(grads, "qkv", w, needed, dqkv, normed)
    if not needed.normed_x:
        return None
    dx, grads["attention_norm"] = _norm_backward(
        input_gradient(dqkv, w.qkv), dh, saved.x, w.attention_norm, saved.x_rstd, needed.x,
        needed.weights.attention_norm,
    )  # fmt: skip
    return dx


def _qkv_backward(do, saved, w, settings, needed, grads):
    q, q_rstd = _rotated(saved.q, w.q_norm, settings)
    k, k_rstd = _rotated(saved.k, w.k_norm, settings)
    dqkv = ops.flash_attention_backward_packed(
        *(do, q, k, saved.v, saved.o, saved.stats, settings.cu_seqlens),
        *(True, q.shape[-1] ** -0.5, settings.window),
    )  # (B, T, H + 2 Hkv, D)
    heads, kv_heads = q.shape[2], k.shape[2]
    ops.rope_inplace(dqkv[:, :, : heads + kv_heads], settings.cos, settings.sin, True)
    if w.q_norm is not None:
        dq, dk, _ = dqkv.split((heads, kv_heads, kv_heads), 2)
        _head_norm_backward(grads, "q_norm", dq, saved.q, w.q_norm, q_rstd, needed)
        _head_norm_backward(grads, "k_norm", dk, saved.k, w.k_norm, k_rstd, needed)
    return dqkv.flatten(2)


def _head_norm_backward(grads, name, dheads, heads, weight, rstd, needed):
    """Add to grads that of the weight; dheads becomes the gradient of what was normed."""
    want_weight = getattr(needed.weights, name)
    dx, grads[name] = _norm_backward(dheads, None, heads, weight, rstd, needed.qkv, want_weight)
    if needed.qkv:
        dheads.copy_(dx)


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


def _projection_gradients(grads, name, w, needed, dy, x):
    """Add to grads those of the weight and the bias of y = projection(x()).

    x is computed where it is needed.
    """
    bias = f"{name}_bias"
    if getattr(needed.weights, name):
        wanted, dy_rows = getattr(needed.pieces, name), dy.flatten(0, -2)  # (B T, out)
        grads[name] = weight_gradient(dy_rows, x().flatten(0, 1), getattr(w, name), wanted)
    if getattr(needed.weights, bias):
        wanted = getattr(needed.pieces, bias)
        grads[bias] = bias_gradient(dy.flatten(0, -2), getattr(w, bias), wanted)


class _Block(torch.autograd.Function):
    """Weights come last, as `flat_and_layout` lays them out."""

    @staticmethod
    def forward(ctx, x, cos, sin, cu_seqlens, eps, window, recompute, layout, *weights):
        settings = Settings(cos, sin, cu_seqlens, eps, window, recompute)
        y, saved = _forward(x, unflat(weights, layout), settings)
        ctx.layout, ctx.options = layout, (eps, window, recompute)
        saved = _needed_grads(ctx).inputs_of_backward(saved, recompute)
        ctx.save_for_backward(*saved, cos, sin, cu_seqlens, *weights)
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("decoder_block has no second derivative (create_graph=True)")
        tensors = ctx.saved_tensors  # once: each time unpacks all of them
        count = len(SavedActivations._fields)
        saved, w = SavedActivations(*tensors[:count]), unflat(tensors[count + 3 :], ctx.layout)
        settings = Settings(*tensors[count : count + 3], *ctx.options)
        with library.without_autocast(dy.device.type):  # forward has settled the dtypes
            saved = _recompute(saved, w, settings)
            dx, dweights = _backward(dy, saved, w, settings, _needed_grads(ctx))
        return dx, *(None,) * 7, *as_flat_as(ctx.layout, dweights)


def _needed_grads(ctx):
    weights = ctx.needs_input_grad[8:]  # after x, the settings and the layout
    return NeededGrads(ctx.needs_input_grad[0], unflat(weights, ctx.layout, lambda *wanted: False))


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

    cos, sin: (T, D) or (B, T, D) as `rope` takes them, which also gives the head dimension; the
    head counts follow from the weights. The weights are of x's dtype; those of the norms may be of
    any. `window` and `cu_seqlens` as in `flash_attention`. `recompute`: what backward computes a
    second time instead of reading it, "none", "mlp" or "block" (the module's docstring has the
    table); it changes memory and time, and no bit of the gradients.
    `cache` is called with this block's rotated keys and its values, (B, T, Hkv, D), and returns all
    keys and values to attend to, (B, S, Hkv, D), of which the last belong to these queries; with a
    window, those that no query sees may be left out. For one query a row it may return a mask (B,
    S) besides, True for the keys that are seen. There are no gradients through it.
    Under autocast the block computes in autocast's dtype. Raises TypeError for dtypes, and
    ValueError for shapes and options that do not fit. Source: Touvron et al. 2023.
    """
    _check(x, weights, cos, sin, eps, window, cu_seqlens, recompute)
    # float: a default that Dynamo makes a symbol (dynamic=True) cannot enter the next block's node.
    settings = Settings(cos, sin, cu_seqlens, float(eps), window, recompute)
    (computed,) = library.in_autocast(x)
    if library.autocast_dtype(x.device.type) is not None:
        weights = mapped(lambda t: library.in_autocast(t)[0], weights)
    check_dtypes(computed, weights)
    with library.without_autocast(x.device.type):
        return _run(computed, weights, settings, cache).to(x.dtype)


def _run(x, weights, settings, cache):
    if not torch.is_grad_enabled():
        return _forward(x, weights, settings, cache)[0]
    flat, layout = flat_and_layout(weights)
    if not any(t.requires_grad for t in (x, *(w for w in flat if w is not None))):
        return _forward(x, weights, settings, cache)[0]
    if cache is not None:
        raise ValueError("there are no gradients through a cache: call under torch.no_grad()")
    return _Block.apply(x, *settings, layout, *flat)


def _check(x, weights, cos, sin, eps, window, cu_seqlens, recompute):
    if not isinstance(weights, BlockWeights):
        raise TypeError(f"weights must be BlockWeights, got {type(weights).__name__}")
    library.check_floating(x=x, cos=cos, sin=sin, **floats(weights))
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {RECOMPUTE}, got {recompute!r}")
    if x.dim() != 3 or cos.dim() < 1:
        raise ValueError(
            f"x (B, T, N), cos and sin (T, D) or (B, T, D) expected,"
            f" got {tuple(x.shape)}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    check_tables(*x.shape[:2], cos.shape[-1], cos, sin)
    check_constant(cos, sin)
    check_shapes(x.shape[2], cos.shape[-1], weights)
    check_window(window)
    library.check_eps(eps)
    if cu_seqlens is not None:
        check_documents(x, x, cu_seqlens)
