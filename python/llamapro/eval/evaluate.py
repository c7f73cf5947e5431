"""Evaluate a model by benchmarks, one after the other, into a file that is gone on with."""

import json
import logging
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from llamapro.data.chat import ChatTemplate
from llamapro.eval import code, dialogue, mint, sandbox, tasks
from llamapro.eval.completion import Completer
from llamapro.eval.endpoint import Endpoint
from llamapro.eval.records import check_limit
from llamapro.generate import check_sampling
from llamapro.hardware import environment
from llamapro.markdown import table
from llamapro.model import Llama
from llamapro.proof import whole_fingerprint
from llamapro.storage import read_json, shown, write_json, write_text
from llamapro.tokenizer import load_tokenizer

SEED = 1234  # of examples, and of what tasks shuffle: lm-eval's
PASS_AT = (1, 10, 100)  # k, of as many samples or more
PARTS = ("results", "n-shot", "n-samples", "versions", "seconds", "config")
SAME = ("fingerprint", "dtype", "limit", "samples", "temperature")  # of a file that is gone on with
FIRST = ("pass@1", "score", f"sr@{mint.TURNS}")
log = logging.getLogger("llamapro")


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    limit: questions of each benchmark, from its beginning; of a group, such as MMLU's 57 subjects,
    spread over its members. rows: how many texts are generated at a time. samples, temperature:
    programs for each problem, of which pass@k is estimated; one is greedy. allow_unsafe: run
    programs of the model also where nothing isolates them. judge: grades the answers to MT-Bench.
    feedback: let it comment on each turn of MINT too.
    """

    names: tuple[str, ...]
    data_root: Path | None = None
    limit: int | None = None
    rows: int = 8
    samples: int = 1
    temperature: float = 0.0
    allow_unsafe: bool = False
    judge: Endpoint | None = None
    feedback: bool = False

    def check(self, path: Path, out: Path | None) -> None:
        """Raise what would come up later before the model, whose directory is `path`, is loaded:
        ValueError for numbers that do not fit, for what is missing, and for a file `out` of other
        settings, FileNotFoundError for files of the data root, the tokenizer and the folder of
        `out`, EndpointError, IsolationError, and ImportError without the "eval" extra.
        """
        check_limit(self.limit)
        check_sampling(self.temperature, 1.0)
        if self.rows < 1 or self.samples < 1:
            got = f"batch_size {self.rows} and samples {self.samples}"
            raise ValueError(f"batch_size and samples of at least 1 expected, got {got}")
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"a temperature above 0 expected for {self.samples} samples, got 0")
        from llamapro.eval.harness import tokenizer_of  # says what is missing

        if out:
            _begun(out, self.settings())
        load_tokenizer(path)
        if not {*self.names} <= {*tasks.PROGRAMS, *tasks.DIALOGUES}:
            tokenizer_of(path)
        for name in self.names:
            self._check_one(name, path, out)
        if self.judge is not None and {*self.names} & {*tasks.DIALOGUES}:
            self.judge.check()

    def settings(self) -> dict:
        """What results depend on, but for the model and for what is asked."""
        names = ("limit", "samples", "temperature")
        return {name: getattr(self, name) for name in names}

    def _check_one(self, name: str, path: Path, out: Path | None) -> None:
        if name in (*tasks.PROGRAMS, *tasks.DIALOGUES) and self.data_root is None:
            raise ValueError(f"{name}: a data root with its files expected, got none")
        if self.data_root is not None and not self.data_root.is_dir():
            raise FileNotFoundError(f"{self.data_root}: a folder of benchmarks expected")
        if name in tasks.PROGRAMS:
            code.load(name, self.data_root)
        elif name in tasks.DIALOGUES:
            ChatTemplate.of(path)
            if name == "mint":
                for task in mint.TASKS:
                    mint.read_task(self.data_root, task)
            elif out is None:
                raise ValueError("mt_bench: a file expected, beside which its answers are written")
            else:
                dialogue.read_questions(self.data_root, self.limit)
        elif self.data_root is not None:
            tasks.check_files(name, self.data_root)
        if name in (*tasks.PROGRAMS, "mint"):
            sandbox.check(self.allow_unsafe)
        if self.feedback and self.judge is None:
            raise ValueError("feedback: a judge that gives it expected, got none")


def evaluate(model: Llama, path: Path, asked: Evaluation, out: Path | None = None) -> dict:
    """Evaluate a model whose directory is `path`, by what is not in the file `out` yet.

    Returns {"results": {name: {metric: value, metric_stderr: ...}}, "n-shot", "n-samples",
    "versions", "seconds", "config"}, as lm-eval's files have them, and writes it to `out` at first,
    so that files beside it, with what the model said, belong to it, and after each benchmark. A
    judge is asked for the grades that are missing. Raises ValueError when `out` is of another model
    or other settings.
    """
    config = _config(model, path, asked)
    found = {"seconds": {}, **(_begun(out, config) if out else {"results": {}}), "config": config}
    if out:
        write_json(out, found)
    for name in asked.names:
        graded = name == "mt_bench" and asked.judge
        if name in found["seconds"] and not graded:
            log.info("%s: taken from %s", name, out)
            continue
        log.info("%s ...", name)
        begun = time.perf_counter()
        by = _by_lm_eval
        if name in tasks.PROGRAMS:
            by = _by_programs
        elif name in tasks.DIALOGUES:
            by = _by_dialogues
        kept = found["seconds"].keys() - {name}  # a group's member may be asked for by itself too
        for part, values in by(model, path, name, asked, out).items():
            own = {task: value for task, value in values.items() if task not in kept}
            found.setdefault(part, {}).update(own)
        found["seconds"][name] = round(time.perf_counter() - begun, 1)
        if out:
            write_json(out, found)
    return found


def _config(model, path, asked) -> dict:
    return {
        "model": str(path),
        "fingerprint": whole_fingerprint(model),
        "dtype": str(model.norm.dtype).removeprefix("torch."),
        "device": model.norm.device.type,
        **asked.settings(),
        "data_root": None if asked.data_root is None else str(asked.data_root),
        "lm_eval": version("lm-eval"),
        **environment(model.norm.device),
    }


def _begun(out: Path, config: dict) -> dict:
    """What a file has of the same evaluation, by as much of its settings as is known."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: a file in a folder that exists expected")
    if not out.exists():
        return {"results": {}}
    found = read_json(out)
    parts = [name for name in PARTS if not isinstance(found.get(name, {}), dict)]
    if parts or not {"results", "config"} <= found.keys():
        raise ValueError(f"{out}: an evaluation expected, got {shown(found)}")
    for name in filter(config.__contains__, SAME):
        before = found["config"].get(name)
        if before != config[name]:
            raise ValueError(
                f"{out}: an evaluation with {name} {config[name]} expected, got {before};"
                " name another file"
            )
    return found


