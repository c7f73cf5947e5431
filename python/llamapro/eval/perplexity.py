"""Perplexity on held-out tokens, and the divergence from what a base says of them."""

from dataclasses import dataclass

import torch

import llamapro_kernels as lk
from llamapro.data.tokens import IGNORED, Batch, TokenDataset
from llamapro.model import Llama

ROWS_AT_A_TIME = 4


@dataclass
class BaseSays:
    """What a base says of held-out rows: final states of each batch, on the CPU, its head, and its
    own perplexity."""

    states: list[torch.Tensor]
    head: torch.Tensor
    perplexity: float


@torch.no_grad()
def what_the_base_says(
    model: Llama, sets: dict[str, TokenDataset], max_tokens: int | None = None
) -> dict[str, BaseSays]:
    """What a model says of each set, its new blocks switched off; the head is copied where the
    model's trains."""
    head = model.lm_head.weight
    head = head.detach().clone() if head.requires_grad and sets else head.detach()
    said = {}
    with model.as_base():
        for name, rows in sets.items():
            states: list[torch.Tensor] = []
            found = perplexity(model, rows, max_tokens, states=states)
            said[name] = BaseSays(states, head, found["perplexity"])
    return said


@torch.no_grad()
def perplexity(
    model: Llama,
    rows: TokenDataset,
    max_tokens: int | None = None,
    *,
    base: BaseSays | None = None,
    states: list | None = None,
) -> dict:
    """{"loss", "perplexity", "tokens"} over the rows that `evenly_spaced_indices` gives, and with
    what a base says of the same rows "kl", KL(base || model).

    Both are in nats per target that counts. Each row, or document in it, starts without context.
    states: takes the final states of each batch.
    """
    device, head = model.embed_tokens.weight.device, model.lm_head.weight
    places = evenly_spaced_indices(rows, max_tokens)
    total, divergence, tokens = 0.0, 0.0, 0
    for number, start in enumerate(range(0, len(places), ROWS_AT_A_TIME)):
        batch = rows.rows(places[start : start + ROWS_AT_A_TIME])
        hidden, targets = model.hidden(*inputs(batch, device)), batch.targets.to(device)
        total += lk.linear_cross_entropy(hidden, head, targets, reduction="sum").item()
        tokens += batch.counted
        if states is not None:
            states.append(hidden.cpu())
        if base is not None:
            said = {"teacher_weight": base.head, "mask": targets != IGNORED, "reduction": "sum"}
            theirs = base.states[number].to(device)
            divergence += lk.linear_kl_divergence(hidden, theirs, head, **said).item()
    if not tokens:
        raise ValueError(f"{rows.tokens.name}: targets that count expected, got none")
    loss = total / tokens
    # As a tensor: math.exp raises where a diverged model's perplexity is infinite.
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    found = {"loss": loss, "perplexity": value, "tokens": tokens}
    return found if base is None else {**found, "kl": divergence / tokens}


def inputs(batch: Batch, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Its tokens and documents, for `Llama.hidden`."""
    ends = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    return batch.tokens.to(device), ends


def evenly_spaced_indices(rows: TokenDataset, max_tokens: int | None = None) -> list[int]:
    """Places of whole rows, evenly spread, with at most `max_tokens` or one row; all by default.

    Raises ValueError when `max_tokens` is below 1.
    """
    if max_tokens is None:
        return list(range(len(rows)))
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    count = max(1, min(len(rows), max_tokens // rows.seq_len))
    return [i * len(rows) // count for i in range(count)]
