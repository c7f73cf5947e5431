"""Perplexity on held-out tokens."""

import torch

from llamapro.data.tokens import TokenDataset
from llamapro.model import Llama

ROWS_AT_A_TIME = 4


@torch.no_grad()
def perplexity(model: Llama, rows: TokenDataset, max_tokens: int | None = None) -> dict:
    """{"loss", "perplexity", "tokens"} over the rows that `evenly_spaced_indices` gives.

    The loss is in nats per token. Rows are independent: each starts without context.
    """
    device = model.embed_tokens.weight.device
    places = evenly_spaced_indices(rows, max_tokens)
    total = 0.0
    for start in range(0, len(places), ROWS_AT_A_TIME):
        batch = [rows.row(place) for place in places[start : start + ROWS_AT_A_TIME]]
        batch = torch.stack(batch).to(device)
        total += model.loss(batch[:, :-1], batch[:, 1:], reduction="sum").item()
    tokens = len(places) * rows.seq_len
    loss = total / tokens
    # As a tensor: math.exp raises where a diverged model's perplexity is infinite.
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"loss": loss, "perplexity": value, "tokens": tokens}


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
