"""Log-likelihoods of continuations, with what many sequences begin with computed once.

Few-shot prompts are long, what follows them is short, and a question's choices share all of them:
sequences are sorted, neighbours that share enough become a group, and a group's prefix is a row
whose keys and values its sequences then go on from. What shares nothing is packed without padding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from llamapro.generate import KVCache

LEAST_SHARED = 64  # tokens: a shorter prefix is not worth two passes
TOKENS_AT_A_TIME = 4096  # of a pass
KEYS_AT_A_TIME = 65536  # of all rows of a pass, those of their prefix counted for each
ROWS_OF_LOGITS = 512  # (rows, V) in fp32 at a time


@dataclass(frozen=True)
class Scored:
    """What a model says of a continuation."""

    log_likelihood: float  # in nats, summed over its tokens
    greedy: bool  # whether each of its tokens is the most probable


@dataclass(frozen=True)
class Group:
    """Sequences, by position in a sorted list, of which the first `shared` tokens are the same."""

    shared: int
    members: range


@torch.no_grad()
def score(model, requests: Sequence[tuple[list[int], list[int]]], tell=lambda count: None):
    """What a model says of continuations: pairs of (context, continuation) to a list of `Scored`.

    Both are ids, and neither is empty. What is longer than the model's context loses its beginning.
    tell: called with the number of requests done since the last call. Raises ValueError for what is
    empty.
    """
    for context, asked in requests:
        if not context or not asked:
            got = f"{len(context)} and {len(asked)}"
            raise ValueError(f"a token or more of context and of continuation expected, got {got}")
    room = model.config.max_position_embeddings
    whole = [tuple((*context, *asked)[-room - 1 :]) for context, asked in requests]
    askers: dict[tuple[int, ...], list[int]] = {}  # by input: the last token is only a target
    for place, ids in enumerate(whole):
        askers.setdefault(ids[:-1], []).append(place)
    rows, scored = sorted(askers), [None] * len(requests)
    for member, states in _states(model, rows):
        mine = askers[rows[member]]
        asked = {place: whole[place][-len(requests[place][1]) :] for place in mine}
        found = _say(model, states[-max(map(len, asked.values())) :], asked)
        for place, said in found.items():
            scored[place] = said
        tell(len(mine))
    return scored


def _states(model, rows) -> Iterator[tuple[int, torch.Tensor]]:
    """The final states (T, N) of each sorted row, in any order."""
    alone: list[int] = []
    for group in groups(rows):
        if len(group.members) == 1:
            alone += group.members
        else:
            yield from _after_prefix(model, rows, group)
    alone.sort(key=lambda member: len(rows[member]))
    for batch in _batches(alone, lambda member: len(rows[member])):
        ids = [rows[member] for member in batch]
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0).int()
        tokens = torch.tensor([[i for row in ids for i in row]])
        device = model.norm.device
        states = model.hidden(tokens.to(device), ends.to(device))[0]
        yield from zip(batch, states.split([len(row) for row in ids]), strict=True)


def _after_prefix(model, rows, group: Group):
    device, shared = model.norm.device, group.shared
    trunk = KVCache(model, shared)
    prefix = torch.tensor([rows[group.members[0]][:shared]], device=device)
    before = model.hidden(prefix, cache=trunk)[0]
    for batch in _batches(group.members, lambda member: len(rows[member]) - shared, shared):
        ids = [rows[member][shared:] for member in batch]
        # Padding comes after all that counts, which therefore does not see it.
        longest = max(map(len, ids))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=device)
        states = model.hidden(tokens, cache=Branches(trunk))
        for member, row, after in zip(batch, ids, states, strict=True):
            yield member, torch.cat((before, after[: len(row)]))


class Branches:
    """Rows that go on from the same keys and values, as the `cache` of `Llama.hidden`; their own
    are not kept."""

    def __init__(self, trunk: KVCache):
        self.trunk, self.length = trunk, trunk.length

    def of_block(self, i: int):
        """The `cache` argument of `lk.decoder_block` for block i."""

        def behind(*new):
            pairs = zip(self.trunk.pairs[i], new, strict=True)
            return tuple(torch.cat((k.expand(len(n), -1, -1, -1), n), 1) for k, n in pairs)

        return behind


def groups(rows: Sequence[tuple[int, ...]]) -> Iterator[Group]:
    """Neighbours of sorted rows that together cost fewer tokens than apart, as groups.

    A group computes its shared prefix once, of which a row leaves at least its last token.
    """
    start, shared = 0, len(rows[0]) - 1 if rows else 0
    beyond = 1  # tokens of the group's rows behind their shared prefix
    for at in range(1, len(rows)):
        row, count = rows[at], at - start
        both = min(shared, common(rows[at - 1], row), len(row) - 1)
        behind = beyond + count * (shared - both) + len(row) - both
        if both >= LEAST_SHARED and both + behind < shared + beyond + len(row):
            shared, beyond = both, behind
        else:
            yield Group(shared, range(start, at))
            start, shared, beyond = at, len(row) - 1, 1
    if rows:
        yield Group(shared, range(start, len(rows)))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _batches(members, size, prefix: int | None = None) -> Iterator[list[int]]:
    """Members in the order of their size, in batches of bounded work, or of one.

    prefix: how many tokens come before them; then they are rows of a rectangle.
    """
    batch: list[int] = []
    total = 0
    for member in sorted(members, key=size):
        total += size(member)
        rows = len(batch) + 1
        tokens = total if prefix is None else rows * size(member)
        keys = 0 if prefix is None else rows * (prefix + size(member))
        if batch and (tokens > TOKENS_AT_A_TIME or keys > KEYS_AT_A_TIME):
            yield batch
            batch, total = [], size(member)
        batch.append(member)
    if batch:
        yield batch


def _say(model, states, asked: dict[int, tuple[int, ...]]) -> dict[int, Scored]:
    """Score targets {key: ids} that end together: by the last states (T, N)."""
    longest, totals, greedy = len(states), dict.fromkeys(asked, 0.0), dict.fromkeys(asked, True)
    for start in range(0, longest, ROWS_OF_LOGITS):
        logits = model.lm_head(states[start : start + ROWS_OF_LOGITS]).float()  # (rows, V)
        likely, best = logits.log_softmax(-1), logits.argmax(-1)
        for key, ids in asked.items():
            first = max(start, longest - len(ids))
            part = ids[first - longest :][: start + len(logits) - first]
            if not part:
                continue
            targets = torch.tensor(part, device=logits.device)
            mine = slice(first - start, first - start + len(part))
            totals[key] += likely[mine].gather(1, targets[:, None]).sum().item()
            greedy[key] &= bool((best[mine] == targets).all())
    return {key: Scored(totals[key], greedy[key]) for key in asked}
