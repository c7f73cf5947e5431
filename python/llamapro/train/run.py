"""What a run keeps on disk: its settings, metrics, checkpoints and results.

run/config.json             the TrainConfig
run/metrics.jsonl           a line per step and per evaluation
run/checkpoints/step-*/     what a run goes on from, see `train.checkpoint`
run/final/                  the trained model, a plain Hugging Face directory
run/summary.json            what came out
"""

import base64
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llamapro import storage
from llamapro.config import stock_shapes
from llamapro.data.mixture import absolute
from llamapro.frozen import FORMS
from llamapro.hardware import environment, pick_device, pick_dtype
from llamapro.hf import Checkpoint, write_model
from llamapro.proof import combined, difference, digest
from llamapro.ranks import ALONE, Ranks
from llamapro.train import checkpoint, sharded
from llamapro.train.checkpoint import checkpoints
from llamapro.train.config import with_keep_data
from llamapro.train.metrics import Metrics
from llamapro.train.parallel import Frozen, held_whole, release_gathered
from llamapro.train.trackers import Trackers
from llamapro_kernels import FrozenMatrix

RETRIES = 10  # of a checkpoint that could not be written, one after each step
# What runs did before there was a choice.
BEFORE = {"frozen": FORMS[0], "packing": "wrapped", "keep": None, "keep_data": None}
BEFORE |= {"keep_loss": "kl", "keep_within": None}
# Settings that a resumed run may change.
MAY_DIFFER = ("out", "device", "memory", "verify", "report_to", "shard", "timeout")
log = logging.getLogger("llamapro")


