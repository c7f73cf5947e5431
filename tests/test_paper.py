"""The paper's experiments in their smallest scale: numbers are asserted only where mathematics
fixes them."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import Llama
from llamapro.hf import Checkpoint
from llamapro.model import stock_tensors
from llamapro.storage import read_json

pytest.importorskip("peft")
from recipes import paper as recipe
from recipes import paper_config, paper_inputs
from recipes.paper import paper
from recipes.paper_config import Row, scale, scales, steps, table_of
from recipes.paper_verdict import chosen, verdict

SCORES = [{"model": "base", "benchmarks": {"arc_challenge": {"value": 0.25, "stderr": None}}}]
ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("LLAMAPRO_KILLS", 1))  # of the recipe


@pytest.fixture
def smoke(tmp_path):
    return replace(scales()["smoke"], out=tmp_path / "paper", device="cpu")


@pytest.fixture
def small(smoke):
    """Each kind of row once."""
    rates = dict.fromkeys(smoke.rates, (1e-2,))
    return replace(smoke, counts=(1,), blocks=1, shares=(0.25,), seeds=(0,), rates=rates)


def test_every_row_end_to_end(smoke, monkeypatch):
    asked = {}
    monkeypatch.setattr(recipe.paper_accuracy, "check", lambda config, base: None)
    monkeypatch.setattr(recipe, "accuracies", lambda config, models: asked.update(models) or SCORES)
    smoke = replace(smoke, tasks="arc_challenge", limit=2)
    results = paper(smoke)
    _check_who_is_asked(smoke, results, asked)
    page = (smoke.out / "report" / "paper.md").read_text()
    runs, table = results["runs"], table_of(smoke)
    for row in table.rows:
        mine = [run for run in runs if run["row"] == row.name]
        swept = len(smoke.rates[row.way]) - 1 if row == row.plain else 0
        assert len(mine) == len(smoke.seeds) + swept, row.name
        assert {run["seed"] for run in mine} == {*smoke.seeds}
        assert page.count(f"| {row.name} ") >= 2
        assert math.isfinite(sum(run["perplexity"]["domain"] for run in mine))
    assert all(f"not run: {name}" in page for name in table.not_run) and "not run yet" not in page
    assert len(runs) == sum(cost["runs"] for cost in results["costs"])
    _check_sft(smoke, results)
    saved = read_json(smoke.out / "report" / "results.json")
    assert saved["runs"] == runs and saved["verdict"] == verdict(results)
    for name in ("frontier", "along"):
        assert (smoke.out / "report" / f"{name}.png").stat().st_size > 10_000
    _check_step_zero(smoke, results)
    _check_tokens_and_parameters(smoke, results)
    _check_what_is_frozen(smoke, runs)


def _check_who_is_asked(config, results, models):
    """The base, and each row's model of the first seed, also after SFT; experts have none."""
    rows = [row.name for row in (*table_of(config).rows, *table_of(config).sft)]
    assert [*models] == ["base", *(name for name in rows if name != "2 experts")]
    trained = {r["name"]: r for r in results["runs"] + results["sft"]["runs"]}
    for row, path in [*models.items()][1:]:
        run = trained[path.parent.name]
        assert (run["row"], run["seed"], path.name) == (row, config.seeds[0], "final")
        assert path.exists()
    page = (config.out / "report" / "paper.md").read_text()
    assert "over the first 2 questions of each benchmark" in page
    assert re.search(r"\| base +\| 25\.0% +\| - +\|", page)


def _check_sft(config, results):
    """It begins with what the row, at its best rate and with the same seed, made of the base."""
    runs, names = results["sft"]["runs"], [row.name for row in table_of(config).sft]
    assert names == ["base, SFT", "full fine-tuning, SFT", "+2 interleaved, SFT"]
    assert len(runs) == 3 * (len(config.seeds) + len(config.rates["sft"]) - 1)
    before = {(r["row"], r["seed"]): r for rows in chosen(results).values() for r in rows.values()}
    for run in runs:
        first, steps = run["along"][0], run["along"][-1]["step"]
        start = before.get((run["row"].removesuffix(", SFT"), run["seed"]))
        expected = start["perplexity"] if start else results["base"]
        assert {name: first["perplexity"][name] for name in results["base"]} == expected
        assert steps * config.batch_size * config.seq_len == config.sft_tokens
    for rows in chosen({**results, **results["sft"]}).values():
        for run in rows.values():
            assert run["perplexity"]["instructions"] < run["along"][0]["perplexity"]["instructions"]


def _check_step_zero(config, results):
    """Expanded models are the base, to the bit."""
    base = results["base"]
    for run in results["runs"]:
        first = run["along"][0]
        assert first["step"] == 0
        if run["way"] in ("full", "new_blocks"):
            assert first["perplexity"] == base, run["row"]
        assert first["perplexity"] == pytest.approx(base, rel=1e-5), run["row"]


def _check_tokens_and_parameters(config, results):
    """Every run sees the same rows of the domain, to within what rounds a step up; it trains as
    many parameters as was said."""
    wanted = config.tokens / config.seq_len
    costs = {cost["row"]: cost for cost in results["costs"]}
    for run in results["runs"]:
        learnt, *kept = run["rows_taken"]
        assert wanted - 1 < learnt < wanted + config.batch_size, run["row"]
        assert sum(kept) == pytest.approx(run["share"] * sum(run["rows_taken"]), abs=1)
        assert sum(run["rows_taken"]) == costs[run["row"]]["steps"] * config.batch_size
        assert run["trained"] == costs[run["row"]]["trained"], run["row"]
        assert run["along"][-1]["step"] == costs[run["row"]]["steps"]


