"""What ranks must not do: leak, repeat each other, or do what one process should."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro.cli import main
from llamapro.ranks import Ranks, started
from llamapro.train import train
from llamapro.train.stopping import asked_to_stop
from run_ranks import train_together


def train_as_a_library(configs, resume):
    """Call train again and again, by itself and in a process group of the caller's; the first rank
    prints how many files each had open after each of them."""
    held = []

    def again(config, number):
        train(replace(config, out=f"{config.out}-{number}"))
        held.append(len(os.listdir("/proc/self/fd")))
        return torch.distributed.is_initialized()

    assert not any(again(configs[0], number) for number in range(2))
    torch.distributed.init_process_group("gloo")
    assert all(again(configs[0], number) for number in range(2, 4)), "it is the caller's"
    with started("cpu", 60) as ranks:
        values = ranks.gather(held)
    torch.distributed.destroy_process_group()
    if ranks.first:
        print(json.dumps(values))


def test_runs_of_one_process_leave_nothing_open(config):
    """And a tracker hears of each from the first rank alone."""
    pytest.importorskip("tensorboard")
    run = replace(config, steps=2, report_to=("tensorboard",))
    said = train_together([run], 2, work=train_as_a_library)
    for held in json.loads(said.splitlines()[-1]):
        assert held[1] <= held[0] and held[3] <= held[2]
    for number in range(2, 4):
        (events,) = Path(f"{run.out}-{number}/tensorboard").iterdir()
        assert b"learning_rate" in events.read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_should_do_is_refused_by_several(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as refused:
        main(["generate", "MODEL", "def "])
    said = "llamapro: one process expected, torchrun started 2: train alone shares"
    assert refused.value.code == (1 if rank else said)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_dry_run_is_shown_once(config, monkeypatch, capsys, rank):
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    shown = []
    monkeypatch.setattr("llamapro.cli.show_what_it_would_do", shown.append)
    options = ["--model", config.model, "--data", *config.data, "--out", config.out]
    main(["train", *options, "--dry-run"])
    assert len(shown) == 1 - rank


def test_a_signal_that_comes_twice_does_not_end_one_of_several_ranks(capfd):
    """A scheduler sends it to all processes, and torchrun to its ranks once more."""
    for rank in range(2):
        with asked_to_stop(Ranks(rank, 2)) as asked:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        assert len(asked) == 2
    assert capfd.readouterr().err == "stopping after this step\n"
