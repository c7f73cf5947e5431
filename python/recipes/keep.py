"""What keeps a base: stories260K learns law, with shares of its own samples, by two losses.

`make keep` runs it. Every row sees the same law in the same order; samples come on top. A run that
is there is not run again, so it can be stopped, and goes on.
"""

import json
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
import tyro
from llamapro.command_line import said_in_one_line
from llamapro.data.prepare import prepare
from llamapro.expansion import expand_checkpoint
from llamapro.hardware import environment
from llamapro.storage import write_json
from llamapro.train import TrainConfig, train
from llamapro.train.replay import replay

from recipes.records import commit
from recipes.stories import convert

BATCH_SIZE, SEQ_LEN, NEW_BLOCKS = 16, 256, 5
FRESH_SEED = 1000  # of samples that no run has seen
# Peak learning rates; not swept.
RATES = {"full": 1e-3, "interleaved": 3e-3, "suffix": 3e-3}
KEPT = (0.0, 0.02, 0.05, 0.25)  # shares of the rows


@dataclass
class KeepConfig:
    """The experiment; on one CPU core a run takes six to nine minutes."""

    data_root: Path
    """The folder with models/stories260K and text/legal."""
    out: Path = Path("runs/keep")
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 1_600_000
    """Tokens of law that each run sees."""
    shares: tuple[float, ...] = KEPT
    """Shares of the rows that are samples."""
    results: Path = Path("benchmarks/results/keep-stories260k.json")
    picture: Path = Path("docs/keep.svg")


@dataclass(frozen=True)
class Row:
    """One run."""

    trained: str  # "full", or where the new blocks are
    share: float
    loss: str | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.trained}-{self.share:g}-{self.loss}-{self.seed}"


def rows(config: KeepConfig) -> list[Row]:
    """Every run; what tells most comes first."""
    kinds = [(s, loss) for s in sorted(config.shares, reverse=True) for loss in ("kl", "ce") if s]
    kinds = [(0.0, None)] * (0 in config.shares) + kinds
    return [
        Row(trained, share, loss, seed)
        for seed, (share, loss), trained in product(config.seeds, kinds, RATES)
    ]


def keep(config: KeepConfig) -> None:
    """Run what is missing, and write the results after each run."""
    out, results = config.out, []
    base = convert(config.data_root / "models" / "stories260K", out / "base")
    law, fresh = out / "law", out / "stories"
    if not law.exists():
        prepare([config.data_root / "text" / "legal"], base, law, pattern="*.jsonl")
    if not fresh.exists():
        replay(base, fresh, tokens=9 * 40_000, seq_len=SEQ_LEN, seed=FRESH_SEED, dtype="float32")
    models = {"full": base}
    for placement in ("interleaved", "suffix"):
        models[placement] = out / placement
        if not models[placement].exists():
            expand_checkpoint(base, models[placement], NEW_BLOCKS, placement)
    for row in rows(config):
        results.append(_run(config, row, models[row.trained], base))
        setting = {"tokens": config.tokens, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN}
        where = {"environment": environment(torch.device("cpu")), "commit": commit()}
        write_json(config.results, {"setting": setting, **where, "results": results})
    draw(results, config.picture)
    print(f"{config.results}, {config.picture}; python -m benchmarks.tables puts it into the docs")


def _run(config: KeepConfig, row: Row, model: Path, base: Path) -> dict:
    samples = config.out / f"samples-{row.seed}"
    if row.share and not samples.exists():
        most = max(config.shares)
        tokens = int(config.tokens * most / (1 - most))
        replay(base, samples, tokens=tokens, seq_len=SEQ_LEN, seed=row.seed, dtype="float32")
    settings = TrainConfig(
        model=str(model),
        data=(str(config.out / "law"),),
        out=str(config.out / row.name),
        trainable="all" if row.trained == "full" else "new_blocks",
        steps=round(config.tokens / (1 - row.share) / BATCH_SIZE / SEQ_LEN),
        batch_size=BATCH_SIZE,
        seq_len=SEQ_LEN,
        learning_rate=RATES[row.trained],
        dtype="float32",
        device="cpu",
        seed=row.seed,
        evaluate={"stories": str(config.out / "stories")},
        eval_every=10**6,
        eval_tokens=40_000,
        checkpoint_every=100,
    )
    if row.share:
        settings = replace(settings, keep=row.share, keep_data=str(samples), keep_loss=row.loss)
    out = Path(settings.out)
    finished = out / "summary.json"
    if not finished.exists():
        train(settings, resume=out.exists())
    summary = json.loads(finished.read_text())
    before, after = summary["perplexity_before"], summary["perplexity_after"]
    return {
        **asdict(row),
        "learning_rate": settings.learning_rate,
        "law": after["domain"],
        "stories": after["stories"],
        "kl": summary["kl_after"]["stories"],
        "base": {"law": before["domain"], "stories": before["stories"]},
    }


def draw(results: list[dict], path: Path) -> None:
    """What was learnt against what was kept, a point for each run, to an SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for color, trained in enumerate(RATES):
        for loss, marker in ((None, "x"), ("ce", "o"), ("kl", "s")):
            mine = [r for r in results if (r["trained"], r["loss"]) == (trained, loss)]
            if not mine:
                continue
            name = {None: "no samples", "ce": "samples, cross-entropy", "kl": "samples, KL"}[loss]
            points = zip(*((r["kl"], r["law"]) for r in mine), strict=True)
            axis.plot(*points, marker, color=f"C{color}", label=f"{_title(trained)}: {name}")
            for row in mine:
                if row["loss"] == "kl":  # those of cross-entropy are so near that one would do
                    how = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
                    axis.annotate(f"{row['share']:.0%}", (row["kl"], row["law"]), (0, -12), **how)
    axis.set(xlabel="KL to the base on its own fresh samples, nats per token: what is lost")
    axis.set(ylabel="perplexity of held-out law: what is learnt", xscale="log")
    axis.xaxis.set_major_locator(ticker.FixedLocator([0.05, 0.1, 0.2, 0.5, 1, 2]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)
    pyplot.close(figure)


def _title(trained: str) -> str:
    return "full fine-tuning" if trained == "full" else f"+{NEW_BLOCKS} blocks, {trained}"


if __name__ == "__main__":
    with said_in_one_line():
        keep(tyro.cli(KeepConfig))
