"""Fused Llama ops that do no work for frozen weights. One file per op; start with its docstring."""

from llamapro_kernels.attention import flash_attention
from llamapro_kernels.block import decoder_block
from llamapro_kernels.block_weights import BlockWeights
from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.library import backends, use_backend
from llamapro_kernels.linear_cross_entropy import linear_cross_entropy
from llamapro_kernels.linear_kl_divergence import linear_kl_divergence
from llamapro_kernels.linear_swiglu import linear_swiglu
from llamapro_kernels.rms_norm import add_rms_norm, rms_norm
from llamapro_kernels.rope import rope
from llamapro_kernels.swiglu import swiglu

__version__ = "0.1.0"
__all__ = [
    "BlockWeights",
    "FrozenMatrix",
    "add_rms_norm",
    "backends",
    "decoder_block",
    "flash_attention",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_swiglu",
    "rms_norm",
    "rope",
    "swiglu",
    "use_backend",
]
