import json

import pytest

demo = pytest.importorskip("recipes.demo")


def test_the_recorded_sweep_is_of_this_demo():
    recorded = json.loads(demo.SWEEP.read_text())
    swept = {(r["trainable"], r["learning_rate"]) for r in recorded["results"]}
    assert swept == {(kind, rate) for kind, rates in demo.SWEPT.items() for rate in rates}
    setting = recorded["setting"]
    assert (setting["batch_size"], setting["seq_len"]) == (demo.BATCH_SIZE, demo.SEQ_LEN)
    for kind in demo.SWEPT:
        best = min(r["perplexity"]["domain"] for r in recorded["results"] if r["trainable"] == kind)
        chosen = [r for r in recorded["results"] if r["learning_rate"] == demo.best_rate(kind)]
        assert best in [r["perplexity"]["domain"] for r in chosen]
