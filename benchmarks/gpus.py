"""What training on several GPUs takes by `llamapro.planner_ranks`: computed, not measured.

python -m benchmarks.gpus benchmarks/results/gpus-computed.json    # writes it; on any CPU
"""

import json
import sys
from pathlib import Path

from llamapro import LlamaConfig, planner, planner_ranks
from llamapro.expansion import expanded_config
from llamapro.placement import place_blocks

from llamapro_kernels.block import RECOMPUTE

MODELS = {  # and the rows of 4096 tokens that a GPU has
    "Llama-2-7B + 8": (LlamaConfig(), 2),
    "70B + 8": (
        LlamaConfig(
            vocab_size=32000,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
        1,
    ),
}
MEMORY, LENGTH, IN_A_NODE = "80GB", 4096, 8
FLOPS, REACHED = 989e12, 0.4  # of an H100 in bf16
NVLINK, NETWORK = 450e9, 50e9  # bytes/s that a GPU sends: in a node, and by its card to other nodes


def report() -> dict:
    """Every model, placement, number of GPUs and layout."""
    rows = [
        row(model, placement, ranks, shard)
        for model in MODELS
        for placement in ("interleaved", "top_half")
        for ranks in (8, 64)
        for shard in planner_ranks.SHARDS
    ]
    return {"memory": MEMORY, "length": LENGTH, "rows": rows}


def row(model, placement, ranks, shard) -> dict:
    """What a GPU holds and sends in a step, and the seconds that sending and the FLOPs take."""
    base, batch = MODELS[model]
    config = expanded_config(base, place_blocks(base.num_hidden_layers, 8, placement))
    work = planner.Workload(config, tuple(config.new_blocks), batch, LENGTH)
    limit = planner.usable(MEMORY)
    try:
        recompute, fits = planner_ranks.choose_rank_recompute(work, limit, ranks, shard), True
    except ValueError:
        recompute, fits = ["block"] * len(work.blocks), False
    sent = sum(planner_ranks.rank_traffic(work, ranks, shard).values())
    operations = sum(planner.flops(work, recompute).values())
    seconds = {"NVLink": sent / NVLINK}
    if ranks > IN_A_NODE:  # a ring leaves a node once; the rings share its cards, or take one
        seconds = {"network": sent / (IN_A_NODE * NETWORK), "one card": sent / NETWORK}
    return {
        **{"model": model, "placement": placement, "GPUs": ranks, "shard": shard, "batch": batch},
        "fits": fits,
        "recompute": {kind: recompute.count(kind) for kind in RECOMPUTE if kind in recompute},
        "memory": planner_ranks.rank_memory(work, recompute, ranks, shard)["total"],
        "sent": sent,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "FLOPs' seconds": round(operations / (REACHED * FLOPS), 4),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report(), indent=1) + "\n", encoding="utf-8")
