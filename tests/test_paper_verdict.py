"""What is said of the paper's experiments follows from their numbers."""

import math

import pytest
from recipes.paper_verdict import Measured, best_rate, chosen, difference, lost_at, verdict

BASE = {"domain": 10.0, "general": 20.0}


def run(row, seed, learnt, lost, rate=0.1, **changes):
    perplexity = {"domain": 10 * math.exp(-learnt), "general": 20 * math.exp(lost)}
    ways = {
        "way": "full",
        "placement": None,
        "blocks": 0,
        "replayed": None,
        "within": None,
        "sft": False,
    }
    said = {"row": row, "plain": row, "seed": seed, "learning_rate": rate}
    return {**said, **ways, "perplexity": perplexity, **changes}


def results_of(*runs, rates=(0.01, 0.1, 1.0)):
    setting = {"seeds": [0, 1, 2], "blocks": 2, "rates": {"full": rates, "new_blocks": rates}}
    rows = dict.fromkeys(run["row"] for run in runs)
    made = {"setting": setting, "base": BASE, "sft": {"costs": [], "runs": []}}
    return {**made, "runs": [*runs], "costs": [{"row": r} for r in rows]}


def three(row, learnt, lost, noise=0.0, **changes):
    """Of three seeds; noise is what the middle one is off."""
    return [
        run(row, seed, learnt + noise * (seed - 1), lost + noise * (seed - 1), **changes)
        for seed in range(3)
    ]


SWEEP = [(0.01, 1.0, 0.1), (0.1, 2.0, 0.5), (1.0, 1.5, 3.0)]
OURS = {"way": "new_blocks", "placement": "interleaved", "blocks": 2}


def test_means_and_standard_errors_by_hand():
    assert Measured.of([1.0, 2.0, 3.0]) == Measured(2.0, 1 / math.sqrt(3))
    assert Measured.of([1.0]) == Measured(1.0, None)
    assert [Measured(x, 1.0).sign for x in (2.1, 2.0, -2.0, -2.1)] == [1, 0, 0, -1]
    assert Measured(5.0, None).sign == 0


def test_rows_are_compared_seed_by_seed():
    """What all rows of a seed have in common is no noise of their difference."""
    a = {r["seed"]: r for r in three("a", 1.0, 0.5, noise=0.3)}
    b = {r["seed"]: r for r in three("b", 0.9, 0.5, noise=0.3)}
    by = difference(a, b, BASE, "learnt")
    assert by.mean == pytest.approx(0.1) and by.stderr == pytest.approx(0, abs=1e-12)
    assert difference(a, {2: b[2]}, BASE, "learnt").stderr is None


def test_the_best_rate_is_that_of_the_domain():
    runs = [run("a", 0, 1.0, 9.0, rate=0.1), run("a", 0, 0.9, 0.0, rate=0.01)]
    runs += [run("a", 1, 5.0, 0.0, rate=0.01), run("b", 0, 7.0, 0.0, rate=1.0)]
    assert best_rate(runs, "a", 0) == 0.1
    assert [*chosen(results_of(*runs))["a"]] == [0]


def test_losses_at_equal_gain_by_hand():
    """Between the neighbours in a sweep; where it turns back, the lesser loss."""
    points = [(1.0, 0.1), (2.0, 0.5), (1.5, 3.0)]
    assert lost_at(points, 1.5) == pytest.approx(0.3) and lost_at(points, 2.0) == 0.5
    assert lost_at(points, 2.1) is None and lost_at(points, 0.9) is None
    assert lost_at([(1.0, 0.1)], 1.0) is None
    runs = [run("full", 0, learnt, lost, rate) for rate, learnt, lost in SWEEP]
    runs += [run("+2", 0, 1.5, 0.4, **OURS), run("few", 0, 1.4, 0.0)]
    runs += [run("replay", 0, 1.6, 0.2, replayed="self", plain="+2")]
    runs += [{**made, "seed": seed} for made in runs for seed in (1, 2)]
    (said,) = (line for line in verdict(results_of(*runs)) if "are learnt, as by" in line)
    assert said == (
        "Where 1.500 nats are learnt, as by +2, these lose, with seed 0: replay 0.200; full 0.300;"
        " +2 0.400; never so much is learnt by: few."
    )


def test_the_verdict_follows():
    replayed = {**OURS, "replayed": "self", "plain": "+2 interleaved"}
    lines = verdict(
        results_of(
            *three("full", 2.0, 1.0, rate=1.0),
            *three("near", 2.0, 3.0, noise=0.1),
            *three("+2 interleaved", 1.5, 0.5, **OURS),
            *three("+2 interleaved, replay", 1.5, 0.005, within="1%", **replayed),
        )
    )
    said = "\n".join(lines)
    assert "Most is learnt by" in lines[0] and "within noise of it: near." in lines[0]
    assert lines[1].startswith("Least is lost by +2 interleaved, replay: 0.005 ± 0.000")
    assert lines[2] == ("On the frontier, beaten by no other row: full; +2 interleaved, replay.")
    assert (
        "+2 interleaved against full: learns 0.500 ± 0.000 less, loses 0.500 ± 0.000 less." in said
    )
    assert "+2 interleaved, replay against +2 interleaved: learns as much within noise" in said
    assert "replay: the limit was held in 3 of 3 runs; most was lost 0.50%." in said
    assert lines[-1] == "A better learning rate may lie beyond the sweep of full (1)."


def test_the_verdict_after_sft():
    """Of three rows each pair is compared, answers first; until all runs are there, none is."""
    results = results_of(*three("full", 1.0, 1.0), *three("+2 interleaved", 1.0, 1.0, **OURS))
    runs = []
    for row, answers in (("base, SFT", 9.0), ("full, SFT", 8.0), ("+2, SFT", 8.0)):
        for made in three(row, 0.0 if row == "base, SFT" else 0.5, 0.1, sft=True):
            made["perplexity"]["instructions"] = answers + made["seed"] / 100
            runs.append(made)
    names = dict.fromkeys(made["row"] for made in runs)
    results["sft"] = {"costs": [{"row": name} for name in names], "runs": runs[:-1]}
    assert verdict(results)[-1] == "Not all runs of SFT are there yet."
    better = {**runs[3], "row": "base, SFT", "learning_rate": 7}
    assert best_rate([runs[0], better], "base, SFT", 0) == 7
    results["sft"]["runs"] = runs
    first, second, third = verdict(results)[-3:]
    assert first == (
        "full, SFT against base, SFT: learns to answer 0.118 ± 0.000 more,"
        " learns 0.500 ± 0.000 more, loses as much within noise (0.000 ± 0.000)."
    )
    assert second.startswith("+2, SFT against base, SFT:")
    assert third.startswith(
        "+2, SFT against full, SFT: learns to answer as much within noise (0.000"
    )


def test_one_seed_and_missing_runs_have_no_verdict():
    results = results_of(*three("full", 1.0, 1.0), run("+2 interleaved", 0, 1.0, 1.0, **OURS))
    assert verdict(results) == ["Not all runs are there yet."]
    results["setting"]["seeds"] = [0]
    (line,) = verdict(results)
    assert line.startswith("There is one seed, so no standard error")
