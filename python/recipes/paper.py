"""The paper's experiments by one command: block expansion beside its rivals.

`make paper` runs a scale: each row at the best of a small sweep of learning rates, on the same
tokens of the domain, measured on it and on what shall be kept. What has been run is not run again,
what was interrupted goes on: stopped or killed, the same command ends with the same table.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from llamapro.command_line import said_in_one_line
from llamapro.config import LlamaConfig
from llamapro.hardware import environment, pick_device
from llamapro.hf import Checkpoint
from llamapro.model import Llama
from llamapro.storage import read_json, write_json
from llamapro.train import TrainConfig, train
from llamapro.train.checkpoint import checkpoints, read_state
from llamapro.train.keep import MOST_SAMPLES
from llamapro.train.loop import open_data
from llamapro.train.metrics import Metrics

from recipes import paper_inputs, paper_report
from recipes.paper_config import PaperConfig, Row, Run, scales, steps, table_of
from recipes.paper_costs import equal_rank, flops, trained
from recipes.paper_inputs import Inputs
from recipes.paper_verdict import best_rate
from recipes.records import commit, settle
from recipes.rivals import ATTENTION, Judge, adapt, train_experts, train_top_blocks

SAMPLES_SEED = 1  # of what is replayed; what a base is measured on has another


@dataclass
class Experiment:
    """A scale that is being run."""

    config: PaperConfig
    inputs: Inputs
    shape: LlamaConfig
    rows: list[Row]


def paper(config: PaperConfig) -> dict:
    """Run what is missing; write the results after each run, and return them."""
    setting = asdict(config)
    del setting["out"]
    setting = settle(config.out / "setting.json", setting)
    inputs, table = paper_inputs.make(config), table_of(config)
    experiment = Experiment(config, inputs, Checkpoint(inputs.base).config, table.rows)
    costs = [_cost(experiment, row) for row in table.rows]
    print("\n".join(paper_report.costs(costs)), flush=True)
    where = {"environment": environment(pick_device(config.device)), "commit": commit()}
    results = {"setting": setting, **where, "not_run": table.not_run, "costs": costs}
    results |= {"base": _measure_base(experiment), "runs": []}
    for run in runs(experiment, results["runs"]):
        _say(run, costs, results["runs"])
        results["runs"].append(_run(experiment, run))
        paper_report.write(results, config.out / "report")
    paper_report.draw(results, config.out / "report")
    return results


def runs(experiment: Experiment, done: list[dict]) -> Iterator[Run]:
    """Every run: the sweeps, then each row at its best rate. done: what came out of earlier ones,
    on which later ones depend."""
    config, swept = experiment.config, experiment.config.seeds[0]
    for row in experiment.rows:
        if row == row.plain:
            yield from (Run(row, rate, swept) for rate in config.rates[row.way])
    for seed in config.seeds:
        for row in experiment.rows:
            if row != row.plain or seed != swept:
                yield Run(row, best_rate(done, row.plain.name, swept), seed)


def _cost(experiment: Experiment, row: Row) -> dict:
    config, shape = experiment.config, experiment.shape
    plain = row == row.plain
    return {
        "row": row.name,
        "trained": trained(config, shape, row),
        "steps": steps(config, row),
        "flops": flops(config, shape, row),
        "runs": len(config.seeds) + (len(config.rates[row.way]) - 1 if plain else 0),
    }


def _say(run: Run, costs: list[dict], done: list[dict]) -> None:
    """Which run comes now, and how long the rest will take by the FLOPs and seconds so far."""
    of_row = {cost["row"]: cost["flops"] for cost in costs}
    said = f"\n{run.row.name}, learning rate {run.rate:g}, seed {run.seed}: run {len(done) + 1} of"
    said += f" {sum(cost['runs'] for cost in costs)}"
    if done:
        spent = sum(of_row[result["row"]] for result in done)
        left = sum(cost["flops"] * cost["runs"] for cost in costs) - spent
        minutes = left / spent * sum(result["seconds"] for result in done) / 60
        said += f", about {minutes:.0f} minutes of training left"
    print(said, flush=True)


def _measure_base(experiment: Experiment) -> dict:
    """Perplexity of the base on every set."""
    file = experiment.config.out / "base.json"
    if not file.exists():
        settings = _settings(experiment, Run(Row("full"), 1.0, 0))
        dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
        base = Llama.from_pretrained(settings.model, dtype, device)
        _, heldout = open_data(settings, experiment.shape)
        write_json(file, Judge.of(settings, heldout).record(base, 0)["perplexity"])
    return read_json(file)


def _run(experiment: Experiment, run: Run) -> dict:
    """What came out of a run, which is made, or gone on with, where it is missing."""
    settings = _settings(experiment, run)
    out = Path(settings.out)
    file = out / "result.json"
    if not file.exists():
        if not (out / "summary.json").exists():
            _train(experiment, run, settings)
        write_json(file, _result(run, out))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # the model is in out/final
    return read_json(file)


def _train(experiment: Experiment, run: Run, settings: TrainConfig) -> None:
    config, row = experiment.config, run.row
    if row.way == "lora":
        adapt(settings, config.lora_rank, ATTENTION)
    elif row.way == "lora_equal":
        adapt(settings, equal_rank(config, experiment.shape))
    elif row.way == "top_blocks":
        train_top_blocks(settings, row.blocks)
    elif row.way == "experts":
        depth = experiment.shape.num_hidden_layers
        # Those that interleaved new blocks are copies of.
        train_experts(settings, [depth * (i + 1) // row.blocks - 1 for i in range(row.blocks)])
    else:
        train(settings, resume=Path(settings.out).exists())


def _settings(experiment: Experiment, run: Run) -> TrainConfig:
    config, inputs, row = experiment.config, experiment.inputs, run.row
    model, count = inputs.base, steps(config, row)
    if row.way == "new_blocks":
        model = paper_inputs.expanded(config, inputs, row.blocks, row.placement)
    settings = TrainConfig(
        model=str(model),
        data=(str(inputs.domain),),
        out=str(config.out / "runs" / run.name),
        trainable="new_blocks" if row.way == "new_blocks" else "all",
        steps=count,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seq_len=config.seq_len,
        packing=config.packing,
        learning_rate=run.rate,
        dtype=config.dtype,
        device=config.device,
        seed=run.seed,
        evaluate={name: str(path) for name, path in inputs.general.items()},
        eval_every=max(1, -(-count // config.evaluations)),
        eval_tokens=config.eval_tokens,
        checkpoint_every=config.checkpoint_every,
    )
    if not row.replayed:
        return settings
    kept = inputs.general[Path(config.original).name] if row.replayed == "original" else None
    how = {"keep": row.share, "keep_data": str(kept or _samples(experiment))}
    how["keep_loss"] = "ce" if row.replayed == "original" else "kl"
    return replace(settings, **how, keep_within=row.within)


def _samples(experiment: Experiment) -> Path:
    """As many as the row with most of them takes, up to as many as a run would sample itself."""
    config, most = experiment.config, max(experiment.config.shares)
    tokens = min(MOST_SAMPLES, round(config.tokens * most / (1 - most)))
    return paper_inputs.samples(config, experiment.inputs.base, "samples", tokens, SAMPLES_SEED)


def _result(run: Run, out: Path) -> dict:
    """The figures of a run that is finished."""
    summary, records = read_json(out / "summary.json"), Metrics(out / "metrics.jsonl").read()
    taken = [record for record in records if "loss" in record]
    shown = {"domain", *summary["config"]["evaluate"]}
    state = read_state(checkpoints(out)[-1])
    return {
        "row": run.row.name,
        **asdict(run.row),
        "plain": run.row.plain.name,
        "learning_rate": run.rate,
        "seed": run.seed,
        "trained": summary["trainable_parameters"],
        "rows_taken": state["rows"],
        "tokens": sum(record["tokens"] for record in taken),
        "seconds": sum(record["tokens"] / record["tokens_per_second"] for record in taken),
        "perplexity": {n: v for n, v in summary["perplexity_after"].items() if n in shown},
        "kl": {n: v for n, v in summary["kl_after"].items() if n in shown},
        "along": [
            {"step": r["step"], "perplexity": {n: r["perplexity"][n] for n in shown}}
            for r in records
            if "perplexity" in r
        ],
    }


if __name__ == "__main__":
    described = {name: (f"The scale {name}.", made) for name, made in scales().items()}
    with said_in_one_line():
        chosen = tyro.extras.overridable_config_cli(described)
        paper(chosen)
        print((chosen.out / "report" / "paper.md").read_text())
