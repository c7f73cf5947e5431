"""What one decoder block costs: its FLOPs, and the bytes it saves for backward and needs beside.

Here because every figure follows from what `block.py` computes, saves and recomputes: they change
together. Each is exact. Elementwise work is not counted.
"""

from dataclasses import dataclass

from llamapro_kernels.attention import visible_pairs


@dataclass(frozen=True)
class BlockShape:
    """The sizes that the cost of a block follows from."""

    width: int  # N
    queries: int  # H D
    keys: int  # Hkv D
    inner: int  # I
    heads: int  # H
    head_norms: bool = False

    @property
    def matrices(self) -> int:
        """Weights in the matrices of the block."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)


def flops(
    shape: BlockShape,
    batch: int,
    length: int,
    *,
    window: int | None = None,
    backward: bool,
    trained: bool,
    recompute: str,
) -> dict[str, int]:
    """FLOPs of one step of a block, by what they are for.

    Each multiplication and each addition of a matrix product counts. window: as attention takes it;
    backward: whether gradients pass through the block; trained: whether its weights have some.
    """
    tokens = batch * length
    matrices = 2 * tokens * shape.matrices
    attention = 4 * batch * shape.queries * visible_pairs(length, length, window=window)
    recomputed = {
        "none": 0,
        "mlp": 4 * tokens * shape.width * shape.inner,  # gate_up
        "block": matrices - 2 * tokens * shape.width * shape.inner + attention,  # but down_proj
    }
    return {
        "forward": matrices,
        "input gradient": backward * matrices,
        "weight gradient": trained * matrices,
        "attention": attention + backward * 5 * attention // 2,
        "recomputed": backward * recomputed[recompute],
    }


def saved_bytes(shape: BlockShape, tokens: int, itemsize: int, recompute: str) -> int:
    """Bytes that a block saves for backward."""
    rows = 2 * shape.width + 2 * shape.queries + 2 * shape.keys  # x and h; q and o; k and v
    statistics = 4 * (2 * shape.heads + 2)  # of attention and of both norms, in fp32
    a_token = {
        "none": (rows + 2 * shape.inner) * itemsize + statistics,  # gate_up as well
        "mlp": rows * itemsize + statistics,
        "block": shape.width * itemsize,  # x
    }
    return tokens * a_token[recompute]


def scratch_bytes(shape: BlockShape, tokens: int, itemsize: int, recompute: str) -> int:
    """Bytes that backward of a block holds at its peak, beside what was saved."""
    mlp = 3 * shape.inner + 2 * shape.width  # the product's gradient, gate_up's, dy and dh
    attention = 2 * shape.queries + 2 * shape.keys + 3 * shape.width  # do and dqkv; dh and dx
    if shape.head_norms:  # do, dqkv, q and k as attention takes them, the gradient of q; dh
        attention = max(attention, 4 * shape.queries + 3 * shape.keys + shape.width)
    recomputed = {
        "none": 0,
        "mlp": 2 * shape.inner,
        "block": 2 * shape.inner + shape.width + 2 * shape.queries + 2 * shape.keys,
    }
    return tokens * (max(mlp, attention) + recomputed[recompute]) * itemsize
