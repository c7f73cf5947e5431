"""What can be wrong with one rank of several: all end, or go on, and it is said once."""

import errno
import math
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import run_ranks
import torch
from llamapro import Llama
from llamapro.train import loop, parallel, sharded, train
from llamapro.train.keep import Keeper
from llamapro.train.metrics import Metrics
from run_files import records
from run_ranks import ended, refuse_each, start, train_each, train_together
from torch.distributed.checkpoint import FileSystemWriter

LOST = "lost another rank, or waited"


def second():
    """Whether this process is the second rank."""
    return os.environ["RANK"] == "1"


def named(config, name, **changes):
    return replace(config, out=f"{config.out}-{name}", **changes)


def refuse_at_home(configs, resume):
    """Each rank has its own working directory; the second one runs newer code with the seed 7."""
    os.chdir(Path(configs[0].out).parent / f"home-{os.environ['RANK']}")
    for config in configs:
        version = "9" if second() and config.seed == 7 else "8"
        with patch.object(parallel, "__version__", version):
            refuse_each([config], resume)


@pytest.fixture
def homes(config, tmp_path):
    """Two directories in which the same names mean other things."""
    homes = [tmp_path / f"home-{rank}" for rank in range(2)]
    new = Llama.from_pretrained(config.model).config.new_blocks[0]
    for rank, home in enumerate(homes):
        home.mkdir()
        for name, block in (("base", 0), ("new", new)):
            model = Llama.from_pretrained(config.model)
            model.blocks[block].mlp_norm.data[0] += rank
            model.save_pretrained(home / name)
        shutil.copytree(config.data[0], home / "data")
    ids = torch.from_file(str(homes[1] / "data/train.bin"), True, 4000, dtype=torch.uint16)
    ids[3] = 5 if ids[3] == 4 else 4
    return homes


def test_what_differs_is_refused_before_a_run_directory_is_there(config, homes):
    """By the rank that has it, in one line; and what no rank could do, as of one."""
    ours = [
        (named(config, "options"), {"learning_rate": 0.5}),
        (named(config, "layout", shard="none"), {"shard": "full"}),
        (named(config, "out"), {"out": config.out + "-elsewhere"}),
        (named(config, "code", seed=7), {}),
        (named(config, "data", data="data"), {}),
        (named(config, "base", model="base"), {}),
        (named(config, "new", model="new"), {}),
        (named(config, "all", model="base", trainable="all"), {}),
        (named(config, "uneven", batch_size=3), {}),
        (named(config, "8bit", shard="full", frozen="8bit"), {}),
        (named(config, "memory", memory="1kB"), {}),
    ]
    expected = [
        "rank 1: learning_rate: the same on every rank expected, rank 0 has 0.01, this one 0.5",
        "rank 1: shard: the same on every rank expected, rank 0 has 'none', this one 'full'",
        f"rank 1: out: the same on every rank expected, rank 0 has '{config.out}-out', this one",
        "rank 1: llamapro: the same on every rank expected, rank 0 has 8, this one 9",
        "rank 1: data of domain: the same on every rank expected, rank 0 has ",
        *["rank 1: weights: the same on every rank expected, rank 0 has "] * 3,
        "a batch size that the number of GPUs divides expected, got 3 rows on 2",
        "each rank holds a base in 8bit whole: --shard none expected with it, got full",
        "rank 0: --shard none on 2 GPUs needs at least",
    ]
    configs, others = zip(*[(c, replace(c, **changes)) for c, changes in ours], strict=True)
    began = time.monotonic()
    results = ended(start(configs, 2, work=refuse_at_home, others={1: others}))
    assert time.monotonic() - began < 30
    said = results[0][1].splitlines()
    assert results[1] == (0, "", "") and len(said) == len(expected), results
    for line, text in zip(said, expected, strict=True):
        assert line.startswith(f"llamapro: {text}")
    assert "; --shard full on 2 GPUs needs at least" in said[-1]
    assert not [c.out for c in (*configs, *others) if Path(c.out).exists()]


def test_a_rank_that_is_missing_at_the_start_is_said(config):
    began = time.monotonic()
    (rank,) = ended(start([replace(config, timeout=2.0)], 2, missing=[1]))
    assert rank[0] == 1 and "llamapro: rank 0 of 2 waited 2 s for the others: " in rank[2]
    assert time.monotonic() - began < 20 and not Path(config.out).exists()


