"""Records of an evaluation, a line of JSON each: what a benchmark gives, and what is finished."""

import json
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llamapro.storage import check_regular, lock, read_json_lines, shown


class Finished:
    """The records of a file, to which more are appended, each as soon as it is made."""

    def __init__(self, path: Path, records: list[dict], file):
        self.path, self.records, self._file = path, records, file

    def append(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)  # a failed write names none
            raise
        self.records.append(record)


@contextmanager
def finished(path: Path, fields: dict[str, type]) -> Iterator[Finished]:
    """The records of a file that a killed process may have left, to go on with; a last line that
    was cut off is dropped.

    Raises ValueError, which names the line, for any other that is none of these records, and
    BlockingIOError when another process is writing the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        check_regular(path)
    with open(path, "a", encoding="utf-8") as file, lock(path):
        with open(path, "rb+") as whole:
            whole.truncate(whole.read().rfind(b"\n") + 1)
        yield Finished(path, read_records(path, fields), file)


def read_records(path: Path, fields: dict[str, type]) -> list[dict]:
    """The records of a file. Raises FileNotFoundError, and ValueError for one that lacks a field
    or has it of another type."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: a file with a record in each line expected, got none")
    records = read_json_lines(path)
    for number, record in enumerate(records, 1):
        for name, kind in fields.items():
            if not isinstance(record.get(name), kind):
                got = shown(record.get(name))
                raise ValueError(
                    f"{path}, record {number}: {name} as {kind.__name__} expected, got {got}"
                )
    return records


def texts(value, count: int, place: str) -> list[str]:
    """A list of so many texts, or a ValueError that names the place."""
    if not isinstance(value, list) or [*map(type, value)] != [str] * count:
        raise ValueError(f"{place}: a list of {count} texts expected, got {shown(value)}")
    return value


def check_limit(limit: int | None) -> None:
    """Raise ValueError for a limit that leaves nothing."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")


def mean(values: list) -> float | None:
    """Nothing where there is no value."""
    return statistics.fmean(values) if values else None


def standard_error(values: list) -> float | None:
    """Of the mean, from the sample's standard deviation; nothing for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
