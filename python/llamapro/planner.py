"""What a training run will cost, from the configuration alone: FLOPs, memory, recomputation.

M is the number of weights in a block's matrices. A token costs 2 M FLOPs forward in every block,
2 M for input gradients in every block from the first trainable one up, 2 M for weight gradients in
every trainable block, and attention's products where there are any. So the paper's 40 blocks, of
which 8 are new and the first of these is the fifth, cost (40 + 36 + 8) / 120 of training them all.
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch

from llamapro.config import LlamaConfig, block_shapes
from llamapro.expansion import expanded_config
from llamapro.frozen import FORMS
from llamapro.markdown import table
from llamapro.placement import place_blocks
from llamapro_kernels import cost
from llamapro_kernels.attention import visible_pairs
from llamapro_kernels.block import RECOMPUTE
from llamapro_kernels.frozen import has_units
from llamapro_kernels.linear_head import chunk_bytes

MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes of a trainable parameter, in fp32
USABLE = 0.95  # of a limit: allocators lose some between tensors, and libraries take some


@dataclass(frozen=True)
class Workload:
    """A step to be planned. `trainable` holds positions of blocks; None trains everything.
    `documents` are the lengths of those that rows are packed of, and how many of each a row has on
    average; none of them stands for rows that are one document each. Of the share `kept` of the
    tokens the base is asked, too, to be distilled: this model without its new blocks, or, where
    everything is trained, a second one."""

    config: LlamaConfig
    trainable: tuple[int, ...] | None
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    frozen: str = FORMS[0]
    documents: tuple[tuple[int, float], ...] = ()
    kept: float = 0.0

    def __post_init__(self):
        if not self.trained:
            raise ValueError("no new block to train: expand the model first")
        if self.batch < 1 or self.length < 1:
            raise ValueError(
                f"at least one row of one token expected, got {self.batch} x {self.length}"
            )

    @property
    def units(self) -> bool:
        """Whether the device multiplies 8 bits; of a GPU that is not here, it is taken to."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return True
        return has_units(torch.device(self.device))

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def pairs(self, window: int | None) -> int:
        """How many pairs of a query and a key attention looks at."""
        documents = self.documents or ((self.length, 1),)
        seen = (count * visible_pairs(n, n, window=window) for n, count in documents)
        return round(self.batch * sum(seen))

    @property
    def blocks(self) -> range:
        return range(self.config.num_hidden_layers)

    @property
    def trained(self) -> tuple[int, ...]:
        return tuple(self.blocks) if self.trainable is None else self.trainable

    @property
    def blocks_in_backward(self) -> range:
        """The blocks that backward goes through."""
        return range(min(self.trained), len(self.blocks))


def block_shape(config: LlamaConfig) -> cost.BlockShape:
    """The sizes of each block."""
    return cost.BlockShape(
        width=config.hidden_size,
        queries=config.num_attention_heads * config.head_dim,
        keys=config.num_key_value_heads * config.head_dim,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        head_norms=config.architecture.head_norms,
    )


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Count the parameters of one block, and of everything else."""
    block = sum(map(math.prod, block_shapes(config).values()))
    tables = 1 if config.tie_word_embeddings else 2
    return {"block": block, "rest": (tables * config.vocab_size + 1) * config.hidden_size}


def flops(work: Workload, recompute: list[str] | None = None) -> dict[str, int]:
    """FLOPs of one step, exactly: each multiplication and each addition of a matrix product.

    All but those of the head are those of the blocks, see `cost.flops`. recompute: the policy of
    each block, "none" by default. Elementwise work is not counted.
    """
    recompute = recompute or ["none"] * len(work.blocks)
    trained, total = set(work.trained), Counter()
    kinds = Counter(
        (window, i in work.blocks_in_backward, i in trained, recompute[i])
        for i, window in enumerate(work.config.windows)
    )
    shape = block_shape(work.config)
    for (window, backward, is_trained, policy), count in kinds.items():
        of_one = cost.flops(
            *(shape, work.tokens, work.pairs(window)),
            backward=backward,
            trained=is_trained,
            recompute=policy,
        )
        total.update({name: count * value for name, value in of_one.items()})
    head = 2 * work.tokens * shape.width * work.config.vocab_size
    found = {**total, "head": (2 + (work.trainable is None)) * head}
    return {**found, "base": _base_flops(work)} if work.kept else found


def _base_flops(work):
    """Of the base's forward on the tokens that are kept."""
    shape, windows = block_shape(work.config), work.config.windows
    tokens = round(work.kept * work.tokens)
    total = 2 * tokens * shape.width * work.config.vocab_size
    first = 0 if work.trainable is None else min(work.trained)
    for i in {*work.blocks[first:]} - {*work.config.new_blocks}:
        sizes = shape, tokens, round(work.kept * work.pairs(windows[i]))
        forward = cost.flops(*sizes, backward=False, trained=False, recompute="none")
        total += sum(forward.values())
    return total


