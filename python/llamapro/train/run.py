"""What a run keeps on disk: its settings, metrics, checkpoints and results.

run/config.json             the TrainConfig
run/metrics.jsonl           a line per step and per evaluation
run/checkpoints/step-*/     masters, AdamW's moments, place and random state, what metrics go on
                            from, and digests of all of it; the newest two
run/final/                  the trained model, a plain Hugging Face directory
run/summary.json            what came out
"""

import base64
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llamapro import storage
from llamapro.data.mixture import absolute
from llamapro.frozen import FORMS
from llamapro.hardware import environment, pick_device, pick_dtype
from llamapro.hf import Checkpoint, entries_of, write_model, write_safetensors
from llamapro.model import stock_tensors
from llamapro.model_files import CheckpointError
from llamapro.proof import combined, difference, digest, digests, fingerprint
from llamapro.train.config import with_keep_data
from llamapro.train.metrics import Metrics
from llamapro.train.trackers import Trackers
from llamapro_kernels import FrozenMatrix

KEPT = 2
RETRIES = 10  # of a checkpoint that could not be written, one after each step
# What runs did before there was a choice.
BEFORE = {"frozen": FORMS[0], "packing": "wrapped", "keep": None, "keep_data": None}
BEFORE |= {"keep_loss": "kl", "keep_within": None}
MAY_DIFFER = (
    "out",
    "device",
    "memory",
    "verify",
    "report_to",
)  # settings that a resumed run may change
log = logging.getLogger("llamapro")


