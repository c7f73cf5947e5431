"""New blocks apart from their base: saved alone, merged with it on disk, or swapped in memory.

One model holds any number of sets of new blocks, by name, of which one is in its stack, or none:
then the stack is the base's, and so is what it computes, bit for bit and at the base's speed.
"""

import copy
import itertools
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from llamapro.config import LAYER, stock_shapes
from llamapro.expansion import expanded_config, is_per_layer
from llamapro.frozen import check_16_bits
from llamapro.hf import Checkpoint, TensorEntry, entries_of, write_model
from llamapro.model import Llama, block_tensors, stock_tensors
from llamapro.new_block_files import (
    PREFIX,
    Base,
    NewBlocks,
    base_settings,
    describe,
    open_new_blocks,
    write_new_blocks,
)
from llamapro.placement import Slot
from llamapro.storage import new_directory

DEFAULT = "default"


class LlamaStack:
    """What is asked here of a model; `llamapro.integrations` asks it of other libraries' models.

    `layout` is the part of the configuration that depends on which blocks there are: their number,
    `llama_pro`, and every list with an entry for each block.
    """

    def __init__(self, model: Llama):
        self.model = model

    @property
    def blocks(self) -> list[torch.nn.Module]:
        return list(self.model.blocks)

    @property
    def layout(self) -> dict:
        config = self.model.config
        lists = {n: v for n, v in config.other.items() if is_per_layer(n, v, config)}
        own = {"num_hidden_layers": config.num_hidden_layers, "llama_pro": config.llama_pro}
        return {**own, **lists}

    def put(self, blocks: list[torch.nn.Module], layout: dict) -> None:
        """Make these the model's blocks."""
        self.model.config = self._laid_out(layout)
        del self.model.blocks[:]
        self.model.blocks.extend(blocks)

    def copy(self, block: torch.nn.Module) -> torch.nn.Module:
        return copy.deepcopy(block)

    def tensors(self, block: torch.nn.Module) -> dict[str, torch.Tensor]:
        """A block's tensors under their stock names, without the block's."""
        return block_tensors(block, self.model.config, "")

    def outside(self) -> dict[str, torch.Tensor]:
        """The tensors of no block, under their stock names; of tied ones, one."""
        return {n: t for n, t in stock_tensors(self.model).items() if not LAYER.fullmatch(n)}

    def settings(self, layout: dict) -> dict[str, str]:
        """What a model of this layout computes with, by name."""
        return base_settings(replace(self._laid_out(layout), llama_pro=None))

    def _laid_out(self, layout: dict):
        """The model's configuration with what a layout says instead."""
        lists, config = dict(layout), self.model.config
        own = {
            name: lists.pop(name) for name in ("num_hidden_layers", "llama_pro") if name in lists
        }
        return replace(config, **own, other={**config.other, **lists})


def save_new_blocks(model: Llama, out) -> Path:
    """Write the new blocks of an expanded model, alone, to the new directory `out`.

    Raises ValueError when there are none, FileExistsError when `out` exists, OSError when the disk
    is too small.
    """
    return save(LlamaStack(model), out)


def save(stack, out) -> Path:
    """See `save_new_blocks`. Of a sharded model every rank calls it, and the first one writes."""
    check_16_bits(stack.model, "saving its new blocks with the fingerprint of their base")
    layout, entries = stack.layout, new_block_entries(stack)
    sharded = is_sharded(stack.model)
    if sharded:
        entries = entries_of({entry.name: entry.load().cpu() for entry in entries})
    name = layout["llama_pro"].get("base")
    about = describe(entries, new_in(layout), sources(layout), name, base_of(stack))
    if sharded and torch.distributed.get_rank():
        return Path(out)
    return write_new_blocks(out, entries, about)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a rank has parts of tensors only."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def new_block_entries(stack) -> list[TensorEntry]:
    """The tensors of the new blocks under the stock names of the expanded model."""
    new = new_in(stack.layout)
    if not new:
        raise ValueError("no new block to save: expand the model first")
    return _entries(stack, {i: stack.blocks[i] for i in new})


def base_of(stack) -> Base:
    """The base in an expanded model, under its own names."""
    new, layout = new_in(stack.layout), base_layout(stack.layout)
    kept = [block for i, block in enumerate(stack.blocks) if i not in new]
    return _base(stack, kept, layout)


