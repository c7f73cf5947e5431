"""Generation: a KV cache, and sampling."""

from collections.abc import Iterator

import torch


def generate(model, tokens, max_new_tokens, **sampling) -> torch.Tensor:
    """Continue tokens (B, T) by up to max_new_tokens: returns (B, T + new), see `stream`."""
    return torch.cat((tokens, *stream(model, tokens, max_new_tokens, **sampling)), 1)


@torch.no_grad()
def stream(
    model, tokens, max_new_tokens, *, temperature=0.0, top_p=1.0, stop=None, generator=None
) -> Iterator[torch.Tensor]:
    """Continue tokens (B, T) by up to max_new_tokens: gives (B, 1) at a time.

    temperature 0 is greedy; otherwise samples from the smallest set of tokens that holds
    `top_p` of the probability. stop: ids that end a row (default: the config's eos); the row
    is filled with its stop id until all rows have ended.
    """
    if not temperature >= 0 or not 0 < top_p <= 1 or max_new_tokens < 0:
        raise ValueError(
            "temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 0 expected,"
            f" got {temperature}, {top_p} and {max_new_tokens}"
        )
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens (B, T) with T >= 1 expected, got {tuple(tokens.shape)}")
    eos = model.config.eos_token_id if stop is None else stop
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    stop = torch.tensor(ids, dtype=torch.long, device=tokens.device)
    cache = KVCache(model, tokens.shape[1] + max_new_tokens)
    ended = torch.zeros_like(tokens[:, :1], dtype=torch.bool)
    step = tokens
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.hidden(step, cache=cache)[:, -1:])[:, 0]
        chosen = _sample(logits.float(), temperature, top_p, generator)
        step = torch.where(ended, step[:, -1:], chosen)
        yield step
        ended |= torch.isin(step, stop)
        if ended.all():
            break


class KVCache:
    """Keys and values of the tokens so far, in the dtype of the first, with room for `capacity`."""

    def __init__(self, model, capacity: int):
        self.length, self.capacity = 0, capacity
        self.pairs: list[tuple[torch.Tensor, ...] | None] = [None] * len(model.blocks)

    def of_block(self, i: int):
        """The `cache` argument of `lk.decoder_block` for block i."""

        def append(k, v):
            end = self.length + k.shape[1]
            if end > self.capacity:
                raise ValueError(f"the cache has room for {self.capacity} tokens, got {end}")
            if self.pairs[i] is None:
                shape = (k.shape[0], self.capacity, *k.shape[2:])
                self.pairs[i] = tuple(k.new_empty(shape) for _ in "kv")
            for kept, new in zip(self.pairs[i], (k, v), strict=True):
                kept[:, self.length : end] = new
            return tuple(kept[:, :end] for kept in self.pairs[i])

        return append


def _sample(logits, temperature, top_p, generator):
    """(B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(kept, 1, generator=generator))