def _check_what_is_frozen(config, runs):
    """The bytes of the base are in every expanded model."""
    for run in runs:
        if run["way"] != "new_blocks":
            continue
        name = recipe.Run(_row(run), run["learning_rate"], run["seed"]).name
        final = Checkpoint(config.out / "runs" / name / "final")
        before = Checkpoint(config.out / f"expanded-{run['blocks']}-{run['placement']}")
        new = final.config.new_blocks
        assert len(new) == run["blocks"]
        for tensor, entry in final.tensors.items():
            block = re.match(r"model\.layers\.(\d+)\.", tensor)
            same = torch.equal(entry.load(), before.tensors[tensor].load())
            assert same == (block is None or int(block[1]) not in new), (name, tensor)


def _row(run):
    return Row(**{name: run[name] for name in Row.__dataclass_fields__})


def test_killed_it_ends_with_the_same_table(small, tmp_path):
    """The same command goes on after kills; what was finished is not run again."""
    torch.set_num_threads(1)
    calm = paper(replace(small, out=tmp_path / "calm"))
    words = ["--seeds", "0", "--counts", "1", "--blocks", "1", "--shares", "0.25"]
    words += ["--device", "cpu", "--out", str(small.out), "--workers", "2"]
    words += [word for way in small.rates for word in (f"--rates.{way}", "0.01")]
    command = [sys.executable, "-m", "recipes.paper", "smoke", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    finished = small.out / "runs"
    moments = random.Random(0).sample(range(1, len(calm["runs"])), KILLS)
    for count in sorted(moments):  # within the run after so many
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
        while len([*finished.glob("*/result.json")]) < count:
            assert child.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        time.sleep(0.05)
        child.kill()
        child.wait()
    before = {file: file.stat().st_mtime_ns for file in finished.glob("*/result.json")}
    assert max(moments) <= len(before) < len(calm["runs"]) + len(calm["sft"]["runs"])
    done = paper(small)
    assert all(file.stat().st_mtime_ns == at for file, at in before.items())
    assert figures(done) == figures(calm)


def figures(results):
    """All but what depends on the time."""
    for run in (*results["runs"], *results["sft"]["runs"]):
        run["seconds"] = None
    return json.loads(json.dumps(results, default=str))


def test_another_setting_is_refused(small):
    small.out.mkdir()
    (small.out / "setting.json").write_text(json.dumps({"tokens": 1}))
    with pytest.raises(ValueError, match=r"setting.json: model 'generated' expected, got None"):
        paper(small)


def test_importance_is_what_a_removal_costs(small):
    """A block that adds nothing is the first to be copied, above itself."""
    inputs = paper_inputs.make(small)
    model = Llama.from_pretrained(inputs.base)
    model.blocks[2].make_identity()
    inputs.base = model.save_pretrained(small.out / "changed", files_from=inputs.base)
    assert paper_inputs.after_the_least_important(small, inputs, 1) == [3]
    costs = next(iter(read_json(small.out / "importance.json").values()))
    assert costs[2] == 0 and len(costs) == len(model.blocks)
    paper_inputs.expanded(small, inputs, 1, "importance")
    grown = stock_tensors(Llama.from_pretrained(small.out / "expanded-1-importance"))
    assert torch.equal(
        grown["model.layers.3.mlp.gate_proj.weight"], grown["model.layers.2.mlp.gate_proj.weight"]
    )


@pytest.mark.parametrize("name", scales())
def test_scales_have_every_row(name):
    config = scales()[name]
    table = table_of(config)
    ways = {row.way for row in table.rows}
    assert ways == {*paper_config.WAYS}
    placements = {row.placement for row in table.rows} - {None}
    assert placements == {"interleaved", *paper_config.PLACEMENTS}
    assert len({row.name for row in table.rows}) == len(table.rows)
    for row in table.rows:
        seen = steps(config, row) * (1 - row.share)
        assert seen == pytest.approx(steps(config, row.plain), abs=1)
    replayed = {row.replayed for row in table.rows} - {None}
    assert ("original" in replayed) == (config.original is not None)
    assert config.original or "replay of original data" in table.not_run


@pytest.mark.parametrize(
    "text, said",
    [
        ("tokens: [", "wrong.yaml: while parsing"),
        ("- 1", "wrong.yaml: "),
        (
            "rates: {full: [1]}\nstep: 1",
            r"wrong.yaml: settings of a scale expected, got \['step'\]",
        ),
        ("rates: {full: [1]}", "wrong.yaml: .*missing"),
    ],
)
def test_a_scale_that_is_none(tmp_path, text, said):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        scale(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"blocks": 3}, r"blocks must be one of counts \(1, 2, 4\), got 3"),
        ({"seeds": (0, 0)}, r"seeds: one or more, each once, expected, got"),
        ({"rates": {}}, r"rates of each of \('full', "),
        ({"original": "books"}, r"original must be one of \('generated',\), got 'books'"),
        ({"shares": (1.0,)}, r"shares above 0 and below 1 expected"),
        ({"within": "1"}, r"a limit such as 1% expected"),
        ({"tokens": 0}, r"tokens must be at least 1, got 0"),
        ({"sft_tokens": 0}, r"sft_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings(smoke, changes, said):
    with pytest.raises(ValueError, match=said):
        replace(smoke, **changes)


def test_a_scale_without_its_data_says_so(smoke):
    with pytest.raises(ValueError, match="data_root, the folder with models and text, expected"):
        paper(replace(smoke, domain="law"))
