"""Runs of several ranks on this machine, each a process with what torchrun tells it.

They are forked from a server that has imported everything: most of a short run is imports.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

import torch._dynamo  # fully_shard does
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401 (for the server)
from llamapro.command_line import said_in_one_line
from llamapro.ranks import started
from llamapro.train.loop import train
from torch.distributed import TCPStore

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["run_ranks"])


def train_each(configs, resume):
    """Train one run after the other, as the command line does."""
    with said_in_one_line(), started("cpu", configs[0].timeout):
        for config in configs:
            train(config, resume=resume)


def refuse_each(configs, resume):
    """Print what the command line would say of each run that is refused."""
    with started("cpu", configs[0].timeout):
        for config in configs:
            try:
                with said_in_one_line():
                    train(config, resume=resume)
            except SystemExit as refused:
                if refused.code != 1:
                    print(refused.code)
            else:
                print("it was not refused")


class Rank:
    """A process that works on `work(configs, resume)`, and what it says."""

    def __init__(self, work, configs, resume, environment, store):
        self.says, self.store = Path(mkdtemp()), store
        arguments = self.says, environment, work, configs, resume
        self.process = FORKS.Process(target=_rank, args=arguments)
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # for the server
            self.process.start()

    @property
    def running(self):
        return self.process.is_alive()

    def send(self, number):
        os.kill(self.process.pid, number)

    def said(self, name):
        return (self.says / name).read_text()

    def ended(self, timeout):
        """(exit status, standard output, standard error)."""
        self.process.join(timeout)
        assert not self.running, (self.said("output"), self.said("errors"))
        return self.process.exitcode, self.said("output"), self.said("errors")


def _rank(says, environment, work, configs, resume):
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(says / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run under nohup
    work(configs, resume)


def start(configs, count, *, resume=False, work=train_each, others=None, missing=()):
    """Ranks that train, one run after the other. others: the runs of a rank that has others, by
    rank. missing: ranks that are not there."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    world["TORCHELASTIC_USE_AGENT_STORE"] = True
    ranks = []
    for rank in set(range(count)) - {*missing}:
        own = {**world, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        arguments = work, (others or {}).get(rank, configs), resume
        ranks.append(Rank(*arguments, {name: str(value) for name, value in own.items()}, store))
    return ranks


def ended(ranks, timeout=120):
    """(exit status, standard output, standard error) of each rank; those that hang are ended."""
    limit = time.monotonic() + timeout
    try:
        return [rank.ended(max(0, limit - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()


def train_together(configs, count, **options):
    """What `start` and `ended` say of runs that end well; gives what the first rank says."""
    results = ended(start(configs, count, **options))
    assert [status for status, *_ in results] == [0] * count, results
    assert not any(output for _, output, _ in results[1:])
    return results[0][1]
