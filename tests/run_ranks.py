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
from llamapro.ranks import started
from llamapro.train.config import TrainConfig
from llamapro.train.loop import train
configs = [TrainConfig(**settings) for settings in json.loads(sys.argv[1])]
with said_in_one_line(), started("cpu", configs[0].timeout):
    for config in configs:
        train(config, resume="--resume" in sys.argv)
"""


def start(configs, count, *, resume=False, code=TRAIN, changes=None, **environment):
    """Processes of ranks that train, one run after the other; changes: other settings of some of
    the ranks, by rank."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    world |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": 1, **environment}
    processes = []
    for rank in range(count):
        settings = [{**asdict(config), **(changes or {}).get(rank, {})} for config in configs]
        arguments = [json.dumps(settings), *["--resume"] * resume]
        own = {**world, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env={**os.environ, **{name: str(value) for name, value in own.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ended(processes, timeout=180):
    """(exit status, standard output, standard error) of each rank."""
    found = []
    for process in processes:
        output, errors = process.communicate(timeout=timeout)
        found.append((process.returncode, output, errors))
    return found


def train_together(configs, count, **options):
    """Train on so many ranks, to the end; gives what the first one says."""
    results = ended(start(configs, count, **options))
    assert [status for status, *_ in results] == [0] * count, results
    assert not any(output for _, output, _ in results[1:])
    return results[0][1]
