"""What the models of the experiments get right in benchmarks."""

from pathlib import Path

import torch
from llamapro.eval.evaluate import Evaluation, evaluate
from llamapro.eval.tasks import names_of
from llamapro.hardware import pick_device
from llamapro.model import Llama
from llamapro.report_benchmarks import read_evaluations

from recipes.paper_config import PaperConfig


def check(config: PaperConfig, base: Path) -> None:
    """Raise what would come up after hours of training, such as benchmarks that are missing."""
    if config.tasks is not None:
        _asked(config).check(base, None)


def accuracies(config: PaperConfig, models: dict[str, Path]) -> dict[str, dict[str, list]]:
    """By row and benchmark, [share of the answers that are right, its standard error]; what has
    been evaluated is read. models: a directory for each row."""
    found = {}
    for row, path in models.items():
        file = config.out / "evaluations" / f"{path.parent.name}.json"
        file.parent.mkdir(exist_ok=True)
        dtype, device = getattr(torch, config.dtype), pick_device(config.device)
        evaluate(Llama.from_pretrained(path, dtype, device), path, _asked(config), file)
        (read,) = read_evaluations([file])
        found[row] = {name: [score.value, score.stderr] for name, score in read.scores.items()}
    return found


def _asked(config: PaperConfig) -> Evaluation:
    root = None if config.data_root is None else config.data_root / "bench"
    return Evaluation(names_of(config.tasks), root, config.limit)