class Run:
    """A run, with its settings settled: `start` and `resume` look at everything that can be wrong
    with them and write nothing; `open` makes the directory, or takes the one that is there. Of
    several ranks, the first alone writes, but for checkpoints."""

    def __init__(self, config, resumed: bool, ranks: Ranks):
        self.config, self.resumed, self.path = config, resumed, Path(config.out)
        self.trackers, self.failures = Trackers(config.report_to if ranks.first else ()), 0
        self.ranks = ranks

    @classmethod
    def start(cls, config, ranks: Ranks = ALONE) -> "Run":
        """A new run: paths are whole, and dtype "auto" is one. Raises FileExistsError."""
        if Path(config.out).exists():
            raise FileExistsError(f"{config.out} exists: resume it, or name a new run directory")
        config = _whole(with_keep_data(config))
        if config.dtype == "auto":
            config = replace(config, dtype=pick_dtype(pick_device(config.device)))
        return cls(config, False, ranks)

    @classmethod
    def resume(cls, config, ranks: Ranks = ALONE) -> "Run":
        """The run at config.out, with the dtype that it was started with.

        Raises FileNotFoundError or ValueError when it is no run, ValueError for other settings.
        """
        started = settings(config.out)
        config = _whole(with_keep_data(config))
        if config.dtype == "auto":
            config = replace(config, dtype=started["dtype"])
        _check_same(config, started)
        return cls(config, True, ranks)

    @contextmanager
    def open(
        self, model, frozen: Frozen, optimizer, rows, data: dict[str, str], keeper
    ) -> Iterator[int]:
        """Make or take the directory, go back to the newest checkpoint, and give its step, 0 when
        there is none. The model is as it was loaded.

        data: a fingerprint of each set's tokens, by name. Raises BlockingIOError when another
        process works on the run, and as `restore`.
        """
        with ExitStack() as held:
            own = self._own_directory()
            self.ranks.of_first(lambda: held.enter_context(own))
            self.model, self.optimizer, self.rows, self.data = model, optimizer, rows, data
            self.keeper, self.frozen = keeper, frozen
            self.metrics = Metrics(self.path / "metrics.jsonl" if self.ranks.first else None)
            self.environment = environment(model.norm.device)
            if self.ranks.size > 1:
                self.environment["ranks"] = self.ranks.size
            step = self.restore()
            self.ranks.of_first(lambda: self.trackers.start(self.path, asdict(self.config)))
            held.callback(self.trackers.end)
            self.writer = self._writer()
            held.callback(self.writer.close)
            yield step

    @contextmanager
    def _own_directory(self) -> Iterator[None]:
        if not self.resumed:
            with storage.new_directory(self.path) as directory:
                storage.write_json(directory / "config.json", asdict(self.config))
        with storage.lock(self.path):
            for partial in (self.path / "checkpoints").glob(".*.partial"):
                shutil.rmtree(partial)
            yield

    def _writer(self):
        if self.ranks.size == 1:
            return checkpoint.Writer()
        return sharded.ShardedWriter(self.ranks, self.config.timeout)

    def append(self, record: dict) -> None:
        """Put a line into metrics.jsonl, and tell the trackers."""
        self.metrics.append(record)
        self.trackers.log(record)

    def save(self, step: int, *, last: bool = False) -> None:
        """Write a checkpoint, or say why it could not be, for the caller to try after a further
        step. Raises OSError when it was the last chance, or has failed too often, and as
        `write_checkpoint`."""
        try:
            self.write_checkpoint(step, last=last)
            self.failures = 0
        except OSError as error:
            self.failures += 1
            saved = checkpoints(self.path)
            newest = f"the newest on disk is {saved[-1].name}" if saved else "there is none on disk"
            if last or self.failures > RETRIES:
                raise OSError(
                    f"no checkpoint of step {step} could be written: {error}; {newest}"
                ) from None
            log.warning("no checkpoint of step %d could be written: %s; %s", step, error, newest)

    def write_checkpoint(self, step: int, *, last: bool = False) -> None:
        """Write a checkpoint, whole or not at all, then drop all but the newest two; several ranks
        go on before it is whole, unless it is the last.

        Raises RuntimeError when what is frozen has changed, FloatingPointError for a master or a
        moment that is not finite, and OSError when it, or the one before, cannot be written.
        """
        self._check_frozen(step)
        self.ranks.agree(lambda: self.optimizer.check_finite(step))
        state = {
            "step": step,
            "frozen": self.frozen.digests,
            "data": self.data,
            "rows": self.rows.taken,
            "kept_weight": self.keeper.weight,
            "environment": self.environment,
            "metrics": self.metrics.carried(),
            "random": self.ranks.gather(_random_state()),
        }
        self.ranks.of_first(self.metrics.sync)
        out = self.path / "checkpoints" / f"step-{step:08d}"
        self.writer.write(out, self.optimizer.state(), state, last=last)

    def restore(self) -> int:
        """Go back to the newest checkpoint and return its step; 0 when there is none.

        Warns when the machine or a version is another. Raises ValueError when what is frozen or
        the data are not those of the run, and CheckpointError for a damaged checkpoint.
        """
        saved = checkpoints(self.path)
        if not saved:
            self.ranks.agree(lambda: self.metrics.restore(-1, []))
            return 0
        state, tensors = self.ranks.agree(lambda: self._read(saved))
        if tensors is None:
            tensors = sharded.read_tensors(saved[-1], self.optimizer.state(), self.ranks)
        before = {"ranks": 1, **state["environment"]}
        changed = [
            f"{name} was {before.get(name)}, is {now}"
            for name, now in {"ranks": 1, **self.environment}.items()
            if before.get(name) != now
        ]
        if changed:
            log.warning("resumed: %s, so the bits may differ", ", ".join(changed))
        release_gathered(self.model)
        self.optimizer.load_state(tensors, state["step"])
        if "rows" in state:  # otherwise written when there was one corpus: its rows are counted
            self.rows.taken = list(state["rows"])
        self.keeper.weight = state.get("kept_weight", 1.0)
        self._restore_random_state(state["random"])
        self.ranks.agree(lambda: self.metrics.restore(state["step"], state["metrics"]))
        return state["step"]

    def _read(self, saved: list[Path]) -> tuple[dict, dict | None]:
        """The newest checkpoint's state and tensors; of one that ranks wrote, only the state."""
        like, tensors = self.optimizer.state(), None
        with checkpoint.damage_said(saved):
            state = checkpoint.read_state(saved[-1])
            if "files" in state:
                sharded.check(saved[-1], state, like, self.ranks)
            else:
                tensors = checkpoint.read_tensors(saved[-1], state, like)
        changed = difference(state["frozen"], self.frozen.digests)
        if changed:
            raise ValueError(f"{self.config.model} differs from the run's: {changed}")
        for name, hashed in state["data"].items():
            if self.data[name] != hashed:
                raise ValueError(f"the data of {name!r} differ from those of the run")
        return state, tensors

    def _restore_random_state(self, saved: list[dict[str, str]] | dict[str, str]) -> None:
        """Of other numbers of ranks there is no state to go on from: that of the start stays."""
        of_ranks = [saved] if isinstance(saved, dict) else saved  # of runs before there were any
        if len(of_ranks) == self.ranks.size:
            _set_random_state(of_ranks[self.ranks.rank])

    def finish(self, peak_memory: int) -> dict:
        """Write the final model and the summary, which is returned."""
        self._check_frozen(self.config.steps)  # again: the last evaluation may have come since
        peak_memory = max(self.ranks.gather(peak_memory))
        return self.ranks.of_first(lambda: self._write_results(peak_memory))

    def _write_results(self, peak_memory: int) -> dict:
        if (self.path / "summary.json").exists():
            return storage.read_json(self.path / "summary.json")
        self.metrics.flush()
        if not (self.path / "final").exists():
            self._write_final(self.path / "final")
        model = self.model
        evaluations = self.metrics.evaluations
        rates = sorted(r["tokens_per_second"] for r in self.metrics.read() if "loss" in r)
        summary = {
            "config": asdict(self.config),
            "dtype": self.config.dtype,
            "device": str(model.norm.device),
            "parameters": sum(map(math.prod, stock_shapes(model.config).values())),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "tokens_per_second": rates[len(rates) // 2],
            "peak_memory_bytes": peak_memory,
            "frozen_fingerprint": combined(self.frozen.digests),
            "environment": self.environment,
            "perplexity_before": evaluations[0]["perplexity"],
            "perplexity_after": evaluations[-1]["perplexity"],
        }
        for name in {"kl", "lost"} & evaluations[-1].keys():
            summary[f"{name}_after"] = evaluations[-1][name]
        storage.write_json(self.path / "summary.json", summary)
        return summary

    def _check_frozen(self, step: int) -> None:
        def check():
            changed = self.frozen.changed()
            if changed:
                raise RuntimeError(
                    f"step {step}: what is frozen changed: {changed}; it was not saved"
                )

        self.ranks.agree(check)

    def _write_final(self, out: Path) -> None:
        """The trained model; of ranks, from the shards of the last checkpoint."""
        dtype, held = getattr(torch, self.config.dtype), held_whole(self.model)
        trained = {name: t.detach for name, t in held.items() if t.requires_grad}
        if self.ranks.size > 1:
            trained = sharded.trained_tensors(checkpoints(self.path)[-1], self.model, dtype)
        base = Checkpoint(self.config.model)
        save_trained(self.model.config, base, out, dtype, trained, held, self.frozen.digests)


def settings(run) -> dict:
    """The settings a run was started with. FileNotFoundError or ValueError when it is no run."""
    file = Path(run) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{run}: a run to resume expected, got no config.json")
    try:
        config = storage.read_json(file)
    except ValueError as error:
        raise ValueError(f"the settings of a run expected: {error}") from None
    evaluate, data = config.get("evaluate"), config.get("data")
    texts = [config.get("model"), config.get("dtype")]
    texts += data if isinstance(data, list) else [data]
    texts += [text for text in [config.get("keep_data")] if text is not None]
    texts += evaluate.values() if isinstance(evaluate, dict) else [None]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ValueError(f"{file}: the settings of a run expected, got {sorted(config)[:5]} ...")
    return config


def _whole(config):
    """With absolute paths of the directories that are there: a run may go on from anywhere. A path
    that no file system takes is one that is not there."""
    return replace(config, **_whole_paths(asdict(config)))


def _whole_paths(settings: dict) -> dict:
    def whole(path):
        return str(Path(path).resolve()) if os.path.exists(path) else path

    evaluate = {name: whole(path) for name, path in settings["evaluate"].items()}
    model, data = whole(settings["model"]), absolute(settings["data"])
    keep_data = settings.get("keep_data")
    keep_data = keep_data if keep_data is None else str(Path(keep_data).resolve())
    return {"model": model, "data": data, "evaluate": evaluate, "keep_data": keep_data}


def _check_same(config, started: dict) -> None:
    """Raise ValueError unless these are the settings that the run was started with."""
    now, then = json.loads(json.dumps(asdict(config))), {**started, **_whole_paths(started)}
    for name, value in BEFORE.items():
        then.setdefault(name, value)
    changed = [
        f"{name} was {then.get(name)!r}, got {now[name]!r}"
        for name in now
        if name not in MAY_DIFFER and then.get(name) != now[name]
    ]
    if changed:
        said = storage.one_line("; ".join(changed))
        raise ValueError(f"{config.out}: a resumed run keeps its settings: {said}")


def save_trained(
    config,
    base: Checkpoint,
    out: Path,
    dtype: torch.dtype,
    trained: dict[str, Callable[[], torch.Tensor]],
    held: dict,
    frozen: dict[str, str],
) -> None:
    """The model in the base's dtypes; frozen tensors are the base's own bytes.

    trained: what gives each trained tensor, by stock name. Raises RuntimeError when the others, as
    the files have them, are no longer what was trained with: of those in 8 bits the matrices that
    are `held`, of those in `dtype` the digests `frozen`.
    """

    def value(entry):
        if entry.name in trained:
            return trained[entry.name]()
        kept, matrix = entry.load(), held.get(entry.name)
        read = kept.to(dtype)
        in_8_bits = isinstance(matrix, FrozenMatrix)
        if not (matrix.holds(read) if in_8_bits else digest(read) == frozen[entry.name]):
            raise RuntimeError(f"{base.path}: {entry.name} changed during the run")
        return kept

    entries = [replace(e, load=lambda e=e: value(e)) for e in base.tensors.values()]
    with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        write_model(directory, config, entries, files_from=base.path)


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {k: base64.b64encode(s.numpy().tobytes()).decode() for k, s in states.items()}


def _set_random_state(states: dict[str, str]) -> None:
    decoded = {
        k: torch.frombuffer(bytearray(base64.b64decode(s)), dtype=torch.uint8)
        for k, s in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if "cuda" in decoded and torch.cuda.is_available():
        torch.cuda.set_rng_state(decoded["cuda"])
