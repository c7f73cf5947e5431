"""What ranks must not do: leak, repeat each other, or do what one process should."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro.cli import main
from llamapro.ranks import Ranks, started
from llamapro.train import train
from llamapro.train.stopping import asked_to_stop
from run_ranks import ended, start, train_together


def train_as_a_library(configs, resume):
    """Call train again and again, by itself and in a process group of the caller's."""
    held = []
    for number, config in enumerate([*configs] * 3):
        train(replace(config, out=f"{config.out}-{number}"))
        assert not torch.distributed.is_initialized()
        held.append(len(os.listdir("/proc/self/fd")))
    torch.distributed.init_process_group("gloo")
    for number, config in enumerate(configs):
        train(replace(config, out=f"{config.out}-of-a-caller-{number}"))
        held.append(len(os.listdir("/proc/self/fd")))
    assert torch.distributed.is_initialized(), "it is the caller's"
    with started("cpu", 60) as ranks:
        values = ranks.gather(held)
    torch.distributed.destroy_process_group()
    if ranks.first:
        print("held", values)


def test_runs_of_one_process_leave_nothing_open(config):
    runs = [replace(config, steps=2)] * 2
    said = train_together(runs, 2, work=train_as_a_library)
    print(said.splitlines()[-1])
    assert 0


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
