"""Evaluations by benchmarks in a report."""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import Llama, report_benchmarks
from llamapro import report as module
from llamapro.model import stock_tensors
from llamapro.proof import combined, digests, settings
from llamapro.report import report
from llamapro.report_benchmarks import add_scores, benchmarks, read_evaluations, scores_of
from llamapro.storage import write_json
from llamapro.train import train

ARC, MMLU = {"arc_challenge": (0.5, 0.03)}, {"mmlu": (0.4, 0.01)}


def write(path, model, scores, **changes):
    """An evaluation of some benchmarks: in each an accuracy and its standard error."""
    results, shots = {}, {}
    for name, (value, error) in scores.items():
        of = {} if error is None else {"acc_norm_stderr": error, "acc_stderr": error}
        results[name] = {"acc_norm": value, "acc": value, **of}
        shots[name] = changes.get("shots", 5)
    if "mmlu" in scores:
        results["mmlu_astronomy"] = {"acc": 0.9, "acc_stderr": 0.1}
    config = {"model": str(model), "fingerprint": "none", "dtype": "bfloat16", "limit": 100}
    counts = dict.fromkeys(results, changes.get("questions", 100))
    found = {"results": results, "n-shot": shots, "n-samples": counts}
    found["seconds"] = dict.fromkeys(scores, 1.0)
    found["config"] = config | {name: changes[name] for name in config.keys() & changes.keys()}
    write_json(path, found)
    return path


def figures_of(*scores):
    """Those of a base and of runs with these accuracies."""
    figures = [{"model": f"m{i}"} for i in range(len(scores))]
    made = [
        {
            name: report_benchmarks.Score("acc", value, error, 5, 100)
            for name, (value, error) in of.items()
        }
        for of in scores
    ]
    add_scores(figures, made)
    return figures


