"""The lean loop: post-pre-training of the new blocks, or of everything, with exact resume."""

import hashlib
import math
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from llamapro import run_state
from llamapro.checkpoint import Checkpoint, stock_tensors
from llamapro.data import Rows, load_tokens
from llamapro.evaluate import perplexity
from llamapro.hardware import peak_memory, pick_device, pick_dtype
from llamapro.model import Llama
from llamapro.progress import Progress


@dataclass
class TrainConfig:
    """One run. The defaults are the paper's (LLaMA Pro, section 4.1), but for the sizes."""

    model: str
    """Hugging Face Llama directory; expanded, unless everything is trained."""
    data: str
    """Directory made by `llamapro prepare`."""
    out: str
    """Run directory: metrics, checkpoints, and the final model."""
    trainable: str = "new_blocks"
    """"new_blocks" or "all"."""
    steps: int = 100
    batch_size: int = 4
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step."""
    seq_len: int = 512
    learning_rate: float = 2e-4
    warmup: float = 0.06
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    """Largest norm of the gradient."""
    dtype: str = "auto"
    """"bfloat16", "float32" or the faster of the two here."""
    device: str = "auto"
    seed: int = 0
    evaluate: dict[str, str] = field(default_factory=dict)
    """Further held-out sets, name to data directory."""
    eval_every: int = 50
    eval_tokens: int = 16384
    checkpoint_every: int = 50


class Interrupted(RuntimeError):
    """The run was stopped by Ctrl-C; its state is in a checkpoint."""


def train(config: TrainConfig, *, resume: bool = False) -> dict:
    """Train and return the summary that is also written to `out`/summary.json.

    Leaves `out`/metrics.jsonl, `out`/checkpoints and `out`/final, a plain Hugging Face Llama in
    the dtype of config.model. `resume` goes on from the newest checkpoint, bit for bit as if the
    run had not stopped. Raises before the first step: CheckpointError for the model, DataError
    for the data, ValueError for settings, FileExistsError for a run that exists and is not
    resumed. Raises FloatingPointError before a step whose loss or gradient is not finite, and
    Interrupted after Ctrl-C.
    """
    _check(config)
    device = pick_device(config.device)
    rows, heldout = _open_data(config)
    model = Llama.from_pretrained(
        config.model, dtype=pick_dtype(config.dtype, device), device=device
    )
    freeze(model, config.trainable)
    frozen = fingerprint(model)
    optimizer = Optimizer(model, config)
    run = run_state.open_run(config, frozen, resume=resume)
    step = run.restore(optimizer)
    with Progress(config.steps, step) as progress, _ctrl_c() as stop:
        if not step:
            run.log(_evaluation(model, heldout, config, 0), progress)
        while step < config.steps:
            began = time.perf_counter()
            metrics = take_step(model, optimizer, rows, config, step)
            step += 1
            seconds = time.perf_counter() - began
            rate = config.batch_size * config.accumulation * config.seq_len / seconds
            run.log({"step": step, **metrics, "tokens_per_second": rate})
            progress.step(step, metrics["loss"], metrics["learning_rate"], rate)
            if step % config.eval_every == 0 or step == config.steps:
                run.log(_evaluation(model, heldout, config, step), progress)
            if step % config.checkpoint_every == 0 or step == config.steps or stop:
                run.save(step, optimizer)
            if stop:
                raise Interrupted(
                    f"stopped after step {step}; the same command with --resume goes on"
                )
    if fingerprint(model) != frozen:
        raise RuntimeError("frozen tensors changed during training; nothing was written")
    return run.finish(model, peak_memory(device))


def take_step(model, optimizer, rows: Rows, config: TrainConfig, step: int) -> dict:
    """One optimizer step; the loss is the sum over valid targets of all micro-batches by their
    number, so accumulating gives the gradient of one large batch."""
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


class Optimizer:
    """AdamW on fp32 masters of the trainable parameters; nothing exists for frozen ones.

    A parameter that is fp32 is its own master. Others hand each gradient to their master as soon
    as it is complete and drop it, so micro-batches add up in fp32.
    """

    def __init__(self, model: Llama, config: TrainConfig):
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError("no trainable parameter: every tensor of the model is frozen")
        self.clip = config.clip
        self.pairs = {name: (p, self._master(p)) for name, p in trainable.items()}
        masters = [master for _, master in self.pairs.values()]
        groups = [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [m for m in masters if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=tuple(config.betas), fused=True
        )

    @staticmethod
    def _master(parameter):
        if parameter.dtype == torch.float32:
            return parameter
        master = torch.nn.Parameter(parameter.detach().float())

        def collect(p):
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        return master

    def clip_and_check(self, loss: torch.Tensor, step: int) -> float:
        """Clip the gradient and return its norm; raises before anything non-finite is applied."""
        masters = [master for _, master in self.pairs.values()]
        norm = torch.nn.utils.clip_grad_norm_(masters, self.clip).item()
        if not (math.isfinite(norm) and math.isfinite(loss.item())):
            raise FloatingPointError(
                f"step {step}: loss {loss.item()} and gradient norm {norm}, finite ones expected;"
                " the step was not taken"
            )
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.copy_to_model()

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and moments, by parameter name; the step count is the caller's."""
        return {
            f"{kind}.{name}": tensor
            for name, (_, master) in self.pairs.items()
            for kind, tensor in (
                ("master", master.detach()),
                ("exp_avg", self.adamw.state[master]["exp_avg"]),
                ("exp_avg_sq", self.adamw.state[master]["exp_avg_sq"]),
            )
        }

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        for name, (_, master) in self.pairs.items():
            master.copy_(tensors[f"master.{name}"])
            self.adamw.state[master] = {
                "step": torch.tensor(float(step), device=master.device),
                "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
            }
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for parameter, master in self.pairs.values():
            if parameter is not master:
                parameter.copy_(master)