class Run:
    """A run, with its settings settled: `start` and `resume` look at everything that can be wrong
    with them and write nothing; `open` makes the directory, or takes the one that is there."""

    def __init__(self, config, resumed: bool):
        self.config, self.resumed, self.path = config, resumed, Path(config.out)
        self.trackers, self.failures = Trackers(config.report_to), 0

    @classmethod
    def start(cls, config) -> "Run":
        """A new run: paths are whole, and dtype "auto" is one. Raises FileExistsError."""
        if Path(config.out).exists():
            raise FileExistsError(f"{config.out} exists: resume it, or name a new run directory")
        config = _whole(with_keep_data(config))
        if config.dtype == "auto":
            config = replace(config, dtype=pick_dtype(pick_device(config.device)))
        return cls(config, False)

    @classmethod
    def resume(cls, config) -> "Run":
        """The run at config.out, with the dtype that it was started with.

        Raises FileNotFoundError or ValueError when it is no run, ValueError for other settings.
        """
        started = settings(config.out)
        config = _whole(with_keep_data(config))
        if config.dtype == "auto":
            config = replace(config, dtype=started["dtype"])
        _check_same(config, started)
        return cls(config, True)

    @contextmanager
    def open(self, model, optimizer, rows, data: dict[str, str], keeper) -> Iterator[int]:
        """Make or take the directory, go back to the newest checkpoint, and give its step, 0 when
        there is none. The model is as it was loaded.

        data: a fingerprint of each set's tokens, by name. Raises BlockingIOError when another
        process works on the run, and as `restore`.
        """
        if not self.resumed:
            with storage.new_directory(self.path) as directory:
                storage.write_json(directory / "config.json", asdict(self.config))
        with storage.lock(self.path):
            for partial in (self.path / "checkpoints").glob(".*.partial"):
                shutil.rmtree(partial)
            self.model, self.optimizer, self.rows, self.data = model, optimizer, rows, data
            self.keeper = keeper
            self.metrics = Metrics(self.path / "metrics.jsonl")
            self.frozen = fingerprint(model)
            self.environment = environment(model.norm.device)
            step = self.restore()
            self.trackers.start(self.path, asdict(self.config))
            try:
                yield step
            finally:
                self.trackers.end()

    def append(self, record: dict) -> None:
        """Put a line into metrics.jsonl, and tell the trackers."""
        self.metrics.append(record)
        self.trackers.log(record)

    def save(self, step: int, *, last: bool = False) -> None:
        """Write a checkpoint, or say why it could not be, for the caller to try after a further
        step. Raises OSError when it was the last chance, or has failed too often, and as
        `write_checkpoint`."""
        try:
            self.write_checkpoint(step)
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

    def write_checkpoint(self, step: int) -> None:
        """Write a checkpoint, whole or not at all, then drop all but the newest two.

        Raises RuntimeError when what is frozen has changed, FloatingPointError for a master or a
        moment that is not finite, and OSError when it cannot be written.
        """
        self._check_frozen(step)
        self.optimizer.check_finite(step)
        tensors = self.optimizer.state()
        entries = entries_of(tensors)
        state = {
            "step": step,
            "frozen": self.frozen,
            "data": self.data,
            "rows": self.rows.taken,
            "kept_weight": self.keeper.weight,
            "environment": self.environment,
            "metrics": self.metrics.carried(),
            "tensors": digests(tensors),
            "random": _random_state(),
        }
        self.metrics.sync()
        out = self.path / "checkpoints" / f"step-{step:08d}"
        with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
            storage.write_json(directory / "state.json", {**state, "digest": _digest(state)})
            write_safetensors(directory / "state.safetensors", entries)
        for old in checkpoints(self.path)[:-KEPT]:
            _remove(old)

    def restore(self) -> int:
        """Go back to the newest checkpoint and return its step; 0 when there is none.

        Warns when the machine or a version is another. Raises ValueError when what is frozen or
        the data are not those of the run, and CheckpointError for a damaged checkpoint.
        """
        saved = checkpoints(self.path)
        if not saved:
            self.metrics.restore(-1, [])
            return 0
        state, tensors = _read(saved, self.optimizer.shapes())
        changed = difference(state["frozen"], self.frozen)
        if changed:
            raise ValueError(f"{self.config.model} differs from the run's: {changed}")
        for name, hashed in state["data"].items():
            if self.data[name] != hashed:
                raise ValueError(f"the data of {name!r} differ from those of the run")
        changed = [
            f"{name} was {state['environment'].get(name)}, is {now}"
            for name, now in self.environment.items()
            if state["environment"].get(name) != now
        ]
        if changed:
            log.warning("resumed: %s, so the bits may differ", ", ".join(changed))
        self.optimizer.load_state(tensors, state["step"])
        if "rows" in state:  # otherwise written when there was one corpus: its rows are counted
            self.rows.taken = list(state["rows"])
        self.keeper.weight = state.get("kept_weight", 1.0)
        _set_random_state(state["random"])
        self.metrics.restore(state["step"], state["metrics"])
        return state["step"]

    def finish(self, peak_memory: int) -> dict:
        """Write the final model and the summary, which is returned."""
        if (self.path / "summary.json").exists():
            return storage.read_json(self.path / "summary.json")
        self._check_frozen(self.config.steps)  # again: the last evaluation may have come since
        self.metrics.flush()
        final, model = self.path / "final", self.model
        if not final.exists():
            save_trained(model, Checkpoint(self.config.model), final, self.frozen)
        evaluations = self.metrics.evaluations
        rates = sorted(r["tokens_per_second"] for r in self.metrics.read() if "loss" in r)
        summary = {
            "config": asdict(self.config),
            "dtype": str(model.norm.dtype).removeprefix("torch."),
            "device": str(model.norm.device),
            "parameters": sum(t.shape.numel() for t in stock_tensors(model).values()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "tokens_per_second": rates[len(rates) // 2],
            "peak_memory_bytes": peak_memory,
            "frozen_fingerprint": combined(self.frozen),
            "environment": self.environment,
            "perplexity_before": evaluations[0]["perplexity"],
            "perplexity_after": evaluations[-1]["perplexity"],
        }
        for name in {"kl", "lost"} & evaluations[-1].keys():
            summary[f"{name}_after"] = evaluations[-1][name]
        storage.write_json(self.path / "summary.json", summary)
        return summary

    def _check_frozen(self, step: int) -> None:
        changed = difference(self.frozen, fingerprint(self.model))
        if changed:
            raise RuntimeError(f"step {step}: what is frozen changed: {changed}; it was not saved")


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


def checkpoints(run) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-" + "[0-9]" * 8)
    return sorted(folder for folder in folders if folder.is_dir())


def _remove(folder: Path) -> None:
    """Remove a checkpoint, of which half must not look whole; one that stays is said."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        os.rename(folder, partial)
        shutil.rmtree(partial)
    except OSError as error:
        log.warning("an old checkpoint could not be removed: %s", error)


def _read(saved: list[Path], shapes: dict[str, tuple]) -> tuple[dict, dict[str, torch.Tensor]]:
    """The newest checkpoint's state and tensors, which must have these names and shapes, in fp32,
    and the digests that were taken when they were saved."""
    folder = saved[-1]
    try:
        state = storage.read_json(folder / "state.json")
        _check_digest(state)
        storage.check_regular(folder / "state.safetensors")
        tensors = load_file(folder / "state.safetensors")
        expected = {name: (tuple(shape), torch.float32) for name, shape in shapes.items()}
        got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        wrong = sorted(name for name in expected | got if expected.get(name) != got.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(f"{name}: {expected.get(name)} expected, got {got.get(name)}")
        changed = difference(state["tensors"], digests(tensors))
        if changed:
            raise ValueError(f"state.safetensors: the digest of {changed}")
        return state, tensors
    except (OSError, ValueError, SafetensorError) as error:
        instead = f"go on from {saved[-2].name}" if len(saved) > 1 else "start anew"
        said = storage.one_line(error)
        raise CheckpointError(f"{folder} is damaged: {said}; remove it to {instead}") from None


def _check_digest(state) -> None:
    """Raise ValueError unless this is what `write_checkpoint` wrote."""
    said, got = state.get("digest"), _digest({k: v for k, v in state.items() if k != "digest"})
    if said != got:
        raise ValueError(f"state.json: the digest {got} expected, got {said}")


def _digest(state: dict) -> str:
    text = json.dumps(state, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def save_trained(model, base: Checkpoint, out: Path, frozen: dict[str, str]) -> None:
    """The model in the base's dtypes; frozen tensors are the base's own bytes.

    Raises RuntimeError when these are no longer what was trained with, of which `frozen` has the
    digests.
    """
    tensors = stock_tensors(model)

    def value(entry):
        tensor = tensors[entry.name]
        if tensor.requires_grad:
            return tensor.detach()
        kept = entry.load()
        held = kept.to(model.norm.dtype)
        in_8_bits = isinstance(tensor, FrozenMatrix)
        if not (tensor.holds(held) if in_8_bits else digest(held) == frozen[entry.name]):
            raise RuntimeError(f"{base.path}: {entry.name} changed during the run")
        return kept

    entries = [replace(e, load=lambda e=e: value(e)) for e in base.tensors.values()]
    with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        write_model(directory, model.config, entries, files_from=base.path)


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