def _by_programs(model, path, name, asked, out) -> dict:
    """How many programs of a model pass; they are written beside `out`."""
    from tqdm import tqdm

    completer = Completer(model, path, asked.rows)
    problems = len(code.load(name, asked.data_root)[: asked.limit])
    with tqdm(total=problems * asked.samples, desc=name) as bar:
        said = code.evaluate(
            name,
            asked.data_root,
            completer.complete,
            limit=asked.limit,
            samples=asked.samples,
            temperature=asked.temperature,
            k=[k for k in PASS_AT if k <= asked.samples],
            allow_unsafe=asked.allow_unsafe,
            done=lambda sample: bar.update(),
        )
    if out:
        lines = "".join(json.dumps(sample) + "\n" for sample in said["samples"])
        write_text(_beside(out, name), lines)
    results = {"results": {name: _numbers(said["metrics"])}, "n-samples": {name: said["n"]}}
    return {**results, "n-shot": {name: code.TASKS[name].shots}}


def _by_dialogues(model, path, name, asked, out) -> dict:
    """MINT's success rates, or MT-Bench's scores where there is a judge."""
    answer = Completer(model, path, asked.rows).answer
    if name == "mint":
        run = partial(sandbox.run, allow_unsafe=asked.allow_unsafe)
        said = mint.evaluate(
            *(asked.data_root, answer, run),
            limit=asked.limit,
            feedback=asked.judge if asked.feedback else None,
            out=_beside(out, name) if out else None,
        )
        return {"results": {name: _numbers(said["metrics"])}, "n-samples": {name: said["n"]}}
    answers, graded = _beside(out, name), _beside(out, "mt_bench.judged")
    dialogue.write_answers(
        asked.data_root, answer, answers, Path(path).name, limit=asked.limit, batch=asked.rows
    )
    count = {name: len(dialogue.read_questions(asked.data_root, asked.limit))}
    if asked.judge is None:
        log.info("%s: the model's answers, for a judge", answers)
        return {"results": {name: {}}, "n-samples": count}
    said = dialogue.judge(asked.data_root, answers, graded, asked.judge, limit=asked.limit)
    for failed in said["failed"]:
        log.warning("mt_bench: question %s, turn %s: %s", *failed.values())
    return {"results": {name: _numbers(said["metrics"])}, "n-samples": count}


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name.removesuffix('.json')}.{name}.jsonl")


