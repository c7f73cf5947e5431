"""What a run says while it works: a progress bar on a terminal, plain lines elsewhere."""

import io
import os
import sys
import time

from llamapro.train.stopping import say

PLAIN_EVERY = 10.0  # seconds between plain lines
OUTLIER = 5.0  # standard deviations


class Progress:
    """Shows step, loss, learning rate, tokens/s and the remaining time; a `quiet` rank, for which
    another speaks, shows nothing."""

    def __init__(self, steps: int, start: int = 0, *, quiet: bool = False):
        self.steps, self.first = steps, start
        self.began = self.said = 0.0
        self.output = Output(io.StringIO() if quiet else sys.stdout)
        self.bar = _bar(steps, start, self.output) if self.output.isatty() else None

    def step(self, record: dict) -> None:
        """Show a step's line of metrics.jsonl; one with an outlier is always shown."""
        step = record["step"]
        text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.1e}"
        text += f"  {record['tokens_per_second']:,.0f} tok/s"
        scores = {name: z for name, z in record.items() if name.endswith("_z") and z > OUTLIER}
        text += "".join(f"  {name} {z:.1f}" for name, z in scores.items())
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, description=text)
            return
        now = time.perf_counter()
        self.began = self.began or now  # the first step also warms up
        if now - self.said >= PLAIN_EVERY or step == self.steps or scores:
            self.said = now
            done = step - self.first - 1
            left = (now - self.began) / done * (self.steps - step) if done else None
            left = "" if left is None else f"  {left / 60:.1f} min left"
            print(f"step {step}/{self.steps}  {text}{left}", file=self.output, flush=True)

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=self.output, flush=True)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


class Output:
    """Standard output, but for what ends a run: a reader that went away, a terminal that is gone, a
    full disk. From then on nothing is printed, and standard error says so once."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str) -> int:
        try:
            return self.file.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Python keeps what it could not write and tries again, even as it ends: into nothing."""
        say(f"nothing more is printed, standard output cannot be written: {error}")
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.file.fileno())
        os.close(nothing)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def _bar(steps: int, start: int, output: Output):
    try:
        from rich import console, progress
    except ImportError:  # the "train" extra is not installed
        return None
    bar = progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.description}"),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console.Console(file=output),
    )
    bar.add_task("starting", total=steps, completed=start)
    return bar
