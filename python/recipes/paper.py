"""The paper's experiments by one command: block expansion beside its rivals.

`make paper` runs a scale: each row at the best of a small sweep of learning rates, on the same
tokens of the domain, measured on it and on what shall be kept. What has been run is not run again,
what was interrupted goes on: stopped or killed, the same command ends with the same table.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
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

from recipes import paper_accuracy, paper_inputs, paper_report
from recipes.paper_accuracy import accuracies
from recipes.paper_config import PaperConfig, Row, Run, Table, scales, steps, table_of
from recipes.paper_costs import equal_rank, flops, trained
from recipes.paper_inputs import Inputs
from recipes.paper_verdict import best_rate, chosen
from recipes.records import commit, settle
from recipes.rivals import ATTENTION, Judge, adapt, train_experts, train_top_blocks
from recipes.workers import workers

BEFORE = "taught before"  # the domain, in a run that is taught instructions
SAMPLES_SEED = 1  # of what is replayed; what a base is measured on has another


@dataclass
class Experiment:
    """A scale that is being run."""

    config: PaperConfig
    inputs: Inputs
    shape: LlamaConfig


def paper(config: PaperConfig) -> dict:
    """Run what is missing; write the results after each run, and return them."""
    setting = asdict(config)
    del setting["out"], setting["workers"]
    setting = settle(config.out / "setting.json", setting)
    inputs, table = paper_inputs.make(config), table_of(config)
    paper_accuracy.check(config, inputs.base)
    experiment = Experiment(config, inputs, Checkpoint(inputs.base).config)
    costs, sft_costs = (
        [_cost(experiment, row) for row in rows] for rows in (table.rows, table.sft)
    )
    print("\n".join(paper_report.costs(costs + sft_costs)), flush=True)
    where = {"environment": environment(pick_device(config.device)), "commit": commit()}
    results = {"setting": setting, **where, "not_run": table.not_run, "costs": costs, "runs": []}
    results |= {"base": _measure_base(experiment), "sft": {"costs": sft_costs, "runs": []}}
    with workers(config.workers, preload="recipes.rivals") as mapped:
        for stage in stages(config, table, results):
            tasks = [(run, _settings(experiment, run)) for run in stage]
            for result in mapped(partial(_run, experiment), tasks):
                (results["sft"] if result["sft"] else results)["runs"].append(result)
                _say(results, result, config.workers)
                paper_report.write(results, config.out / "report")
    if config.tasks is not None:
        results["accuracies"] = accuracies(config, _models(experiment, results))
        paper_report.write(results, config.out / "report")
    paper_report.draw(results, config.out / "report")
    return results


def stages(config: PaperConfig, table: Table, results: dict) -> Iterator[list[Run]]:
    """Every run: those of a stage depend on the results of the stages before. The sweeps, then each
    row at its best rate; then the same of SFT, which begins with what a row made of the base."""
    first = config.seeds[0]
    for rows, done in ((table.rows, results["runs"]), (table.sft, results["sft"]["runs"])):

        def run(row: Row, rate: float, seed: int) -> Run:
            start = None
            if row.sft and row.way != "base":
                before = replace(row, sft=False)
                start = Run(before, best_rate(results["runs"], before.name, first), seed)
            return Run(row, rate, seed, start)

        plain = [row for row in rows if row == row.plain]
        yield [run(row, rate, first) for row in plain for rate in config.rates[row.swept]]
        yield [
            run(row, best_rate(done, row.plain.name, first), seed)
            for seed in config.seeds
            for row in rows
            if row not in plain or seed != first
        ]


def _models(experiment: Experiment, results: dict) -> dict[str, Path]:
    """The model of each row with the first seed, after SFT too, and the base; experts have none."""
    config, found = experiment.config, {"base": experiment.inputs.base}
    for part in (results, results | results["sft"]):
        for name, runs in chosen(part).items():
            final = config.out / "runs" / runs[config.seeds[0]]["name"] / "final"
            if final.exists():
                found[name] = final
    return found


def _cost(experiment: Experiment, row: Row) -> dict:
    config, shape = experiment.config, experiment.shape
    plain = row == row.plain
    return {
        "row": row.name,
        "trained": trained(config, shape, row),
        "steps": steps(config, row),
        "flops": flops(config, shape, row),
        "runs": len(config.seeds) + (len(config.rates[row.swept]) - 1 if plain else 0),
    }


def _say(results: dict, result: dict, at_once: int) -> None:
    """What came out of a run, and how long the rest will take by the FLOPs and seconds so far."""
    costs = results["costs"] + results["sft"]["costs"]
    done = results["runs"] + results["sft"]["runs"]
    of_row = {cost["row"]: cost["flops"] for cost in costs}
    spent = sum(of_row[run["row"]] for run in done)
    left = sum(cost["flops"] * cost["runs"] for cost in costs) - spent
    minutes = left / spent * sum(run["seconds"] for run in done) / 60 / at_once
    perplexity = "  ".join(f"{name} {value:.2f}" for name, value in result["perplexity"].items())
    print(
        f"{result['row']}, learning rate {result['learning_rate']:g}, seed {result['seed']}:"
        f" {perplexity}; run {len(done)} of {sum(cost['runs'] for cost in costs)},"
        f" about {minutes:.0f} minutes of training left",
        flush=True,
    )


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


def _run(experiment: Experiment, task: tuple[Run, TrainConfig]) -> dict:
    """What came out of a run, which is made, or gone on with, where it is missing."""
    run, settings = task
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
    print(f"\n{row.name}, learning rate {run.rate:g}, seed {run.seed}", flush=True)
    if row.sft:
        train(settings, resume=Path(settings.out).exists())
    elif row.way == "lora":
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
    """The settings of a run; what it needs, and is not there, is made."""
    config, inputs, row = experiment.config, experiment.inputs, run.row
    model, taught, count = inputs.base, inputs.domain, steps(config, row)
    measured = dict(inputs.general)
    if row.sft:
        taught, measured = inputs.instructions, {**measured, BEFORE: inputs.domain}
        model = _out(config, run.start) / "final" if run.start else model
    elif row.way == "new_blocks":
        model = paper_inputs.expanded(config, inputs, row.blocks, row.placement)
    settings = TrainConfig(
        model=str(model),
        data=(str(taught),),
        out=str(_out(config, run)),
        trainable="new_blocks" if row.way == "new_blocks" and not row.sft else "all",
        steps=count,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        seq_len=config.seq_len,
        packing=config.packing,
        learning_rate=run.rate,
        dtype=config.dtype,
        device=config.device,
        seed=run.seed,
        evaluate={name: str(path) for name, path in measured.items()},
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


def _out(config: PaperConfig, run: Run) -> Path:
    return config.out / "runs" / run.name


def _samples(experiment: Experiment) -> Path:
    """As many as the row with most of them takes, up to as many as a run would sample itself."""
    config, most = experiment.config, max(experiment.config.shares)
    tokens = min(MOST_SAMPLES, round(config.tokens * most / (1 - most)))
    return paper_inputs.samples(config, experiment.inputs.base, "samples", tokens, SAMPLES_SEED)


def _result(run: Run, out: Path) -> dict:
    """The figures of a run that is finished."""
    summary, records = read_json(out / "summary.json"), Metrics(out / "metrics.jsonl").read()
    taken = [record for record in records if "loss" in record]
    settings = summary["config"]
    names = {name: name for name in ("domain", *settings["evaluate"])}
    if run.row.sft:
        names |= {"domain": "instructions", BEFORE: "domain"}
    state = read_state(checkpoints(out)[-1])
    return {
        "name": run.name,
        "row": run.row.name,
        **asdict(run.row),
        "plain": run.row.plain.name,
        "learning_rate": run.rate,
        "seed": run.seed,
        "trained": summary["trainable_parameters"],
        "rows_taken": state["rows"],
        "tokens": sum(record["tokens"] for record in taken),
        "seconds": sum(record["tokens"] / record["tokens_per_second"] for record in taken),
        "perplexity": {n: summary["perplexity_after"][old] for old, n in names.items()},
        # After SFT it would be that to the model it began with.
        "kl": {} if run.row.sft else {n: summary["kl_after"][n] for n in settings["evaluate"]},
        "along": [
            {"step": r["step"], "perplexity": {n: r["perplexity"][old] for old, n in names.items()}}
            for r in records
            if "perplexity" in r
        ],
    }


if __name__ == "__main__":
    described = {name: (f"The scale {name}.", made) for name, made in scales().items()}
    with said_in_one_line():
        asked = tyro.extras.overridable_config_cli(described)
        paper(asked)
        print((asked.out / "report" / "paper.md").read_text())
