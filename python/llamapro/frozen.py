"""A model whose frozen matrices are held in 8 bits, see `llamapro_kernels.FrozenMatrix`.

Embeddings, head, norms, biases and everything that trains stay as they are. Files never hold 8
bits: what is saved comes from the base's own files.
"""

from collections.abc import Iterator

from torch import nn

from llamapro.config import PARTS
from llamapro_kernels import FrozenMatrix

FORMS = ("bf16", "8bit", "8bit-compact")  # how frozen matrices are held; bf16: in the model's dtype


class FrozenLinear(nn.Module):
    """A linear layer whose `weight` is a FrozenMatrix, which follows the module to its device."""

    def __init__(self, linear: nn.Linear, compact: bool):
        super().__init__()
        self.weight = FrozenMatrix.quantize(linear.weight.detach(), compact)
        self.bias = linear.bias

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        device = function(self.weight.scale).device
        if device != self.weight.scale.device:
            self.weight = self.weight.to(device)
        return self


def freeze_in_8_bits(blocks, compact: bool) -> int:
    """Hold the frozen matrices of these blocks in 8 bits, and return how many there were."""
    count = 0
    for block in blocks:
        for name in PARTS:
            linear = getattr(block, name)
            if isinstance(linear, nn.Linear) and not linear.weight.requires_grad:
                setattr(block, name, FrozenLinear(linear, compact))
                count += 1
    return count


def matrices_in_8_bits(model: nn.Module) -> Iterator[FrozenMatrix]:
    """All of a model."""
    return (m.weight for m in model.modules() if isinstance(m, FrozenLinear))


def check_16_bits(model: nn.Module, what: str) -> None:
    """Raise ValueError for a model with matrices in 8 bits, of which `what` cannot be had."""
    if next(matrices_in_8_bits(model), None) is not None:
        raise ValueError(
            f"a model without matrices in 8 bits expected for {what}: they are the base's no more;"
            " restore_16_bits(path) reads them from its files again"
        )
