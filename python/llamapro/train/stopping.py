"""Signals that end a run after the step at hand, with a checkpoint."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llamapro.ranks import ALONE, Ranks


class Interrupted(RuntimeError):
    """The run was stopped by Ctrl-C, SIGTERM or a hang-up; it says which checkpoint is left."""


@contextmanager
def asked_to_stop(ranks: Ranks = ALONE) -> Iterator[list[int]]:
    """Gives a list that is empty until Ctrl-C, SIGTERM or SIGHUP; a second Ctrl-C or SIGTERM ends
    at once. A second SIGHUP does not: a lost terminal sends it, and then the shell does too. Nor
    does any of several ranks: a scheduler sends each one to them and to torchrun, which sends it
    to them too, and ends them itself when they take long."""
    asked = []

    def remember(number, frame):
        if not asked and ranks.size > 1:
            if ranks.first:
                say("stopping after this step")
        elif not asked:
            say("stopping after this step; again to stop at once")
            for again in before.keys() - {signal.SIGHUP}:
                signal.signal(again, before[again])
        asked.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup asks for
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Write a line to standard error, past Python's buffer, which a signal may have found in use;
    where that is a terminal that is gone, nothing is written."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
