import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from llamapro.train import train
from llamapro.train.trackers import Trackers, flat
from run_files import records


def test_names_are_flat():
    record = {"loss": 2.0, "perplexity": {"domain": 4.2, "general": 5.0}}
    assert flat(record) == {"loss": 2.0, "perplexity/domain": 4.2, "perplexity/general": 5.0}


def test_tensorboard_has_the_metrics_of_the_run(config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(config, report_to=("tensorboard",)))
    events = accumulator.EventAccumulator(f"{config.out}/tensorboard").Reload()
    for name in ("loss", "learning_rate", "tokens"):
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == pytest.approx(records(config, name), rel=1e-6)  # fp32 there
    assert [event.step for event in events.Scalars("perplexity/domain")] == [0, 10, 20]
    assert events.Scalars("epochs/data")[-1].value > 0


def test_a_tracker_that_is_not_installed_is_named_and_nothing_is_written(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--report-to wandb needs the package: pip install wandb"):
        train(replace(config, report_to=("wandb",)))
    with pytest.raises(FileNotFoundError):
        records(config)


def test_a_tracker_that_fails_ends_no_run(config, monkeypatch, caplog):
    class Run:
        def log(self, values, step):
            raise ConnectionError("the service is gone")

    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(init=lambda **_: Run(), finish=None)
    )
    with caplog.at_level(logging.WARNING):
        train(replace(config, report_to=("trackio",)))
    assert caplog.text.count("trackio is told no more: the service is gone") == 1
    assert len(records(config)) == 20


def test_an_unknown_tracker_is_refused(config):
    with pytest.raises(ValueError, match=r"report_to must be of .*, got \('abacus',\)"):
        replace(config, report_to=("abacus",))
    with pytest.raises(ImportError):
        Trackers(("abacus",))