def memory(work: Workload, recompute: list[str]) -> dict[str, int]:
    """Bytes of tensors at the peak of a step, by what they are for.

    Backward frees a block's activations as gradients arrive, so the peak is either at the loss,
    or in some block on the way down, or after them. What the allocator loses between tensors
    comes on top, and so does what the libraries take.
    """
    fixed, peak = fixed_bytes(work), max(moments(work, recompute), key=sum)
    parts = fixed | dict(zip(("activations", "gradients", "loss"), peak, strict=True))
    return parts | {"total": sum(parts.values())}


def fixed_bytes(work: Workload) -> dict[str, int]:
    """Bytes that are there all the time."""
    counts, size, shape = parameters(work.config), work.dtype.itemsize, block_shape(work.config)
    total = len(work.blocks) * counts["block"] + counts["rest"]
    trained = total if work.trainable is None else len(work.trained) * counts["block"]
    own_master = size == 4  # an fp32 parameter is its own
    weights = total * size
    if work.frozen != FORMS[0]:
        held = cost.bytes_in_8_bits(shape, work.frozen == "8bit-compact", work.units)
        weights += (len(work.blocks) - len(work.trained)) * (held - shape.matrices * size)
    if work.kept and work.trainable is None:
        weights += total * size
    return {
        "weights": weights,
        "masters": 0 if own_master else trained * MASTER,
        "optimizer": trained * MOMENTS,
    }


def moments(work: Workload, recompute: list[str]) -> list[tuple[int, int, int]]:
    """(activations and scratch, gradients, loss) in bytes, at each moment that may be the peak.

    The first is the loss; then come the blocks, from the last one down; then the embeddings'
    gradient, and the optimizer's step.
    """
    shape, size, tokens = block_shape(work.config), work.dtype.itemsize, work.tokens
    counts, trained = parameters(work.config), set(work.trained)
    saved, *scratch_of = bytes_by_policy(work)
    rest = counts["rest"] if work.trainable is None else 0
    hidden = 3 * tokens * shape.width * size  # before and after the last norm, and their gradient
    hidden += round(work.kept * tokens) * shape.width * size  # after the base's
    chunk = chunk_bytes(tokens, work.config.vocab_size, size, work.device)
    activations, gradients = sum(saved[recompute[i]] for i in work.blocks_in_backward), 0
    found = [(activations, rest * GRADIENT, chunk + hidden)]
    for i in reversed(work.blocks_in_backward):
        gradients += counts["block"] * GRADIENT * (i in trained)
        # The head's gradient waits in the model's dtype: the embeddings may add to it.
        scratch = scratch_of[i in trained][recompute[i]]
        found.append((activations + scratch, gradients + rest * size, 0))
        activations -= saved[recompute[i]]
    gradients += rest * GRADIENT
    return [*found, (0, gradients + 2 * rest * size, 0), (0, gradients, 0)]