def _numbers(metrics: dict) -> dict[str, float]:
    """The score that counts comes first."""
    numbers = {key: value for key, value in metrics.items() if value is not None}
    return dict(sorted(numbers.items(), key=lambda item: item[0] not in FIRST))


def _by_lm_eval(model, path, name, asked, out) -> dict:
    """What lm-eval says of a benchmark, without what it says of itself and of the machine."""
    from llamapro.eval.harness import Harness

    found = ask(Harness(model, path, asked.rows), name, asked.data_root, asked.limit)
    results = {task: flat(values) for task, values in found["results"].items()}
    counts = {task: said["effective"] for task, said in found["n-samples"].items()}
    counts[name] = sum(counts.values())
    parts = {"n-shot": found["n-shot"], "versions": found["versions"]}
    return {"results": results, "n-samples": counts, **parts}


def ask(lm, name: str, data_root: Path | None, limit: int | None, samples: bool = False) -> dict:
    """What `lm_eval.simple_evaluate` gives for one of its models, but for what it says of the
    machine, which takes longer than a small benchmark. samples: with every answer."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a page of it for each task
    datasets.disable_progress_bars()
    random.seed(0)  # some tasks shuffle what they load
    np.random.seed(SEED)
    task = tasks.load(name, data_root)
    asked = None if limit is None else first_questions(task, limit)
    loaded = TaskManager(include_defaults=False).load([task])
    for leaf, places in (asked or {}).items():
        if not places:  # no place at all means all of them to lm-eval
            del loaded["tasks"][leaf]
    for leaf in loaded["tasks"].values():
        leaf.set_config("num_fewshot", leaf.get_config("num_fewshot") or 0)
        leaf.set_fewshot_seed(SEED)
    return evaluator.evaluate(lm, loaded, samples=asked, log_samples=samples)


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
        metric, shots = metric_of(name, values), found.get("n-shot", {}).get(name, "")
        questions = str(found["n-samples"][name])
        rows.append([name, str(shots), metric, _value(values, metric), questions, f"{seconds:.0f}"])
    return "\n".join(table(["benchmark", "shots", "metric", "value", "questions", "s"], rows))


def _value(values: dict, metric: str) -> str:
    if metric not in values:
        return "not judged"
    show = "{:.2f}" if metric == "score" else "{:.1%}"  # a judge's, from 1 to 10
    error = values.get(f"{metric}_stderr")
    return show.format(values[metric]) + ("" if error is None else " ± " + show.format(error))


def metric_of(name: str, values: dict) -> str:
    """The metric that counts: the paper's, or of another benchmark the first."""
    known = tasks.BENCHMARKS.get(name)
    return known.metric if known else next(iter(values), "")
