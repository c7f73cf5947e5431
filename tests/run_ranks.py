"""Runs of several ranks on this machine, each a process, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict

TRAIN = """
import json, sys
from llamapro.command_line import said_in_one_line
from llamapro.train.config import TrainConfig
from llamapro.train.loop import train
config, resume = json.loads(sys.argv[1])
with said_in_one_line():
    train(TrainConfig(**config), resume=resume)
"""


def start(config, count, *, resume=False, code=TRAIN, changes=(), **environment):
    """Processes of ranks that train; changes: settings of some of them, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    world |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": 1, **environment}
    processes = []
    for rank in range(count):
        settings = {**asdict(config), **dict(changes).get(rank, {})}
        own = {**world, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, json.dumps([settings, resume])],
                env={**os.environ, **{name: str(value) for name, value in own.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ended(processes, timeout=120):
    """[(exit status, standard output, standard error)] by rank."""
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=timeout)
        found.append((process.returncode, output, errors))
    return found


def train_together(config, count, **options):
    """Trains on so many ranks, and gives the standard output of the first."""
    results = ended(start(config, count, **options))
    assert [status for status, *_ in results] == [0] * count, results
    return results[0][1]
