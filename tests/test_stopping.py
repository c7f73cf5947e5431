import os
import signal

import pytest
from llamapro.train import Interrupted, train
from llamapro.train import loop as module
from llamapro.train import run as run_module
from llamapro.train.loop import take_step
from llamapro.train.stopping import asked_to_stop
from run_files import records


@pytest.fixture(autouse=True)
def signals_of_a_terminal():
    """As under a shell, also where the tests were started with nohup or in the background."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signals_at(monkeypatch):
    """Sends this process some signals in the step of this number."""

    def call(number, *signals):
        def step(*arguments):
            if arguments[-1] + 1 == number:
                for sent in signals:
                    os.kill(os.getpid(), sent)
            return take_step(*arguments)

        monkeypatch.setattr(module, "take_step", step)

    return call


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM,),
        (signal.SIGHUP, signal.SIGHUP),  # from the system, and from the shell
        (signal.SIGINT, signal.SIGHUP),
    ],
)
def test_the_step_at_hand_is_saved(config, monkeypatch, signals_at, signals):
    before = {number: signal.getsignal(number) for number in (*signals, signal.SIGHUP)}
    signals_at(4, *signals)
    with pytest.raises(Interrupted, match=r"stopped after step 4; .* --resume"):
        train(config)
    assert [p.name for p in run_module.checkpoints(config.out)] == ["step-00000004"]
    assert before == {number: signal.getsignal(number) for number in before}
    monkeypatch.undo()
    train(config, resume=True)
    assert list(records(config)) == list(range(1, 21))


def test_a_second_ctrl_c_stops_at_once(config, signals_at):
    signals_at(4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert list(records(config)) == [1, 2, 3]


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_may_go_nowhere(capfd):
    """Standard error is the terminal that is gone, too."""
    stderr = os.dup(2)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    try:
        with asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)
    assert asked == [signal.SIGHUP]