def freeze(model: Llama, trainable: str) -> None:
    """Leave only what is named trainable: "new_blocks" or "all"."""
    if trainable == "all":
        model.requires_grad_(True)
    else:
        model.train_new_blocks_only()


def fingerprint(model: Llama) -> str:
    """A hash of all frozen tensors, names, shapes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in stock_tensors(model).items():
        if not tensor.requires_grad:
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_data(config: TrainConfig) -> tuple[Rows, dict[str, Rows]]:
    """Training rows, and the held-out rows of the domain and of the further sets."""
    raw = Checkpoint(config.model)
    vocab, seq_len = raw.config.vocab_size, config.seq_len
    rows = Rows(load_tokens(config.data, "train", vocab), seq_len, config.seed)
    sets = {"domain": config.data, **config.evaluate}
    return rows, {
        name: Rows(load_tokens(data, "heldout", vocab), seq_len) for name, data in sets.items()
    }


def _evaluation(model: Llama, heldout: dict[str, Rows], config: TrainConfig, step: int) -> dict:
    values = {
        name: perplexity(model, rows, config.eval_tokens)["perplexity"]
        for name, rows in heldout.items()
    }
    return {"step": step, "perplexity": values}


@contextmanager
def _ctrl_c():
    """The first Ctrl-C is remembered until the step is done; a second one ends at once."""
    asked = []

    def remember(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _check(config: TrainConfig) -> None:
    if config.trainable not in ("new_blocks", "all"):
        raise ValueError(f"trainable must be new_blocks or all, got {config.trainable!r}")
    counts = ("steps", "batch_size", "accumulation", "seq_len")
    for name in (*counts, "eval_every", "eval_tokens", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.learning_rate > 0 or not 0 <= config.warmup <= 1:
        raise ValueError(
            "learning_rate > 0 and warmup between 0 and 1 expected,"
            f" got {config.learning_rate} and {config.warmup}"
        )
