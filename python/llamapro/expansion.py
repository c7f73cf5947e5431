"""Block expansion: which block goes where, identity blocks, and the proof that nothing changed.

A new block is a copy of an existing one whose output projections are zero, so the expanded model
computes what the base computes until it is trained. Source: Wu et al. 2024, "LLaMA Pro".
"""

import copy
import itertools
import logging
import operator
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import llamapro_kernels as lk
from llamapro import checkpoint
from llamapro.checkpoint import LAYER, Checkpoint, TensorEntry
from llamapro.config import LlamaConfig
from llamapro.model import Llama, rope_table
from llamapro.model_files import CheckpointError, encode, load_tokenizer
from llamapro.storage import new_directory

log = logging.getLogger("llamapro")

PLACEMENTS = ("interleaved", "prefix", "suffix")
PROOF_TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1905 Einstein published four papers.\n"
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a\n"
)
_ZEROED = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)")


class IdentityError(RuntimeError):
    """An expanded model does not compute what its base computes."""


@dataclass(frozen=True)
class Slot:
    """A place in the expanded stack: the base block it holds, or a new copy of it."""

    source: int
    new: bool


def place_blocks(
    blocks: int, new_blocks: int | None, placement="interleaved", per_group: int = 1
) -> list[Slot]:
    """The expanded stack, bottom to top, of a base with `blocks` blocks.

    placement: "interleaved" cuts the base into new_blocks / per_group groups, as even as can be,
    and stacks copies of the top `per_group` blocks of each on it; "prefix" and "suffix" put
    copies of the lowest or highest `new_blocks` blocks below or above all; a list of positions in
    the expanded stack puts a copy of the nearest base block below at each.
    Raises ValueError for counts and positions that do not fit.
    """
    if placement != "interleaved" and per_group != 1:
        raise ValueError(f"per_group is for interleaved blocks, got {per_group} for {placement!r}")
    if not isinstance(placement, str):
        return _place_at(blocks, new_blocks, placement)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {PLACEMENTS} or positions, got {placement!r}")
    if not new_blocks or new_blocks < 1 or new_blocks > blocks:
        raise ValueError(
            f"new_blocks must be between 1 and the {blocks} blocks of the base, got {new_blocks}"
        )
    base = [Slot(i, False) for i in range(blocks)]
    if placement == "interleaved":
        return _interleave(base, new_blocks, per_group)
    if placement == "prefix":
        return [Slot(i, True) for i in range(new_blocks)] + base
    return base + [Slot(i, True) for i in range(blocks - new_blocks, blocks)]