def _base(stack, blocks: list[torch.nn.Module], layout: dict) -> Base:
    entries = [_entry(name, tensor) for name, tensor in stack.outside().items()]
    return Base(stack.settings(layout), [*entries, *_entries(stack, dict(enumerate(blocks)))])


def _entries(stack, blocks: dict[int, torch.nn.Module]) -> list[TensorEntry]:
    return [
        _entry(f"{PREFIX}{i}.{name}", tensor)
        for i, block in blocks.items()
        for name, tensor in stack.tensors(block).items()
    ]


def _entry(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), partial(_whole, tensor.detach()))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, gathered from all ranks if it is a shard's."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def new_in(layout: dict) -> list[int]:
    """Positions of the new blocks."""
    return list((layout["llama_pro"] or {}).get("new_blocks", []))


def base_layout(layout: dict) -> dict:
    """The layout without the new blocks."""
    new = new_in(layout)
    kept = [i for i in range(layout["num_hidden_layers"]) if i not in new]
    return {**_of_blocks(layout, kept), "llama_pro": None}


def expanded_layout(layout: dict, slots: list[Slot], base_name: str | None) -> dict:
    """The layout of a base with the new blocks of these slots."""
    new = [i for i, slot in enumerate(slots) if slot.new]
    llama_pro = {"new_blocks": new, "base_blocks": len(slots) - len(new), "base": base_name}
    return {**_of_blocks(layout, [slot.source for slot in slots]), "llama_pro": llama_pro}


def _of_blocks(layout: dict, blocks: list[int]) -> dict:
    lists = {n: [v[i] for i in blocks] for n, v in layout.items() if isinstance(v, list)}
    return {**layout, **lists, "num_hidden_layers": len(blocks)}


def sources(layout: dict) -> list[int]:
    """The block of the base that each new one is a copy of.

    Every placement with a name puts copies of k blocks, in order, right above those, or below the
    lowest k. Positions may have been chosen otherwise; but a copy is of its original's kind in
    every list that has an entry for each block.
    """
    new, lists = new_in(layout), [v for v in layout.values() if isinstance(v, list)]
    original = [i for i in range(layout["num_hidden_layers"]) if i not in new]
    found = []
    for position in new:
        start = end = position
        while start - 1 in new:
            start -= 1
        while end in new:
            end += 1
        below = sum(i < start for i in original)
        likely = below - (end - start) + position - start if below else position - start
        order = [i for i in (likely, *reversed(range(below))) if 0 <= i < len(original)]
        order += range(below, len(original))
        same = (i for i in order if all(v[original[i]] == v[position] for v in lists))
        found.append(next(same, order[0]))
    return found


def merge(base, new_blocks, out) -> Path:
    """Join the model directory `base` and a directory of new blocks: the expanded model, in `out`.

    The files are byte for byte those that `save_pretrained` writes of the whole model in the
    base's dtype; a tensor is in memory at a time. Raises CheckpointError for another base than the
    blocks were made for, FileExistsError when `out` exists, OSError when the disk is too small,
    all before anything is written.
    """
    source, saved = Checkpoint(base), open_new_blocks(new_blocks)
    known = [source.tensors[name] for name in stock_shapes(source.config)]
    saved.check(Base(base_settings(source.config), known), source.path)
    config = expanded_config(source.config, saved.slots, saved.base)
    with torch.device("meta"):
        names = stock_tensors(Llama(config))  # in the order in which a model is saved
    merged = _merged(source, saved)
    entries = [merged[name] for name in names]
    with new_directory(out, needs=sum(entry.nbytes for entry in entries)) as directory:
        write_model(directory, config, entries, files_from=source.path)
    source.close()
    return Path(out)


def _merged(source: Checkpoint, saved: NewBlocks) -> dict[str, TensorEntry]:
    """The expanded model's tensors, in the dtypes of the base."""
    merged = {name: e for name, e in source.tensors.items() if not LAYER.fullmatch(name)}
    blocks: dict[int, list[tuple[str, TensorEntry]]] = {}
    for entry in source.tensors.values():
        if match := LAYER.fullmatch(entry.name):
            blocks.setdefault(int(match[1]), []).append((match[2], entry))
    for i, slot in enumerate(saved.slots):
        for short, entry in blocks[slot.source]:
            name = f"{PREFIX}{i}.{short}"
            load = saved.tensors[name].load if slot.new else entry.load
            merged[name] = replace(entry, name=name, load=load)
    return merged


