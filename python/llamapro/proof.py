"""Proof that nothing changed: identity of an expanded model, digests of tensors, equal bytes.

A digest reads the bytes of a tensor as int64 words w, in chunks. Each chunk gives two sums that
wrap around, over its words: of m_i * w_i, and of m_i * (w_i >> 32), where m_i is an odd number
drawn once for each place in a chunk. An odd factor can be undone, so one word that changes always
changes the first sum. The upper half of a word counts again as a low one, because the highest bits
of two words could cancel: of 2^63 * m only the lowest bit of m is left. The sums are the same on
every device, in any order, and a cryptographic hash of them all, with shape and dtype, is what is
compared; the tensor itself never leaves its device.
"""

import hashlib
import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import llamapro_kernels as lk
from llamapro.config import LlamaConfig
from llamapro.hf import Checkpoint
from llamapro.model import Llama, load_block, rope_table, stock_tensors
from llamapro.model_files import CheckpointError
from llamapro.placement import Slot
from llamapro.storage import read_json
from llamapro.tokenizer import encode, load_tokenizer
from llamapro_kernels import FrozenMatrix

PROOF_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905 Einstein published four papers.\n"
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n"
)
CHUNK = 2**14  # words
AT_ONCE = {"cpu": 2**15, "cuda": 2**22}  # words whose products are in a cache together
# Of a configuration, what no result depends on; what others of it mean together is added.
UNUSED = {"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"}
UNUSED |= {"llama_pro", "other", "model_type"}
UNUSED |= {"sliding_window", "use_sliding_window", "max_window_layers"}


class IdentityError(RuntimeError):
    """An expanded model does not compute what its base computes."""


@torch.no_grad()
def prove_identity(base: Checkpoint, expanded: Checkpoint, slots: list[Slot]) -> None:
    """Raise IdentityError unless both give bit-equal logits on real tokens.

    Both run at once, a block of each in memory, so the first place where they part is known.
    """
    tokens, dtype = proof_tokens(base), base.dtype
    cos, sin = rope_table(base.config, torch.arange(tokens.shape[1]))
    embedding = "model.embed_tokens.weight"
    x = base.tensors[embedding].load()[tokens].to(dtype)
    y = expanded.tensors[embedding].load()[tokens].to(dtype)
    _compare(x, y, "the embeddings")
    for i, slot in enumerate(slots):
        y = load_block(expanded, i, dtype)(y, cos, sin)
        if not slot.new:
            x = load_block(base, slot.source, dtype)(x, cos, sin)
        kind = "a new copy of" if slot.new else "the base's"
        _compare(x, y, f"block {i}, {kind} block {slot.source}")
    compare_logits(_logits(base, x), _logits(expanded, y))
    base.close()
    expanded.close()


def _logits(side: Checkpoint, x: torch.Tensor) -> torch.Tensor:
    tied = side.config.tie_word_embeddings
    head = side.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].load()
    norm = side.tensors["model.norm.weight"].load()
    head, norm = head.to(x.dtype), norm.to(x.dtype)
    return torch.nn.functional.linear(lk.rms_norm(x, norm, side.config.rms_norm_eps), head)


def compare_logits(x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise IdentityError unless both are finite and have the same bits."""
    _compare(x, y, "the logits")
    _compare(x.view(torch.uint8), y.view(torch.uint8), "the bits of the logits")


def _compare(x: torch.Tensor, y: torch.Tensor, where: str) -> None:
    if not torch.equal(x, y):
        if not x.isfinite().all():
            raise IdentityError(f"the base itself is not finite at {where}, so nothing is proven")
        difference = (x.double() - y.double()).abs().max().item()
        raise IdentityError(
            f"base and expanded model part at {where}: largest difference {difference:g},"
            " expected none"
        )


def proof_tokens(base: Checkpoint) -> torch.Tensor:
    """Real text where the directory has a tokenizer, otherwise ids spread over the vocabulary."""
    config = base.config
    try:
        ids = encode(load_tokenizer(base.path), PROOF_TEXT)
    except (ImportError, FileNotFoundError):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (64,), generator=generator).tolist()
    if not ids or max(ids) >= config.vocab_size:
        got = f"up to {max(ids)}" if ids else "none"
        raise CheckpointError(
            f"{base.path}/tokenizer.json: ids below vocab_size = {config.vocab_size} expected for"
            f" the proof's text, got {got}"
        )
    return torch.tensor([ids])


def frozen_verdict(run: Path) -> str:
    """Compare, byte by byte, the frozen tensors of a run's model before and after."""
    config = read_json(run / "config.json")
    if config["trainable"] == "all":
        return "nothing frozen"
    before, after = Checkpoint(config["model"]), Checkpoint(run / "final")
    new = tuple(f"model.layers.{i}." for i in before.config.new_blocks)
    frozen = [name for name in before.tensors if not name.startswith(new)]
    same = sum(same_bytes(before.tensors[n].load(), after.tensors[n].load()) for n in frozen)
    verdict = "bit-identical" if same == len(frozen) else "CHANGED"
    return f"{same} of {len(frozen)} {verdict}"


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and the same bits."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def fingerprint(model: Llama) -> dict[str, str]:
    """What must stay as it is: each setting that is computed with, and a digest of each frozen
    tensor, by name."""
    frozen = {n: t for n, t in stock_tensors(model).items() if not t.requires_grad}
    return {**settings(model.config), **digests(frozen)}


def whole_fingerprint(model: Llama) -> str:
    """A hash of all that a model computes with."""
    return combined({**settings(model.config), **digests(stock_tensors(model))})


def settings(config: LlamaConfig) -> dict[str, str]:
    """Each setting that is computed with, as JSON, by name."""
    used = {name: value for name, value in asdict(config).items() if name not in UNUSED}
    used["new_blocks"] = config.new_blocks
    if any(config.windows):
        used["windows"] = config.windows
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


def digest(tensor: torch.Tensor | FrozenMatrix) -> str:
    """See `digests`; of a matrix in 8 bits, one of all that it is made of."""
    if isinstance(tensor, FrozenMatrix):
        parts = enumerate(tensor.tensors())
        return combined({str(i): digest(part) for i, part in parts if part is not None})
    tensor = tensor.detach()
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
