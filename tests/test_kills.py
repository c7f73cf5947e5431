"""A run whose process is killed at random goes on as if it had not been."""

import json
import multiprocessing
import os
import random
import time
from dataclasses import replace

import torch
from llamapro.train import run as run_module
from llamapro.train import train
from run_files import records
from safetensors.torch import load_file


def run_in_child(config, resume):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    train(config, resume=resume)


def test_killed_at_random_moments(config, tmp_path):
    """Six kills: each leaves a checkpoint that loads, and the end is as if there were none."""
    config = replace(config, steps=125, checkpoint_every=1, eval_every=1000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(replace(config, out=str(tmp_path / "calm"), checkpoint_every=1000))
    torch.set_num_threads(threads)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llamapro.train"])
    chance = random.Random(0)
    for kill in range(6):
        child = context.Process(target=run_in_child, args=(config, kill > 0))
        child.start()
        start, before = time.monotonic(), newest_step(config)
        while kill and newest_step(config) == before and child.is_alive():
            assert time.monotonic() - start < 60
            time.sleep(0.002)
        while not kill and not (tmp_path / "run").exists():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))  # the first falls before or into the first checkpoint
        child.kill()
        child.join()
        if not run_module.checkpoints(config.out):
            assert kill == 0
            continue
        newest = run_module.checkpoints(config.out)[-1]
        state = json.loads((newest / "state.json").read_text())
        assert newest.name == f"step-{state['step']:08d}"
        assert all(t.isfinite().all() for t in load_file(newest / "state.safetensors").values())
    assert 5 <= newest_step(config) < 125, "the kills fell into the run"
    torch.set_num_threads(1)
    train(config, resume=True)
    torch.set_num_threads(threads)
    assert records(config) == records(replace(config, out=str(tmp_path / "calm")))


def newest_step(config):
    saved = run_module.checkpoints(config.out)
    return int(saved[-1].name[5:]) if saved else 0
