"""Ranks in bf16, and what else a run on several of them may be asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro.proof import frozen_verdict
from llamapro.train import train
from llamapro.train.optimizer import Optimizer
from run_files import records
from run_ranks import train_each, train_together


def named(config, name, **changes):
    return replace(config, out=f"{config.out}-{name}", **changes)


def losses(config):
    return torch.tensor([*records(config).values()], dtype=torch.float64)


def test_two_ranks_in_bf16_are_as_near_to_fp32_as_one_is(config, token_data):
    """At most twice as far; also where everything trains and some rows are kept, and a rank has
    nothing but kept rows, or none."""
    config = replace(config, steps=8, eval_every=4)
    base = replace(config, evaluate={"more": str(token_data("more", top=40))})
    kept = {"keep": 0.5, "keep_data": base.evaluate["more"], "keep_within": "1%"}
    kinds = {"new": base, "kept": replace(base, evaluate={}, **kept)}
    kinds["all"] = replace(base, trainable="all", keep=0.25, keep_data=str(token_data("third")))
    together, checked = [], []
    for name, kind in kinds.items():
        alone, exact = (named(kind, f"{name}-{d}", dtype=d) for d in ("bfloat16", "float32"))
        for one in (alone, exact):
            train(one)
        ours = [named(kind, f"{name}-{shard}", shard=shard) for shard in ("none", "full")]
        together += ours
        checked += [(one, alone, exact) for one in ours]
    train_together(together, 2, work=with_fp32_masters)
    for ours, alone, exact in checked:
        found, expected = ((losses(c) - losses(exact)).norm() for c in (ours, alone))
        assert found <= 2 * expected, ours.out
        verdict = frozen_verdict(Path(ours.out))
        assert "bit-identical" in verdict or ours.trainable == "all"
        assert records(ours, "tokens") == records(alone, "tokens")


def with_fp32_masters(configs, resume):
    """Train each, and look at what the optimizer has."""
    made = Optimizer.__init__

    def checked(optimizer, model, **options):
        made(optimizer, model, **options)
        for parameter, master in optimizer.pairs.values():
            assert parameter is master and master.dtype == torch.float32
            assert master.to_local().shape[0] <= -(-master.shape[0] // 2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "__init__", checked)
        train_each(configs, resume)
