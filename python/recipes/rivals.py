"""What expansion is compared with: adapters, experts, or some of the base's own blocks.

They go through the steps of the library's loop, on its rows, by its schedule and optimizer; only
the model is another, which may be one of transformers.
"""

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from llamapro.data.tokens import TokenDataset
from llamapro.eval.perplexity import BaseSays, perplexity, what_the_base_says
from llamapro.hardware import pick_device
from llamapro.hf import Checkpoint
from llamapro.model import Llama
from llamapro.model_files import companions
from llamapro.ranks import ALONE
from llamapro.storage import new_directory, write_json
from llamapro.train import TrainConfig
from llamapro.train.checkpoint import Writer, checkpoints, damage_said, read_state, read_tensors
from llamapro.train.keep import Keeper
from llamapro.train.loop import general_sets, open_data, take_step
from llamapro.train.metrics import Metrics
from llamapro.train.optimizer import Optimizer
from llamapro.train.progress import Progress
from llamapro.train.stopping import Interrupted, asked_to_stop
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import llamapro_kernels as lk
from llamapro_kernels.integrations.transformers import apply
from recipes.records import settle

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MATRICES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


class Stock(nn.Module):
    """A causal model of transformers, or what peft made of one, as the loop asks for a Llama."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def stock(self) -> nn.Module:
        """The model of transformers inside."""
        return getattr(self.model, "get_base_model", lambda: self.model)()

    @property
    def embed_tokens(self) -> nn.Module:
        return self.stock.model.embed_tokens

    @property
    def norm(self) -> torch.Tensor:
        return self.stock.model.norm.weight

    @property
    def lm_head(self) -> nn.Module:
        return self.stock.lm_head

    def hidden(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
        """Final normed states: tokens (B, T) -> (B, T, N); each document is a row of its own."""
        if cu_seqlens is None:
            return self.stock.model(input_ids=tokens, use_cache=False).last_hidden_state
        lengths = [n for n in cu_seqlens.diff().tolist() if n]
        rows = pad_sequence(tokens[0].split(lengths), batch_first=True)
        states = self.stock.model(input_ids=rows, use_cache=False).last_hidden_state
        return torch.cat([row[:n] for row, n in zip(states, lengths, strict=True)])[None]

    def loss(self, tokens, targets, *, cu_seqlens=None, reduction="mean") -> torch.Tensor:
        """Cross-entropy, as `Llama.loss`."""
        hidden = self.hidden(tokens, cu_seqlens)
        return lk.linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)


class Experts(nn.Module):
    """An MLP and a copy of it, mixed token by token by a router; at first both count half, so
    that it computes what the MLP does."""

    def __init__(self, mlp: nn.Module, width: int):
        super().__init__()
        weight = next(mlp.parameters())
        self.mlp, self.expert = mlp, copy.deepcopy(mlp)
        self.router = nn.Linear(width, 2, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.router.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, other = self.router(x).softmax(-1).split(1, -1)
        return own * self.mlp(x) + other * self.expert(x)


def stock_model(settings: TrainConfig, *, block: bool = True) -> nn.Module:
    """The base in transformers, frozen, on the ops of this library; block: on whole blocks."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of some milliseconds
    dtype = getattr(torch, settings.dtype)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
    model = model.to(pick_device(settings.device)).requires_grad_(False)
    apply(model, block=block)
    return model


def adapt(settings: TrainConfig, rank: int, matrices: tuple[str, ...] = MATRICES) -> dict:
    """Train LoRA adapters beside these matrices of each block, and merge them into `out`/final."""
    from peft import LoraConfig, get_peft_model

    base = stock_model(settings)
    torch.manual_seed(settings.seed)  # of the adapters' first values
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(matrices))
    model = get_peft_model(base, adapters)

    def save(out: Path) -> None:
        merged = model.merge_and_unload().to(Checkpoint(settings.model).dtype)
        with new_directory(out) as directory:
            merged.save_pretrained(directory)
            for file in companions(Path(settings.model)):
                shutil.copyfile(file, directory / file.name)

    return train_rival(settings, Stock(model), save)


def train_top_blocks(settings: TrainConfig, count: int) -> dict:
    """Train the topmost blocks of the base, and nothing else."""
    dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
    model = Llama.from_pretrained(settings.model, dtype, device).requires_grad_(False)
    model.blocks[-count:].requires_grad_(True)

    def save(out: Path) -> None:
        whole = model.to(Checkpoint(settings.model).dtype)
        whole.save_pretrained(out, files_from=settings.model)

    return train_rival(settings, model, save)


