"""What a training run costs on several GPUs: memory and traffic of each rank, in two layouts.

Each rank has its share of the rows, and FSDP2 shards the fp32 masters of what trains, their moments
and their reduced gradients. The layouts differ in what else is sharded:

    "none"   nothing: the base is whole on every rank, the new blocks' weights are gathered once a
             step and stay until their backward
    "full"   every block: its weights are gathered before its forward, and again before its backward

So "none" sends little and "full" holds little. What is held when follows torch 2.13's FSDP2.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

from llamapro.expansion import expanded_config
from llamapro.frozen import FORMS
from llamapro.markdown import table
from llamapro.placement import place_blocks
from llamapro.planner import (
    GRADIENT,
    MASTER,
    MOMENTS,
    Workload,
    bytes_by_policy,
    fixed_bytes,
    flops,
    moments,
    parameters,
    policies_after,
)
from llamapro_kernels.block import RECOMPUTE

SHARDS = ("none", "full")


def rows_of_a_rank(batch: int, ranks: int) -> int:
    """The rows that each of `ranks` has of a batch. Raises ValueError where they are not equal."""
    if ranks < 1 or batch % ranks:
        raise ValueError(
            f"a batch size that the number of GPUs divides expected, got {batch} rows on {ranks}"
        )
    return batch // ranks


def rank_memory(
    work: Workload, recompute: list[str], ranks: int, shard: str, accumulation: int = 1
) -> dict[str, int]:
    """Bytes of tensors of one rank at the peak of a step, by what they are for, as
    `planner.memory`. work.batch: the rows of one rank in a micro-batch, of which a step has
    `accumulation`; "gathered" are whole weights, and the buffers that they arrive in."""
    rank = _Rank(work, ranks, shard, accumulation)
    peak = max(rank.moments(recompute), key=sum)
    names = "activations", "gradients", "loss", "gathered"
    parts = rank.fixed | dict(zip(names, peak, strict=True))
    return parts | {"total": sum(parts.values())}


def rank_traffic(work: Workload, ranks: int, shard: str, accumulation: int = 1) -> dict[str, int]:
    """Bytes that one rank sends in a step, by what they are for; it receives as many.

    In a ring each rank sends all shards but one. In "full" each micro-batch gathers weights anew,
    and reduces its gradients.
    """
    rank, size = _Rank(work, ranks, shard, accumulation), work.dtype.itemsize
    forward, backward, reduced = rank.trained * size, 0, rank.trained * GRADIENT
    if shard == "full":
        up = len(work.blocks_in_backward)
        backward = accumulation * up * rank.block * size
        again = up - len(work.trained) if work.kept and work.trainable is not None else 0
        forward = accumulation * ((len(work.blocks) + again) * rank.block + rank.rest) * size
        reduced *= accumulation
    sent = {
        "weights gathered forward": forward,
        "weights gathered backward": backward,
        "gradients reduced": reduced,
    }
    return {name: total * (ranks - 1) // ranks for name, total in sent.items()}


def layouts(work: Workload) -> tuple[str, ...]:
    """Those that a workload may have, the one that sends least first: 8 bits are not sharded."""
    return SHARDS if work.frozen == FORMS[0] else SHARDS[:1]


def choose_shard(
    work: Workload, limit: float, ranks: int, accumulation: int = 1
) -> tuple[str, list[str]]:
    """The layout that sends least of those that fit `limit` bytes, and the policies of its blocks.

    Raises ValueError when neither fits, with how much each is over.
    """
    over = []
    for shard in layouts(work):
        try:
            return shard, choose_rank_recompute(work, limit, ranks, shard, accumulation)
        except ValueError as error:
            over.append(str(error))
    raise ValueError("; ".join(over))


def choose_rank_recompute(
    work: Workload, limit: float | None, ranks: int, shard: str, accumulation: int = 1
) -> list[str]:
    """As `planner.choose_recompute`, of one rank; no limit is None."""
    if limit is None:
        return ["none"] * len(work.blocks)

    def needed(recompute):
        return rank_memory(work, recompute, ranks, shard, accumulation)["total"]

    most = (len(RECOMPUTE) - 1) * len(work.blocks_in_backward)
    least = needed(policies_after(work, most))
    if least > limit:
        raise ValueError(
            f"--shard {shard} on {ranks} GPUs needs at least {least / 1e9:.2f} GB on each for"
            f" {work.batch} x {work.length} tokens, {(least - limit) / 1e9:.2f} more than"
            f" {limit / 1e9:.2f} GB"
        )
    changes = range(most)
    fewest = bisect_left(changes, True, key=lambda n: needed(policies_after(work, n)) <= limit)
    recompute = policies_after(work, fewest)
    for i in work.blocks_in_backward:
        for policy in RECOMPUTE[: RECOMPUTE.index(recompute[i])]:
            less = [*recompute[:i], policy, *recompute[i + 1 :]]
            if needed(less) <= limit:
                recompute = less
                break
    return recompute


def plan_ranks(
    tuning: Workload,
    new_blocks: int,
    placements: tuple[str, ...],
    ranks: int,
    shard: str = "auto",
    limit: float | None = None,
) -> str:
    """What `llamapro plan --gpus` prints, as Markdown. tuning: all of the base trained, with the
    rows of one GPU; shard: a layout, or "auto" for both and which of them training takes."""
    found, refused = [], []
    for name in placements:
        config = expanded_config(tuning.config, place_blocks(len(tuning.blocks), new_blocks, name))
        work, taken = replace(tuning, config=config, trainable=tuple(config.new_blocks)), "yes"
        for layout in layouts(work) if shard == "auto" else (shard,):
            try:
                recompute = choose_rank_recompute(work, limit, ranks, layout)
            except ValueError as error:
                refused.append(f"{name} does not fit: {error}")
                continue
            found.append(([name, layout], taken, work, recompute))
            taken = ""
    if not found:
        raise ValueError("\n".join(refused))
    lines = _tables(found, ranks, shard == "auto")
    return "\n".join([*lines, *("\n" + line for line in refused)])


def _tables(found, ranks, choice):
    rows, parts, sent, most = [], [], [], 0
    for names, taken, work, recompute in found:
        held = rank_memory(work, recompute, ranks, names[1])
        traffic = rank_traffic(work, ranks, names[1])
        total = sum(traffic.values())
        ratio = total / sum(flops(work, recompute).values())
        kinds = [f"{recompute.count(kind)} {kind}" for kind in RECOMPUTE if kind in recompute]
        cells = [*names, ", ".join(kinds), f"{held.pop('total') / 1e9:.2f} GB"]
        cells += [f"{total / 1e9:.2f} GB", f"{1e6 * ratio:.1f}"]
        rows.append(cells + [taken] * choice)
        parts.append(names + [f"{size / 1e9:.2f}" for size in held.values()])
        sent.append(names + [f"{size / 1e9:.2f}" for size in traffic.values()])
        most = max(most, ratio)
    head, auto = ["placement", "shard"], ["auto"] * choice
    return [
        *table([*head, "recompute", "memory", "sent", "MB/TFLOP", *auto], rows),
        "",
        "Of one GPU, in one step: memory at its peak, and the bytes that it sends. That takes as",
        "long as the FLOPs on a link of (MB/TFLOP) x (TFLOP/s that a GPU reaches) MB/s: at 400",
        f"TFLOP/s, {1e6 * most:.1f} MB/TFLOP want {400 * 1e3 * most:.1f} GB/s.",
        "",
        "### Memory, GB",
        *table([*head, *held], parts),
        "",
        "### Sent, GB",
        *table([*head, *traffic], sent),
    ]


@dataclass(frozen=True)
class _Rank:
    """One rank of a step, see `rank_memory`."""

    work: Workload
    ranks: int
    shard: str
    accumulation: int

    def __post_init__(self):
        if self.shard not in SHARDS:
            raise ValueError(f"shard must be one of {SHARDS}, got {self.shard!r}")
        if self.shard == "full" and self.work.frozen != FORMS[0]:
            raise ValueError(
                f"--shard full with frozen blocks in {FORMS[0]} expected, got {self.work.frozen}:"
                " only --shard none leaves those whole"
            )

    @cached_property
    def block(self) -> int:
        """Parameters of a block."""
        return parameters(self.work.config)["block"]

    @cached_property
    def rest(self) -> int:
        """Parameters outside the blocks that train."""
        return parameters(self.work.config)["rest"] if self.work.trainable is None else 0

    @cached_property
    def trained(self) -> int:
        """Parameters that train."""
        return len(self.work.trained) * self.block + self.rest

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes that are there all the time. The masters are FSDP2's parameters, of which it makes
        a copy to compute with, of fp32 too."""
        work, size = self.work, self.work.dtype.itemsize
        weights = fixed_bytes(work)["weights"] - self.trained * size
        if self.shard == "full":
            frozen = (len(work.blocks) - len(work.trained)) * self.block * size
            weights -= frozen - self._share(frozen)
        masters, optimizer = self.trained * MASTER, self.trained * MOMENTS
        sharded = {"masters": self._share(masters), "optimizer": self._share(optimizer)}
        return {"weights": weights, **sharded}

    def moments(self, recompute: list[str]) -> list[tuple[int, int, int, int]]:
        """(activations and scratch, gradients, loss, gathered) in bytes at each moment of the last
        micro-batch that may be the peak: the loss; of each block from the last one down, where the
        next one's weights arrive, its backward and the reduction of its gradients; and the end."""
        work, size = self.work, self.work.dtype.itemsize
        (saved, *_), trained = bytes_by_policy(work), set(work.trained)
        (left, gradients, loss), *down = moments(work, recompute)
        last, held = len(work.blocks) - 1, self.rest * size
        found = [(left, gradients + self._waiting(last), loss, self._gathered(last, 0, 0))]
        for i, (activations, *_) in zip(reversed(work.blocks_in_backward), down, strict=False):
            own, waiting = (i in trained) * self.block * size, self._waiting(i) + held
            waiting += self.block * GRADIENT * self._buffer_is_held(i)
            found.append((left, waiting, 0, self._gathered(i, 1, 2)))
            found.append((activations, waiting + own, 0, self._gathered(i, 1, 1)))
            left -= saved[recompute[i]]
            if own:
                reducing = self._waiting(i - 1) + held + self._reduction(self.block)
                found.append((left, reducing, 0, self._gathered(i - 1, 0, 1)))
        return found + self._end()

    def _end(self):
        """The embeddings' gradient, and the reduction of everything outside the blocks."""
        if not self.rest:
            return []
        arriving = self._waiting(-1) + 2 * self.rest * self.work.dtype.itemsize
        arriving += self.block * GRADIENT
        reducing = self._share(self.trained * GRADIENT) + self._reduction(self.rest)
        gathered = self._gathered(-1, 0, 0)
        return [(0, arriving, 0, gathered), (0, reducing, 0, gathered)]

    def _share(self, size):
        return -(-size // self.ranks)

    def _up_to(self, i):
        """How many blocks train up to block i."""
        return bisect_right(self.work.trained, i)

    def _waiting(self, i):
        """Bytes of gradients when blocks above i are done: of those, shards; of the others what
        earlier micro-batches left, which is whole in "none", and a shard in "full"."""
        up_to = self._up_to(i)
        left = up_to * self.block + self.rest if self.accumulation > 1 else 0
        if self.shard == "full":
            left = self._share(left)
        reduced = self._share(self.block * GRADIENT) * (len(self.work.trained) - up_to)
        return left * GRADIENT + reduced

    def _reduction(self, count):
        """Bytes that reducing so many gradients takes beside the shard that is left: they are
        copied to fp32, and are gone before gloo copies that again."""
        copied = count * GRADIENT
        added_up = self.accumulation > 1 and self.shard == "none"
        own = copied if added_up else count * self.work.dtype.itemsize
        again = copied if self.work.device == "cpu" else 0
        return copied + max(own - self._share(copied), again)

    def _buffer_is_held(self, i):
        """Whether that copy is still there of the block that was reduced last: until the next one
        under FSDP2 is done."""
        if self.shard == "full":
            return i + 1 in self.work.trained
        return self._up_to(i) < len(self.work.trained)

    def _gathered(self, i, whole, arriving):
        """Bytes of weights that are whole in backward of block i: in "full", of so many blocks, and
        on a CPU of as many more as are arriving, in gloo's copy as well. A GPU has a pool of memory
        for those, which holds two."""
        if self.shard == "none":
            whole, arriving = self._up_to(i), 0
        if self.work.device != "cpu":
            arriving = 2
        return ((whole + arriving) * self.block + self.rest) * self.work.dtype.itemsize
