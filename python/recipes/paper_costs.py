"""What each row of the experiments costs, before anything is trained."""

import torch
from llamapro import planner
from llamapro.config import LlamaConfig
from llamapro.expansion import expanded_config
from llamapro.placement import place_blocks

from llamapro_kernels import cost
from recipes.paper_config import PaperConfig, Row, steps
from recipes.rivals import ATTENTION, MATRICES


def trained(config: PaperConfig, base: LlamaConfig, row: Row) -> int:
    """How many parameters a row trains."""
    counts = planner.parameters(base)
    width, inner = base.hidden_size, base.intermediate_size
    if row.sft:
        return (base.num_hidden_layers + row.blocks) * counts["block"] + counts["rest"]
    return {
        "full": base.num_hidden_layers * counts["block"] + counts["rest"],
        "lora": _adapters(base, ATTENTION) * config.lora_rank,
        "lora_equal": _adapters(base, MATRICES) * equal_rank(config, base),
        "top_blocks": row.blocks * counts["block"],
        "experts": row.blocks * (3 * width * inner + 2 * width),
        "new_blocks": row.blocks * counts["block"],
    }[row.way]


def equal_rank(config: PaperConfig, base: LlamaConfig) -> int:
    """The rank with which adapters beside all matrices have the parameters of the new blocks, or
    the next ones."""
    wanted = config.blocks * planner.parameters(base)["block"]
    return max(1, round(wanted / _adapters(base, MATRICES)))


def _adapters(base: LlamaConfig, matrices: tuple[str, ...]) -> int:
    """Parameters of adapters of rank 1 beside these matrices of every block."""
    width, inner = base.hidden_size, base.intermediate_size
    queries, keys = base.num_attention_heads, base.num_key_value_heads
    queries, keys = queries * base.head_dim, keys * base.head_dim
    sums = {"q_proj": width + queries, "k_proj": width + keys, "v_proj": width + keys}
    sums |= {"o_proj": queries + width}
    sums |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), width + inner)
    return base.num_hidden_layers * sum(sums[name] for name in matrices)


def flops(config: PaperConfig, base: LlamaConfig, row: Row) -> int:
    """FLOPs of a run, exactly for what the library's loop trains; of adapters and experts those of
    a frozen base with gradients to its inputs, and six for each parameter and token beside."""
    size = config.batch_size, config.seq_len
    kept = row.share if row.replayed == "self" else 0.0
    how = {"dtype": getattr(torch, config.dtype), "device": "cpu", "kept": kept}
    shape, blocks = base, range(base.num_hidden_layers)
    trainable: tuple[int, ...] | None = None
    if row.way == "top_blocks":
        trainable = tuple(blocks[-row.blocks :])
    elif row.way == "new_blocks":
        # Where the least important blocks are, is not known yet: interleaved ones stand for them.
        placement = "interleaved" if row.placement == "importance" else row.placement
        shape = expanded_config(base, place_blocks(len(blocks), row.blocks, placement))
        trainable = None if row.sft else tuple(shape.new_blocks)
    work = planner.Workload(shape, trainable, *size, **how)
    if row.sft or row.way in ("full", "top_blocks", "new_blocks"):
        a_batch = sum(planner.flops(work).values())
    else:
        head = 4 * work.tokens * base.hidden_size * base.vocab_size
        a_batch = _beside(work) + head + 6 * work.tokens * trained(config, base, row)
    return a_batch * config.gradient_accumulation_steps * steps(config, row)


def _beside(work: planner.Workload) -> int:
    """FLOPs of a batch through blocks that are frozen, with gradients to their inputs."""
    total = 0
    for window in work.config.windows:
        sizes = planner.block_shape(work.config), work.tokens, work.pairs(window)
        parts = cost.flops(*sizes, backward=True, trained=False, recompute="none")
        total += sum(parts.values())
    return total
