"""Perplexity on held-out tokens."""

import torch

from llamapro.data import Rows
from llamapro.model import Llama

ROWS_AT_A_TIME = 4


@torch.no_grad()
def perplexity(model: Llama, rows: Rows, max_tokens: int | None = None) -> dict:
    """{"loss", "perplexity", "tokens"} over at most `max_tokens`, evenly spread over `rows`.

    The loss is in nats per token. Rows are independent: each starts without context. Raises
    ValueError for less than a token.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    count = len(rows) if max_tokens is None else max(1, min(len(rows), max_tokens // rows.seq_len))
    device = model.embed_tokens.weight.device
    places = [i * len(rows) // count for i in range(count)]
    total = 0.0
    for start in range(0, count, ROWS_AT_A_TIME):
        batch = [rows.row(place) for place in places[start : start + ROWS_AT_A_TIME]]
        batch = torch.stack(batch).to(device)
        total += model.loss(batch[:, :-1], batch[:, 1:], reduction="sum").item()
    loss = total / (count * rows.seq_len)
    # As a tensor: math.exp raises where a diverged model's perplexity is infinite.
    value = torch.tensor(loss, dtype=torch.float64).exp().item()
    return {"loss": loss, "perplexity": value, "tokens": count * rows.seq_len}
