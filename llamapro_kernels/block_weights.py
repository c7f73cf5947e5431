"""The tensors of a decoder block: their names, their shapes, and how they lie side by side.

An autograd node takes and returns a flat list of tensors; a block's weights are fields, some of
them tuples of pieces.
"""

import dataclasses
from typing import NamedTuple

import torch

from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.projection import Matrix, Weight


class BlockWeights(NamedTuple):
    """The tensors of one block; N is the width, D the head dimension, I the MLP's width.

    `qkv` and `gate_up`, and their biases, are one tensor or a tuple of its row pieces, such as
    (q, k, v): pieces are never copied, and each gets its own gradient. Each matrix may be a
    `FrozenMatrix`, whose gradient nobody wants.
    """

    attention_norm: torch.Tensor  # (N,)
    qkv: Weight  # ((H + 2 Hkv) D, N): queries, then keys, then values
    o_proj: Matrix  # (N, H D)
    mlp_norm: torch.Tensor  # (N,)
    gate_up: Weight  # (2I, N): gate, then up
    down_proj: Matrix  # (N, I)
    qkv_bias: Weight | None = None
    o_proj_bias: torch.Tensor | None = None
    gate_up_bias: Weight | None = None
    down_proj_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None  # (D,), of every query head before it is rotated
    k_norm: torch.Tensor | None = None  # (D,), of every key head


REQUIRED = BlockWeights._fields[:6]
PARTS = len(dataclasses.fields(FrozenMatrix))
PIECES = ("qkv", "gate_up", "qkv_bias", "gate_up_bias")  # what may be a tuple


def flat_and_layout(w: BlockWeights) -> tuple[list, tuple]:
    """The tensors of all pieces side by side; and of each field, or of each piece of a tuple,
    whether it is a matrix in 8 bits."""
    flat, layout = [], []
    for t in w:
        pieces = t if isinstance(t, tuple) else (t,)
        frozen = tuple(isinstance(piece, FrozenMatrix) for piece in pieces)
        for piece, in_8_bits in zip(pieces, frozen, strict=True):
            flat += piece.tensors() if in_8_bits else [piece]
        layout.append(frozen if isinstance(t, tuple) else frozen[0])
    return flat, tuple(layout)


def unflat(flat, layout, join=FrozenMatrix) -> BlockWeights:
    """The fields again; join: what becomes of the tensors of a matrix in 8 bits."""
    flat = iter(flat)

    def piece(frozen):
        return join(*(next(flat) for _ in range(PARTS))) if frozen else next(flat)

    return BlockWeights(
        *(tuple(map(piece, f)) if isinstance(f, tuple) else piece(f) for f in layout)
    )


def as_flat_as(layout, dweights):
    """Gradients side by side, as many as there are tensors; None for each of no gradient."""
    flat = []
    for grad, field in zip(dweights, layout, strict=True):
        frozen = field if isinstance(field, tuple) else (field,)
        grads = grad if isinstance(field, tuple) and grad is not None else [grad] * len(frozen)
        for piece, in_8_bits in zip(grads, frozen, strict=True):
            flat += [None] * PARTS if in_8_bits else [piece]
    return flat


def mapped(function, w: BlockWeights) -> BlockWeights:
    """The same weights, each that is a tensor by `function`."""

    def of(t):
        if isinstance(t, tuple):
            return tuple(map(of, t))
        return function(t) if isinstance(t, torch.Tensor) else t

    return BlockWeights(*map(of, w))


def _is_given(name, t):
    return t is not None or name in REQUIRED


def named(w):
    """(name, tensor) of all that is given, the pieces of a tuple by their numbers."""
    for name, t in w._asdict().items():
        if isinstance(t, tuple) and name in PIECES:
            yield from ((f"{name}[{i}]", piece) for i, piece in enumerate(t))
        elif _is_given(name, t):
            yield name, t


def floats(w: BlockWeights) -> dict[str, torch.Tensor]:
    """The floating tensors of all that is given, by name: of a matrix in 8 bits its scale."""
    return {name: t.scale if isinstance(t, FrozenMatrix) else t for name, t in named(w)}


def _shape(name, t):
    """Of a tuple's pieces, that of the whole."""
    if not isinstance(t, tuple):
        return tuple(t.shape)
    shapes = [tuple(piece.shape) for piece in t]
    dims = 1 if name.endswith("bias") else 2
    if not t or any(len(s) != dims or s[1:] != shapes[0][1:] for s in shapes):
        raise ValueError(f"pieces of {name} must be rows of one tensor, got {shapes}")
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def _check_same_pieces(name, weight, bias):
    """A bias of one piece fits any weight."""
    if isinstance(bias, tuple) and isinstance(weight, tuple):
        got, expected = [len(b) for b in bias], [len(w) for w in weight]
        if got != expected:
            raise ValueError(
                f"pieces of {name}_bias must be those of {name}, got {got} and {expected} rows"
            )


def check_shapes(width, dim, w):
    """Raise ValueError for shapes that do not fit together, by the name of the first."""
    shapes = {name: _shape(name, t) for name, t in w._asdict().items() if _is_given(name, t)}
    projected, values = (*shapes["qkv"], 0)[0], (0, *shapes["o_proj"])[-1]
    inner = (0, *shapes["down_proj"])[-1]
    expected = {
        **dict.fromkeys(("attention_norm", "mlp_norm", "o_proj_bias", "down_proj_bias"), (width,)),
        **{"qkv": (projected, width), "qkv_bias": (projected,), "o_proj": (width, values)},
        **{"gate_up": (2 * inner, width), "gate_up_bias": (2 * inner,)},
        **{"down_proj": (width, inner), "q_norm": (dim,), "k_norm": (dim,)},
    }
    if ("q_norm" in shapes) != ("k_norm" in shapes):
        raise ValueError("q_norm and k_norm must be given both or neither, got one")
    for name, shape in shapes.items():
        if expected[name] != shape:
            raise ValueError(f"{name} must be {expected[name]} for N = {width}, got {shape}")
    for name in ("qkv", "gate_up"):
        _check_same_pieces(name, getattr(w, name), getattr(w, f"{name}_bias"))
    heads = values // max(1, dim)
    kv_heads = (projected - values) // max(1, 2 * dim)
    whole = values == heads * dim and projected == (heads + 2 * kv_heads) * dim and dim % 2 == 0
    if not whole or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"qkv ((H + 2 Hkv) D, N) and o_proj (N, H D), H a multiple of Hkv, expected for an even"
            f" D = {dim}, that of cos and sin, got {shapes['qkv']} and {shapes['o_proj']}"
        )


def check_dtypes(x, w):
    """Raise TypeError for matrices and biases of another dtype than x."""
    for name, t in named(w):
        if not name.endswith("norm") and isinstance(t, torch.Tensor) and t.dtype != x.dtype:
            raise TypeError(f"{name} must be of x's dtype, {x.dtype}, got {t.dtype}")
