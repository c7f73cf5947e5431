"""Which blocks of a base text needs least: what each one's removal costs."""

from collections.abc import Sequence

from llamapro.data.packing import open_rows
from llamapro.data.tokens import TokenDataset, check_tokenizer
from llamapro.eval.perplexity import perplexity
from llamapro.hardware import pick_device
from llamapro.model import Llama
from llamapro.model_files import read_config
from llamapro.placement import place_blocks

SEQ_LEN, TOKENS = 512, 16_384  # of the held-out text that is enough to tell blocks apart


def by_importance(base, data, count: int | None) -> list[int]:
    """The positions, in the expanded stack, of copies of the `count` blocks of the directory `base`
    that the held-out text of the data directory `data` needs least. Raises ValueError, before
    anything is computed, for a count that `place_blocks` refuses."""
    place_blocks(read_config(base).num_hidden_layers, count, "suffix")
    check_tokenizer(data, base)
    model = Llama.from_pretrained(base, device=pick_device("auto"))
    seq_len = min(SEQ_LEN, model.config.max_position_embeddings)
    rows = open_rows(data, "heldout", model.config.vocab_size, seq_len, "bfd")
    return least_important(removal_costs(model, [rows], TOKENS), count)


def removal_costs(
    model: Llama, sets: Sequence[TokenDataset], max_tokens: int | None = None
) -> list[float]:
    """How many nats per token the loss rises when a block is left out, for each block from the
    bottom; the mean over the sets. Negative where a set is better off without.

    Source: ADEPT, arXiv 2510.10071.
    """

    def loss() -> float:
        return sum(perplexity(model, rows, max_tokens)["loss"] for rows in sets) / len(sets)

    before, costs = model.skipped, []
    whole = loss()
    try:
        for i in range(len(model.blocks)):
            model.skipped = before | {i}
            costs.append(loss() - whole)
    finally:
        model.skipped = before
    return costs


def least_important(costs: Sequence[float], count: int) -> list[int]:
    """The positions, in the expanded stack, of copies of the `count` blocks with the least costs,
    each right above its own."""
    least = sorted(sorted(range(len(costs)), key=costs.__getitem__)[:count])
    return [place + 1 + number for number, place in enumerate(least)]
