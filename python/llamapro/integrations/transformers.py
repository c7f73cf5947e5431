"""Block expansion of decoders of transformers: expand, freeze, save the new blocks alone, Trainer.

`config.llama_pro` says which blocks are new, in memory and in config.json; nothing is recognised
by a pattern of names or by its values.
"""

import shutil
from pathlib import Path

import torch
from torch import nn

try:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainerCallback
except ImportError as error:
    raise ImportError(
        f"llamapro.integrations.transformers needs transformers, pip install transformers: {error}"
    ) from error

from llamapro import new_blocks as blocks_of
from llamapro.expansion import warn_of_post_norm
from llamapro.integrations.keeping import KEPT as KEPT
from llamapro.integrations.keeping import BaseKeepingLoss as BaseKeepingLoss
from llamapro.integrations.keeping import new_blocks_off as new_blocks_off
from llamapro.integrations.stack import DecoderStack
from llamapro.model import Llama
from llamapro.new_block_files import PREFIX
from llamapro.new_blocks import DEFAULT, LlamaStack, expanded_layout, is_sharded, new_in
from llamapro.placement import place_blocks
from llamapro.proof import difference, digests

# The last matrices of attention and MLP: what they give is all that a layer adds to its input.
OUTPUT_PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")


def expand(
    model: PreTrainedModel, new_blocks: int | None = None, placement="interleaved"
) -> PreTrainedModel:
    """Add identity blocks to a decoder of transformers, in place, and return it.

    new_blocks, placement: see `llamapro.placement.place_blocks`. The model computes exactly what
    it did. Raises ValueError, with the model unchanged, for counts and positions that do not fit,
    for another architecture, a quantized model, and one with adapters.
    """
    stack = DecoderStack(model)
    blocks = stack.blocks
    slots = place_blocks(len(blocks), new_blocks, placement)
    for block in blocks:
        _check_projections(block)
    layout = expanded_layout(stack.layout, slots, _base_name(model.config))
    placed = [_identity(stack, blocks[s.source]) if s.new else blocks[s.source] for s in slots]
    stack.put(placed, layout)
    warn_of_post_norm(model.config)
    return model


def train_new_blocks_only(model: PreTrainedModel) -> None:
    """Freeze everything but the blocks that expansion added.

    Raises ValueError when there are none.
    """
    stack = DecoderStack(model)
    new = new_in(stack.layout)
    if not new:
        raise ValueError("no new block to train: expand the model first")
    model.requires_grad_(False)
    for i in new:
        stack.blocks[i].requires_grad_(True)


def new_block_patterns(config) -> list[str]:
    """Regular expressions for trainers that freeze by name: the new blocks' parameters, no other.

    config: that of the expanded model. They match a whole name, by any function of `re` and by
    axolotl, which escapes every dot of a pattern that is not followed by a plus.
    """
    new = (getattr(config, "llama_pro", None) or {}).get("new_blocks", [])
    return [f"^{PREFIX}{i}.".replace(".", "[.]") + ".+" for i in new]


def save_new_blocks(model, out) -> Path:
    """Write the new blocks of an expanded model, alone, to the new directory `out`.

    See `llamapro.new_blocks.save_new_blocks`; takes our Llama, too.
    """
    return blocks_of.save(_stack(model), out)


def load_new_blocks(model, path, name: str = DEFAULT) -> None:
    """Put the new blocks of a directory into the model's stack, and keep them under this name.

    See `llamapro.new_blocks.load_new_blocks`; takes our Llama, too.
    """
    blocks_of.load(_stack(model), path, name)


def activate(model, name: str | None) -> None:
    """Have the new blocks of this name in the stack, and no others; None: the base alone.

    See `llamapro.new_blocks.activate`; takes our Llama, too.
    """
    blocks_of.switch(_stack(model), name)


class BlockExpansionCallback(TrainerCallback):
    """Keep a Trainer to what block expansion promises.

    At the start it says which blocks train, and raises ValueError when anything else would. Each
    checkpoint gets a folder new_blocks, see `save_new_blocks`. When a frozen bit has changed, at a
    checkpoint or at the end, it raises RuntimeError.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.stack = _stack(model)
        trained, new = _trained(self.stack)
        if state.is_world_process_zero:
            count = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(
                f"training the new blocks {new} of {len(self.stack.blocks)}: {count / 1e6:.1f} M"
                f" parameters in {trained} tensors; everything else is frozen"
            )
        self.frozen = _frozen_digests(model)

    def on_save(self, args, state, control, **kwargs):
        self._check(state.global_step)
        out = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "new_blocks"
        if state.is_world_process_zero and out.exists():
            shutil.rmtree(out)  # of an earlier run, whose checkpoint was overwritten
        if state.is_world_process_zero or is_sharded(self.stack.model):
            blocks_of.save(self.stack, out)

    def on_train_end(self, args, state, control, **kwargs):
        self._check(state.global_step)

    def _check(self, step: int) -> None:
        changed = difference(self.frozen, _frozen_digests(self.stack.model))
        if changed:
            raise RuntimeError(f"step {step}: what is frozen changed: {changed}")


def _trained(stack) -> tuple[int, list[int]]:
    """How many tensors train, and the new blocks, which must be all that does."""
    new = new_in(stack.layout)
    inside = {id(p) for i in new for p in stack.blocks[i].parameters()}
    trained = {name: p for name, p in stack.model.named_parameters() if p.requires_grad}
    outside = [name for name, p in trained.items() if id(p) not in inside]
    if outside or not trained:
        got = f"{len(outside)} others, such as {outside[0]}" if outside else "none"
        raise ValueError(
            f"the new blocks alone are saved, so parameters of {new} alone are expected to train,"
            f" got {got}: call train_new_blocks_only(model)"
        )
    return len(trained), new


def _frozen_digests(model: nn.Module) -> dict[str, str]:
    """Of what this rank has of each frozen parameter."""
    frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    return digests({n: p.to_local() if hasattr(p, "to_local") else p for n, p in frozen.items()})


def _stack(model) -> LlamaStack | DecoderStack:
    """The stack of a model whose tensors have their stock names."""
    if isinstance(model, Llama):
        return LlamaStack(model)
    stack = DecoderStack(model)
    if f"{stack.name}." != PREFIX:
        raise ValueError(
            f"a whole language model expected, with its layers at {PREFIX}0, got a"
            f" {type(model).__name__}, with {stack.name}.0"
        )
    return stack


def _check_projections(block: nn.Module) -> None:
    for name in OUTPUT_PROJECTIONS:
        projection = block.get_submodule(name)
        if type(projection) is not nn.Linear:
            kind = type(projection)
            raise ValueError(
                f"{name} must be torch.nn.Linear, got {kind.__module__}.{kind.__qualname__}: expand"
                " before a model is quantized or gets adapters"
            )


@torch.no_grad()
def _identity(stack: DecoderStack, block: nn.Module) -> nn.Module:
    block = stack.copy(block)
    for name in OUTPUT_PROJECTIONS:
        for parameter in block.get_submodule(name).parameters():
            parameter.zero_()
    return block


def _base_name(config: PreTrainedConfig) -> str | None:
    """A Hub name as it is; of a directory its name, since a path is nobody else's business."""
    name = config._name_or_path or None
    return Path(name).resolve().name if name and Path(name).is_dir() else name
