import os
import pty
import subprocess
import sys

import pytest
from llamapro.train import train
from llamapro.train.progress import Progress
from run_files import records

RECORD = {"step": 3, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 1e3}


def gone_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def gone_terminal():
    terminal, side = pty.openpty()
    os.close(terminal)
    return side


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(
    "output, reason",
    [
        (gone_reader, "Broken pipe"),
        (gone_terminal, "Input/output error"),
        (full_disk, "No space left on device"),
    ],
)
def test_output_that_cannot_be_written_ends_no_run(config, monkeypatch, capfd, output, reason):
    with open(output(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        train(config)
        print("also what the process prints later", file=stdout, flush=True)
    assert list(records(config)) == list(range(1, 21))
    said = capfd.readouterr().err
    assert said.count("nothing more is printed, standard output cannot be written") == 1
    assert reason in said and said.count("\n") == 1


def test_a_terminal_that_goes_away_ends_no_run():
    """Under the bar too, whose thread draws; with both outputs gone."""
    pytest.importorskip("rich")
    code = f"""
import os, sys, time
from llamapro.train.progress import Progress
with Progress(10) as progress:
    assert progress.bar
    progress.step({RECORD!r})
    os.close(int(sys.argv[1]))
    time.sleep(0.5)
    progress.say("an evaluation")
    progress.step({RECORD!r})
os.write(int(sys.argv[2]), b"done")
"""
    terminal, side = pty.openpty()
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(terminal), str(writer)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
        stdout=side,
        stderr=side,
        pass_fds=(terminal, writer),
    )
    for descriptor in (terminal, side, writer):
        os.close(descriptor)
    assert os.read(reader, 10) == b"done"
    os.close(reader)
    assert child.wait(timeout=60) == 0


def test_outliers_are_shown(capsys):
    progress = Progress(1000)
    progress.step({**RECORD, "step": 1})
    assert "loss 2.5000  lr 1.0e-03  1,000 tok/s" in capsys.readouterr().out
    progress.step({**RECORD, "loss_z": 4.9, "gradient_norm_z": 1.0})
    assert not capsys.readouterr().out  # too soon for another line
    progress.step({**RECORD, "loss_z": 7.25, "gradient_norm_z": 1.0})
    said = capsys.readouterr().out
    assert said.startswith("step 3/1000  loss 2.5000 ") and "tok/s  loss_z 7.2" in said
    assert "gradient_norm_z" not in said
