"""A minimal Llama with block expansion and a lean training loop on llamapro_kernels."""

from llamapro.expansion import expand
from llamapro.model import Llama, LlamaConfig
from llamapro_kernels import __version__

__all__ = ["Llama", "LlamaConfig", "__version__", "expand"]
