"""Power may be lost at any call that changes a file: the run then goes on as if it had not been."""

import builtins
import io
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from llamapro import expand
from llamapro.train import train
from llamapro.train.run import Run
from run_files import records

CALLS = ("open", "rename", "replace", "mkdir", "rmdir", "unlink", "truncate", "ftruncate")


class Killed(BaseException):
    """No handler of errors may take it for one."""


class Disk:
    """Lets so many calls through while it watches; none after, as of a process that is dead."""

    def __init__(self):
        self.watching, self.left, self.seen = False, 0, []

    def pass_through(self, name):
        if self.watching:
            if not self.left:
                raise Killed(name)
            self.left -= 1
            self.seen.append(name)

    def guard(self, name, function):
        def call(*args, **options):
            self.pass_through(name)
            return function(*args, **options)

        return call

    def opened(self, function):
        def call(*args, **options):
            self.pass_through("open")
            return (
                File(self, function(*args, **options))
                if self.watching
                else function(*args, **options)
            )

        return call


class File:
    """An open file of which the fatal write leaves the first half."""

    def __init__(self, disk, file):
        self.disk, self.file = disk, file

    def write(self, content):
        try:
            self.disk.pass_through("write")
        except Killed:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise
        return self.file.write(content)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    for name in CALLS:
        monkeypatch.setattr(os, name, disk.guard(name, getattr(os, name)))
    monkeypatch.setattr(os, "fsync", disk.guard("fsync", lambda descriptor: None))  # slow
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", disk.opened(module.open))
    return disk


@pytest.fixture
def config(config, tiny, tmp_path):
    model = expand(tiny(num_hidden_layers=1, hidden_size=8, intermediate_size=8), new_blocks=1)
    return replace(
        config,
        model=str(model.save_pretrained(tmp_path / "small")),
        steps=4,
        batch_size=1,
        gradient_accumulation_steps=1,
        seq_len=8,
        eval_tokens=8,
        eval_every=100,
        checkpoint_every=1,
        dtype="float32",
    )


def every_stop(config, disk, monkeypatch, method, when):
    """The names of all calls of a method of Run, each of which was the last of a process once.

    when: whether to watch, from the method's arguments.
    """
    calm = config.out + "-calm"
    train(replace(config, out=calm))
    function = getattr(Run, method)

    def watched(run, *args, **options):
        disk.watching = when(*args)
        result = function(run, *args, **options)
        disk.watching = False
        return result

    monkeypatch.setattr(Run, method, watched)
    start = Path(config.out + "-start")
    disk.left = 0
    with pytest.raises(Killed):
        train(replace(config, out=str(start)))
    disk.watching, left = False, 0
    while True:
        shutil.rmtree(config.out, ignore_errors=True)
        shutil.copytree(start, config.out)
        disk.left, disk.seen = left, []
        try:
            train(config, resume=True)
        except Killed:
            disk.watching, disk.left = False, 10**9
            train(config, resume=True)
            left += 1
        else:
            left = None
        for key in ("loss", "gradient_norm", "perplexity"):
            assert records(config, key) == records(replace(config, out=calm), key), disk.seen
        for name in ("final/model.safetensors", "final/config.json"):
            assert (Path(config.out) / name).read_bytes() == (Path(calm) / name).read_bytes()
        if left is None:
            return disk.seen


def test_a_checkpoint_may_be_stopped_anywhere(config, disk, monkeypatch):
    """The third, which drops the first."""
    calls = every_stop(config, disk, monkeypatch, "write_checkpoint", lambda step: step == 3)
    assert {"open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"} <= set(calls)
    assert calls.count("write") > 10


def test_the_end_may_be_stopped_anywhere(config, disk, monkeypatch):
    calls = every_stop(config, disk, monkeypatch, "finish", lambda peak_memory: True)
    assert {"open", "write", "fsync", "rename", "replace", "mkdir"} <= set(calls)
    assert calls.count("write") > 10