def bytes_by_policy(work: Workload) -> tuple[dict[str, int], ...]:
    """What a block saves, and what backward of a frozen and of a trained one needs beside, each for
    each policy."""
    sizes = block_shape(work.config), work.tokens, work.dtype.itemsize
    in_8_bits = partial(cost.scratch_bytes, frozen=work.frozen, units=work.units)
    return tuple(
        {policy: function(*sizes, policy) for policy in RECOMPUTE}
        for function in (cost.saved_bytes, in_8_bits, cost.scratch_bytes)
    )


def choose_recompute(work: Workload, limit: float) -> list[str]:
    """The policies that fit `limit` bytes with little recomputation.

    Blocks change from "none" to "mlp", lowest first, because their activations are held longest;
    then to "block"; then those change back that turn out to be elsewhere than at the peak. Raises
    ValueError when nothing fits, with the least that it would take.
    """

    def fits(changes):
        return memory(work, policies_after(work, changes))["total"] <= limit

    most = (len(RECOMPUTE) - 1) * len(work.blocks_in_backward)
    if fits(most):  # no change raises the peak, so the first of them that fits is found by halving
        fewest = bisect_left(range(most), True, key=fits)
        return _recompute_less(work, policies_after(work, fewest), limit)
    least = memory(work, policies_after(work, most))["total"]
    fixed = sum(fixed_bytes(work).values())
    raise ValueError(
        f"a batch of {work.batch} x {work.length} tokens needs at least {least / 1e9:.2f}"
        f" GB, {fixed / 1e9:.2f} of them for weights and optimizer, got {limit / 1e9:.2f} GB"
    )


def cheapest(
    work: Workload, limit: float | None, forms: tuple[str, ...] = FORMS
) -> tuple[Workload, list[str]]:
    """The workload with its frozen matrices in the form that leaves least to recompute within
    `limit` bytes, the earlier of equals, and the policies. Raises as `choose_recompute`, of the
    last form, where none fits."""
    if limit is None:
        return replace(work, frozen=forms[0]), ["none"] * len(work.blocks)
    found = []
    for form in forms:
        held = replace(work, frozen=form)
        try:
            found.append((held, choose_recompute(held, limit)))
        except ValueError as refused:
            error = refused
    if not found:
        raise error
    return min(found, key=lambda pair: flops(*pair)["recomputed"])


def policies_after(work: Workload, changes: int) -> list[str]:
    """The policies after so many changes to the next one, each of the lowest block that is due."""
    count = len(work.blocks_in_backward)
    level, changed = divmod(changes, count)
    below = ["none"] * work.blocks_in_backward.start
    return below + [RECOMPUTE[level + (at < changed)] for at in range(count)]


def _recompute_less(work, recompute, limit):
    """Let each block, lowest first, recompute less where the step still fits.

    More bytes saved by a block raise its own moment and all before it: the loss, and the blocks
    above. Those are tracked by their peak, and by what was added to all of them so far.
    """
    fixed, recompute, added = sum(fixed_bytes(work).values()), list(recompute), 0
    saved, *scratch_of = bytes_by_policy(work)
    totals = [fixed + sum(moment) for moment in moments(work, recompute)]
    peaks = list(accumulate(totals, max))
    last = len(work.blocks) - 1
    for i in work.blocks_in_backward:
        scratch = scratch_of[i in work.trained]
        at, now = last - i, recompute[i]  # of the loss and the blocks above in `totals`
        for policy in RECOMPUTE[: RECOMPUTE.index(now)]:
            more = added + saved[policy] - saved[now]
            own = totals[at + 1] + more + scratch[policy] - scratch[now]
            if max(peaks[at] + more, own) <= limit:
                recompute[i], added = policy, more
                break
    return recompute


