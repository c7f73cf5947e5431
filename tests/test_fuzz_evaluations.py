"""An evaluation file of a report, changed at random; see fuzz.py.

It may lie wherever its owner likes, so links are followed.
"""

import shutil

import pytest
from fuzz import change_file, try_changes
from llamapro.report_benchmarks import add_scores, benchmarks, read_evaluations, scores_of
from llamapro.storage import write_json

EVALUATION = {
    "results": {"mmlu": {"acc": 0.5, "acc_stderr": 0.1}, "other": {"f1": 0.25, "f1_stderr": 0.1}},
    "n-shot": {"mmlu": 5, "other": 0},
    "n-samples": {"mmlu": 100, "other": 100},
    "seconds": {"mmlu": 1.0, "other": 1.0},
    "config": {"fingerprint": "f", "dtype": "float32", "limit": None},
}


@pytest.fixture
def models(tiny, tmp_path):
    return [tiny().save_pretrained(tmp_path / name) for name in ("base", "final")]


def write(path, model):
    config = {**EVALUATION["config"], "model": str(model)}
    write_json(path, {**EVALUATION, "config": config})
    return path


def test_evaluations_that_were_changed(models, tmp_path):
    base = write(tmp_path / "base.json", models[0])

    def change(draw):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        (tmp_path / "changed").mkdir()
        file = write(tmp_path / "changed" / "run.json", models[1])
        change_file(file, draw)
        return file

    def read(file):
        figures, evaluations = [{"model": "base"}, {"model": "run"}], read_evaluations([base, file])
        add_scores(figures, scores_of(models, evaluations))
        return figures, evaluations

    def can_be_written(taken):
        if taken is not None:
            "\n".join(benchmarks(*taken)).encode()

    try_changes(300, change, read, can_be_written)
