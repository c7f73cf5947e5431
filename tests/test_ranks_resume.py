"""Checkpoints of ranks: what stops goes on, on as many, on fewer and on more of them."""

import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from llamapro import Llama
from llamapro.command_line import said_in_one_line
from llamapro.ranks import started
from llamapro.train import loop, train
from llamapro.train.run import checkpoints
from run_files import flip, records
from run_ranks import ended, refuse_each, start, train_each, train_together
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter


@pytest.fixture
def exact(config, tmp_path):
    """A run in fp32 of 12 steps, with four rows a step and three evaluations."""
    path = Llama.from_pretrained(config.model, torch.float32).save_pretrained(tmp_path / "in_fp32")
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 1, "steps": 12, "eval_every": 6}
    return replace(config, model=str(path), dtype="float32", checkpoint_every=100, **sizes)


def named(config, name, **changes):
    return replace(config, out=f"{config.out}-{name}", **changes)


def losses(config):
    return torch.tensor([*records(config).values()], dtype=torch.float64)


def distance(a, b):
    return ((losses(a) - losses(b)).norm() / losses(b).norm()).item()


def everything(config):
    """Of a run's metrics what no clock decides, and the bytes of its final model."""
    what = [records(config, key) for key in ("loss", "gradient_norm", "perplexity", "tokens")]
    return what, (Path(config.out) / "final" / "model.safetensors").read_bytes()


def stop_after(number, configs, resume):
    """Train up to a step, after which the last rank alone is asked to stop."""
    take_step = loop.take_step

    def step(*arguments):
        metrics, ranks = take_step(*arguments), arguments[-2]
        if arguments[-1] + 1 == number and ranks.rank == ranks.size - 1:
            signal.raise_signal(signal.SIGTERM)
        return metrics

    with said_in_one_line(), started("cpu", 60), patch.object(loop, "take_step", step):
        train(configs[0], resume=resume)


def stopped(config, count, number, *, resume=False):
    """Ranks end with one line, and with a checkpoint of all of them."""
    results = ended(start([config], count, work=partial(stop_after, number), resume=resume))
    assert [status for status, *_ in results] == [130] * count
    said = [line for *_, errors in results for line in errors.splitlines()]
    assert said.count(f"stopped after step {number}; the same command with --resume goes on") == 1
    assert not [line for line in said if "topp" not in line and "resumed: ranks was" not in line]
    assert checkpoints(config.out)[-1].name == f"step-{number:08d}"


def test_a_run_goes_on_with_any_number_of_ranks(exact):
    """Four, two in another layout, one, and four again; from each other's checkpoints."""
    calm, smaller, changing = (named(exact, name) for name in ("calm", "smaller", "changing"))
    train(calm)
    train(replace(smaller, batch_size=1, gradient_accumulation_steps=4))
    stopped(replace(changing, shard="none"), 4, 3)
    stopped(replace(changing, shard="full"), 2, 6, resume=True)
    stopped(changing, 1, 9, resume=True)
    train_together([changing], 4, resume=True)
    assert list(records(changing)) == list(range(1, 13))
    assert distance(changing, calm) <= 4 * distance(smaller, calm) + 1e-7  # an ulp: 1e-7


def write_late(number, configs, resume):
    """Train while the files of the checkpoint at step 9 wait for a further step."""
    write_data = FileSystemWriter.write_data

    def late(writer, *arguments):
        limit = time.monotonic() + 30
        while "step-00000009" in str(writer.path) and number not in records(configs[0]):
            assert time.monotonic() < limit
            time.sleep(0.01)
        return write_data(writer, *arguments)

    with patch.object(FileSystemWriter, "write_data", late):
        train_each(configs, resume)


def saved_at(config, step):
    """The tensors of a checkpoint."""
    folder = Path(config.out) / "checkpoints" / f"step-{step:08d}"
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in metadata.items()}
    dcp.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


@pytest.mark.filterwarnings("ignore:.*assuming the intent is to load")
@pytest.mark.parametrize("shard", ["none", "full"])
def test_as_many_ranks_go_on_bit_for_bit(exact, shard):
    """What is saved is that of its step, though training goes on before it is written."""
    calm, again = (named(exact, name, shard=shard, checkpoint_every=9) for name in ("a", "b"))
    train_together([calm], 2, work=partial(write_late, 11))
    stopped(again, 2, 9)
    train_together([again], 2, resume=True)
    assert everything(again) == everything(calm)
    for step in (9, 12):
        found, expected = saved_at(calm, step), saved_at(again, step)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_ranks_finish_what_one_device_has_trained(exact):
    """It was stopped after its last checkpoint."""
    train(exact)
    expected = everything(exact)
    unfinish(exact)
    train_together([exact], 2, resume=True)
    assert everything(exact) == expected


def unfinish(config):
    """Leave what a run has when it is killed after its last checkpoint."""
    shutil.rmtree(Path(config.out) / "final")
    (Path(config.out) / "summary.json").unlink()


DAMAGE = {
    ".metadata": lambda file: flip(file, 0),
    "__0_0.distcp": lambda file: flip(file, 700),
    "__1_0.distcp": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "state.json": lambda file: flip(file, file.read_bytes().index(b'"step": 1') + 8),
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(exact, token_data):
    """That of another run is refused, too."""
    config = replace(exact, checkpoint_every=6)
    foreign = named(config, "foreign", data=str(token_data("other", top=50)))
    train_together([config, foreign], 2)
    expected = everything(config)
    unfinish(config)
    before, newest = checkpoints(config.out)
    damaged = []
    for name, damage in DAMAGE.items():
        other = named(config, name)
        shutil.copytree(config.out, other.out)
        damage(checkpoints(other.out)[-1] / name)
        damaged.append(other)
    mixed = named(config, "mixed")
    shutil.copytree(config.out, mixed.out)
    shutil.rmtree(f"{mixed.out}/checkpoints")
    shutil.copytree(f"{foreign.out}/checkpoints", f"{mixed.out}/checkpoints")
    results = ended(start([*damaged, mixed], 2, resume=True, work=refuse_each))
    said = results[0][1].splitlines()
    assert results[1] == (0, "", "") and len(said) == len(damaged) + 1, results
    assert said.pop() == "llamapro: the data of 'domain' differ from those of the run"
    for line, name in zip(said, DAMAGE, strict=True):
        assert line.startswith(f"llamapro: rank {name[2]}: " if "dist" in name else "llamapro: /")
        assert f"/{newest.name} is damaged: " in line and f"{name}: " in line
        assert line.endswith(f"; remove it to go on from {before.name}")
    shutil.rmtree(checkpoints(damaged[0].out)[-1])
    train_together(damaged[:1], 2, resume=True)
    assert everything(damaged[0]) == expected
