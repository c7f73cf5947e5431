"""Rotary position embedding of q and k, in the rotate-half convention of Llama checkpoints.

    y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin    (x1, x2: first and second half of D)
    backward: the same rotation by the opposite angle, so dx = rope(dy) with sin negated

q is (B, T, H, D), k (B, T, Hkv, D), cos and sin (T, D), or (B, T, D) where rows have positions of
their own, with equal halves: each frequency stands twice. Any floating dtype, products in fp32
(fp64 for fp64). Saved for backward: cos and sin only. Bytes moved at least: q and k, in and out.
`llamapro::rope_inplace` rotates heads where they are, for a caller that owns them: a decoder block,
inside its packed projection.

Source: Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

from functools import partial

import torch

from llamapro_kernels import cpu, gpu, library
from llamapro_kernels.gpu import tl, triton


def rope_reference(x, cos, sin):
    """Ground truth: q or k rotated, in its own dtype."""
    dtype = library.compute_dtype(x.dtype)
    x1, x2 = x.to(dtype).chunk(2, -1)
    c, s = (t[..., None, : x.shape[-1] // 2].to(dtype) for t in (cos, sin))
    return torch.cat((x1 * c - x2 * s, x2 * c + x1 * s), -1).to(x.dtype)


@gpu.jit
def rope_kernel(
    q, k, cos, sin, q_out, k_out, length, q_heads, k_heads, half, sign,
    q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides,
    WANT_Q: tl.constexpr, WANT_K: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """All heads of one token, HEADS at a time; sign is -1 for the opposite angle.

    An output may be the input itself: every number is stored by the thread that has read it.
    """
    token = tl.program_id(0).to(tl.int64)
    batch, time = token // length, token % length
    column = tl.arange(0, HALF).to(tl.int64)
    cos += batch * cos_strides[0] + time * cos_strides[1]
    sin += batch * sin_strides[0] + time * sin_strides[1]
    c = tl.load(cos + column * cos_strides[2], mask=column < half, other=0)
    s = tl.load(sin + column * sin_strides[2], mask=column < half, other=0)
    c, s = c.to(tl.float32), s.to(tl.float32) * sign
    if WANT_Q:
        q += batch * q_strides[0] + time * q_strides[1]
        q_out += batch * q_out_strides[0] + time * q_out_strides[1]
        _rotate_heads(q, q_out, q_strides, q_out_strides, c, s, q_heads, half, HEADS, HALF)
    if WANT_K:
        k += batch * k_strides[0] + time * k_strides[1]
        k_out += batch * k_out_strides[0] + time * k_out_strides[1]
        _rotate_heads(k, k_out, k_strides, k_out_strides, c, s, k_heads, half, HEADS, HALF)


@gpu.jit
def _rotate_heads(
    x, out, strides, out_strides, cos, sin, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr
):
    column = tl.arange(0, HALF)[None, :].to(tl.int64)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)[:, None].to(tl.int64)
        mask = (head < heads) & (column < half)
        at = x + head * strides[2]
        x1 = tl.load(at + column * strides[3], mask=mask, other=0).to(tl.float32)
        x2 = tl.load(at + (column + half) * strides[3], mask=mask, other=0).to(tl.float32)
        to = out + head * out_strides[2]
        tl.store(to + column * out_strides[3], x1 * cos[None, :] - x2 * sin[None, :], mask=mask)
        to += (column + half) * out_strides[3]
        tl.store(to, x2 * cos[None, :] + x1 * sin[None, :], mask=mask)


def _rotate_triton(q, k, cos, sin, sign, outputs):
    """One launch for both; what is None is not rotated."""
    some = k if q is None else q
    batch, length, _, dim = some.shape
    heads = [0 if x is None else x.shape[2] for x in (q, k)]
    half = max(1, triton.next_power_of_2(dim // 2))
    tile = max(1, min(1024 // half, max(512 // half, triton.next_power_of_2(max(heads)))))
    gpu.launch(
        rope_kernel,
        (batch * length,),
        *(q, k, cos, sin, *outputs, length),
        *(*heads, dim // 2, sign),
        *((0,) * 4 if x is None else x.stride() for x in (q, k)),
        *((0,) * 4 if x is None else out.stride() for x, out in zip((q, k), outputs, strict=True)),
        *(table.expand(batch, length, dim).stride() for table in (cos, sin)),
        WANT_Q=q is not None,
        WANT_K=k is not None,
        HEADS=tile,
        HALF=half,
        num_warps=gpu.warps_for(tile * half, some.device),
    )


def _rotate_reference(q, k, cos, sin, sign, outputs):
    for x, out in zip((q, k), outputs, strict=True):
        if x is not None:
            out.copy_(rope_reference(x, cos, sign * sin))


def _rotate_cpp(q, k, cos, sin, sign, outputs):
    cos, sin = library.contiguous_fp32(cos), library.contiguous_fp32(sin)
    for x, out in zip((q, k), outputs, strict=True):
        if x is not None:
            cpu.ops.rope(x, cos, sin, sign, out)


def _check_halves(cos, sin):
    """Of the last angles, which tell; on a CPU alone, since on a GPU looking would mean waiting."""
    for name, table in (("cos", cos), ("sin", sin)):
        first, second = table[..., -1:, :].chunk(2, -1)
        if table.device.type == "cpu" and not torch.equal(first, second):
            raise ValueError(f"{name} must have equal halves, got two that differ")


# What the backends have in common. rotate(q, k, cos, sin, sign, outputs) skips a None.


def rope_forward(q, k, cos, sin, *, rotate):
    _check_halves(cos, sin)
    outputs = _fake(q, k, cos, sin)
    rotate(q, k, cos, sin, 1.0, outputs)
    return outputs


def rope_backward(dq, dk, cos, sin, want_q, want_k, *, rotate):
    _check_halves(cos, sin)
    outputs = _fake_backward(dq, dk, cos, sin, want_q, want_k)
    rotate(dq if want_q else None, dk if want_k else None, cos, sin, -1.0, outputs)
    return outputs


def rope_inplace(x, cos, sin, inverse, *, rotate):
    """One tensor: of two views of one buffer, inductor loses where the second starts."""
    _check_halves(cos, sin)
    rotate(x, None, cos, sin, -1.0 if inverse else 1.0, (x, None))
    torch.autograd.graph.increment_version(x)  # as PyTorch's own do, for those who look


def _fake(q, k, cos, sin):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(dq, dk, cos, sin, want_q, want_k):
    grads = ((dq, want_q), (dk, want_k))
    return tuple(library.empty_if(want, cos if g is None else g) for g, want in grads)


def _check(q, k, cos, sin):
    """Either may be None, as a gradient may."""
    x = k if q is None else q
    if x is None or any(t is not None and t.dim() != 4 for t in (q, k)):
        shapes = [None if t is None else tuple(t.shape) for t in (q, k)]
        raise ValueError(f"q (B, T, H, D) and k (B, T, Hkv, D) expected, got {shapes}")
    batch, length, _, dim = x.shape
    if k is not None:
        library.expect((batch, length, k.shape[2], dim), x, k=k)
    if dim % 2:
        raise ValueError(f"an even D expected, got {dim}")
    check_tables(batch, length, dim, cos, sin)
    library.expect(cos.shape, x, cos.dtype, cos=cos)
    library.expect(cos.shape, x, sin.dtype, sin=sin)


def _check_backward(dq, dk, cos, sin, want_q, want_k):
    if (want_q and dq is None) or (want_k and dk is None):
        raise ValueError("a gradient that is wanted must come in, got None")
    _check(dq, dk, cos, sin)


rope_op = library.define(
    "rope",
    forward="(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    backward="(Tensor? dq, Tensor? dk, Tensor cos, Tensor sin, bool want_q, bool want_k)"
    " -> (Tensor, Tensor)",
    inplace="(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()",
    fakes={
        "forward": _fake,
        "backward": _fake_backward,
        "inplace": lambda x, cos, sin, inverse: None,
    },
    checks={
        "forward": _check,
        "backward": _check_backward,
        "inplace": lambda x, cos, sin, inverse: _check(x, None, cos, sin),
    },
)
for _backend, _rotate_by in (
    ("triton", _rotate_triton),
    ("cpp", _rotate_cpp),
    ("reference", _rotate_reference),
):
    rope_op.register(
        _backend,
        forward=partial(rope_forward, rotate=_rotate_by),
        backward=partial(rope_backward, rotate=_rotate_by),
        inplace=partial(rope_inplace, rotate=_rotate_by),
    )


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

    q: (B, T, H, D), k: (B, T, Hkv, D) of one floating dtype, cos, sin: (T, D) or (B, T, D) with
    equal halves, D even, of any. Returns new tensors of the shapes and the dtype of q and k. cos
    and sin are constants: asking for their gradient raises ValueError, as do sizes that do not
    match and, on a CPU, halves that differ; TypeError for dtypes. Source: Su et al. 2021.
    """
    library.check_floating(q=q, k=k, cos=cos, sin=sin)
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q (B, T, H, D) and k (B, T, Hkv, D) expected, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    check_tables(*q.shape[:2], q.shape[3], cos, sin)
    check_constant(cos, sin)
    return torch.ops.llamapro.rope(q, k, cos, sin)


def check_tables(batch, length, dim, cos, sin):
    """Raise ValueError for tables that are neither (T, D) nor (B, T, D)."""
    shapes = (length, dim), (batch, length, dim)
    if dim % 2 or cos.shape not in shapes or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin must be (T, D) = {shapes[0]} or (B, T, D) = {shapes[1]} with D even,"
            f" got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )


def check_constant(cos, sin):
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are constants, got one that requires a gradient")
