"""SwiGLU on a packed gate and up projection.

    y = silu(g) * u,  silu(g) = g * s,  s = 1 / (1 + exp(-g))
    dg = dy * u * s * (1 + g * (1 - s)),  du = dy * silu(g)

gate_up is (..., 2I) with the gate first, y (..., I); any floating dtype, arithmetic in fp32 (fp64
for fp64). Saved for backward: gate_up; silu is computed again, which is cheaper than keeping it.
Bytes moved at least: forward read 2I, write I; backward read 3I, write 2I.

Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

import torch

from llamapro_kernels import library


def swiglu_reference(gate_up):
    """Ground truth: silu(gate) * up in gate_up's dtype."""
    gate, up = gate_up.to(library.compute_dtype(gate_up.dtype)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_reference(dy, gate_up):
    gate, up = gate_up.to(library.compute_dtype(gate_up.dtype)).chunk(2, -1)
    dyf, sigmoid = dy.to(gate.dtype), torch.sigmoid(gate)
    dgate = dyf * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((dgate, dyf * gate * sigmoid), -1).to(gate_up.dtype)


def _fake(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _fake_backward(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


swiglu_op = library.define(
    "swiglu",
    forward="(Tensor gate_up) -> Tensor",
    backward="(Tensor dy, Tensor gate_up) -> Tensor",
    fakes={"forward": _fake, "backward": _fake_backward},
)
swiglu_op.register("reference", forward=swiglu_reference, backward=swiglu_backward_reference)


def _setup_context(ctx, inputs, output):
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(inputs[0])


def _backward(ctx, dy):
    return torch.ops.llamapro.swiglu_backward(dy, *ctx.saved_tensors)


swiglu_op.autograd(_backward, setup_context=_setup_context)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up = [gate, up] packed along the last dimension.

    gate_up: (..., 2I) floating point; returns (..., I) in the same dtype.
    Raises TypeError for other dtypes, ValueError for an odd last dimension.
    Source: Shazeer 2020.
    """
    library.check_floating(gate_up=gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be (..., 2I), got {tuple(gate_up.shape)}")
    return torch.ops.llamapro.swiglu(gate_up)