def failing(owner, name, rank, run):
    """Let a function fail as on a full disk, the first time on that rank in that run."""
    function, left = getattr(owner, name), [1]

    def call(*arguments, **options):
        if left and int(os.environ["RANK"]) == rank and run in RUNNING:
            left.pop()
            raise OSError(errno.ENOSPC, "no space", "a file")
        return function(*arguments, **options)

    return patch.object(owner, name, call)


RUNNING = []


def train_on_full_disks(configs, resume):
    """Each run has one file that cannot be written at first, named by the run."""
    with ExitStack() as failures:
        for fault in (
            (Metrics, "sync", 0, "metrics"),
            (sharded, "write_state", 0, "state"),
            (FileSystemWriter, "write_data", 1, "shard"),
            (sharded, "write_state", 0, "late"),
        ):
            failures.enter_context(failing(*fault))

        def begun(config, **options):
            RUNNING[:] = [config.out.split("-")[-1]]
            return train(config, **options)

        failures.enter_context(patch.object(run_ranks, "train", begun))
        train_each(configs, resume)


def outcome(config):
    """Of a run what no clock decides."""
    weights = (Path(config.out) / "final" / "model.safetensors").read_bytes()
    return [records(config, key) for key in ("loss", "perplexity")], weights


def test_a_checkpoint_that_one_rank_cannot_write_is_tried_again(config):
    """One that is noticed to have failed only at the end is replaced by the last."""
    config = replace(config, steps=10, eval_every=5, checkpoint_every=5)
    runs = [named(config, name) for name in ("calm", "metrics", "state", "shard")]
    runs.append(named(config, "late", checkpoint_every=9))
    (status, _, said), other = ended(start(runs, 2, work=train_on_full_disks))
    assert (status, other) == (0, (0, "", "")), (said, other)
    assert len(said.splitlines()) == len(runs) - 1 and said.count("could not be written: ") == 1
    assert said.count("no checkpoint of step ") == 3 and said.count("there is none on disk") == 3
    assert "rank 1: " in said.splitlines()[2]
    for config in runs:
        assert outcome(config) == outcome(runs[0])
        saved = sorted((Path(config.out) / "checkpoints").iterdir())
        assert len(saved) == 1 + (config is not runs[-1]) and saved[-1].name == "step-00000010"


def end_in_faults(configs, resume):
    """The loss of the first run is not finite on one rank; the second's evaluation fails there."""
    losses, perplexity = Keeper.losses, loop.perplexity

    def lost(keeper, batch):
        learnt, kept = losses(keeper, batch)
        return (learnt * math.nan, kept) if second() else (learnt, kept)

    def failed(*arguments, **options):
        if second():
            raise OSError("no such file")
        return perplexity(*arguments, **options)

    with patch.object(Keeper, "losses", lost):
        refuse_each(configs[:1], resume)
    with patch.object(loop, "perplexity", failed):
        refuse_each(configs[1:], resume)


def test_what_is_not_finite_ends_all_and_so_does_an_evaluation_that_fails_on_one(config):
    runs = [named(config, "nan", checkpoint_every=1), named(config, "evaluation")]
    (first, said, _), (other, others, _) = ended(start(runs, 2, work=end_in_faults), timeout=30)
    assert (first, other, others) == (0, 0, "llamapro: no such file\n")
    lines = [line for line in said.splitlines() if line.startswith("llamapro: ")]
    assert len(lines) == 2 and lines[-2].startswith(
        "llamapro: step 1: loss nan and gradient norm nan, finite ones"
    )
    assert lines[1].startswith(f"llamapro: rank 0 {LOST} 600 s for one: ")
    assert not (Path(runs[0].out) / "checkpoints").exists()


def sample_slowly(configs, resume):
    """The first rank works alone for longer than ranks wait for each other."""
    with patch.object(loop, "make_samples", lambda config: time.sleep(4)):
        train_each(configs, resume)


def test_the_first_rank_may_work_alone_for_longer_than_ranks_wait(config):
    train_together([replace(config, timeout=2.0)], 2, work=sample_slowly)
