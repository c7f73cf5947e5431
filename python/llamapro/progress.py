"""What a run says while it works: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time

PLAIN_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Shows step, loss, learning rate, tokens/s and the remaining time."""

    def __init__(self, steps: int, start: int = 0):
        self.steps, self.first = steps, start
        self.began = self.said = 0.0
        self.bar = _bar(steps, start) if sys.stdout.isatty() else None

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.4f}  lr {learning_rate:.1e}  {tokens_per_second:,.0f} tok/s"
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=step, description=text)
            return
        now = time.perf_counter()
        self.began = self.began or now  # the first step also warms up
        if now - self.said >= PLAIN_EVERY or step == self.steps:
            self.said = now
            done = step - self.first - 1
            left = (now - self.began) / done * (self.steps - step) if done else None
            left = "" if left is None else f"  {left / 60:.1f} min left"
            print(f"step {step}/{self.steps}  {text}{left}", flush=True)

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


def _bar(steps: int, start: int):
    try:
        from rich import progress
    except ImportError:  # the "train" extra is not installed
        return None
    bar = progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.description}"),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    bar.add_task("starting", total=steps, completed=start)
    return bar
