"""What the base of an expanded decoder knows, kept while its new blocks train on something else.

    loss = (sum of cross-entropies + weight * sum of KL(base || model)) / tokens that count

The base is the model with its new blocks switched off, so there is no second set of weights. Which
tokens are kept, rather than learnt, is said by their labels: `KEPT`.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

import llamapro_kernels as lk
from llamapro.integrations.stack import DecoderStack
from llamapro.new_blocks import base_layout, new_in

KEPT = -101  # the label of a token that the model is to predict as its base does
IGNORED = -100  # transformers' label of a token that does not count
# Arguments of a forward that have an entry for each row.
BY_ROW = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@contextmanager
def new_blocks_off(model: PreTrainedModel):
    """Make an expanded decoder its base in a `with` block: what it computes, bit for bit, or saves.

    The new blocks are out of its layers meanwhile, so change neither mode nor device there. Within
    another one it changes nothing. Raises ValueError for a model without new blocks.
    """
    stack = DecoderStack(model)
    if "llamapro_off" in vars(model):
        yield
        return
    blocks, layout, new = stack.blocks, stack.layout, _new_blocks(stack)
    model.llamapro_off = True
    try:
        kept = [block for i, block in enumerate(blocks) if i not in new]
        stack.put(kept, base_layout(layout))
        yield
    finally:
        stack.put(blocks, layout)
        del model.llamapro_off


@dataclass
class Forward:
    """What is remembered of the model's last forward."""

    inputs: dict
    states: torch.Tensor  # (B, T, D), those that the head reads
    autocast: torch.autocast  # as it was there: a Trainer's is over by the time of the loss


class BaseKeepingLoss:
    """Cross-entropy, and KL(base || model) where the labels say `KEPT`, for Trainer's loss.

    Use it as `Trainer(model, ..., compute_loss_func=BaseKeepingLoss(model))`. Labels are next-token
    labels as everywhere in transformers: token ids are learnt, -100 does not count, and `KEPT`, at
    each token of a row that is a sample of the base, or any general text, keeps what the base says
    there. The sum over all tokens that count is divided by num_items_in_batch, else by their
    number. The base computes only rows in which something is kept, without dropout.

    No logits are formed for either side but those of each row's last token, which transformers'
    forward insists on: that is all that `outputs.logits` has in training. To see inputs and final
    states, it puts hooks on the model, so make one for a model, and call it after each forward.

    weight: of the KL divergence of a token, beside the cross-entropy of another.

    Raises ValueError for a model without new blocks, for one whose base trains, so that it would
    not be its base any more, and for a head that is not one frozen matrix alone.
    """

    def __init__(self, model: PreTrainedModel, weight: float = 1.0):
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be above 0 and finite, got {weight}")
        self.stack, self.weight = DecoderStack(model), weight
        self.last: Forward | None = None
        _check(self.stack)
        model.register_forward_pre_hook(_want_last_logits_alone, with_kwargs=True)
        model.base_model.register_forward_hook(self._remember, with_kwargs=True)

    def __call__(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """The loss of the last forward. outputs: not read, they have no logits."""
        _check(self.stack)  # again: adapters may have come since
        forward, self.last = self.last, None
        targets = _targets(labels, forward)
        learnt, kept = targets >= 0, targets == KEPT
        states, head = forward.states, self.stack.model.get_output_embeddings().weight
        with forward.autocast:
            loss = lk.linear_cross_entropy(states[learnt], head, targets[learnt], reduction="sum")
            if kept.any():
                teacher = self._base_states(forward.inputs, kept)
                divergence = lk.linear_kl_divergence(states[kept], teacher, head, reduction="sum")
                loss = loss + self.weight * divergence
        if num_items_in_batch is None:
            num_items_in_batch = (learnt | kept).sum().clamp(min=1)
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device)

    def _remember(self, decoder, args, inputs, output) -> None:
        states = output[0]
        kind = states.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.last = Forward(inputs, states, torch.autocast(kind, dtype, enabled))

    @torch.no_grad()
    def _base_states(self, inputs: dict, kept: torch.Tensor) -> torch.Tensor:
        """The base's final states of the kept tokens, (N, D)."""
        if inputs.get("past_key_values") is not None:
            raise ValueError("a forward without past_key_values expected where the base is kept")
        rows, model = kept.any(1), self.stack.model
        own = {n: t for n in BY_ROW if (t := inputs.get(n)) is not None and len(t) == len(rows)}
        inputs = {**inputs, **{name: tensor[rows] for name, tensor in own.items()}}
        with new_blocks_off(model), _in_eval_mode(model):
            # Not by a call, whose hooks, ours among them, are for what the model computes.
            return model.base_model.forward(**inputs)[0][kept[rows]]


@contextmanager
def _in_eval_mode(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _want_last_logits_alone(model: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """In training without labels, when a loss is to follow that reads no logits."""
    if model.training and torch.is_grad_enabled() and inputs.get("labels") is None:
        inputs = {"logits_to_keep": 1, **inputs}
    return args, inputs


def _targets(labels, forward: Forward | None) -> torch.Tensor:
    """The label of the token after each, (B, T); raises ValueError unless these are labels."""
    if forward is None or labels is None or labels.shape != forward.states.shape[:-1]:
        got = None if labels is None else tuple(labels.shape)
        seen = None if forward is None else tuple(forward.states.shape[:-1])
        raise ValueError(
            f"labels of the tokens of the model's last forward expected, got {got} and {seen}"
        )
    bad = labels[(labels < 0) & (labels != IGNORED) & (labels != KEPT)]
    if len(bad):
        raise ValueError(
            f"labels must be token ids, {IGNORED} (does not count) or {KEPT} (kept),"
            f" got {bad[0].item()}"
        )
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(forward.states.device)


def _new_blocks(stack: DecoderStack) -> list[int]:
    new = new_in(stack.layout)
    if not new:
        raise ValueError("a model with new blocks expected: expand it first")
    return new


def _check(stack: DecoderStack) -> None:
    """Raise ValueError unless the base is frozen and its logits are states times one matrix."""
    model = stack.model
    new = {id(p) for i in _new_blocks(stack) for p in stack.blocks[i].parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in new]
    if trained:
        raise ValueError(
            f"a frozen base expected, got {len(trained)} of its tensors that train, such as"
            f" {trained[0]}: call train_new_blocks_only(model)"
        )
    head, cap = (
        model.get_output_embeddings(),
        getattr(model.config, "final_logit_softcapping", None),
    )
    if type(head) is not nn.Linear or head.bias is not None or cap is not None:
        raise ValueError(
            "a head that is one torch.nn.Linear without bias and soft cap expected, got"
            f" {head} and {cap}"
        )
    if hasattr(head.weight, "full_tensor"):
        raise ValueError("a model that is whole on each device expected, got a sharded one")
