"""metrics.jsonl: a line for each step and each evaluation, in order and never half a line."""

import json
import logging
import math
import os
from collections import deque
from pathlib import Path

from llamapro import storage

WINDOW = 128  # steps
SCORED = ("loss", "gradient_norm")
log = logging.getLogger("llamapro")


class Metrics:
    """The open file. Lines that cannot be written wait in memory for the next one.

    path: None for ranks that keep in mind what the first one writes.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.evaluations: list[dict] = []
        self.recent: deque[dict] = deque(maxlen=WINDOW)
        self.unwritten: list[str] = []
        self.written = path.stat().st_size if path is not None and path.exists() else 0

    def append(self, record: dict) -> None:
        """Write a line, or say that it could not be written."""
        self._remember(record)
        if self.path is None:
            return
        self.unwritten.append(json.dumps(record) + "\n")
        try:
            self.flush()
        except OSError as error:
            if len(self.unwritten) == 1:
                log.warning("lines are kept in memory until one can be written: %s", error)

    def flush(self) -> None:
        """Write all lines that are not; an OSError leaves none of them, but those before whole."""
        if not self.unwritten:
            return
        left = "".join(self.unwritten).encode()
        with open(self.path, "ab", buffering=0) as file:
            self.written = min(self.written, os.fstat(file.fileno()).st_size)
            file.truncate(self.written)  # of what an earlier failure may have left
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError as error:
                error.filename = str(self.path)  # a failed write names none
                file.truncate(self.written)
                raise
            self.written = file.tell()
        self.unwritten.clear()

    def sync(self) -> None:
        """Wait until what is written is on the disk."""
        if self.path is not None and self.path.exists():
            storage.sync(self.path)

    def z_scores(self, metrics: dict) -> dict[str, float]:
        """How many standard deviations a step's loss and gradient norm lie from the mean of the
        newest 128, itself among them; nothing before there are 128 earlier ones."""
        if len(self.recent) < WINDOW:
            return {}
        return {
            f"{name}_z": z_score([*(r[name] for r in self.recent), metrics[name]][1:])
            for name in SCORED
        }

    def carried(self) -> list[dict]:
        """The records on which later ones and the summary depend."""
        return [*self.evaluations, *self.recent]

    def restore(self, step: int, carried: list[dict]) -> None:
        """Drop what comes after `step`, put back what its checkpoint carried, say what is lost.

        An evaluation that it did not carry is dropped too, and can be made again: nothing has
        proven the model that was evaluated.
        """
        if self.path is None:
            for record in carried:
                self._remember(record)
            return
        found = {_place(record): record for record in self.read() if record["step"] <= step}
        wrong = sum(found.get(_place(record)) != record for record in carried)
        found = {place: record for place, record in found.items() if "loss" in record}
        found |= {_place(record): record for record in carried}
        missing = sum((number, False) not in found for number in range(1, step + 1))
        if wrong or missing:
            log.warning(
                "%s: %d lines were lost or changed since step %d was saved and are restored from"
                " there; those of %d steps stay lost",
                self.path,
                wrong,
                step,
                missing,
            )
        records = [found[place] for place in sorted(found)]
        storage.write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.written = self.path.stat().st_size
        for record in records:
            self._remember(record)

    def read(self) -> list[dict]:
        """The whole lines of the file. Raises ValueError for what is no regular file."""
        if not self.path.exists():
            return []
        storage.check_regular(self.path)  # a device may have no end
        text = self.path.read_text(encoding="utf-8", errors="replace")
        records = map(_record, text.splitlines(keepends=True))
        return [record for record in records if record]

    def _remember(self, record: dict) -> None:
        (self.evaluations if "perplexity" in record else self.recent).append(record)


def z_score(values: list[float]) -> float:
    """Of the last value among all of them; 0 when they are equal."""
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    return (values[-1] - mean) / deviation if deviation else 0.0


def _place(record: dict) -> tuple[int, bool]:
    """What a line is about, in the order of lines: a step's evaluation follows the step."""
    return record["step"], "perplexity" in record


def _record(line: str) -> dict | None:
    """Nothing for a line that was cut short, or that a run does not write."""
    try:
        record = json.loads(line) if line.endswith("\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
