"""What a run keeps on disk: its settings, metrics, checkpoints and results.

run/config.json             the TrainConfig
run/metrics.jsonl           a line per step and per evaluation
run/checkpoints/step-*/     masters, AdamW's moments, place and random state; the newest two
run/final/                  the trained model, a plain Hugging Face directory
run/summary.json            what came out
"""

import base64
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from llamapro import checkpoint
from llamapro.checkpoint import Checkpoint, TensorEntry

KEPT = 2
MAY_DIFFER = ("out", "device")  # settings that a resumed run may change


class Run:
    """An open run directory."""

    def __init__(self, config, frozen: str):
        self.config, self.frozen, self.path = config, frozen, Path(config.out)
        self.metrics = self.path / "metrics.jsonl"

    def log(self, record: dict, progress=None) -> None:
        """Append a line to metrics.jsonl; say an evaluation aloud."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if progress and record.get("perplexity"):
            values = ", ".join(f"{name} {p:.3f}" for name, p in record["perplexity"].items())
            progress.say(f"step {record['step']}: held-out perplexity {values}")

    def save(self, step: int, optimizer) -> None:
        """Write a checkpoint, whole or not at all, then drop all but the newest two."""
        tensors = optimizer.state()
        entries = [
            TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
            for name, tensor in tensors.items()
        ]
        out = self.path / "checkpoints" / f"step-{step:08d}"
        if out.exists():
            return
        with checkpoint.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
            state = {"step": step, "frozen": self.frozen, "random": _random_state()}
            checkpoint.write_json(directory / "state.json", state)
            checkpoint.write_safetensors(directory / "state.safetensors", entries)
        for old in checkpoints(self.path)[:-KEPT]:
            shutil.rmtree(old)

    def restore(self, optimizer) -> int:
        """Go back to the newest checkpoint and return its step; 0 when there is none.

        Raises ValueError when the frozen tensors are not those of the run.
        """
        saved = checkpoints(self.path)
        step = 0
        if saved:
            state = json.loads((saved[-1] / "state.json").read_text())
            if state["frozen"] != self.frozen:
                raise ValueError(
                    f"{self.config.model}: frozen tensors differ from those of the run"
                )
            optimizer.load_state(load_file(saved[-1] / "state.safetensors"), state["step"])
            _set_random_state(state["random"])
            step = state["step"]
        self._forget_after(step, keep_evaluation=bool(saved))
        return step

    def finish(self, model, peak_memory: int) -> dict:
        """Write the final model and the summary, which is returned."""
        base = Checkpoint(self.config.model)
        final = self.path / "final"
        if not final.exists():
            save_trained(model, base, final)
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        steps = [r for r in records if "loss" in r]
        evaluations = [r for r in records if "perplexity" in r]
        rates = sorted(r["tokens_per_second"] for r in steps)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        summary = {
            "config": asdict(self.config),
            "dtype": str(model.norm.dtype).removeprefix("torch."),
            "device": str(model.norm.device),
            "parameters": total,
            "trainable_parameters": trainable,
            "tokens_per_second": rates[len(rates) // 2],
            "peak_memory_bytes": peak_memory,
            "frozen_fingerprint": self.frozen,
            "perplexity_before": evaluations[0]["perplexity"] if evaluations else {},
            "perplexity_after": evaluations[-1]["perplexity"] if evaluations else {},
        }
        checkpoint.write_json(self.path / "summary.json", summary)
        return summary

    def _forget_after(self, step: int, keep_evaluation: bool) -> None:
        """Drop metrics of steps that will be taken again."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        kept = [line for line in lines if keep_evaluation and _step_of(line) <= step]
        partial = self.metrics.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, self.metrics)


def open_run(config, frozen: str, *, resume: bool) -> Run:
    """A new run directory, or one that exists, with the same settings, when `resume`.

    Raises FileExistsError, FileNotFoundError, or ValueError for settings that differ.
    """
    path = Path(config.out)
    settings = path / "config.json"
    if not resume:
        if path.exists():
            raise FileExistsError(f"{path} exists: resume it, or name a new run directory")
        with checkpoint.new_directory(path) as directory:
            checkpoint.write_json(directory / "config.json", asdict(config))
    elif not settings.exists():
        raise FileNotFoundError(f"{path}: a run to resume expected, got no config.json")
    then, now = json.loads(settings.read_text()), json.loads(json.dumps(asdict(config)))
    changed = [
        f"{name} was {then.get(name)!r}, got {now[name]!r}"
        for name in now
        if name not in MAY_DIFFER and then.get(name) != now[name]
    ]
    if changed:
        raise ValueError(f"{path}: a resumed run keeps its settings: {'; '.join(changed)}")
    return Run(config, frozen)


def checkpoints(run) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((Path(run) / "checkpoints").glob("step-*"))


def save_trained(model, base: Checkpoint, out: Path) -> None:
    """The model in the base's dtypes; frozen tensors are the base's own bytes."""
    trained = {
        name: tensor.detach()
        for name, tensor in checkpoint.stock_tensors(model).items()
        if tensor.requires_grad
    }
    entries = [
        TensorEntry(e.name, e.dtype, e.shape, lambda t=trained[e.name]: t)
        if e.name in trained
        else e
        for e in base.tensors.values()
    ]
    with checkpoint.new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
        checkpoint.write_model(directory, model.config, entries, files_from=base.path)


def _step_of(line: str) -> float:
    """A line cut short by a crash counts as later than all."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


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
