"""Runs under torchrun of which ranks are killed, and those that are asked to stop."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from llamapro.train.config import as_options
from llamapro.train.run import checkpoints
from run_files import records
from run_ranks import train_together

KILLS = int(os.environ.get("LLAMAPRO_KILLS", 2))
LOST = " lost another rank, or waited 600 s for one: "


def torchrun(config, *options):
    """A process that starts two ranks of `llamapro train`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [*options, "-m", "llamapro", "train", *as_options(asdict(config))]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )


def workers(agent, restart=0):
    """The processes of the ranks after so many restarts, in order, once both are there."""
    found = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        with suppress(OSError):  # it has ended since
            said = (Path("/proc") / child / "environ").read_bytes().decode().split("\0")
            found[dict(line.partition("=")[::2] for line in said).get("RANK")] = int(child), said
    ours = [found[n] for n in ("0", "1") if n in found]
    ours = [child for child, said in ours if f"TORCHELASTIC_RESTART_COUNT={restart}" in said]
    return ours if len(ours) == 2 else None


def wait_for(condition, seconds=120):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return found


def steps(config):
    return len(records(config)) if (Path(config.out) / "metrics.jsonl").exists() else 0


def ended(agent, seconds=120):
    """(exit status, lines that ranks have said, and those of torchrun)."""
    try:
        _, errors = agent.communicate(timeout=seconds)
    finally:
        agent.terminate()  # and with it what hangs
    lines = errors.splitlines()
    ours = [line for line in lines if line.startswith(("llamapro: ", "stop"))]
    return agent.returncode, ours, lines


def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint(config):
    long = replace(config, steps=10**5, eval_every=10**6, checkpoint_every=10**6, shard="full")
    agent = torchrun(long)
    wait_for(lambda: steps(long))
    agent.send_signal(signal.SIGTERM)
    status, ours, _ = ended(agent)
    (saved,) = checkpoints(long.out)
    last = f"stopped after step {int(saved.name[5:])}; the same command with --resume goes on"
    assert status != 0 and ours == ["stopping after this step", last]


def test_ranks_that_are_killed_at_random_go_on_bit_for_bit(config):
    """The first before there is a checkpoint; after the last torchrun ends, and names it."""
    config = replace(config, steps=22 * KILLS + 30, eval_every=50, checkpoint_every=5)
    calm = replace(config, out=config.out + "-calm", checkpoint_every=1000)
    train_together([calm], 2)
    chance, agent = random.Random(0), torchrun(config, f"--max-restarts={KILLS - 1}")
    for kill in range(KILLS):
        before = steps(config) + chance.randrange(20) if kill else -1
        running = wait_for(lambda kill=kill: workers(agent, kill))
        wait_for(lambda before=before: steps(config) > before)
        time.sleep(chance.uniform(0, 0.05))
        killed = chance.randrange(2)
        os.kill(running[killed], signal.SIGKILL)
    status, ours, lines = ended(agent)
    assert status == 1 and len(ours) <= KILLS and all(LOST in line for line in ours)
    assert ours[-1].startswith(f"llamapro: rank {1 - killed} ")
    assert any(line.split()[:3] == ["rank", ":", str(killed)] for line in lines)
    assert any("Signal 9 (SIGKILL)" in line for line in lines)
    assert steps(config) < config.steps, "the kills fell into the run"
    train_together([config], 2, resume=True)
    for key in ("loss", "gradient_norm", "perplexity"):
        assert records(config, key) == records(calm, key)
    final = (Path(c.out) / "final" / "model.safetensors" for c in (config, calm))
    assert len({file.read_bytes() for file in final}) == 1