def _interleave(base: list[Slot], new_blocks: int, per_group: int) -> list[Slot]:
    groups, rest = divmod(new_blocks, per_group) if per_group > 0 else (0, 0)
    if not groups or rest or len(base) // groups < per_group:
        raise ValueError(
            f"per_group must divide new_blocks = {new_blocks} and not exceed the blocks of a group,"
            f" got {per_group}"
        )
    cuts = [len(base) * g // groups for g in range(groups + 1)]
    sizes = sorted({end - start for start, end in itertools.pairwise(cuts)})
    if len(sizes) > 1:
        log.warning(
            "%d blocks do not divide into %d groups: groups have %s blocks",
            len(base),
            groups,
            " or ".join(map(str, sizes)),
        )
    slots = []
    for start, end in itertools.pairwise(cuts):
        slots += base[start:end] + [Slot(i, True) for i in range(end - per_group, end)]
    return slots


def _place_at(blocks: int, new_blocks: int | None, placement) -> list[Slot]:
    try:
        positions = [operator.index(position) for position in placement]
    except TypeError:
        raise ValueError(f"placement must be a name or whole numbers, got {placement!r}") from None
    total = blocks + len(positions)
    wrong = [p for p in positions if not 0 <= p < total]
    if not positions or wrong or len(set(positions)) < len(positions):
        raise ValueError(
            f"positions must be distinct and within 0..{total - 1} of the expanded stack,"
            f" got {positions}"
        )
    if new_blocks is not None and new_blocks != len(positions):
        raise ValueError(f"{len(positions)} positions given for new_blocks = {new_blocks}")
    slots, below = [], 0
    for position in range(total):
        if position in positions:
            slots.append(Slot(max(below - 1, 0), True))
        else:
            slots.append(Slot(below, False))
            below += 1
    return slots


def expanded_config(
    config: LlamaConfig, slots: list[Slot], base_name: str | None = None, keep_new: bool = False
) -> LlamaConfig:
    """The configuration of the expanded model, per-layer lists extended."""
    earlier = set(config.new_blocks) if keep_new else set()
    new = [i for i, slot in enumerate(slots) if slot.new or slot.source in earlier]
    other = {
        name: [value[slot.source] for slot in slots] if _per_layer(name, value, config) else value
        for name, value in config.other.items()
    }
    return replace(
        config,
        num_hidden_layers=len(slots),
        other=other,
        llama_pro={"new_blocks": new, "base_blocks": len(slots) - len(new), "base": base_name},
    )


def _per_layer(name: str, value, config: LlamaConfig) -> bool:
    """By name too: a list of eos ids can have as many entries as there are blocks."""
    return isinstance(value, list) and "layer" in name and len(value) == config.num_hidden_layers


@torch.no_grad()
def expand(
    model: Llama,
    new_blocks: int | None = None,
    placement="interleaved",
    *,
    per_group=1,
    keep_new=False,
) -> Llama:
    """Add identity blocks to `model`, in place, and return it; see `place_blocks`.

    The model computes exactly what it did. Of an expanded model, the earlier new blocks become
    part of the base, unless `keep_new` counts them as new still. Raises ValueError for counts and
    positions that do not fit, before anything is changed.
    """
    slots = place_blocks(len(model.blocks), new_blocks, placement, per_group)
    config = expanded_config(model.config, slots, model.config.other.get("_name_or_path"), keep_new)
    blocks = torch.nn.ModuleList()
    for slot in slots:
        block = model.blocks[slot.source]
        if slot.new:
            block = copy.deepcopy(block)
            block.make_identity()
        blocks.append(block)
    model.blocks, model.config = blocks, config
    return model


def expand_checkpoint(
    base,
    out,
    new_blocks: int | None = None,
    placement="interleaved",
    *,
    per_group=1,
    keep_new=False,
) -> list[int]:
    """Expand the model directory `base` into the new directory `out`; returns the new positions.

    Values are copied a tensor at a time in their dtype. Before `out` appears, base and output are
    run side by side, a block at a time, on real tokens: IdentityError says where they part, and
    then nothing is left behind. Raises what `place_blocks`, `Checkpoint` and `new_directory` do.
    """
    source = Checkpoint(base)
    slots = place_blocks(source.config.num_hidden_layers, new_blocks, placement, per_group)
    config = expanded_config(source.config, slots, Path(base).resolve().name, keep_new)
    entries = _expanded_entries(source, slots)
    largest = max(file.stat().st_size for file in source.files)
    with new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        checkpoint.write_model(
            directory, config, entries, files_from=source.path, max_shard_bytes=largest
        )
        prove_identity(source, Checkpoint(directory), slots)
    return config.new_blocks


def _expanded_entries(source: Checkpoint, slots: list[Slot]) -> list[TensorEntry]:
    """The output's tensors in the order of its blocks; those outside blocks as they are."""
    by_block: dict[int, list[tuple[str, TensorEntry]]] = {}
    outside = []
    for entry in source.tensors.values():
        match = LAYER.fullmatch(entry.name)
        if match:
            by_block.setdefault(int(match[1]), []).append((match[2], entry))
        else:
            outside.append(entry)
    return outside + [
        _placed(entry, f"model.layers.{i}.{name}", slot.new and bool(_ZEROED.fullmatch(name)))
        for i, slot in enumerate(slots)
        for name, entry in by_block[slot.source]
    ]


def _placed(entry: TensorEntry, name: str, zero: bool) -> TensorEntry:
    load = (lambda: torch.zeros(entry.shape, dtype=entry.dtype)) if zero else entry.load
    return replace(entry, name=name, load=load)


@torch.no_grad()
def prove_identity(base: Checkpoint, expanded: Checkpoint, slots: list[Slot]) -> None:
    """Raise IdentityError unless both give bit-equal logits on real tokens.

    Both run at once, a block of each in memory, so the first place where they part is known.
    """
    tokens, dtype = _proof_tokens(base), base.dtype
    cos, sin = rope_table(base.config, 0, tokens.shape[1])
    embedding = "model.embed_tokens.weight"
    x = base.tensors[embedding].load()[tokens].to(dtype)
    y = expanded.tensors[embedding].load()[tokens].to(dtype)
    _compare(x, y, "the embeddings")
    for i, slot in enumerate(slots):
        y = checkpoint.load_block(expanded, i, dtype)(y, cos, sin)
        if not slot.new:
            x = checkpoint.load_block(base, slot.source, dtype)(x, cos, sin)
        kind = "a new copy of" if slot.new else "the base's"
        _compare(x, y, f"block {i}, {kind} block {slot.source}")
    logits = [_logits(side, state) for side, state in ((base, x), (expanded, y))]
    _compare(*(side.view(torch.uint8) for side in logits), "the logits")
    base.close()
    expanded.close()


def _logits(side: Checkpoint, x: torch.Tensor) -> torch.Tensor:
    tied = side.config.tie_word_embeddings
    head = side.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"].load()
    norm = side.tensors["model.norm.weight"].load()
    head, norm = head.to(x.dtype), norm.to(x.dtype)
    return torch.nn.functional.linear(lk.rms_norm(x, norm, side.config.rms_norm_eps), head)


def _compare(x: torch.Tensor, y: torch.Tensor, where: str) -> None:
    if not torch.equal(x, y):
        if not x.isfinite().all():
            raise IdentityError(f"the base itself is not finite at {where}, so nothing is proven")
        difference = (x.double() - y.double()).abs().max().item()
        raise IdentityError(
            f"base and expanded model part at {where}: largest difference {difference:g},"
            " expected none"
        )


def _proof_tokens(base: Checkpoint) -> torch.Tensor:
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
