"""What one decoder block costs: its FLOPs, and the bytes it saves for backward and needs beside.

Here because every figure follows from what `block.py` computes, saves and recomputes: they change
together. Each is exact. Elementwise work is not counted.
"""

from dataclasses import dataclass

from llamapro_kernels.frozen import ALIGNED


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
    def shapes(self) -> list[tuple[int, int]]:
        """Of the block's matrices: qkv, o_proj, gate_up, down_proj."""
        qkv = self.queries + 2 * self.keys, self.width
        gate_up = 2 * self.inner, self.width
        return [qkv, (self.width, self.queries), gate_up, (self.width, self.inner)]

    @property
    def matrices(self) -> int:
        """Weights in the matrices of the block."""
        return sum(rows * columns for rows, columns in self.shapes)


def flops(
    shape: BlockShape,
    tokens: int,
    pairs: int,
    *,
    backward: bool,
    trained: bool,
    recompute: str,
) -> dict[str, int]:
    """FLOPs of one step of a block, by what they are for.

    Each multiplication and each addition of a matrix product counts. pairs: of a query and a key it
    sees, see `visible_pairs`; backward: whether gradients pass through the block; trained: whether
    its weights have some.
    """
    matrices = 2 * tokens * shape.matrices
    attention = 4 * pairs * shape.queries
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


def bytes_in_8_bits(shape: BlockShape, compact: bool, units: bool) -> int:
    """Bytes of the matrices of a block in 8 bits, and of their scales. units: whether the device
    multiplies 8 bits."""
    total = 0
    for rows, columns in shape.shapes:
        both = units and not compact and not (rows % ALIGNED or columns % ALIGNED)
        total += (1 + both) * rows * columns + 4 * rows
    return total


def scratch_bytes(
    shape: BlockShape,
    tokens: int,
    itemsize: int,
    recompute: str,
    frozen: str = "bf16",
    units: bool = False,
) -> int:
    """Bytes that backward of a block holds at its peak, beside what was saved.

    frozen: whether its matrices are held in 8 bits, "8bit" or "8bit-compact"; then units, whether
    8 bits are multiplied there.
    """
    mlp = 3 * shape.inner + 2 * shape.width  # the product's gradient, gate_up's, dy and dh
    attention = 2 * shape.queries + 2 * shape.keys + 3 * shape.width  # do and dqkv; dh and dx
    if shape.head_norms:  # do, dqkv, q and k as attention takes them, the gradient of q; dh
        attention = max(attention, 4 * shape.queries + 3 * shape.keys + shape.width)
    recomputed = {
        "none": 0,
        "mlp": 2 * shape.inner,
        "block": 2 * shape.inner + shape.width + 2 * shape.queries + 2 * shape.keys,
    }
    again = tokens * recomputed[recompute] * itemsize
    mlp, attention = tokens * mlp * itemsize, tokens * attention * itemsize
    if frozen != "bf16":
        qkv, _, gate_up, _ = shape.shapes
        mlp += _of_8_bits(gate_up, tokens, itemsize, frozen, units, kept=False)
        attention += _of_8_bits(qkv, tokens, itemsize, frozen, units, kept=True)
    return max(mlp, attention) + again


def _of_8_bits(matrix, tokens, itemsize, frozen, units, kept):
    """Bytes more that dx = dy w takes, of which dy is in 8 bits, too, where it is not `kept`."""
    rows, columns = matrix
    if units:
        copy = rows * columns if frozen == "8bit-compact" else 0
        return copy + tokens * rows * (1 if kept else 1 - itemsize)
    return rows * columns * itemsize + tokens * rows * (1 + itemsize * kept)
