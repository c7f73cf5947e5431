"""Perplexity on held-out tokens, and the divergence from what a base says of them."""

from dataclasses import dataclass

import torch

import llamapro_kernels as lk
from llamapro.data.tokens import IGNORED, Batch, TokenDataset
from llamapro.model import Llama
from llamapro.ranks import ALONE, Ranks

ROWS_AT_A_TIME = 4


@dataclass
class BaseSays:
    """What a base says of held-out rows: final states of each batch of this rank, on the CPU, its
    head, and its own perplexity."""

    states: list[torch.Tensor]
    head: torch.Tensor
    perplexity: float


@torch.no_grad()
def what_the_base_says(
    model: Llama,
    sets: dict[str, TokenDataset],
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, BaseSays]:
    """What a model says of each set, its new blocks switched off; the head is copied where the
    model's trains."""
    if not sets:
        return {}
    found, states = {}, {name: [] for name in sets}
    with model.as_base():
        for name, rows in sets.items():
            found[name] = perplexity(model, rows, max_tokens, states=states[name], ranks=ranks)
    head = model.lm_head.weight  # of a sharded model it is there by now, in its dtype
    head = head.clone() if head.requires_grad else head
    return {name: BaseSays(states[name], head, found[name]["perplexity"]) for name in sets}


@torch.no_grad()
def perplexity(
    model: Llama,
    rows: TokenDataset,
    max_tokens: int | None = None,
    *,
    base: BaseSays | None = None,
    states: list | None = None,
    ranks: Ranks = ALONE,
) -> dict:
    """{"loss", "perplexity", "tokens"} over the rows that `evenly_spaced_indices` gives, and with
    what a base says of the same rows "kl", KL(base || model).

    Both are in nats per target that counts. Each row, or document in it, starts without context.
    states: takes the final states of each batch. ranks: those that share the rows, and all get what
    they found together.
    """
    device = model.embed_tokens.weight.device
    places = evenly_spaced_indices(rows, max_tokens)
    batches = [places[i : i + ROWS_AT_A_TIME] for i in range(0, len(places), ROWS_AT_A_TIME)]
    total, divergence, tokens = 0.0, 0.0, 0
    for number, (at, counts) in enumerate(ranks.deal(batches)):
        batch = rows.rows(at)
        hidden, targets = model.hidden(*inputs(batch, device)), batch.targets.to(device)
        head = model.lm_head.weight  # of a sharded model it is there from now on
        if states is not None:
            states.append(hidden.cpu())
        if not counts:
            continue
        total += lk.linear_cross_entropy(hidden, head, targets, reduction="sum").item()
        tokens += batch.counted
        if base is not None:
            said = {"teacher_weight": base.head, "mask": targets != IGNORED, "reduction": "sum"}
            theirs = base.states[number].to(device)
            divergence += lk.linear_kl_divergence(hidden, theirs, head, **said).item()
    total, divergence, tokens = ranks.sum(total, divergence, tokens)
    if not tokens:
        said = f"{rows.tokens.name}: targets that count expected, got none"
        raise ranks.alike(ValueError(said))
    loss = total / tokens
    # As a tensor: math.exp raises where a diverged model's perplexity is infinite.
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    found = {"loss": loss, "perplexity": value, "tokens": int(tokens)}
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
