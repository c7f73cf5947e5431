"""Evaluate a model by benchmarks, one after the other, into a file that is gone on with."""

import logging
import math
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from llamapro.eval import tasks
from llamapro.hardware import environment
from llamapro.markdown import table
from llamapro.model import Llama, stock_tensors
from llamapro.proof import combined, digests, settings
from llamapro.storage import read_json, write_json

log = logging.getLogger("llamapro")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    limit: questions of each benchmark, from its beginning; of a group, such as MMLU's 57 subjects,
    spread over its members. rows: how many texts are generated at a time. allow_unsafe: run
    programs of the model also where nothing isolates them.
    """

    names: tuple[str, ...]
    data_root: Path | None = None
    limit: int | None = None
    rows: int = 8
    allow_unsafe: bool = False

    def check(self) -> None:
        """Raise what would come up later before a model is loaded: ValueError for a limit below 1,
        FileNotFoundError for a file that a data root lacks, ImportError without the "eval" extra.
        """
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.rows < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.rows}")
        if self.data_root is not None:
            if not self.data_root.is_dir():
                raise FileNotFoundError(f"{self.data_root}: a folder of benchmarks expected")
            for name in self.names:
                tasks.check_files(name, self.data_root)
        from llamapro.eval import harness  # noqa: F401  # says what is missing


def evaluate(model: Llama, path: Path, asked: Evaluation, out: Path | None = None) -> dict:
    """Evaluate a model whose directory is `path`, by what is not in the file `out` yet.

    Returns {"results": {name: {metric: value, metric_stderr: ...}}, "n-shot", "n-samples",
    "versions", "seconds", "config"}, as lm-eval's files have them, and writes it to `out` after
    each benchmark. Raises ValueError when `out` is of another model or other settings.
    """
    asked.check()
    config = _config(model, path, asked)
    found = _begun(out, config) if out else {"results": {}}
    found["config"] = config
    for name in asked.names:
        if name in found["results"]:
            log.info("%s: taken from %s", name, out)
            continue
        begun = time.perf_counter()
        for part, values in _by_lm_eval(model, path, name, asked).items():
            found.setdefault(part, {}).update(values)
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - begun, 1)
        if out:
            write_json(out, found)
    return found


def _config(model, path, asked) -> dict:
    whole = {**settings(model.config), **digests(stock_tensors(model))}
    said = {name: asdict(asked)[name] for name in ("limit", "data_root")}
    return {
        "model": str(path),
        "fingerprint": combined(whole),
        "dtype": str(model.norm.dtype).removeprefix("torch."),
        "device": model.norm.device.type,
        "limit": said["limit"],
        "data_root": None if asked.data_root is None else str(asked.data_root),
        "lm_eval": version("lm-eval"),
        **environment(model.norm.device),
    }


def _begun(out: Path, config: dict) -> dict:
    """What a file has of the same evaluation."""
    if not out.exists():
        return {"results": {}}
    found = read_json(out)
    for name in ("fingerprint", "dtype", "limit"):
        before = found.get("config", {}).get(name)
        if before != config[name]:
            raise ValueError(
                f"{out}: an evaluation with {name} {config[name]} expected, got {before};"
                " name another file"
            )
    return found


def _by_lm_eval(model, path, name, asked) -> dict:
    """What lm-eval says of a benchmark, without what it says of itself."""
    import datasets
    from lm_eval import simple_evaluate

    from llamapro.eval.harness import Harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a page of it for each task
    datasets.disable_progress_bars()
    task = tasks.load(name, asked.data_root)
    found = simple_evaluate(
        Harness(model, path, asked.rows),
        tasks=[task],
        samples=None if asked.limit is None else first_questions(task, asked.limit),
        log_samples=False,
    )
    results = {task: flat(values) for task, values in found["results"].items()}
    counts = {task: said["effective"] for task, said in found["n-samples"].items()}
    counts[name] = sum(counts.values())
    parts = {"n-shot": found["n-shot"], "versions": found["versions"]}
    return {"results": results, "n-samples": counts, **parts}


def first_questions(task, limit: int) -> dict[str, list[int]]:
    """Which questions of each of lm-eval's tasks are asked: `limit` in all."""
    leaves = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    sizes = {leaf.task_name: len(leaf.eval_docs) for leaf in leaves}
    shares = dict.fromkeys(sizes, 0)
    while sum(shares.values()) < min(limit, sum(sizes.values())):
        for name, size in sizes.items():
            if shares[name] < size and sum(shares.values()) < limit:
                shares[name] += 1
    return {name: [*range(count)] for name, count in shares.items()}


def flat(values: dict) -> dict[str, float]:
    """lm-eval's {"acc,none": ..., "acc_stderr,none": ...} as {"acc": ..., "acc_stderr": ...}.

    The first filter of a metric has its plain name; others stay as they are.
    """
    found: dict[str, float] = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if chosen and isinstance(value, int | float) and math.isfinite(value):
            found[key if metric in found else metric] = value
    return found


def results_table(found: dict) -> str:
    """A row for each benchmark: the metric that counts, with its standard error."""
    rows = []
    for name, seconds in found["seconds"].items():
        values = found["results"][name]
        metric = metric_of(name, values)
        error = values.get(f"{metric}_stderr")
        rows.append(
            [
                name,
                str(found.get("n-shot", {}).get(name, "")),
                metric,
                f"{values[metric]:.1%}" + (f" ± {error:.1%}" if error is not None else ""),
                str(found["n-samples"][name]),
                f"{seconds:.0f}",
            ]
        )
    return "\n".join(table(["benchmark", "shots", "metric", "value", "questions", "s"], rows))


def metric_of(name: str, values: dict) -> str:
    """The metric that counts: the paper's, or of another benchmark the first."""
    known = tasks.BENCHMARKS.get(name)
    return known.metric if known else next(iter(values))