def train_experts(settings: TrainConfig, places: list[int]) -> dict:
    """Train an expert, and a router, beside the MLPs of the blocks at these places. No directory of
    transformers holds such a model: it is measured as it is in memory."""
    model = stock_model(settings, block=False)  # which look into each MLP
    for place in places:
        layer = model.model.layers[place]
        layer.mlp = Experts(layer.mlp, model.config.hidden_size)
        for part in (layer.mlp.expert, layer.mlp.router):
            part.requires_grad_(True)
    return train_rival(settings, Stock(model), None)


def train_rival(
    settings: TrainConfig, model: nn.Module, save: Callable[[Path], None] | None
) -> dict:
    """Take the steps of the loop with a model of which some parameters train, and return the
    summary that is also written to `out`/summary.json. Stopped or killed, it goes on from the
    newest checkpoint when it is called again.

    save: writes the trained model to a directory, which is what the last evaluation measures.
    """
    if settings.keep is not None:
        raise ValueError(f"a run that keeps no rows expected, got keep {settings.keep}")
    rows, heldout = open_data(settings, Checkpoint(settings.model).config)
    out, judge = Path(settings.out), Judge.of(settings, heldout)
    settle(out / "config.json", asdict(settings))
    optimizer = Optimizer(
        model,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
    )
    metrics = Metrics(out / "metrics.jsonl")
    _take_steps(settings, model, optimizer, rows, metrics, judge)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if save is not None:
        if not (out / "final").exists():
            save(out / "final")
        dtype = getattr(torch, settings.dtype)
        model = Llama.from_pretrained(out / "final", dtype, pick_device(settings.device))
    metrics.append(judge.record(model, settings.steps))
    first, last = metrics.evaluations[0], metrics.evaluations[-1]
    summary = {"config": asdict(settings), "trainable_parameters": trained}
    summary |= {"perplexity_before": first["perplexity"]}
    summary |= {"perplexity_after": last["perplexity"], "kl_after": last["kl"]}
    write_json(out / "summary.json", summary)
    return summary


@dataclass
class Judge:
    """What models are measured on, and what their base says of it."""

    heldout: dict[str, TokenDataset]
    said: dict[str, BaseSays]
    tokens: int

    @classmethod
    def of(cls, settings: TrainConfig, heldout: dict[str, TokenDataset]) -> "Judge":
        """The held-out sets of a run whose model is the base."""
        dtype, device = getattr(torch, settings.dtype), pick_device(settings.device)
        base = Llama.from_pretrained(settings.model, dtype, device)
        general = {name: heldout[name] for name in general_sets(settings)}
        tokens = settings.eval_tokens
        return cls(heldout, what_the_base_says(base, general, tokens), tokens)

    def record(self, model: nn.Module, step: int) -> dict:
        """A line of metrics.jsonl, as the library's loop writes it of an evaluation."""
        found = {
            name: perplexity(model, rows, self.tokens, base=self.said.get(name))
            for name, rows in self.heldout.items()
        }
        values = {name: result["perplexity"] for name, result in found.items()}
        kls = {name: result["kl"] for name, result in found.items() if "kl" in result}
        return {"step": step, "perplexity": values, "kl": kls}


def _take_steps(settings: TrainConfig, model, optimizer, rows, metrics, judge: Judge) -> None:
    out, keeper = Path(settings.out), Keeper(settings, model)
    step = _restore(out, optimizer, metrics)
    if not metrics.evaluations:
        metrics.append(judge.record(model, 0))
    with asked_to_stop() as stop, Progress(settings.steps, step) as progress:
        while step < settings.steps:
            began = time.perf_counter()
            record = take_step(keeper, optimizer, rows, settings, ALONE, step)
            step += 1
            speed = record["tokens"] / (time.perf_counter() - began)
            record = {"step": step, **record, "tokens_per_second": speed}
            metrics.append(record)
            progress.step(record)
            last = bool(stop) or step == settings.steps
            if step % settings.eval_every == 0 and not last:
                metrics.append(judge.record(model, step))
            if step % settings.checkpoint_every == 0 or last:
                where = out / "checkpoints" / f"step-{step:08d}"
                state = {"step": step, "rows": rows.taken, "metrics": metrics.carried()}
                Writer().write(where, optimizer.state(), state, last=last)
            if stop:
                raise Interrupted(f"stopped after step {step}; the same command goes on")


def _restore(out: Path, optimizer: Optimizer, metrics: Metrics) -> int:
    """Go back to the newest checkpoint and return its step; 0 when there is none."""
    saved = checkpoints(out)
    if not saved:
        metrics.restore(-1, [])
        return 0
    with damage_said(saved):
        state = read_state(saved[-1])
        tensors = read_tensors(saved[-1], state, optimizer.state())
    optimizer.load_state(tensors, state["step"])
    metrics.restore(state["step"], state["metrics"])
    return state["step"]
