"""An evaluation file of a report, changed at random; see test_fuzz.py.

It may lie wherever its owner likes, so links are followed.
"""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llamapro.report_benchmarks import add_scores, benchmarks, read_evaluations, scores_of
from llamapro.storage import write_json
from test_fuzz import SAID_IN_ONE_LINE, contents, in_time, not_a_file

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
    ended = set()

    @settings(
        max_examples=300,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def changed(data):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        (tmp_path / "changed").mkdir()
        file = write(tmp_path / "changed" / "run.json", models[1])
        data.draw(st.sampled_from([contents] * 7 + [not_a_file]))(file, data.draw)
        figures = [{"model": "base"}, {"model": "run"}]
        try:
            with in_time():
                evaluations = read_evaluations([base, file])
                add_scores(figures, scores_of(models, evaluations))
            ended.add("read")
        except SAID_IN_ONE_LINE as error:
            ended.add("refused")
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, str(error)
        else:  # what is taken can be written
            "\n".join(benchmarks(figures, evaluations)).encode()

    changed()
    assert ended == {"read", "refused"}
