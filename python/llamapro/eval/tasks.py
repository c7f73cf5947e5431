"""Benchmarks of lm-eval: the paper's settings, and local files in place of the hub.

LLaMA Pro (2401.02415) takes shots and metrics as the Open LLM Leaderboard of its time. A data root
has a folder of .jsonl files for each benchmark, with rows as the hub has them.
"""

import difflib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llamapro.data.sources import rows_of
from llamapro.storage import shown


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of lm-eval as the paper sets it."""

    shots: int
    metric: str  # the one the paper reports
    definitions: str  # folder of lm-eval's
    folder: str  # of a data root
    fields: tuple[str, ...]  # that every row has
    files: dict[str, str] = field(default_factory=dict)  # split: name of its file
    optional: tuple[str, ...] = ()  # splits that a data root may lack


BENCHMARKS = {
    "arc_challenge": Benchmark(
        *(25, "acc_norm", "arc", "arc_challenge", ("question", "choices", "answerKey")),
        {"train": "train", "validation": "validation", "test": "test"},
    ),
    "hellaswag": Benchmark(
        *(10, "acc_norm", "hellaswag", "hellaswag"),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        {"train": "train", "validation": "validation"},
        optional=("train",),  # examples then come from the other questions
    ),
    "mmlu": Benchmark(
        *(5, "acc", "mmlu/default", "mmlu", ("question", "subject", "choices", "answer")),
        {"dev": "dev", "test": "test"},
    ),
    "truthfulqa_mc2": Benchmark(
        *(0, "acc", "truthfulqa", "truthfulqa", ("question", "mc2_targets")),
        {"validation": "mc_v1_817"},
    ),
    "winogrande": Benchmark(
        *(5, "acc", "winogrande", "winogrande", ("sentence", "option1", "option2", "answer")),
        {"train": "train_s", "validation": "validation"},
    ),
    "gsm8k": Benchmark(
        *(5, "exact_match", "gsm8k", "gsm8k", ("question", "answer")),
        {"train": "train", "test": "test"},
    ),
}
PROGRAMS = ("gsm8k_pot", "humaneval", "mbpp")  # see code.py
DIALOGUES = ("mt_bench", "mint")  # see dialogue.py and mint.py
PAPER = (*BENCHMARKS, *PROGRAMS)


def names_of(tasks: str) -> list[str]:
    """The benchmarks that "paper" or names with commas between them name, lm-eval's among them,
    where a tag of lm-eval stands for the tasks that have it.

    Raises ValueError for a name that nobody knows, with the nearest.
    """
    asked = [name for name in map(str.strip, tasks.split(",")) if name]
    if not asked:
        raise ValueError(f'"paper" or tasks such as {",".join(PAPER)} expected, got {tasks!r}')
    names = dict.fromkeys(n for name in asked for n in (PAPER if name == "paper" else (name,)))
    ours = (*PAPER, *DIALOGUES)
    if not names.keys() <= {*ours}:
        manager = _manager(None)
        every = (*ours, *manager.all_tasks)
        for name in names.keys() - {*every}:
            near = ", ".join(difflib.get_close_matches(name, every, 4)) or "none"
            raise ValueError(f"a task that is known expected, got {name!r}; the nearest: {near}")
        tags = {tag: sorted(manager.task_index[tag].tags) for tag in manager.all_tags}
        names = dict.fromkeys(n for name in names for n in tags.get(name, (name,)))
    return [*names]


def load(name: str, data_root: Path | None):
    """lm-eval's task of this name, or group of tasks, with the paper's shots if it is one of its.

    Raises FileNotFoundError where a data root lacks a file, ValueError where a row lacks a field,
    and what `datasets` raises where there is neither a data root nor a network.
    """
    from lm_eval.api.group import AggMetricConfig, Group

    benchmark = BENCHMARKS.get(name)
    if benchmark is None or data_root is None:
        shots = {} if benchmark is None else {"num_fewshot": benchmark.shots}
        manager = _manager(benchmark)
        kind = "group" if name in manager.all_groups else "task"
        return _one(manager, {kind: name, **shots})
    manager, splits = _manager(benchmark), _splits(benchmark, Path(data_root))
    if name != "mmlu":
        return _one(manager, {"task": name, **_local(benchmark, splits)})
    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig("acc")])
    for subject, own in _by_subject(splits).items():
        group.add(_one(manager, {"task": f"mmlu_{subject}", **_local(benchmark, own)}))
    return group


def check_files(name: str, data_root: Path) -> None:
    """Raise FileNotFoundError where a data root lacks a file of a benchmark of lm-eval, ValueError
    where a row lacks a field, and where rows are missing."""
    if name not in BENCHMARKS:
        return
    splits, shots = _splits(BENCHMARKS[name], Path(data_root)), BENCHMARKS[name].shots
    for split, rows in splits.items():
        if not rows:
            raise ValueError(f"{name}: rows of {split} in {data_root} expected, got none")
    for subject, own in _by_subject(splits).items() if name == "mmlu" else ():
        if len(own["dev"]) < shots:
            got = len(own["dev"])
            raise ValueError(f"{name}: {shots} rows of {subject} in dev expected, got {got}")


def _files(benchmark: Benchmark, data_root: Path) -> dict[str, list[Path]]:
    found = {}
    for split, stem in benchmark.files.items():
        folder = data_root / benchmark.folder
        files = [*sorted(folder.glob(f"{stem}.jsonl")), *sorted(folder.glob(f"{stem}.part*.jsonl"))]
        if files:
            found[split] = files
        elif split not in benchmark.optional:
            raise FileNotFoundError(f"{folder / stem}.jsonl expected, or its parts; there is none")
    return found


def _splits(benchmark, data_root) -> dict[str, list[dict]]:
    return {
        split: [row for file in files for row in _rows(file, benchmark.fields)]
        for split, files in _files(benchmark, data_root).items()
    }


def _by_subject(splits) -> dict[str, dict[str, list[dict]]]:
    found = {row["subject"]: {split: [] for split in splits} for row in splits["test"]}
    for split, rows in splits.items():
        for row in rows:
            if row["subject"] in found:
                found[row["subject"]][split].append(row)
    return found


def _rows(file: Path, fields: tuple[str, ...]) -> Iterator[dict]:
    for number, row in rows_of(file).numbered():
        missing = [name for name in fields if row.get(name) is None]
        if missing:
            raise ValueError(f"{file}, row {number}: {missing} expected, got {shown([*row])}")
        yield row


def _local(benchmark, splits) -> dict:
    """What of a task's definition takes the place of the hub."""
    from datasets import Dataset, DatasetDict

    sets = DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})
    missing = {f"{split}ing_split": None for split in benchmark.optional if split not in splits}
    return {
        "num_fewshot": benchmark.shots,
        "custom_dataset": functools.partial(_given, sets),
        **missing,
    }


def _given(sets, **said):
    return sets


def _manager(benchmark: Benchmark | None):
    """lm-eval's definitions, those of one benchmark alone where that will do: there are 14,000."""
    return _definitions(None if benchmark is None else benchmark.definitions)


@functools.cache
def _definitions(folder: str | None):
    from lm_eval import tasks

    if folder is None:
        return tasks.TaskManager()
    path = Path(tasks.__file__).parent / folder
    return tasks.TaskManager(include_defaults=False, include_path=str(path))


def _one(manager, definition: dict):
    """The task or group of a definition; as a group's member it may change what is defined."""
    (member,) = manager.load({"group": "", "task": [definition]})["groups"][""]
    return member
