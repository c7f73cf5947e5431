"""What evaluation files say of the models of a report: accuracies, their errors and changes."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llamapro.eval.evaluate import metric_of
from llamapro.markdown import table
from llamapro.model import Llama
from llamapro.proof import whole_fingerprint
from llamapro.storage import read_json, shown
from llamapro.train.config import DTYPES

CERTAIN = 2  # standard errors: a difference within them is none
SETTINGS = {"model": str, "fingerprint": str, "dtype": str, "limit": int | None}


@dataclass(frozen=True)
class Score:
    """What a model got in a benchmark."""

    metric: str
    value: float  # from 0 to 1
    stderr: float | None  # lm-eval has none for a single question
    shots: int | None
    questions: int | None


@dataclass(frozen=True)
class Evaluation:
    """What a file says: of which model, how it was evaluated, and its scores by benchmark."""

    file: Path
    model: str
    fingerprint: str
    dtype: str
    limit: int | None
    scores: dict[str, Score]


def read_evaluations(files) -> list[Evaluation]:
    """What files of `llamapro.eval.evaluate` say. Raises ValueError for other files, and for those
    of different settings, which cannot be compared."""
    found = [_read(Path(file)) for file in files]
    _check_alike(found)
    return found


def scores_of(models: list[Path], evaluations: list[Evaluation]) -> list[dict[str, Score]]:
    """The scores of each model, by benchmark.

    An evaluation belongs to the model whose path it has, or else whose fingerprint. Raises
    ValueError for one that belongs to none, and for a benchmark that a model has twice.
    """
    scores: list[dict[str, Score]] = [{} for _ in models]
    files, prints = {}, {}
    for evaluation in evaluations:
        owner = _owner(evaluation, models, prints)
        for name, score in evaluation.scores.items():
            before = files.setdefault((owner, name), evaluation.file)
            if name in scores[owner]:
                raise ValueError(
                    f"{evaluation.file}: {shown(name)} of {models[owner]} once expected,"
                    f" got it in {before} too"
                )
            scores[owner][name] = score
    return scores


def _read(file: Path) -> Evaluation:
    found = {"n-shot": {}, **read_json(file)}
    parts = ("results", "n-shot", "n-samples", "seconds", "config")
    missing = [name for name in parts if not isinstance(found.get(name), dict)]
    if missing:
        raise ValueError(f"{file}: an evaluation by benchmarks expected, got one without {missing}")
    config = {name: found["config"].get(name) for name in SETTINGS}
    for name, kind in SETTINGS.items():
        if not isinstance(config[name], kind) or "\0" in str(config[name]):
            raise ValueError(f"{file}: config: {name} expected, got {shown(config[name])}")
    if config["dtype"] not in DTYPES[1:]:
        got = shown(config["dtype"])
        raise ValueError(f"{file}: config: dtype of {DTYPES[1:]} expected, got {got}")
    # What was asked for has its seconds; the parts of a group, such as mmlu_astronomy, have not.
    # A judge's scores are no accuracies: those of MT-Bench stay in the file.
    names = [name for name in found["seconds"] if name != "mt_bench"]
    scores = {name: _score(file, name, found) for name in names}
    return Evaluation(file, **config, scores=scores)


def _score(file: Path, name: str, found: dict) -> Score:
    values, shots, questions = (found[k].get(name) for k in ("results", "n-shot", "n-samples"))
    values = values if isinstance(values, dict) else {}
    metric = metric_of(name, values) if values else "results"
    score = Score(metric, values.get(metric), values.get(f"{metric}_stderr"), shots, questions)
    right = (
        f"{name}{metric}".isprintable()
        and _is_share(score.value)
        and (score.stderr is None or _is_share(score.stderr))
        and all(isinstance(count, int | None) for count in (shots, questions))
    )
    if not right:
        raise ValueError(
            f"{file}: an accuracy from 0 to 1 in {shown(name)} expected, with its standard error,"
            f" shots and questions, got {shown(score)}"
        )
    return score


def _is_share(value) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _check_alike(found: list[Evaluation]) -> None:
    """Raise ValueError unless dtype and limit, and of each benchmark shots, metric and how many
    questions there are, are the same."""
    first: dict[tuple[str, str], tuple[Path, object]] = {}
    for evaluation in found:
        said = {("", name): getattr(evaluation, name) for name in ("dtype", "limit")}
        for name, score in evaluation.scores.items():
            alike = ("shots", "metric", "questions")
            said |= {(name, setting): getattr(score, setting) for setting in alike}
        for (name, setting), value in said.items():
            file, expected = first.setdefault((name, setting), (evaluation.file, value))
            if value != expected:
                place = f"{shown(name)}: " if name else ""
                raise ValueError(
                    f"{evaluation.file}: {place}{setting} {shown(expected)} expected, as in {file},"
                    f" got {shown(value)}"
                )


def _owner(evaluation: Evaluation, models: list[Path], prints: dict) -> int:
    """Which of the models was evaluated.

    prints: takes the fingerprints of models that had to be loaded, by path and dtype.
    """
    path = Path(evaluation.model).resolve()
    owners = [i for i, model in enumerate(models) if model.resolve() == path]
    if len(owners) != 1:
        dtype = evaluation.dtype
        for model in models:
            if (model, dtype) not in prints:
                loaded = Llama.from_pretrained(model, getattr(torch, dtype))
                prints[model, dtype] = whole_fingerprint(loaded)
        owners = [i for i, m in enumerate(models) if prints[m, dtype] == evaluation.fingerprint]
    if len(owners) != 1:
        raise ValueError(
            f"{evaluation.file}: an evaluation of one of {len(models)} models, the base and the"
            f" final ones of the runs, expected, got one of {shown(evaluation.model)}, which by"
            f" path and fingerprint is {len(owners)} of them"
        )
    return owners[0]


def add_scores(figures: list[dict], scores: list[dict[str, Score]]) -> None:
    """Put the scores of each model into its figures, with their changes against the base, the
    first, and the mean change over the benchmarks that every evaluated model has."""
    base, *runs = scores
    common = [name for name in base if all(name in of for of in runs if of)]
    for row, of_model in zip(figures, scores, strict=True):
        row["benchmarks"] = {name: asdict(score) for name, score in of_model.items()}
        if of_model is base:
            continue
        changes = {name: _change(score, base.get(name)) for name, score in of_model.items()}
        for name, change in changes.items():
            row["benchmarks"][name] |= {"change": change}
        row["mean change"] = _mean([changes[name] for name in common]) if of_model else None


def _change(score: Score, base: Score | None) -> dict | None:
    """The difference of two estimates that are taken as independent, and its standard error."""
    if base is None:
        return None
    errors = score.stderr, base.stderr
    stderr = None if None in errors else math.hypot(*errors)
    return {"value": score.value - base.value, "stderr": stderr}


def _mean(changes: list[dict]) -> dict | None:
    if not changes:
        return None
    errors = [change["stderr"] for change in changes]
    stderr = None if None in errors else math.hypot(*errors) / len(errors)
    return {"value": sum(change["value"] for change in changes) / len(changes), "stderr": stderr}


def points(change: dict | None) -> str:
    """A change in points of a percentage; "none" where it lies within its errors."""
    if change is None:
        return "-"
    value, stderr = change["value"], change["stderr"]
    if stderr is None:
        return f"{100 * value:+.1f} points, error unknown"
    return "none" if abs(value) <= CERTAIN * stderr else f"{100 * value:+.1f} points"


def benchmarks(figures: list[dict], evaluations: list[Evaluation]) -> list[str]:
    """The section of the page: a row for each benchmark, a column for each model."""
    if not evaluations:
        return []
    names = dict.fromkeys(name for row in figures for name in row["benchmarks"])
    lines = [
        [_title(name, figures), *(cell(row["benchmarks"].get(name)) for row in figures)]
        for name in names
    ]
    lines.append(["mean change", *(points(row.get("mean change")) for row in figures)])
    limit = evaluations[0].limit
    return [
        "",
        "## Benchmarks",
        *table(["benchmark", *(row["model"] for row in figures)], lines),
        "",
        f"Accuracy ± standard error in {evaluations[0].dtype}, on"
        f" {'all questions' if limit is None else f'at most {limit} questions of each benchmark'},"
        " and the change against the base: none, where the difference lies within"
        f" {CERTAIN} standard errors of it. That of the difference of two independent estimates is"
        " sqrt(a^2 + b^2); the questions are the same, so that this is cautious. The mean change is"
        " over the benchmarks that all evaluated models have.",
    ]


def _title(name: str, figures: list[dict]) -> str:
    score = next(row["benchmarks"][name] for row in figures if name in row["benchmarks"])
    shots = "" if score["shots"] is None else f", {score['shots']} shots"
    return f"{name} ({score['metric']}{shots})"


def cell(score: dict | None) -> str:
    if score is None:
        return "-"
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.1%}"
    change = f" ({points(score['change'])})" if score.get("change") else ""
    return f"{score['value']:.1%}{error}{change}"