def cells(page, first):
    (line,) = [line for line in page if line.startswith(f"| {first}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def models(tiny, tmp_path):
    """Two models; no two have the same weights."""
    paths = []
    for i in range(2):
        model = tiny()
        torch.nn.init.constant_(model.norm, 1.0 + i)
        paths.append(Path(model.save_pretrained(tmp_path / f"model{i}")))
    return paths


@pytest.mark.parametrize(
    "value, said",
    [
        (0.599, "none"),  # sqrt(0.03^2 + 0.04^2) is 0.05
        (0.401, "none"),
        (0.601, "+10.1 points"),
        (0.399, "-10.1 points"),
    ],
)
def test_a_difference_within_two_standard_errors_is_none(tmp_path, value, said):
    found = read_evaluations([write(tmp_path / "e.json", "m", ARC)])
    page = benchmarks(figures_of({"x": (0.5, 0.03)}, {"x": (value, 0.04)}), found)
    assert cells(page, "x")[1:] == ["50.0% ± 3.0%", f"{value:.1%} ± 4.0% ({said})"]


def test_a_change_without_a_standard_error_is_not_judged(tmp_path):
    found = read_evaluations([write(tmp_path / "e.json", "m", ARC)])
    figures = figures_of({"x": (0.5, 0.03)}, {"x": (0.75, None)})
    page = benchmarks(figures, found)
    assert cells(page, "x")[1:] == ["50.0% ± 3.0%", "75.0% (+25.0 points, error unknown)"]
    assert figures[1]["mean change"] == {"value": 0.25, "stderr": None}


def test_the_mean_change_is_over_what_all_evaluated_models_have(tmp_path):
    base = {"x": (0.5, 0.03), "y": (0.2, 0.0), "z": (0.1, 0.0)}
    one = {"x": (0.6, 0.04), "y": (0.5, 0.12), "z": (0.9, 0.0)}
    other = {"x": (0.5, 0.04), "y": (0.2, 0.12), "w": (0.9, 0.1)}
    figures = figures_of(base, one, other, {})
    _, first, second, none = (row.get("mean change") for row in figures)
    stderr = (0.05**2 + 0.12**2) ** 0.5 / 2  # 0.065
    assert first == {"value": pytest.approx(0.2), "stderr": pytest.approx(stderr)}
    assert second == {"value": pytest.approx(0.0), "stderr": pytest.approx(stderr)}
    assert none is None
    page = benchmarks(figures, read_evaluations([write(tmp_path / "e.json", "m", ARC)]))
    assert cells(page, "mean change")[1:] == ["-", "+20.0 points", "none", "-"]
    assert cells(page, "w")[1:] == ["-", "-", "90.0% ± 10.0%", "-"]


def test_evaluations_are_of_the_models_of_their_paths(models, tmp_path, monkeypatch):
    monkeypatch.setattr(report_benchmarks, "whole_fingerprint", None)  # nothing has to be loaded
    (tmp_path / "link").symlink_to(models[1])
    files = [
        write(tmp_path / "a.json", tmp_path / "link", ARC),
        write(tmp_path / "b.json", os.path.relpath(models[0]), ARC),
        write(tmp_path / "c.json", models[1], MMLU),
    ]
    first, second = scores_of(models, read_evaluations(files))
    assert [*first] == ["arc_challenge"] and [*second] == ["arc_challenge", "mmlu"]
    assert (first["arc_challenge"].metric, second["mmlu"].metric) == ("acc_norm", "acc")


def test_evaluations_of_models_that_were_moved_are_known_by_fingerprint(models, tmp_path):
    model = Llama.from_pretrained(models[1], torch.bfloat16)
    print_of = combined({**settings(model.config), **digests(stock_tensors(model))})
    file = write(tmp_path / "a.json", "elsewhere", ARC, fingerprint=print_of)
    first, second = scores_of(models, read_evaluations([file]))
    assert not first and [*second] == ["arc_challenge"]


def test_a_file_of_evaluate_is_taken_as_it_is(chat_path, tmp_path, monkeypatch):
    """Also where the model was moved since."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    manager = evaluator.TaskManager(include_defaults=False)  # not of 14,000 tasks, for each
    monkeypatch.setattr(evaluator, "TaskManager", lambda *_, **__: manager)
    from bench_files import data_root
    from llamapro.eval.evaluate import Evaluation, evaluate

    model = Llama.from_pretrained(chat_path, torch.float32)
    model.config.max_position_embeddings = 4096
    asked = Evaluation(("mmlu", "winogrande"), data_root(tmp_path / "bench"), limit=6)
    found = evaluate(model, chat_path, asked, tmp_path / "e.json")
    moved = chat_path.rename(tmp_path / "moved")
    (evaluation,) = evaluations = read_evaluations([tmp_path / "e.json"])
    assert [*evaluation.scores] == ["mmlu", "winogrande"] and evaluation.limit == 6
    ((mmlu, winogrande),) = (of.values() for of in scores_of([moved], evaluations))
    assert mmlu.value == found["results"]["mmlu"]["acc"] and mmlu.questions == 6
    assert winogrande.stderr == found["results"]["winogrande"]["acc_stderr"] > 0
    assert (mmlu.shots, winogrande.shots) == (5, 5)


@pytest.fixture
def finished(tiny, config, monkeypatch, tmp_path):
    """A base and a run of it, and no tokenizer."""
    monkeypatch.setattr(module, "complete", lambda *_: "text")
    monkeypatch.setattr(module, "encode_prompt", lambda *_: None)
    base = tiny().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = replace(config, steps=4, evaluate={"general": config.data[0]})
    train(config)
    return Path(base), Path(config.out)


def test_a_report_has_the_benchmarks(finished, tmp_path, capsys):
    cli = pytest.importorskip("llamapro.cli")
    base, run = finished
    files = [
        write(tmp_path / "base.json", base, {**ARC, **MMLU}),
        write(tmp_path / "a run.json", run / "final", {"arc_challenge": (0.3, 0.04)}),
    ]
    out = tmp_path / "report"
    words = ["report", base, run, "--out", out, "--max-tokens", 64, "--evaluations", *files]
    cli.main([*map(str, words)])
    page = (out / "report.md").read_text().splitlines()
    name, *scores = cells(page, "arc_challenge")
    assert name == "arc_challenge (acc_norm, 5 shots)"
    assert scores == ["50.0% ± 3.0%", "30.0% ± 4.0% (-20.0 points)"]
    assert cells(page, "mmlu")[1:] == ["40.0% ± 1.0%", "-"]  # the only line of its
    assert any("at most 100 questions of each benchmark" in line for line in page)
    of_base, of_run = json.loads((out / "report.json").read_text())
    assert [*of_base["benchmarks"]] == ["arc_challenge", "mmlu"]
    change = {"value": pytest.approx(-0.2), "stderr": pytest.approx(0.05)}
    assert of_run["benchmarks"]["arc_challenge"]["change"] == of_run["mean change"] == change
    assert "![what was learnt against what was lost](report-frontier.png)" in page
    assert (out / "report-frontier.png").read_bytes().startswith(b"\x89PNG")
    (said,) = [line for line in page if line.startswith("llamapro report")]
    again = [str(word) if word != out else "OUT" for word in words]
    assert shlex.split(said) == ["llamapro", *again]


def test_a_report_without_evaluations_says_nothing_of_benchmarks(finished, tmp_path):
    page = report(*finished[:1], finished[1:], tmp_path / "report", max_tokens=64).read_text()
    assert "enchmark" not in page and "--evaluations" not in page


def test_a_run_whose_metrics_are_no_file_is_refused(finished, tmp_path):
    """A device that ends stands for one that does not."""
    base, run = finished
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a regular file expected, got a device"):
        report(base, [run], tmp_path / "report")


@pytest.mark.parametrize(
    "model, scores, changes, message",
    [
        ("run", ARC, {"limit": 50}, r"limit 100 expected, as in \S+, got 50"),
        ("run", ARC, {"limit": None}, r"limit 100 expected, .* got None"),
        ("run", MMLU, {"dtype": "float32"}, "dtype 'bfloat16' expected, .*"),
        ("run", ARC, {"shots": 0}, r"'arc_challenge': shots 5 expected, as in \S+, got 0"),
        ("run", ARC, {"questions": 99}, "'arc_challenge': questions 100 expected, .* got 99"),
        ("base", ARC, {}, r"'arc_challenge' of \S+base once expected, got it in \S+one\.json too"),
        ("other", ARC, {}, "an evaluation of one of 2 models, .* is 0 of them"),
        ("run", {"wikitext": (20.5, 0.1)}, {}, "an accuracy from 0 to 1 in 'wikitext' expected.*"),
        ("run", ARC, {"dtype": "x"}, r"config: dtype of \('bfloat16', 'float32'\) expected, .*"),
        ("run", {"a\nb": (0.5, 0.1)}, {}, r"an accuracy from 0 to 1 in 'a\\nb' expected.*"),
        ("run", ARC, {"fingerprint": "\0"}, r"config: fingerprint expected, got '\\x00'"),
        ("run", ARC, {"fingerprint": 3}, "config: fingerprint expected, got 3"),
    ],
)
def test_evaluations_that_do_not_go_together_are_refused(
    finished, tmp_path, monkeypatch, model, scores, changes, message
):
    monkeypatch.setattr(module, "_measure", None)
    base, run = finished
    places = {"base": base, "run": run / "final", "other": tmp_path / "other"}
    one = write(tmp_path / "one.json", base, ARC)
    two = write(tmp_path / "two.json", places[model], scores, **changes)
    with pytest.raises(ValueError, match=rf"^\S+two\.json: {message}$"):
        report(base, [run], tmp_path / "report", evaluations=[one, two])
    assert not (tmp_path / "report").exists()


def test_the_same_model_twice_cannot_be_told_apart(models, tmp_path):
    evaluations = read_evaluations([write(tmp_path / "a.json", models[0], ARC)])
    model = Llama.from_pretrained(models[0], torch.bfloat16)
    print_of = combined({**settings(model.config), **digests(stock_tensors(model))})
    evaluations = [replace(evaluations[0], fingerprint=print_of)]
    with pytest.raises(ValueError, match="is 2 of them"):
        scores_of([models[0], models[0]], evaluations)


def test_other_files_are_no_evaluations(tmp_path):
    write_json(tmp_path / "e.json", {"results": {}})
    message = r"e\.json: an evaluation by benchmarks expected, got one without \['n-samples', "
    with pytest.raises(ValueError, match=message):
        read_evaluations([tmp_path / "e.json"])
