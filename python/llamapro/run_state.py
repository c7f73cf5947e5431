"""What a run keeps on disk: its settings, metrics, checkpoints and results.

run/config.json             the TrainConfig
run/metrics.jsonl           a line per step and per evaluation
run/checkpoints/step-*/     masters, AdamW's moments, place and random state; the newest two
run/final/                  the trained model, a plain Hugging Face directory
run/summary.json            what came out
"""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llamapro import checkpoint, storage
from llamapro.checkpoint import Checkpoint, CheckpointError

KEPT = 2
MAY_DIFFER = ("out", "device", "memory")  # settings that a resumed run may change


class Run:
    """An open run directory."""

    def __init__(self, config, frozen: str, data: dict[str, str]):
        self.config, self.frozen, self.data, self.path = config, frozen, data, Path(config.out)
        self.metrics = self.path / "metrics.jsonl"

    def log(self, record: dict, progress=None) -> None:
        """Append a line to metrics.jsonl; say an evaluation aloud."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if progress and record.get("perplexity"):
            values = ", ".join(f"{name} {p:.3f}" for name, p in record["perplexity"].items())
            progress.say(f"step {record['step']}: held-out perplexity {values}")

    def records(self, key: str) -> list[dict]:
        """The lines of metrics.jsonl that have this key."""
        return [r for r in map(json.loads, self.metrics.read_text().splitlines()) if key in r]

    def save(self, step: int, optimizer) -> None:
        """Write a checkpoint, whole or not at all, then drop all but the newest two."""
        storage.sync(self.metrics)
        entries = checkpoint.entries_of(optimizer.state())
        out = self.path / "checkpoints" / f"step-{step:08d}"
        with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
            state = {"step": step, "frozen": self.frozen, "data": self.data}
            state["random"] = _random_state()
            storage.write_json(directory / "state.json", state)
            checkpoint.write_safetensors(directory / "state.safetensors", entries)
        for old in checkpoints(self.path)[:-KEPT]:
            shutil.rmtree(old)

    def restore(self, optimizer) -> int:
        """Go back to the newest checkpoint and return its step; 0 when there is none.

        Raises ValueError when the frozen tensors or the data are not those of the run, and
        CheckpointError for a damaged checkpoint.
        """
        saved = checkpoints(self.path)
        step = 0
        if saved:
            state, tensors = _read(saved[-1], optimizer.shapes())
            if state["frozen"] != self.frozen:
                raise ValueError(
                    f"{self.config.model}: frozen tensors differ from those of the run"
                )
            for name, digest in state.get("data", self.data).items():
                if self.data[name] != digest:
                    raise ValueError(f"the data of {name!r} differ from those of the run")
            step = state["step"]
            optimizer.load_state(tensors, step)
            _set_random_state(state["random"])
        self._forget_after(step, keep_evaluation=bool(saved))
        return step

    def finish(self, model, peak_memory: int) -> dict:
        """Write the final model and the summary, which is returned."""
        if (self.path / "summary.json").exists():
            return json.loads((self.path / "summary.json").read_text())
        final = self.path / "final"
        if not final.exists():
            save_trained(model, Checkpoint(self.config.model), final)
        evaluations = self.records("perplexity")
        rates = sorted(r["tokens_per_second"] for r in self.records("loss"))
        summary = {
            "config": asdict(self.config),
            "dtype": str(model.norm.dtype).removeprefix("torch."),
            "device": str(model.norm.device),
            "parameters": sum(p.numel() for p in model.parameters()),
            "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "tokens_per_second": rates[len(rates) // 2],
            "peak_memory_bytes": peak_memory,
            "frozen_fingerprint": self.frozen,
            "perplexity_before": evaluations[0]["perplexity"],
            "perplexity_after": evaluations[-1]["perplexity"],
        }
        storage.write_json(self.path / "summary.json", summary)
        return summary

    def _forget_after(self, step: int, keep_evaluation: bool) -> None:
        """Drop metrics of steps that will be taken again."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # not one cut short by a crash
        kept = [line for line in whole if keep_evaluation and json.loads(line)["step"] <= step]
        storage.write_text(self.metrics, "".join(kept))


@contextmanager
def open_run(config, frozen: str, data: dict[str, str], *, resume: bool) -> Iterator[Run]:
    """A new run directory, or one that exists when `resume`.

    frozen: a hash of the frozen tensors. data: one of each set's tokens, by name. Raises
    FileExistsError, and BlockingIOError when another process works on the run.
    """
    path = Path(config.out)
    if not resume:
        with storage.new_directory(path) as directory:
            storage.write_json(directory / "config.json", asdict(config))
    with storage.lock(path):
        for partial in (path / "checkpoints").glob(".*.partial"):
            shutil.rmtree(partial)
        yield Run(config, frozen, data)


def settings(run) -> dict:
    """The settings a run was started with. FileNotFoundError or ValueError when it is no run."""
    file = Path(run) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{run}: a run to resume expected, got no config.json")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: the settings of a run expected, got no JSON: {error}") from None
    if not {"model", "data", "evaluate", "dtype"} <= set(config):
        raise ValueError(f"{file}: the settings of a run expected, got {sorted(config)[:5]} ...")
    return config


def whole_paths(settings: dict) -> dict:
    """Those that name directories, as absolute paths: a run may go on from anywhere."""

    def whole(path):
        return str(Path(path).resolve()) if Path(path).exists() else path

    evaluate = {name: whole(path) for name, path in settings["evaluate"].items()}
    return {
        "model": whole(settings["model"]),
        "data": whole(settings["data"]),
        "evaluate": evaluate,
    }


def check_settings(config) -> None:
    """Raise ValueError unless the settings are those of the run at config.out."""
    path, now = Path(config.out), json.loads(json.dumps(asdict(config)))
    then = settings(path)
    then |= whole_paths(then)
    changed = [
        f"{name} was {then.get(name)!r}, got {now[name]!r}"
        for name in now
        if name not in MAY_DIFFER and then.get(name) != now[name]
    ]
    if changed:
        raise ValueError(f"{path}: a resumed run keeps its settings: {'; '.join(changed)}")


def checkpoints(run) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folders = (Path(run) / "checkpoints").glob("step-" + "[0-9]" * 8)
    return sorted(folder for folder in folders if folder.is_dir())


def _read(folder: Path, shapes: dict[str, tuple]) -> tuple[dict, dict[str, torch.Tensor]]:
    """A checkpoint's state and tensors, which must have these names and shapes, in fp32."""
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = load_file(folder / "state.safetensors")
        expected = {name: (tuple(shape), torch.float32) for name, shape in shapes.items()}
        got = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        wrong = sorted(name for name in expected | got if expected.get(name) != got.get(name))
        if wrong:
            name = wrong[0]
            raise ValueError(f"{name}: {expected.get(name)} expected, got {got.get(name)}")
        return state, tensors
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} is damaged: {error}; remove it to go on from an earlier one"
        ) from None


def save_trained(model, base: Checkpoint, out: Path) -> None:
    """The model in the base's dtypes; frozen tensors are the base's own bytes."""
    trained = {
        name: tensor.detach()
        for name, tensor in checkpoint.stock_tensors(model).items()
        if tensor.requires_grad
    }
    entries = [
        replace(e, load=lambda t=trained[e.name]: t) if e.name in trained else e
        for e in base.tensors.values()
    ]
    with storage.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        checkpoint.write_model(directory, model.config, entries, files_from=base.path)


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
