"""Perplexity on held-out tokens."""

import torch

from llamapro.data.tokens import Batch, TokenDataset
from llamapro.model import Llama

ROWS_AT_A_TIME = 4


@torch.no_grad()
def perplexity(model: Llama, rows: TokenDataset, max_tokens: int | None = None) -> dict:
    """{"loss", "perplexity", "tokens"} over the rows that `evenly_spaced_indices` gives.

    The loss is in nats per target that counts. Each row, or document in it, starts without context.
    """
    device = model.embed_tokens.weight.device
    places = evenly_spaced_indices(rows, max_tokens)
    total, tokens = 0.0, 0
    for start in range(0, len(places), ROWS_AT_A_TIME):
        batch = rows.rows(places[start : start + ROWS_AT_A_TIME])
        total += batch_loss(model, batch, device).item()
        tokens += batch.counted
    if not tokens:
        raise ValueError(f"{rows.tokens.name}: targets that count expected, got none")
    loss = total / tokens
    # As a tensor: math.exp raises where a diverged model's perplexity is infinite.
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"loss": loss, "perplexity": value, "tokens": tokens}


def batch_loss(model: Llama, batch: Batch, device) -> torch.Tensor:
    """The sum over the targets that count."""
    ends = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)
    return model.loss(tokens, targets, cu_seqlens=ends, reduction="sum")


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
