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
    check_sampling(temperature, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens >= 0 expected, got {max_new_tokens}")
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens (B, T) with T >= 1 expected, got {tuple(tokens.shape)}")
    eos = model.config.eos_token_id if stop is None else stop
    ids = [eos] if isinstance(eos, int) else list(eos or ())
    stop = torch.tensor(ids, dtype=torch.long, device=tokens.device)
    cache = KVCache(model, tokens.shape[1] + max_new_tokens)
    ended = torch.zeros_like(tokens[:, :1], dtype=torch.bool)
    step = tokens
    for _ in range(max_new_tokens):
        chosen = _next(model, step, cache, temperature, top_p, generator)
        step = torch.where(ended, step[:, -1:], chosen)
        yield step
        ended |= torch.isin(step, stop)
        if ended.all():
            break


@torch.no_grad()
def continue_all(
    model, prompts, length, *, stop, temperature=0.0, top_p=1.0, generator=None
) -> list[list[int]]:
    """Continue prompts, lists of token ids, together: each with what was sampled after it, up to
    `length` tokens in all or the first of the ids `stop`, which is kept.

    The rows begin with as many tokens as the shortest prompt has; a longer one goes on with its own
    instead of sampled ones. Raises ValueError for a prompt of no token, or more than `length`.
    """
    check_sampling(temperature, top_p)
    sizes = sorted(map(len, prompts)) or [0]
    if not 0 < sizes[0] <= sizes[-1] <= length:
        raise ValueError(f"prompts of 1 to {length} tokens expected, got {sizes[0]}..{sizes[-1]}")
    rows, live, ended = [[*prompt] for prompt in prompts], [*range(len(prompts))], set()
    cache, step = KVCache(model, length), [row[: sizes[0]] for row in rows]
    for place in range(sizes[0], length):
        tokens = torch.tensor(step, device=model.norm.device)
        chosen = _next(model, tokens, cache, temperature, top_p, generator).tolist()
        for (token,), row in zip(chosen, live, strict=True):
            if row not in ended and place >= len(prompts[row]):
                rows[row].append(token)
                if token in stop:
                    ended.add(row)
        open_rows = [at for at, row in enumerate(live) if row not in ended]
        if not open_rows:
            break
        if 2 * len(open_rows) <= len(live):  # the ended ones cost as much as the others
            cache.keep(open_rows)
            live = [live[at] for at in open_rows]
        step = [rows[row][place : place + 1] or [stop[0]] for row in live]
    return rows


def check_sampling(temperature: float, top_p: float) -> None:
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature >= 0 and 0 < top_p <= 1 expected, got {temperature} and {top_p}"
        )


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

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone."""
        self.pairs = [pair and tuple(kept[rows] for kept in pair) for pair in self.pairs]


def _next(model, tokens, cache, temperature, top_p, generator):
    """The token after tokens (B, T), (B, 1)."""
    logits = model.lm_head(model.hidden(tokens, cache=cache)[:, -1:])[:, 0]
    return _sample(logits.float(), temperature, top_p, generator)


def _sample(logits, temperature, top_p, generator):
    """(B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits / temperature).softmax(-1)
    if top_p == 1:  # sorting a vocabulary takes longer than a small model's step
        return torch.multinomial(probabilities, 1, generator=generator)
    probabilities, order = probabilities.sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(1, torch.multinomial(kept, 1, generator=generator))
