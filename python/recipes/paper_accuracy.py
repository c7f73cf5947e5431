"""What the models of the experiments get right in benchmarks."""

from pathlib import Path

import torch
from llamapro.eval.evaluate import Evaluation, evaluate
from llamapro.eval.tasks import names_of
from llamapro.hardware import pick_device
from llamapro.model import Llama
from llamapro.report_benchmarks import add_scores, read_evaluations

from recipes.paper_config import PaperConfig


def check(config: PaperConfig, base: Path) -> None:
    """Raise what would come up after hours of training, such as benchmarks that are missing."""
    if config.tasks is not None:
        _asked(config).check(base, None)


def accuracies(config: PaperConfig, models: dict[str, Path]) -> list[dict]:
    """What each model gets right, and its change against the first, the base; what has been
    evaluated is read. models: a directory for each row."""
    scores = []
    for row, path in models.items():
        name = "base" if row == "base" else path.parent.name
        file = config.out / "evaluations" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        dtype, device = getattr(torch, config.dtype), pick_device(config.device)
        evaluate(Llama.from_pretrained(path, dtype, device), path, _asked(config), file)
        (read,) = read_evaluations([file])
        scores.append(read.scores)
    figures = [{"model": row} for row in models]
    add_scores(figures, scores)
    return figures


def _asked(config: PaperConfig) -> Evaluation:
    root = None if config.data_root is None else config.data_root / "bench"
    return Evaluation(names_of(config.tasks), root, config.limit)
