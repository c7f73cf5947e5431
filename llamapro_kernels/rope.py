"""Rotary position embedding of q and k, in the rotate-half convention of Llama checkpoints.

    y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin    (x1, x2: first and second half of D)
    backward: the same rotation by the opposite angle, so dx = rope(dy) with sin negated

q is (B, T, H, D), k (B, T, Hkv, D), cos and sin (T, D) with equal halves: each frequency stands
twice. Any floating dtype, products in fp32 (fp64 for fp64). Saved for backward: cos and sin only.
Bytes moved at least: read and write q and k once.

Source: Su et al. 2021, "RoFormer".
"""

import torch

from llamapro_kernels import library


def rope_reference(q, k, cos, sin):
    """Ground truth: q and k rotated, each in its own dtype."""
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def rope_backward_reference(dq, dk, cos, sin, want_q, want_k):
    """dq or dk is None when nothing downstream used it."""
    grads = ((dq, want_q), (dk, want_k))
    return tuple(
        _rotate(g, cos, -sin) if want else (cos if g is None else g).new_empty(0)
        for g, want in grads
    )


def _rotate(x, cos, sin):
    dtype = library.compute_dtype(x.dtype)
    xf, cos, sin = x.to(dtype), cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    x1, x2 = xf.chunk(2, -1)
    return (xf * cos + torch.cat((-x2, x1), -1) * sin).to(x.dtype)


def _fake(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(dq, dk, cos, sin, want_q, want_k):
    grads = ((dq, want_q), (dk, want_k))
    return tuple(library.empty_if(want, cos if g is None else g) for g, want in grads)


rope_op = library.define(
    "rope",
    forward="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    backward="(Tensor? dq, Tensor? dk, Tensor cos, Tensor sin, bool want_q, bool want_k)"
    " -> (Tensor, Tensor)",
    fakes={"forward": _fake, "backward": _fake_backward},
)
rope_op.register("reference", forward=rope_reference, backward=rope_backward_reference)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*inputs[2:])


def _backward(ctx, dq, dk):
    want_q = ctx.needs_input_grad[0] and dq is not None
    want_k = ctx.needs_input_grad[1] and dk is not None
    if not (want_q or want_k):
        return None, None, None, None
    dq, dk = torch.ops.llamapro.rope_backward(dq, dk, *ctx.saved_tensors, want_q, want_k)
    return dq if want_q else None, dk if want_k else None, None, None


rope_op.autograd(_backward, setup_context=_setup_context)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by the angles whose cosine and sine are given.

    q: (B, T, H, D), k: (B, T, Hkv, D), cos, sin: (T, D) with equal halves, D even.
    Returns new tensors of the shapes and dtypes of q and k. cos and sin are constants: asking
    for their gradient raises ValueError, as do sizes that do not match; TypeError for dtypes.
    Source: Su et al. 2021.
    """
    library.check_floating(q=q, k=k, cos=cos, sin=sin)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q (B, T, H, D) and k (B, T, Hkv, D) expected, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if q.shape[3] % 2 or cos.shape != (q.shape[1], q.shape[3]) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be (T, D) = {(q.shape[1], q.shape[3])} with D even,"
            f" got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants, got one that requires a gradient")
    return torch.ops.llamapro.rope(q, k, cos, sin)
