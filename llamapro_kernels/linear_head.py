"""A linear head in chunks of tokens, for the losses on it: no (tokens, V) tensor ever exists."""

import torch

from llamapro_kernels.frozen import FrozenMatrix
from llamapro_kernels.matmul import matmul, pieces

CHUNK_ELEMENTS = 2**24  # logits held at a time: 64 MB in fp32
# Each chunk reads the whole weight again (and adds to the whole of dweight): this many tokens, at
# least, make that small beside the products.
CHUNK_TOKENS, CHUNK_TOKENS_CPU = 2048, 512
SCALED_ELEMENTS = 2**18  # of a gradient that are scaled at a time on a CPU: 1 MB in fp32


def chunk_bytes(tokens: int, vocabulary: int, itemsize: int, device: str) -> int:
    """The logits that are held at a time."""
    return min(tokens, chunk_tokens(vocabulary, device)) * vocabulary * itemsize


def chunk_tokens(vocabulary, device, share=1):
    """share: of what is held at a time otherwise, one part in so many."""
    least = CHUNK_TOKENS_CPU if device == "cpu" else CHUNK_TOKENS
    return max(1, max(least, CHUNK_ELEMENTS // max(1, vocabulary)) // share)


def logits_by_chunk(x, weight, share=1):
    """(rows, their logits), chunk by chunk in one buffer; its rows start where loads are widest."""
    vocabulary = len(weight)
    chunks = pieces(len(x), chunk_tokens(vocabulary, x.device.type, share))
    length = min(len(x), chunks[0].stop) if chunks else 0
    buffer = x.new_empty((length, (vocabulary + 15) // 16 * 16))
    buffer[:, vocabulary:] = 0  # oneDNN on AMX multiplies what lies there too
    for rows in chunks:
        logits = buffer[: len(x[rows]), :vocabulary]
        if isinstance(weight, FrozenMatrix):
            logits.copy_(weight.linear(x[rows]))
        else:
            matmul(x[rows], weight.T, out=logits)
        yield rows, logits


def write_input_gradient(out, dlogits, weight):
    """The product of a chunk of the logits' gradient and the head."""
    if isinstance(weight, FrozenMatrix):
        out.copy_(weight.input_gradient(dlogits))
    else:
        matmul(dlogits, weight, out=out)


def plain_logits(x, weight):
    if isinstance(weight, FrozenMatrix):
        return weight.linear(x)
    return torch.nn.functional.linear(x, weight)


def plain_dx(dlogits, weight):
    if isinstance(weight, FrozenMatrix):
        return weight.input_gradient(dlogits)
    return dlogits @ weight


def scaled(grad, dloss, dtype):
    """The product in fp32, rounded as it is stored."""
    out = grad.new_empty(grad.shape, dtype=dtype)
    if grad.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.mul(grad, dloss, out=out)
    # PyTorch first stores the product in fp32: that of a few rows stays in the cache.
    for rows in pieces(len(grad), max(1, SCALED_ELEMENTS // max(1, grad.shape[1]))):
        torch.mul(grad[rows], dloss if len(dloss) == 1 else dloss[rows], out=out[rows])
    return out
