"""The whole method on real input: expand SmolLM2-135M, teach it Python, show what it kept.

`make demo` runs it; `make sweep` measures the learning rates it uses.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
import tyro
from llamapro.command_line import said_in_one_line
from llamapro.data.prepare import prepare
from llamapro.expansion import expand_checkpoint
from llamapro.hardware import pick_device, pick_dtype
from llamapro.markdown import table
from llamapro.model import Llama
from llamapro.report import command, report
from llamapro.storage import write_json
from llamapro.train.parallel import freeze
from llamapro.train.replay import replay

from recipes import assets

NEW_BLOCKS = 6
SEQ_LEN = 512
BATCH_SIZE = 2
EVAL_TOKENS = {"run": 512, "sweep": 8192, "report": 4096}  # of each held-out set
LEAST_STEPS, MOST_STEPS, MINUTES = 30, 60, 15  # by default as many as there is time for
KEEP = 0.2  # of the rows
SEPARATOR = "<|endoftext|>"
SWEEP = Path(__file__).with_name("demo_sweep.json")
SWEPT = {"new_blocks": (5e-4, 1e-3, 2e-3), "all": (2e-5, 5e-5, 1e-4, 2e-4)}


@dataclass
class DemoConfig:
    """The demonstration: minutes on two CPU cores, CUDA when there is one."""

    steps: int | None = None
    """Optimizer steps of each of the four runs; by default as many as a quarter of an hour takes,
    30 to 60."""
    out: Path = Path("runs/demo")
    sweep: bool = False
    """Measure the learning rates instead, and record them for later demos."""

    def __post_init__(self):
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def demo(config: DemoConfig) -> None:
    """Fetch, expand, train, report. A run that was interrupted goes on where it was."""
    if (config.out / "report").exists():
        print(f"{config.out}/report is there already; delete {config.out} to run again")
        return
    print(
        f"1. fetch SmolLM2-135M and English text (98 MB, once), take Python's standard library\n"
        f"2. expand the model by {NEW_BLOCKS} identity blocks and prove that nothing changed\n"
        f"3. teach it Python, only new blocks training; for comparison, train all of it\n"
        f"4. do both again with {KEEP:.0%} of the rows from the base itself, to keep what it knew\n"
        f"5. measure all of them on Python and on English, write {config.out}/report/report.md",
        flush=True,
    )
    base, expanded = _inputs(config.out)
    models = {"new_blocks": expanded, "all": base}
    plan = _plan(config, models)
    print(
        f"{plan['device']}, {plan['dtype']}: {plan['steps']} steps of each of four runs, training"
        f" and measuring will take about {plan['minutes']:.0f} minutes",
        flush=True,
    )
    config, samples, runs = replace(config, steps=plan["steps"]), config.out / "samples", []
    if not samples.exists():
        _sample(config, base, samples)
    for keep, trainable in product((None, KEEP), models):
        model = models[trainable]
        runs.append(config.out / (f"{trainable}-kept" if keep else trainable))
        rate = best_rate(trainable)
        settings = _settings(config, plan["dtype"], trainable, model, rate, runs[-1])
        settings |= {"eval_every": config.steps, "eval_tokens": EVAL_TOKENS["run"]}
        _train(settings | ({"keep": keep, "keep_data": str(samples)} if keep else {}))
    notes = _sweep_note()
    page = report(base, runs, config.out / "report", max_tokens=EVAL_TOKENS["report"], notes=notes)
    print(f"\n{page.read_text()}\n{page} and report.png beside it")


def sweep(config: DemoConfig) -> None:
    """Train at every learning rate of SWEPT and record the held-out perplexities."""
    base, expanded = _inputs(config.out)
    models = {"new_blocks": expanded, "all": base}
    dtype = _plan(config, models)["dtype"]
    results = []
    config = replace(config, steps=config.steps or MOST_STEPS)
    for trainable, rates in SWEPT.items():
        for rate in rates:
            run = config.out / f"{trainable}-{rate:g}"
            settings = _settings(config, dtype, trainable, models[trainable], rate, run)
            _train(settings | {"eval_every": config.steps, "eval_tokens": EVAL_TOKENS["sweep"]})
            summary = json.loads((run / "summary.json").read_text())
            after = summary["perplexity_after"]
            results.append({"trainable": trainable, "learning_rate": rate, "perplexity": after})
    setting = {"steps": config.steps, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "dtype": dtype}
    write_json(SWEEP, {"setting": setting, "results": results})
    print(f"{SWEEP}\n{_sweep_note()}")


def best_rate(trainable: str) -> float:
    """The learning rate with the lowest domain perplexity of the recorded sweep."""
    results = json.loads(SWEEP.read_text())["results"]
    mine = [r for r in results if r["trainable"] == trainable]
    return min(mine, key=lambda r: r["perplexity"]["domain"])["learning_rate"]


def _inputs(out: Path) -> tuple[Path, Path]:
    """The base, the expanded model, and the data directories below `out`; made where missing."""
    base = assets.smollm2()
    if not (out / "code").exists():
        prepare(assets.standard_library(), base, out / "code", heldout=0.05, separator=SEPARATOR)
    if not (out / "general").exists():
        english = assets.fetch(assets.BRITANNICA)
        prepare([english], base, out / "general", heldout=1.0, separator=SEPARATOR)
    expanded = out / "expanded"
    if not expanded.exists():
        positions = expand_checkpoint(base, expanded, NEW_BLOCKS)
        print(f"expanded: new blocks at {positions}; logits are bit-equal to the base's")
    return base, expanded


def _plan(config: DemoConfig, models: dict[str, Path]) -> dict:
    """Device, dtype and time, from one measured step of each run; kept in `out`."""
    file = config.out / "plan.json"
    if file.exists():
        return json.loads(file.read_text())
    device = pick_device()
    dtype = pick_dtype(device)
    print("timing a step ...", flush=True)
    steps, forwards = zip(*(_timed(m, t, dtype, device) for t, m in models.items()), strict=True)
    # Four runs measure three sets, before and after, and ask the base; the report five models. The
    # base's own part of a step takes about a tenth, and a sampled token as long as three others.
    evaluated = 3 * (4 * 3 * EVAL_TOKENS["run"] + 5 * EVAL_TOKENS["report"])
    per_token = sum(forwards) / 2 / (BATCH_SIZE * SEQ_LEN)
    fixed, step = 60 + evaluated * per_token, 2.1 * sum(steps) + 3 * KEEP * sum(forwards) / 2
    fitting = max(LEAST_STEPS, min(MOST_STEPS, int((MINUTES * 60 - fixed) / step)))
    count = config.steps or fitting
    plan = {"device": str(device), "dtype": dtype, "steps": count}
    plan["minutes"] = (fixed + count * step) / 60
    write_json(file, plan)
    return plan


def _timed(model_path: Path, trainable: str, dtype: str, device) -> tuple[float, float]:
    """Seconds of a training step, and of its forward alone: the faster of two after a first."""
    model = Llama.from_pretrained(model_path, dtype=getattr(torch, dtype), device=device)
    freeze(model, trainable)
    generator = torch.Generator().manual_seed(0)
    size = (BATCH_SIZE, SEQ_LEN)
    tokens = torch.randint(model.config.vocab_size, size, generator=generator).to(device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss = model.loss(tokens, tokens)
        loss.item()
        forward = time.perf_counter() - start
        loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start, forward))
    return min(times[1:])


def _sample(config: DemoConfig, base: Path, out: Path) -> None:
    """What the base says by itself, as training goes on from the end of a document."""
    tokens = max(8 * SEQ_LEN, round(KEEP * config.steps * BATCH_SIZE * SEQ_LEN))
    print(f"\nsampling {tokens} tokens of the base ...", flush=True)
    replay(base, out, tokens=tokens, bos_token=SEPARATOR, seq_len=SEQ_LEN)


def _settings(
    config: DemoConfig, dtype: str, trainable: str, model: Path, rate: float, out: Path
) -> dict:
    return {
        "model": str(model),
        "data": str(config.out / "code"),
        "out": str(out),
        "trainable": trainable,
        "steps": config.steps,
        "batch_size": BATCH_SIZE,
        "seq_len": SEQ_LEN,
        "learning_rate": rate,
        "dtype": dtype,
        "evaluate": {"general": str(config.out / "general")},
    }


def _train(settings: dict) -> None:
    """As a process of its own, so that peak memory is the run's; goes on when there is a run."""
    out = Path(settings["out"])
    if (out / "summary.json").exists():
        return
    words = command(settings)
    print(f"\n$ {' '.join(words)}", flush=True)
    resume = ["--resume"] if out.exists() else []
    child = subprocess.Popen([sys.executable, "-m", "llamapro.cli", *words[1:], *resume])
    try:
        code = child.wait()
    except KeyboardInterrupt:  # the child has it too, and writes a checkpoint
        code = child.wait()
    if code:
        sys.exit("the demonstration stopped; the same command goes on from here")


def _sweep_note() -> str:
    recorded = json.loads(SWEEP.read_text())
    setting = recorded["setting"]
    rows = [
        [
            r["trainable"],
            f"{r['learning_rate']:g}",
            *(f"{r['perplexity'][name]:.2f}" for name in ("domain", "general")),
        ]
        for r in recorded["results"]
    ]
    lines = [
        "## Learning rates",
        f"Each run uses the best of a recorded sweep (`make sweep`: {setting['steps']} steps of"
        f" {setting['batch_size']} x {setting['seq_len']} tokens, {setting['dtype']}):",
        "",
        *table(["trained", "learning rate", "domain perplexity", "general perplexity"], rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    chosen = tyro.cli(DemoConfig)
    with said_in_one_line():
        (sweep if chosen.sweep else demo)(chosen)
