"""Training on several ranks: the losses, the weights and the files of one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from llamapro import Llama
from llamapro.train.loop import train
from run_files import records
from run_ranks import train_together
from safetensors.torch import load_file

COUNTS = {2: ("answers", "kept", "wrapped, kept, all", "8bit"), 4: ("wrapped, kept, all",)}


@pytest.fixture
def runs(config, tmp_path, token_data):
    """Configurations by name, of 10 steps on a model in fp32."""
    model = Llama.from_pretrained(config.model, torch.float32)
    path = str(model.save_pretrained(tmp_path / "in_fp32"))
    other = str(token_data("other", train=2000, top=50))
    base = replace(config, model=path, dtype="float32", batch_size=4, steps=10, eval_every=5)
    kept = replace(base, keep=0.25, keep_data=other)
    return {
        "answers": replace(base, data=str(conversations(token_data("answers")))),
        "kept": kept,
        "wrapped, kept, all": replace(kept, packing="wrapped", trainable="all"),
        "8bit": replace(base, frozen="8bit"),
    }


def conversations(directory):
    """Documents of 4 to 15 tokens, of which the last third counts."""
    for part in ("train", "heldout"):
        ids = np.fromfile(directory / f"{part}.bin", np.uint16)
        ends = np.cumsum(np.random.default_rng(0).integers(4, 16, len(ids) // 8))
        ends = np.append(ends[ends < len(ids)], len(ids)).astype(np.uint64)
        ends.tofile(directory / f"{part}.bin.index")
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        lengths = ends.astype(np.int64) - starts
        within = np.arange(len(ids)) - np.repeat(starts, lengths)
        counts = within >= 2 * np.repeat(lengths, lengths) // 3
        counts.astype(np.uint8).tofile(directory / f"{part}.bin.loss")
    return directory


def variant(runs, name, **changes):
    return {key: replace(c, out=f"{c.out}/{key} {name}", **changes) for key, c in runs.items()}


def losses(config):
    return torch.tensor([*records(config).values()], dtype=torch.float64)


def evaluated(config):
    values = [v for line in records(config, "perplexity").values() for v in line.values()]
    return torch.tensor(values, dtype=torch.float64).log()


def weights(config):
    tensors = load_file(f"{config.out}/final/model.safetensors").values()
    return torch.cat([t.flatten().double() for t in tensors])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_ranks_train_as_one_does(runs):
    """To what fp32 rounds: as near to one rank's run as that is to itself in smaller batches."""
    one = variant(runs, "one")
    smaller = variant(runs, "smaller", batch_size=1, gradient_accumulation_steps=8)
    for config in (*one.values(), *smaller.values()):
        train(config)
    for count, names in COUNTS.items():
        together = {
            (name, shard): replace(c, out=f"{c.out}/{name} {count} {shard}", shard=shard)
            for shard in ("none", "full")
            for name, c in runs.items()
            if name in names and (name, shard) != ("8bit", "full")
        }
        train_together([*together.values()], count)
        for (name, shard), ours in together.items():
            for what in (losses, evaluated, weights):
                alone, peer = what(one[name]), what(smaller[name])
                found, expected = distance(what(ours), alone), distance(peer, alone)
                assert found <= 4 * expected + 1e-7, (name, count, shard, what)  # an ulp: 1e-7
