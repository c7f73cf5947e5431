"""Keeping what the base knows: its own words among the rows, and what it says as their target.

On rows that are kept the loss is KL(base || model), or cross-entropy. The base is the model itself
with its new blocks switched off, so it takes no memory, and nothing below the first of them is
computed twice; where everything trains it is a second model. A limit on what may be lost steers the
weight of those rows: an evaluation that shows more than half of the limit lost raises it, in
proportion and up to fourfold, and one that shows less lowers it, at most to half.
"""

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch

import llamapro_kernels as lk
from llamapro.data.tokens import IGNORED, Batch
from llamapro.eval.perplexity import inputs
from llamapro.model import Llama
from llamapro.ranks import is_shard
from llamapro.train.config import TrainConfig, kept_corpora, own_samples, parse_share
from llamapro.train.replay import base_digest, replay, sample_settings

MOST_SAMPLES = 10**6  # tokens that a run samples itself
LEAST_ROWS = 8
AIM = 0.5  # of the limit, which is then not passed between two evaluations
LOWEST, HIGHEST = 1 / 8, 32.0  # the weight of a token that is kept, of one that is learnt being 1
log = logging.getLogger("llamapro")


def make_samples(config: TrainConfig) -> None:
    """Sample the base beside the run, unless it names other data or they are there.

    Raises FileExistsError where samples of another base or other settings stand.
    """
    path = Path(own_samples(config))
    if config.keep_data is None or Path(config.keep_data) != path.resolve():
        return
    how = {"tokens": sample_count(config), "seq_len": config.seq_len, "seed": config.seed}
    if not path.exists():
        log.info("sampling %d tokens of %s to keep it by", how["tokens"], config.model)
        replay(config.model, path, **how, device=config.device)
    elif sample_settings(path) != {**how, "temperature": 1.0, "base": base_digest(config.model)}:
        raise FileExistsError(
            f"{path}: samples of another base or size; name them with keep_data, or remove them"
        )


def sample_count(config: TrainConfig) -> int:
    """How many tokens a run samples: as many as it sees, up to a million."""
    wanted = min(MOST_SAMPLES, round(config.keep * config.rows * config.seq_len))
    return max(wanted, LEAST_ROWS * config.seq_len)


def without_own_samples(config: TrainConfig) -> TrainConfig:
    """The same run but for what it keeps by data of its own."""
    return replace(config, keep=None, keep_data=None, keep_within=None)


class Keeper:
    """The loss of a run's rows, and the weight of those that are kept.

    limit: the share of what the base knows that may be lost, None for any.
    """

    def __init__(self, config: TrainConfig, model: Llama):
        self.model, self.weight = model, 1.0
        self.limit = None if config.keep_within is None else parse_share(config.keep_within)
        self.distils = config.keep_loss == "kl" and bool(kept_corpora(config))
        self.teacher = None
        if self.distils and config.trainable == "all":
            dtype, device = model.norm.dtype, model.norm.device
            if is_shard(model.norm):  # a master, in fp32
                dtype = getattr(torch, config.dtype)
            self.teacher = Llama.from_pretrained(config.model, dtype, device).requires_grad_(False)

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums over the targets that count: of what is learnt, and of what is kept."""
        model, device = self.model, self.model.norm.device
        tokens, ends = inputs(batch, device)
        targets = batch.targets.to(device)
        if batch.kept is None:
            loss = model.loss(tokens, targets, cu_seqlens=ends, reduction="sum")
            return loss, torch.zeros_like(loss)
        hidden, base = self._states(tokens, ends, batch.kept)
        count, head = batch.kept.tokens.numel(), model.lm_head.weight
        sizes = targets.numel() - count, count
        (learnt, kept), (targets, aims) = (x.split(sizes) for x in (hidden, targets.flatten()))
        learnt = lk.linear_cross_entropy(learnt, head, targets, reduction="sum")
        if not self.distils:
            return learnt, lk.linear_cross_entropy(kept, head, aims, reduction="sum")
        says = {} if self.teacher is None else {"teacher_weight": self.teacher.lm_head.weight}
        says |= {"mask": aims != IGNORED, "reduction": "sum"}
        return learnt, lk.linear_kl_divergence(kept, base, head, **says)

    def _states(self, tokens, ends, kept: Batch):
        """Of all tokens (B T, N), and the base's of those that are kept (n, N)."""
        base_tokens, base_ends = inputs(kept, tokens.device)
        if not self.distils:
            return self.model.hidden(tokens, ends).flatten(0, 1), None
        if self.teacher is None:
            where = {"base_tokens": base_tokens, "base_cu_seqlens": base_ends}
            both = self.model.hidden_and_base(tokens, ends, **where)
            return tuple(states.flatten(0, 1) for states in both)
        with torch.no_grad(), self.teacher.as_base():
            base = self.teacher.hidden(base_tokens, base_ends).flatten(0, 1)
        return self.model.hidden(tokens, ends).flatten(0, 1), base

    def steer(self, lost: float) -> None:
        """Set the weight by the share that an evaluation shows to be lost."""
        factor = min(max(lost / (AIM * self.limit), 0.5), 4.0)
        self.weight = min(max(self.weight * factor, LOWEST), HIGHEST)


def lost(perplexities: dict, of_base: dict, kls: dict, general) -> float:
    """The share of what the base knows that is lost: the largest rise of perplexity on the sets
    `general`, or, without one, what the largest divergence says of the perplexity on samples."""
    rises = [perplexities[name] / of_base[name] - 1 for name in general]
    return max(rises) if rises else math.expm1(max(kls.values()))
