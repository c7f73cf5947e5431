"""Block expansion, in memory and on disk.

A new block is a copy of an existing one whose output projections are zero, so the expanded model
computes what the base computes until it is trained. Source: Wu et al. 2024, "LLaMA Pro".
"""

import copy
import logging
import re
from dataclasses import replace
from pathlib import Path

import torch

from llamapro.architectures import ARCHITECTURES
from llamapro.config import LAYER, LlamaConfig
from llamapro.decoder import DecoderCheckpoint, open_checkpoint, prove_by_transformers
from llamapro.hf import Checkpoint, TensorEntry, write_model
from llamapro.model import Llama
from llamapro.placement import Slot, place_blocks
from llamapro.proof import prove_identity
from llamapro.storage import new_directory

log = logging.getLogger("llamapro")

POST_NORM = (
    "%s has norms after its output projections, which are zero in new blocks: their first gradients"
    " are up to 1 / sqrt(rms_norm_eps) = %.0f times larger than others, so that a clip of the norm"
    " of all gradients sees only them; warm up, and clip each tensor or none"
)
_ZEROED = re.compile(r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)")


def expanded_config(
    config: LlamaConfig, slots: list[Slot], base_name: str | None = None, keep_new: bool = False
) -> LlamaConfig:
    """The configuration of the expanded model, per-layer lists extended."""
    earlier = set(config.new_blocks) if keep_new else set()
    new = [i for i, slot in enumerate(slots) if slot.new or slot.source in earlier]
    other = {
        name: [value[slot.source] for slot in slots] if is_per_layer(name, value, config) else value
        for name, value in config.other.items()
    }
    return replace(
        config,
        num_hidden_layers=len(slots),
        other=other,
        llama_pro={"new_blocks": new, "base_blocks": len(slots) - len(new), "base": base_name},
    )


def is_per_layer(name: str, value, config: LlamaConfig) -> bool:
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
    then nothing is left behind. A base that `Llama` does not compute is run whole, by transformers.
    Raises what `place_blocks`, `open_checkpoint` and `new_directory` do.
    """
    source = open_checkpoint(base)
    slots = place_blocks(source.config.num_hidden_layers, new_blocks, placement, per_group)
    config = expanded_config(source.config, slots, Path(base).resolve().name, keep_new)
    entries = _expanded_entries(source, slots)
    largest = max(file.stat().st_size for file in source.files)
    with new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        write_model(directory, config, entries, files_from=source.path, max_shard_bytes=largest)
        if isinstance(source, DecoderCheckpoint):
            prove_by_transformers(source, DecoderCheckpoint(directory))
        else:
            prove_identity(source, Checkpoint(directory), slots)
    warn_of_post_norm(config)
    return config.new_blocks


def warn_of_post_norm(config) -> None:
    """Say what norms after the output projections do to the first gradients of new blocks."""
    if ARCHITECTURES[config.model_type].post_norm:
        log.warning(POST_NORM, config.model_type, config.rms_norm_eps**-0.5)


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
