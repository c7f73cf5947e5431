import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llamapro.train import loop as module
from llamapro.train import metrics, train
from llamapro.train.loop import take_step
from llamapro.train.metrics import WINDOW, Metrics, z_score
from run_files import records


@pytest.fixture
def limit():
    """Lets no file grow beyond so many bytes, as a full disk would; nothing for no limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def call(size=before[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield call
    call()


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def line(step):
    return {"step": step, "loss": float(step), "gradient_norm": 1.0}


def test_lines_that_cannot_be_written_are_written_later(tmp_path, limit, caplog):
    """In order, and none by half."""
    path = tmp_path / "metrics.jsonl"
    written = Metrics(path)
    written.append(line(1))
    limit(path.stat().st_size + 10)
    for step in (2, 3):
        written.append(line(step))
        assert path.read_text().endswith("}\n") and steps(path) == [1]
    assert [*written.recent] == [line(1), line(2), line(3)]
    assert len(caplog.records) == 1 and str(path) in caplog.text
    with pytest.raises(OSError, match=r"too large: '.*metrics\.jsonl'"):
        written.flush()
    limit()
    written.append(line(4))
    assert steps(path) == [1, 2, 3, 4]


def test_a_half_line_that_could_not_be_taken_back_is_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = Metrics(path)
    written.append(line(1))
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    written.append(line(2))
    assert steps(path) == [1, 2]
    path.unlink()
    written.append(line(3))
    assert steps(path) == [3]


def test_only_a_regular_file_is_read(tmp_path):
    """A device that ends stands for one that does not."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/null")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: a regular file expected, got a device"):
        Metrics(path).read()


def test_a_run_without_its_metrics_file_goes_on(config, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    other = replace(config, out=config.out + "-other")
    train(other)

    def some_steps(*arguments):
        if arguments[-1] == 2:
            monkeypatch.setattr(metrics, "open", refuse, raising=False)
        if arguments[-1] == 15:
            monkeypatch.delattr(metrics, "open")
        return take_step(*arguments)

    monkeypatch.setattr(module, "take_step", some_steps)
    train(config)
    assert records(config) == records(other)
    assert records(config, "perplexity") == records(other, "perplexity")


def test_a_z_score_is_that_of_the_last():
    values = np.random.default_rng(0).normal(2.5, 0.1, 128)
    expected = (values[-1] - values.mean()) / values.std()
    assert z_score([*values]) == pytest.approx(expected, rel=1e-12)
    assert z_score([3.0] * 128) == 0.0


def test_outliers_are_measured_once_the_window_is_full(tmp_path):
    written = Metrics(tmp_path / "metrics.jsonl")
    for step in range(WINDOW):
        assert written.z_scores(line(step)) == {}
        written.append(line(step))
    scores = written.z_scores({"loss": 1e6, "gradient_norm": 1.0})
    assert scores == {"loss_z": pytest.approx(127**0.5, rel=1e-6), "gradient_norm_z": 0.0}


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_measures_outliers_as_one_that_did_not_stop(config, monkeypatch, lost):
    monkeypatch.setattr(metrics, "WINDOW", 8)
    other = replace(config, out=config.out + "-other")
    train(config)
    scores = records(config, "loss_z"), records(config, "gradient_norm_z")
    assert list(scores[0]) == list(scores[1]) == list(range(9, 21))

    def stop(*arguments):
        if arguments[-1] == 13:
            raise MemoryError("stopped by the test")
        return take_step(*arguments)

    monkeypatch.setattr(module, "take_step", stop)
    with pytest.raises(MemoryError):
        train(other)
    monkeypatch.setattr(module, "take_step", take_step)
    if lost:
        (Path(other.out) / "metrics.jsonl").unlink()
    train(other, resume=True)
    for key, expected in zip(("loss_z", "gradient_norm_z"), scores, strict=True):
        assert records(other, key) == expected