@dataclass
class BlockSet:
    """New blocks, and the stack that they make with their base."""

    slots: list[Slot]
    blocks: list[torch.nn.Module]
    base: str | None


@dataclass
class BlockSets:
    """A base, and the sets of new blocks that were loaded for it, by name."""

    blocks: list[torch.nn.Module]
    layout: dict
    sets: dict[str, BlockSet] = field(default_factory=dict)
    active: str | None = None

    def stack(self, name: str | None) -> tuple[list[torch.nn.Module], dict]:
        """All blocks, bottom to top, and their layout, with this set or none."""
        if name is None:
            return self.blocks, self.layout
        chosen = self.sets[name]
        new = iter(chosen.blocks)
        blocks = [next(new) if slot.new else self.blocks[slot.source] for slot in chosen.slots]
        return blocks, expanded_layout(self.layout, chosen.slots, chosen.base)


def load_new_blocks(model: Llama, path, name: str = DEFAULT) -> None:
    """Put the new blocks of a directory into the model's stack, and keep them under this name.

    The model is their base, expanded or not; new blocks that it has are kept under the name that
    they were loaded with, or "default". A set of the same name and positions is overwritten in
    place, so that an optimizer goes on with it. Raises CheckpointError, with the model unchanged,
    when the base is another or the directory is damaged.
    """
    load(LlamaStack(model), path, name)


@torch.no_grad()
def load(stack, path, name: str = DEFAULT) -> None:
    """See `load_new_blocks`."""
    check_16_bits(stack.model, "loading new blocks")
    saved = open_new_blocks(path)
    sets = _sets(stack, saved.base_blocks)
    saved.check(_base(stack, sets.blocks, sets.layout), "the model")
    held = sets.sets.get(name)
    if held and held.slots == saved.slots:
        blocks = held.blocks
    else:
        blocks = [stack.copy(sets.blocks[source]) for source in saved.sources]
    for position, block in zip(saved.positions, blocks, strict=True):
        for short, tensor in stack.tensors(block).items():
            tensor.copy_(saved.tensors[f"{PREFIX}{position}.{short}"].load())
    sets.sets[name] = BlockSet(saved.slots, blocks, saved.base)
    stack.model.block_sets = sets
    switch(stack, name)


def activate(model: Llama, name: str | None) -> None:
    """Have the new blocks of this name in the stack, and no others; None: the base alone.

    Raises ValueError when none were loaded under it.
    """
    switch(LlamaStack(model), name)


def switch(stack, name: str | None) -> None:
    """See `activate`."""
    sets = _sets(stack)
    if name is not None and name not in sets.sets:
        raise ValueError(f"one of the loaded sets {list(sets.sets)} or None expected, got {name!r}")
    like = sets.blocks[0]
    for block in sets.sets[name].blocks if name is not None else ():
        block.to(next(like.parameters()).device).train(like.training)  # as the base is by now
    stack.put(*sets.stack(name))
    sets.active, stack.model.block_sets = name, sets


def _sets(stack, base_blocks: int | None = None) -> BlockSets:
    """The model's sets of new blocks, its own under "default".

    base_blocks: how many blocks the base has, when new blocks of the model may be part of it.
    """
    blocks, layout = stack.blocks, stack.layout
    sets = getattr(stack.model, "block_sets", None)
    if sets and list(map(id, sets.stack(sets.active)[0])) == list(map(id, blocks)):
        return sets
    new = new_in(layout)
    if not new or len(blocks) == base_blocks:
        return BlockSets(blocks, layout)
    kept = [block for i, block in enumerate(blocks) if i not in new]
    copied, below = iter(sources(layout)), itertools.count()
    slots = [
        Slot(next(copied), True) if i in new else Slot(next(below), False)
        for i in range(len(blocks))
    ]
    own = BlockSet(slots, [blocks[i] for i in new], layout["llama_pro"].get("base"))
    return BlockSets(kept, base_layout(layout), {DEFAULT: own}, DEFAULT)
