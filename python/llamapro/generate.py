"""Generation: a KV cache, and sampling."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

TOKENS_AT_A_TIME = 8192  # of prompts


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
    model,
    prompts,
    lengths: int | list[int],
    *,
    stop,
    rows: int | None = None,
    ended=None,
    temperature=0.0,
    top_p=1.0,
    generator=None,
    tell=lambda count: None,
) -> list[list[int]]:
    """Continue prompts, lists of token ids, together: each with what was sampled after it, up to
    its length in all or the first of the ids `stop`, which is kept.

    rows: how many at a time, all by default: where one ends, the next prompt takes its place.
    ended: called with a prompt's number and its new ids, says whether they are an end by
    themselves. tell: called with the number of prompts that have ended since the last call.
    Raises ValueError for a prompt of no token, or of more than its length.
    """
    check_sampling(temperature, top_p)
    lengths = [lengths] * len(prompts) if isinstance(lengths, int) else lengths
    for prompt, length in zip(prompts, lengths, strict=True):
        if not 0 < len(prompt) <= length:
            raise ValueError(f"a prompt of 1 to {length} tokens expected, got {len(prompt)}")
    texts, stop = [[*prompt] for prompt in prompts], frozenset(stop)
    waiting = deque(i for i, text in enumerate(texts) if len(text) < lengths[i])
    tell(len(texts) - len(waiting))
    slots = Slots(model, min(rows or len(prompts), len(prompts)), max(lengths, default=0))
    live: dict[int, int] = {}  # the text of each slot that is taken
    choose = partial(_sample, temperature=temperature, top_p=top_p, generator=generator)
    while waiting or live:
        taken, states = {}, []
        room = TOKENS_AT_A_TIME
        for slot in slots.free(live):
            if waiting and (room == TOKENS_AT_A_TIME or len(texts[waiting[0]]) <= room):
                taken[slot] = waiting.popleft()
                room -= len(texts[taken[slot]])
        live = dict(sorted(live.items()))  # all of them are then read where they are
        if live:
            last = torch.tensor([texts[text][-1:] for text in live.values()])
            states.append(slots.step(model, [*live], last))
        if taken:
            states.append(slots.fill(model, {at: texts[text] for at, text in taken.items()}))
        live |= taken
        chosen = choose(model.lm_head(torch.cat(states)).float()).flatten().tolist()
        for (slot, text), token in zip([*live.items()], chosen, strict=True):
            texts[text].append(token)
            new = texts[text][len(prompts[text]) :]
            full = len(texts[text]) == lengths[text]
            if full or token in stop or (ended and ended(text, new)):
                del live[slot]
                tell(1)
    return texts


class Slots:
    """Keys and values of rows that have lengths of their own, each with room for `capacity`."""

    def __init__(self, model, count: int, capacity: int):
        device = model.norm.device
        self.count, self.capacity = count, capacity
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.windows = [block.window for block in model.blocks]
        self.pairs: list[tuple[torch.Tensor, ...] | None] = [None] * len(model.blocks)

    def free(self, taken) -> list[int]:
        """The slots that are not taken."""
        return [slot for slot in range(self.count) if slot not in taken]

    def fill(self, model, prompts: dict[int, list[int]]) -> torch.Tensor:
        """Begin slots anew with prompts: their last final states (n, N)."""
        sizes = torch.tensor([len(ids) for ids in prompts.values()], device=self.lengths.device)
        ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
        tokens = torch.tensor([[i for ids in prompts.values() for i in ids]], device=ends.device)
        slots = torch.tensor([*prompts], device=ends.device)
        rows = slots.repeat_interleave(sizes)
        places = torch.arange(len(rows), device=ends.device) - ends[:-1].repeat_interleave(sizes)
        self.lengths[slots] = sizes
        states = model.hidden(tokens, ends, _View(partial(self._begin, rows, places), 0))
        return states[0, ends[1:].long() - 1]

    def step(self, model, slots: list[int], tokens: torch.Tensor) -> torch.Tensor:
        """Go on in some slots with tokens (n, 1): final states (n, N)."""
        device = self.lengths.device
        slots = torch.tensor(slots, device=device)
        lengths = self.lengths[slots]
        longest = int(lengths.max()) + 1
        places = torch.arange(longest, device=device)
        masks = {
            window: (places <= lengths[:, None])
            & (True if window is None else places > lengths[:, None] - window)
            for window in set(self.windows)
        }
        go_on = partial(self._go_on, slots, lengths, longest, masks)
        self.lengths[slots] += 1
        return model.hidden(tokens.to(device), cache=_View(go_on, lengths[:, None]))[:, 0]

    def _begin(self, rows, places, i, k, v):
        for kept, new in zip(self._pair(i, k), (k, v), strict=True):
            kept[rows, places] = new[0]
        return k, v

    def _go_on(self, slots, lengths, longest, masks, i, k, v):
        pair = self._pair(i, k)
        for kept, new in zip(pair, (k, v), strict=True):
            kept[slots, lengths] = new[:, 0]
        every = len(slots) == self.count
        held = (kept[:, :longest] if every else kept[slots, :longest] for kept in pair)
        return *held, masks[self.windows[i]]

    def _pair(self, i, like):
        if self.pairs[i] is None:
            shape = (self.count, self.capacity, *like.shape[2:])
            # A mask gives what it hides a probability of 0, and 0 times NaN is NaN.
            self.pairs[i] = tuple(like.new_zeros(shape) for _ in "kv")
        return self.pairs[i]


@dataclass
class _View:
    """Slots as the `cache` of `Llama.hidden`, for one pass."""

    keep: Callable  # takes the number of a block, its keys and its values
    length: int | torch.Tensor

    def of_block(self, i: int):
        return partial(self.keep, i)


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
