"""What a training run will cost, from the configuration alone: FLOPs, memory, recomputation.

M is the number of weights in a block's matrices. A token costs 2 M FLOPs forward in every block,
2 M for input gradients in every block from the first trainable one up, 2 M for weight gradients in
every trainable block, and attention's products where there are any. So the paper's 40 blocks, of
which 8 are new and the first of these is the fifth, cost (40 + 36 + 8) / 120 of training them all.
"""

import re
from dataclasses import dataclass, replace

import torch

from llamapro.config import LlamaConfig
from llamapro.expansion import expanded_config
from llamapro.placement import Slot, place_blocks
from llamapro_kernels.attention import visible_pairs
from llamapro_kernels.block import RECOMPUTE
from llamapro_kernels.linear_cross_entropy import chunk_bytes

MASTER, MOMENTS, GRADIENT = 4, 8, 4  # bytes of a trainable parameter, in fp32
USABLE = 0.95  # of a limit: allocators lose some between tensors, and libraries take some


@dataclass(frozen=True)
class Workload:
    """A step to be planned. `trainable` holds positions of blocks; None trains everything."""

    config: LlamaConfig
    trainable: tuple[int, ...] | None
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def __post_init__(self):
        if not self.trained:
            raise ValueError("no new block to train: expand the model first")
        if self.batch < 1 or self.length < 1:
            raise ValueError(
                f"at least one row of one token expected, got {self.batch} x {self.length}"
            )

    @property
    def tokens(self) -> int:
        return self.batch * self.length

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


