"""Experiment trackers: where the metrics of a run go beside metrics.jsonl.

A tracker is imported when it is asked for, and told of every line: `log(values, step)` with flat
names. One that fails later is said once and told no more: a run does not end for it.
"""

import hashlib
import importlib
import logging
from pathlib import Path

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
PROJECT = "llamapro"
log = logging.getLogger("llamapro")


class Trackers:
    """The trackers of a run. Raises ImportError, before anything is written, for a missing one."""

    def __init__(self, names: tuple[str, ...]):
        self.modules = {name: _imported(name) for name in names}
        self.logs, self.ends = {}, {}

    def start(self, out: Path, settings: dict) -> None:
        """Begin, or go on with, the run of this directory. Settings are those of the run."""
        for name, module in self.modules.items():
            self.logs[name], self.ends[name] = OPEN[name](module, out, settings)

    def log(self, record: dict) -> None:
        """Tell of a line of metrics.jsonl."""
        values = flat({name: value for name, value in record.items() if name != "step"})
        for name in [*self.logs]:
            try:
                self.logs[name](values, record["step"])
            except Exception as error:  # of whatever kind another library raises
                log.warning("%s is told no more: %s", name, error)
                del self.logs[name]

    def end(self) -> None:
        """Let the trackers write what they hold."""
        for name in self.logs:
            self.ends[name]()


def flat(record: dict, prefix: str = "") -> dict[str, float]:
    """{"perplexity": {"domain": 4.2}} as {"perplexity/domain": 4.2}."""
    found = {}
    for name, value in record.items():
        found |= (
            flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


def _imported(name: str):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"--report-to {name} needs the package: pip install {name}") from None


def _tensorboard(module, out, settings):
    writer = module.SummaryWriter(str(out / "tensorboard"))

    def write(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(module, out, settings):
    run_id = hashlib.blake2b(str(out).encode(), digest_size=8).hexdigest()  # a resumed run goes on
    run = module.init(
        project=PROJECT, name=out.name, id=run_id, resume="allow", dir=str(out), config=settings
    )
    return lambda values, step: run.log(values, step=step), run.finish


def _trackio(module, out, settings):
    run = module.init(project=PROJECT, name=out.name, resume="allow", config=settings)
    return lambda values, step: run.log(values, step=step), module.finish


def _mlflow(module, out, settings):
    module.set_experiment(PROJECT)
    run = module.start_run(run_name=out.name)
    module.log_params({name: str(value)[:500] for name, value in settings.items()})

    def write(values, step):
        module.log_metrics(values, step=step, run_id=run.info.run_id)

    return write, module.end_run


OPEN = dict(zip(TRACKERS, (_tensorboard, _wandb, _trackio, _mlflow), strict=True))
