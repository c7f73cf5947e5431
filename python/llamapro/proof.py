"""Digests of tensors where they are, at the speed of memory: proof that no bit of them changed.

The bytes of a tensor are read as int64 words w, in chunks. Each chunk gives two sums that wrap
around, over its words: of m_i * w_i, and of m_i * (w_i >> 32), where m_i is an odd number drawn
once for each place in a chunk. An odd factor can be undone, so one word that changes always
changes the first sum. The upper half of a word counts again as a low one, because the highest bits
of two words could cancel: of 2^63 * m only the lowest bit of m is left. The sums are the same on
every device, in any order, and a cryptographic hash of them all, with shape and dtype, is what is
compared; the tensor itself never leaves its device.
"""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from llamapro.checkpoint import stock_tensors
from llamapro.model import Llama, LlamaConfig

CHUNK = 2**14  # words
AT_ONCE = {"cpu": 2**15, "cuda": 2**22}  # words whose products are in a cache together
# Of a configuration, what no result depends on; what llama_pro says of that is added.
UNUSED = {"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"}
UNUSED |= {"llama_pro", "other"}


def fingerprint(model: Llama) -> dict[str, str]:
    """What must stay as it is: each setting that is computed with, and a digest of each frozen
    tensor, by name."""
    frozen = {n: t.detach() for n, t in stock_tensors(model).items() if not t.requires_grad}
    return {**_settings(model.config), **digests(frozen)}


def _settings(config: LlamaConfig) -> dict[str, str]:
    used = {name: value for name, value in asdict(config).items() if name not in UNUSED}
    used["new_blocks"] = config.new_blocks
    return {name: json.dumps(value, sort_keys=True) for name, value in used.items()}


def difference(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first name under which two of them differ, in words."""
    for name in before | now:
        if before.get(name) != now.get(name):
            return f"{name} was {before.get(name)}, is {now.get(name)}"
    return None


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """A digest of each tensor's shape, dtype and bits, by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: torch.Tensor) -> str:
    """See `digests`."""
    hashed = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    if tensor.numel():
        hashed.update(_sums(tensor).cpu().numpy().data)
    return hashed.hexdigest()


def combined(digests: dict[str, str]) -> str:
    """One digest of named ones, whatever their order."""
    return hashlib.blake2b(json.dumps(sorted(digests.items())).encode(), digest_size=16).hexdigest()


def _sums(tensor: torch.Tensor) -> torch.Tensor:
    """Two sums of each chunk."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    odd, sums = _multipliers(tensor.device), []
    for piece in content.split(8 * AT_ONCE[tensor.device.type]):
        words = _words(piece)
        sums += [_weighted(words, odd), _weighted(words >> 32, odd)]
    return torch.cat(sums)


def _words(piece: torch.Tensor) -> torch.Tensor:
    """(chunks, CHUNK) words of these bytes, followed by zeros; a copy only where it must be."""
    rest = -len(piece) % (8 * CHUNK)
    if rest or piece.storage_offset() % 8:
        piece = F.pad(piece, (0, rest)) if rest else piece.clone()
    return piece.view(torch.int64).view(-1, CHUNK)


def _weighted(words: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    if words.device.type == "cpu":
        return words @ odd  # twice as fast; CUDA has no product of whole numbers
    return (words * odd).sum(1)


@lru_cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """The raw bits of a generator, which NumPy promises to keep the same in every version."""
    drawn = np.random.PCG64(0).random_raw(CHUNK) | np.uint64(1)
    return torch.from_numpy(drawn.view(np.int64)).to(device)