def largest_batch(work: Workload, limit: float) -> int:
    """Rows of a step that fit `limit` bytes with the best policies; 0 when not even one does."""
    most = ["block"] * len(work.blocks)

    def fits(batch):
        return memory(replace(work, batch=batch), most)["total"] <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def parse_bytes(text: str) -> float:
    """ "80GB", "512 MB" or "24GiB" as bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"memory such as 80GB or 24GiB expected, got {text!r}")
    base = 1024 if match[3] else 1000
    return float(match[1]) * base ** (1 + "KMGT".index(match[2].upper()))


def usable(text: str) -> float:
    """The bytes of a limit such as "80GB" that tensors may take."""
    return USABLE * parse_bytes(text)


def plan(
    tuning: Workload,
    new_blocks: int,
    placements: tuple[str, ...],
    limit: float | None = None,
    rate: float | None = None,
    frozen: str | None = None,
) -> str:
    """What `llamapro plan` prints, as Markdown. tuning: all of the base trained; rate: FLOP/s of a
    large product here, or None; frozen: how frozen matrices are held, None for the form that costs
    least where it fits."""
    lines, details, refused = [], [], []
    for name in placements:
        slots = place_blocks(len(tuning.blocks), new_blocks, name)
        config = expanded_config(tuning.config, slots)
        work = replace(tuning, config=config, trainable=tuple(config.new_blocks))
        try:
            work, recompute = cheapest(work, limit, (frozen,) if frozen else FORMS)
        except ValueError as error:
            work = replace(work, frozen=frozen or FORMS[-1])
            refused += [
                f"{name} does not fit: {error}; largest batch size {largest_batch(work, limit)}"
            ]
            continue
        lines.append(_summary(name, work, tuning, recompute, limit, rate))
        details += [
            "",
            f"### {name}: new blocks at {config.new_blocks}",
            *_details(work, recompute),
        ]
    if not lines:
        raise ValueError("\n".join(refused))
    head = ["placement", "parameters", "trained", "GFLOPs per token"]
    head += ["FLOPs vs full training", "FLOPs vs tuning the base", "frozen", "recompute", "memory"]
    head += ["largest batch size"] if limit else []
    head += ["tokens/s (roofline)"] if rate else []
    head += ["keeping adds"] if tuning.kept else []
    return "\n".join([*table(head, lines), *("\n" + line for line in refused), *details])


def _summary(name, work, tuning, recompute, limit, rate):
    total = sum(flops(work, recompute).values())
    counts = parameters(work.config)
    trained = len(work.trained) * counts["block"]
    everything = len(work.blocks) * counts["block"] + counts["rest"]
    parts = [f"{recompute.count(kind)} {kind}" for kind in RECOMPUTE if recompute.count(kind)]
    cells = [
        name,
        f"{everything / 1e9:.3f} B",
        f"{trained / 1e9:.3f} B ({trained / everything:.0%})",
        f"{total / work.tokens / 1e9:.2f}",
        f"{total / sum(flops(replace(work, trainable=None)).values()):.3f}",
        f"{total / sum(flops(tuning).values()):.3f}",
        work.frozen,
        ", ".join(parts),
        f"{memory(work, recompute)['total'] / 1e9:.2f} GB",
    ]
    cells += [str(largest_batch(work, limit))] if limit else []
    if rate:
        known = work.frozen == FORMS[0] or not work.units  # the rate of products in 8 bits is not
        cells += [f"{rate / total * work.tokens:,.0f}" if known else "not known"]
    if work.kept:
        added = _base_flops(work)
        cells += [f"{added / (total - added):.1%} FLOPs"]
    return cells


def _details(work, chosen):
    """A row for each policy, and for the mix that was chosen."""
    plans = {kind: [kind] * len(work.blocks) for kind in RECOMPUTE}
    if len(set(chosen)) > 1:
        plans["chosen"] = chosen
    rows = []
    for name, recompute in plans.items():
        operations, bytes_of = flops(work, recompute), memory(work, recompute)
        again = operations["recomputed"]
        again = f"{again / (sum(operations.values()) - again):+.1%}"
        rows.append([name, again, *(f"{size / 1e9:.2f}" for size in bytes_of.values())])
    return table(["recompute", "FLOPs", *(f"{name}, GB" for name in bytes_of)], rows)
