"""The lean loop: post-pre-training of the new blocks, or of everything, with exact resume."""

import logging
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from llamapro import planner, run_state
from llamapro.checkpoint import Checkpoint
from llamapro.data import Rows, digest, load_tokens
from llamapro.evaluate import perplexity
from llamapro.hardware import (
    keep_freed_memory,
    peak_memory,
    pick_device,
    pick_dtype,
    resident_memory,
)
from llamapro.model import Llama, LlamaConfig
from llamapro.optimizer import Optimizer
from llamapro.progress import Progress
from llamapro.stopping import Interrupted, asked_to_stop

log = logging.getLogger("llamapro")

TRAINABLE = ("new_blocks", "all")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass
class TrainConfig:
    """One run. The defaults are the paper's (LLaMA Pro, section 4.1), but for the sizes.

    Raises ValueError for settings that make no sense.
    """

    model: str
    """Hugging Face Llama directory; expanded, unless everything is trained."""
    data: str
    """Directory made by `llamapro prepare`."""
    out: str
    """Run directory: metrics, checkpoints, and the final model."""
    trainable: Literal["new_blocks", "all"] = "new_blocks"
    """What is trained: the blocks that expansion added, or everything."""
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 4
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step."""
    seq_len: int = 512
    """Tokens of a row."""
    learning_rate: float = 2e-4
    """The highest, after the warm-up."""
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """Of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; auto: bfloat16, unless fp32 is twice as fast here."""
    device: str = "auto"
    """auto is CUDA when there is one."""
    memory: str | None = None
    """What there is, such as 80GB: blocks keep less for backward until a step fits."""
    seed: int = 0
    """Of the order of the rows."""
    evaluate: dict[str, str] = field(default_factory=dict)
    """Further held-out sets, name to data directory."""
    eval_every: int = 50
    """Steps between evaluations; there is one before and one after."""
    eval_tokens: int = 16384
    """Of each held-out set."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    verify: bool = False
    """Hash all of the tokens at the start, also beyond 4 GB, where a sample is hashed otherwise."""

    def __post_init__(self):
        for name, allowed in (("trainable", TRAINABLE), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        counts = ("steps", "batch_size", "accumulation", "seq_len")
        for name in (*counts, "eval_every", "eval_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name, most in (("warmup", 1), ("weight_decay", math.inf), ("seed", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in 0..{most}, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in 0..1, below 1, got {self.betas}")
        if self.memory is not None:
            planner.parse_bytes(self.memory)
        if "domain" in self.evaluate:
            raise ValueError("the held-out set 'domain' is that of data; name the further one else")


def train(config: TrainConfig, *, resume: bool = False) -> dict:
    """Train and return the summary that is also written to `out`/summary.json.

    Leaves `out`/metrics.jsonl, `out`/checkpoints and `out`/final, a plain Hugging Face Llama in
    the dtype of config.model. `resume` goes on from the newest checkpoint, bit for bit as if the
    run had not stopped. Raises before the first step: CheckpointError for the model, DataError
    for the data, FileExistsError for a run that exists and is not resumed. Raises
    FloatingPointError for a loss, gradient, perplexity, master or moment that is not finite and
    RuntimeError for a frozen tensor that changed, before they can reach a checkpoint; OSError when
    checkpoints cannot be written; and Interrupted after Ctrl-C, SIGTERM or SIGHUP.
    """
    config = replace(config, **run_state.whole_paths(asdict(config)))
    if not resume and Path(config.out).exists():
        raise FileExistsError(f"{config.out} exists: resume it, or name a new run directory")
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory(config.memory is None)
    if config.dtype == "auto":
        started = run_state.settings(config.out)["dtype"] if resume else pick_dtype(device)
        config = replace(config, dtype=started)
    if resume:
        run_state.check_settings(config)
    shape = Checkpoint(config.model).config
    if config.seq_len > shape.max_position_embeddings:
        log.warning(
            "rows of %d tokens, %s was made for %d",
            config.seq_len,
            config.model,
            shape.max_position_embeddings,
        )
    rows, heldout = _open_data(config, shape.vocab_size)
    data = {name: digest(path, verify=config.verify) for name, path in _sets(config).items()}
    recompute = _policies(config, shape, device)
    model = Llama.from_pretrained(config.model, getattr(torch, config.dtype), device)
    freeze(model, config.trainable)
    for block, policy in zip(model.blocks, recompute, strict=True):
        block.recompute = policy
    optimizer = Optimizer(
        model, clip=config.clip, weight_decay=config.weight_decay, betas=config.betas
    )
    with (
        run_state.open_run(config, model, optimizer, data, resume=resume) as run,
        asked_to_stop() as stop,
    ):
        step = run.restore()
        with Progress(config.steps, step) as progress:
            _run_steps(run, rows, heldout, step, progress, stop)
        return run.finish(peak_memory(device))


def _run_steps(run, rows, heldout, step, progress, stop) -> None:
    """From `step` to the last one; evaluations and checkpoints where they are due."""
    config, model = run.config, run.model
    evaluated = {record["step"] for record in run.metrics.evaluations}
    if step % config.eval_every == 0 and step not in evaluated:  # at first, or where it stopped
        _evaluate(run, heldout, step, progress)
    while step < config.steps:
        began = time.perf_counter()
        metrics = take_step(model, run.optimizer, rows, config, step)
        step += 1
        seconds = time.perf_counter() - began
        rate = config.batch_size * config.accumulation * config.seq_len / seconds
        record = {"step": step, **metrics, **run.metrics.z_scores(metrics)}
        record["tokens_per_second"] = rate
        run.metrics.append(record)
        progress.step(record)
        if step % config.eval_every == 0 and not stop:
            _evaluate(run, heldout, step, progress)
        last = step == config.steps or bool(stop)
        if step % config.checkpoint_every == 0 or last or run.failures:
            _save(run, step, last, stop)
        if stop:
            raise Interrupted(f"stopped after step {step}; the same command with --resume goes on")
    if run.metrics.evaluations[-1]["step"] != step:
        _evaluate(run, heldout, step, progress)


def _save(run, step: int, last: bool, stop: list) -> None:
    """Write a checkpoint; a run that was stopped says so even where it cannot be written."""
    try:
        run.save(step, last=last)
    except OSError as error:
        if stop:
            raise Interrupted(f"stopped after step {step}; {error}") from None
        raise


def take_step(model, optimizer, rows: Rows, config: TrainConfig, step: int) -> dict:
    """One optimizer step on the rows that are due.

    The loss is the sum over the valid targets of all micro-batches by their number, so that
    accumulation gives the gradient of one large batch.
    """
    device = model.embed_tokens.weight.device
    count = config.batch_size * config.accumulation
    tokens, targets = rows.batch(step * count, count)
    valid = int((targets != -100).sum())
    if not valid:
        raise ValueError(f"step {step + 1}: a batch without a single valid target")
    loss = torch.zeros((), device=device)
    for part in range(0, count, config.batch_size):
        micro = slice(part, part + config.batch_size)
        summed = model.loss(tokens[micro].to(device), targets[micro].to(device), reduction="sum")
        (summed / valid).backward()
        loss += summed.detach() / valid
    learning_rate = schedule(config, step)
    norm = optimizer.clip_and_check(loss, step + 1)
    optimizer.step(learning_rate)
    return {"loss": loss.item(), "gradient_norm": norm, "learning_rate": learning_rate}


def schedule(config: TrainConfig, step: int) -> float:
    """Learning rate of the step after `step`: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def freeze(model: Llama, trainable: str) -> None:
    """Leave only what is named trainable: "new_blocks" or "all"."""
    if trainable == "all":
        model.requires_grad_(True)
    else:
        model.train_new_blocks_only()


def _policies(config: TrainConfig, shape: LlamaConfig, device: torch.device) -> list[str]:
    """What backward recomputes in each block; planned before a weight is loaded."""
    if config.memory is None:
        return ["none"] * shape.num_hidden_layers
    trainable = None if config.trainable == "all" else tuple(shape.new_blocks)
    sizes = config.batch_size, config.seq_len, getattr(torch, config.dtype), device.type
    libraries = resident_memory() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    limit = planner.usable(config.memory) - libraries
    try:
        return planner.choose_recompute(planner.Workload(shape, trainable, *sizes), limit)
    except ValueError as error:
        raise ValueError(
            f"{error} (of {config.memory}, {1 - planner.USABLE:.0%} are kept back for what"
            f" allocators lose, and {libraries / 1e9:.2f} GB are in use already)"
        ) from None


def _open_data(config: TrainConfig, vocab: int) -> tuple[Rows, dict[str, Rows]]:
    """Training rows, and the held-out rows of the domain and of the further sets."""
    rows = Rows(load_tokens(config.data, "train", vocab), config.seq_len, config.seed)
    return rows, {
        name: Rows(load_tokens(data, "heldout", vocab), config.seq_len)
        for name, data in _sets(config).items()
    }


def _sets(config: TrainConfig) -> dict[str, str]:
    """The data directories that are evaluated on, by name."""
    return {"domain": config.data, **config.evaluate}


def _evaluate(run, heldout: dict[str, Rows], step: int, progress: Progress) -> None:
    """Perplexity on the held-out sets, to metrics.jsonl and to the reader."""
    values = {
        name: perplexity(run.model, rows, run.config.eval_tokens)["perplexity"]
        for name, rows in heldout.items()
    }
    if not all(math.isfinite(value) for value in values.values()):
        raise FloatingPointError(f"step {step}: held-out perplexity {values}, finite one expected")
    run.metrics.append({"step": step, "perplexity": values})
    said = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    progress.say(f"step {step}: held-out perplexity {said}")