@dataclass(frozen=True)
class Shape:
    """The sizes that everything follows from."""

    width: int
    queries: int  # H D
    keys: int  # Hkv D
    inner: int
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, config: LlamaConfig) -> "Shape":
        return cls(
            config.hidden_size,
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
            config.intermediate_size,
            config.num_attention_heads,
            config.vocab_size,
        )

    @property
    def matrices(self) -> int:
        """Weights in the matrices of a block."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)


def parameters(config: LlamaConfig) -> dict[str, int]:
    """Of one block, and of everything else."""
    shape = Shape.of(config)
    block = shape.matrices + 2 * shape.width
    if config.attention_bias:
        block += shape.queries + 2 * shape.keys + shape.width
    if config.mlp_bias:
        block += 2 * shape.inner + shape.width
    tables = 1 if config.tie_word_embeddings else 2
    return {"block": block, "rest": tables * shape.vocabulary * shape.width + shape.width}


def flops(work: Workload, recompute: list[str] | None = None) -> dict[str, int]:
    """FLOPs of one step, exactly: each multiplication and each addition of a matrix product.

    The first three are those of the blocks' weights. recompute: the policy of each block, "none" by
    default. Elementwise work is not counted.
    """
    shape, count, blocks = Shape.of(work.config), work.tokens, len(work.blocks)
    recompute = recompute or ["none"] * blocks
    pairs = visible_pairs(work.length, work.length)
    attention = 4 * work.batch * shape.queries * pairs
    head = 2 * count * shape.width * shape.vocabulary
    block = 2 * count * shape.matrices
    again = {
        "none": 0,
        "mlp": 4 * count * shape.width * shape.inner,
        "block": block - 2 * count * shape.width * shape.inner + attention,
    }
    return {
        "forward": blocks * block,
        "input gradient": len(work.blocks_in_backward) * block,
        "weight gradient": len(work.trained) * block,
        "attention": (2 * blocks + 5 * len(work.blocks_in_backward)) * attention // 2,
        "head": (2 + (work.trainable is None)) * head,
        "recomputed": sum(again[recompute[i]] for i in work.blocks_in_backward),
    }


def saved_bytes(work: Workload, recompute: str) -> int:
    """What one block keeps for backward."""
    shape, size = Shape.of(work.config), work.dtype.itemsize
    light = (2 * shape.width + 2 * shape.queries + 2 * shape.keys) * size + 4 * (
        2 * shape.heads + 2
    )
    a_token = {"block": shape.width * size, "mlp": light, "none": light + 2 * shape.inner * size}
    return work.tokens * a_token[recompute]


def memory(work: Workload, recompute: list[str]) -> dict[str, int]:
    """Bytes of tensors at the peak of a step, by what they are for.

    Backward frees a block's activations as gradients arrive, so the peak is either at the loss,
    or in some block on the way down, or after them. What the allocator loses between tensors
    comes on top, and so does what the libraries take.
    """
    shape, counts, size = Shape.of(work.config), parameters(work.config), work.dtype.itemsize
    total = len(work.blocks) * counts["block"] + counts["rest"]
    trained = len(work.trained) * counts["block"]
    trained = total if work.trainable is None else trained
    own_master = size == 4  # an fp32 parameter is its own
    fixed = {
        "weights": total * size,
        "masters": 0 if own_master else trained * MASTER,
        "optimizer": trained * MOMENTS,
    }
    moments = _moments(work, recompute, shape, counts)
    _, at_peak = max(moments.items(), key=lambda item: sum(item[1].values()))
    return fixed | at_peak | {"total": sum(fixed.values()) + sum(at_peak.values())}


def _moments(work, recompute, shape, counts):
    """Activations, gradients and scratch at each moment that may be the peak."""
    size, count = work.dtype.itemsize, work.tokens
    kept = {i: saved_bytes(work, recompute[i]) for i in work.blocks_in_backward}
    rest = counts["rest"] if work.trainable is None else 0
    hidden = 3 * count * shape.width * size  # before and after the last norm, and their gradient
    chunk = chunk_bytes(count, shape.vocabulary, size, work.device)
    moments = {"loss": (sum(kept.values()), rest * GRADIENT, chunk + hidden)}
    gradients = 0
    for i in reversed(work.blocks_in_backward):
        gradients += counts["block"] * GRADIENT * (i in work.trained)
        below = sum(kept[j] for j in kept if j <= i)
        # The head's gradient waits in the model's dtype: the embeddings may add to it.
        moments[f"block {i}"] = (
            below + _scratch(work, shape, recompute[i]),
            gradients + rest * size,
            0,
        )
    gradients += rest * GRADIENT
    moments["embeddings"] = (0, gradients + 2 * rest * size, 0)
    moments["optimizer"] = (0, gradients, 0)
    names = ("activations", "gradients", "loss")
    return {name: dict(zip(names, parts, strict=True)) for name, parts in moments.items()}


def _scratch(work, shape, recompute):
    """What backward of a block holds beside what was kept."""
    mlp = 3 * shape.inner + 2 * shape.width  # the product's gradient, gate_up's, dy and dh
    attention = 2 * shape.queries + 2 * shape.keys + 3 * shape.width  # do and dqkv; dh and dx
    again = {
        "none": 0,
        "mlp": 2 * shape.inner,
        "block": 2 * shape.inner + shape.width + 2 * shape.queries + 2 * shape.keys,
    }
    return work.tokens * (max(mlp, attention) + again[recompute]) * work.dtype.itemsize


def choose_recompute(work: Workload, limit: float) -> list[str]:
    """The policies that fit `limit` bytes with little recomputation.

    Blocks change from "none" to "mlp", lowest first, because these are kept longest; then to
    "block"; then those change back that turn out to be elsewhere than at the peak. Raises
    ValueError when nothing fits, with the least that it would take.
    """
    recompute, parts = ["none"] * len(work.blocks), []
    for kind, i in [
        ("none", 0),
        *((kind, i) for kind in RECOMPUTE[1:] for i in work.blocks_in_backward),
    ]:
        recompute[i] = kind
        parts.append(memory(work, recompute))
        if parts[-1]["total"] <= limit:
            return _undo(work, recompute, limit)
    least = min(parts, key=lambda part: part["total"])
    fixed = least["weights"] + least["masters"] + least["optimizer"]
    raise ValueError(
        f"a batch of {work.batch} x {work.length} tokens needs at least {least['total'] / 1e9:.2f}"
        f" GB, {fixed / 1e9:.2f} of them for weights and optimizer, got {limit / 1e9:.2f} GB"
    )


def _undo(work, recompute, limit):
    for i in work.blocks_in_backward:
        for kind in RECOMPUTE[: RECOMPUTE.index(recompute[i])]:
            less = [*recompute[:i], kind, *recompute[i + 1 :]]
            if memory(work, less)["total"] <= limit:
                recompute = less
                break
    return recompute


def largest_batch(work: Workload, limit: float) -> int:
    """Rows of a step that fit `limit` bytes with the best policies; 0 when not even one does."""

    def fits(batch):
        try:
            return bool(choose_recompute(replace(work, batch=batch), limit))
        except ValueError:
            return False

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


PLANS = ("interleaved", "interleaved in the top half", "suffix", "prefix")


def slots_of(blocks: int, new_blocks: int, plan: str) -> list[Slot]:
    """A placement of `place_blocks`, or the interleaved one of the top half alone."""
    if plan != "interleaved in the top half":
        return place_blocks(blocks, new_blocks, plan)
    below = blocks - max(new_blocks, blocks // 2)
    above = place_blocks(blocks - below, new_blocks, "interleaved")
    return [Slot(i, False) for i in range(below)] + [
        Slot(slot.source + below, slot.new) for slot in above
    ]


def plan(
    base: LlamaConfig,
    new_blocks: int,
    placements: tuple[str, ...],
    batch: int,
    length: int,
    limit: float | None = None,
    rate: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> str:
    """What `llamapro plan` prints, as Markdown. rate: FLOP/s of a large product here, or None."""
    tuning = Workload(base, None, batch, length, dtype, device)
    lines, details, refused = [], [], []
    for name in placements:
        slots = slots_of(base.num_hidden_layers, new_blocks, name)
        config = expanded_config(base, slots)
        work = Workload(config, tuple(config.new_blocks), batch, length, dtype, device)
        try:
            recompute = choose_recompute(work, limit) if limit else ["none"] * len(slots)
        except ValueError as error:
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
    head += ["FLOPs vs full training", "FLOPs vs tuning the base", "recompute", "memory"]
    head += ["largest batch size"] if limit else []
    head += ["tokens/s (roofline)"] if rate else []
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
        ", ".join(parts),
        f"{memory(work, recompute)['total'] / 1e9:.2f} GB",
    ]
    cells += [str(largest_batch(work, limit))] if limit else []
    return cells + ([f"{rate / total * work.tokens:,.0f}"] if rate else [])


def _details(work, chosen):
    """A row for each policy, and for the mix that was chosen."""
    plans = {kind: [kind] * len(work.blocks) for kind in RECOMPUTE}
    if len(set(chosen)) > 1:
        plans["chosen"] = chosen
    rows = []
    for name, recompute in plans.items():
        cost, bytes_of = flops(work, recompute), memory(work, recompute)
        again = f"{cost['recomputed'] / (sum(cost.values()) - cost['recomputed']):+.1%}"
        rows.append([name, again, *(f"{size / 1e9:.2f}" for size in bytes_of.values())])
    return table(["recompute", "FLOPs", *(f"{name}, GB" for name in bytes_of)], rows)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose columns are aligned, to be read as it is too."""
    widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return [
        f"| {' | '.join(c.ljust(w) for c, w in zip(cells, widths, strict=True))} |"
        for cells in (head, rule, *rows)
    ]
