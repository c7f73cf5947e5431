"""The lean loop: post-pre-training of the new blocks, or of everything, with exact resume."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

from llamapro import planner, planner_ranks
from llamapro.config import LlamaConfig
from llamapro.data.mixture import Mixture, corpora
from llamapro.data.packing import open_rows
from llamapro.data.tokens import TokenDataset, check_tokenizer, fingerprint
from llamapro.eval.perplexity import perplexity, what_the_base_says
from llamapro.frozen import FORMS
from llamapro.hardware import keep_freed_memory, peak_memory, pick_device, resident_memory
from llamapro.hf import Checkpoint
from llamapro.ranks import ALONE, Ranks, started
from llamapro.train.config import (
    KEPT,
    TrainConfig,
    distilled_share,
    held_out_sets,
    kept_corpora,
    own_weight,
    schedule,
)
from llamapro.train.keep import Keeper, lost, make_samples, without_own_samples
from llamapro.train.optimizer import Optimizer
from llamapro.train.parallel import (
    begin_micro_batch,
    load,
    own_device,
    same_inputs,
    same_options,
)
from llamapro.train.progress import Progress
from llamapro.train.run import Run
from llamapro.train.stopping import Interrupted, asked_to_stop

log = logging.getLogger("llamapro")


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
    device = pick_device(config.device)
    with started(device.type, config.timeout) as ranks:
        return _train(config, resume, ranks)


def _train(config: TrainConfig, resume: bool, ranks: Ranks) -> dict:
    ranks.check_same({**same_options(config), "resume": repr(resume)})
    run = ranks.agree(lambda: _settled(config, resume, ranks))
    dtype = ranks.of_first(lambda: run.config.dtype)  # which some CPUs choose by measuring
    config, device = replace(run.config, dtype=dtype), own_device(run.config.device, ranks)
    if device.type == "cpu":
        keep_freed_memory(config.memory is None)
    shape = Checkpoint(config.model).config
    if config.seq_len > shape.max_position_embeddings:
        log.warning(
            "rows of %d tokens, %s was made for %d",
            config.seq_len,
            config.model,
            shape.max_position_embeddings,
        )
    ranks.agree(lambda: open_data(without_own_samples(config), shape))  # what can be wrong, first
    shard, recompute = ranks.of_first(lambda: policies(config, shape, device, ranks))
    run.config = config = replace(config, shard=shard)
    ranks.of_first(lambda: make_samples(config))
    rows, heldout, data = ranks.agree(lambda: _data(config, shape))
    model, frozen = load(config, getattr(torch, dtype), device, ranks)
    for block, policy in zip(model.blocks, recompute, strict=True):
        block.recompute = policy
    ranks.check_same(same_inputs(data, frozen))
    optimizer = ranks.agree(lambda: _optimizer(config, model))
    general = {name: heldout[name] for name in general_sets(config)}
    base = what_the_base_says(model, general, config.eval_tokens, ranks)
    keeper = ranks.agree(lambda: Keeper(config, model))
    opened = run.open(model, frozen, optimizer, rows, data, keeper)
    with opened as step, asked_to_stop(ranks) as stop:
        with Progress(config.steps, step, quiet=not ranks.first) as progress:
            for line in rows.described(config.rows):
                progress.say(line)
            _run_steps(run, heldout, base, step, progress, stop)
        summary = run.finish(peak_memory(device))
    if keeper.limit is not None and summary["lost_after"] > keeper.limit:
        log.warning("%.2f%% is lost, more than %s", 100 * summary["lost_after"], config.keep_within)
    return summary


def _settled(config: TrainConfig, resume: bool, ranks: Ranks) -> Run:
    """A run that torchrun starts anew, after a rank died, goes on."""
    planner_ranks.rows_of_a_rank(config.batch_size, ranks.size)
    if ranks.size > 1 and config.shard == "full" and config.frozen != FORMS[0]:
        raise ValueError(
            f"each rank holds a base in {config.frozen} whole: --shard none expected with it, got"
            " full"
        )
    again = ranks.restarted and (Path(config.out) / "config.json").exists()
    return (Run.resume if resume or again else Run.start)(config, ranks)


def _optimizer(config: TrainConfig, model) -> Optimizer:
    return Optimizer(
        model,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        betas=config.betas,
    )


def _data(config: TrainConfig, shape: LlamaConfig):
    """Training rows, held-out rows, and a fingerprint of each set."""
    rows, heldout = open_data(config, shape)
    sets = held_out_sets(config.data, config.evaluate, config.keep_data)
    hashed = {name: fingerprint(path, verify=config.verify) for name, path in sets.items()}
    return rows, heldout, hashed


def _run_steps(run, heldout, base, step, progress, stop) -> None:
    """From `step` to the last one; evaluations and checkpoints where they are due."""
    config = run.config
    evaluated = {record["step"] for record in run.metrics.evaluations}
    if step % config.eval_every == 0 and step not in evaluated:  # at first, or where it stopped
        _evaluate(run, heldout, base, step, progress)
    while step < config.steps:
        began = time.perf_counter()
        metrics = take_step(run.keeper, run.optimizer, run.rows, config, run.ranks, step)
        step += 1
        seconds = time.perf_counter() - began
        record = {"step": step, **metrics, **run.metrics.z_scores(metrics)}
        record |= {"tokens_per_second": metrics["tokens"] / seconds, "epochs": run.rows.epochs}
        run.append(record)
        progress.step(record)
        stopping, failed = run.ranks.any(stop, run.writer.failed)
        if step % config.eval_every == 0 and not stopping:
            _evaluate(run, heldout, base, step, progress)
        last = step == config.steps or stopping
        if step % config.checkpoint_every == 0 or last or run.failures or failed:
            _save(run, step, last, stopping)
        if stopping:
            said = f"stopped after step {step}; the same command with --resume goes on"
            raise run.ranks.alike(Interrupted(said))
    if run.metrics.evaluations[-1]["step"] != step:
        _evaluate(run, heldout, base, step, progress)


def _save(run, step: int, last: bool, stopping: bool) -> None:
    """Write a checkpoint; a run that was stopped says so even where it cannot be written."""
    try:
        run.save(step, last=last)
    except OSError as error:
        if stopping:
            raise run.ranks.alike(Interrupted(f"stopped after step {step}; {error}")) from None
        raise


def take_step(
    keeper: Keeper,
    optimizer,
    rows: Mixture,
    config: TrainConfig,
    ranks: Ranks,
    step: int,
) -> dict:
    """One optimizer step on the rows that are due, of which each rank takes its part.

    The loss is the sum over the valid targets of all ranks and micro-batches by their number, so
    that accumulation gives the gradient of one large batch; targets that are kept have their
    weight.
    """
    size, micro_batches = config.batch_size, config.gradient_accumulation_steps
    first, part = step * micro_batches, (ranks.rank, ranks.size)
    batches = [rows.batch((first + micro) * size, size, part) for micro in range(micro_batches)]
    amounts = _amounts(batches, ranks)
    valid, kept_targets = amounts.pop("valid"), amounts.pop("kept")
    if not valid:
        said = f"step {step + 1}: a batch without a single valid target"
        raise ranks.alike(ValueError(said))
    losses = torch.zeros(2, device=keeper.model.norm.device)
    for number, batch in enumerate(batches, 1):
        begin_micro_batch(keeper.model, config.shard, last=number == micro_batches)
        learnt, kept = keeper.losses(batch)
        summed = learnt if batch.kept is None else learnt + keeper.weight * kept
        (summed / valid).backward()
        losses += torch.stack([summed.detach() / valid, kept.detach()])
    loss, kept_loss = ranks.add_up(losses)
    learning_rate = schedule(config, step)
    try:
        norm = optimizer.step(learning_rate, loss, step + 1)
    except FloatingPointError as error:
        raise ranks.alike(error) from None
    metrics = {"loss": loss.item(), "gradient_norm": norm, "learning_rate": learning_rate}
    if kept_targets:
        metrics |= {"kept_loss": kept_loss.item() / kept_targets, "kept_weight": keeper.weight}
    return {**metrics, **amounts}


def _amounts(batches, ranks: Ranks) -> dict:
    """Of a step on all ranks: the targets that count, those of them that are kept, and the tokens;
    of packed rows also how many documents, and the share of padding."""
    packed = batches[0].documents is not None
    valid, kept, room, padding, documents = ranks.sum(
        sum(batch.counted for batch in batches),
        sum(batch.kept.counted for batch in batches if batch.kept is not None),
        sum(batch.tokens.numel() for batch in batches),
        sum(batch.padding for batch in batches),
        sum(batch.documents for batch in batches) if packed else 0,
    )
    amounts = {"valid": int(valid), "kept": int(kept), "tokens": int(room - padding)}
    return amounts | ({"documents": int(documents), "padding": padding / room} if packed else {})


def policies(
    config: TrainConfig, shape: LlamaConfig, device: torch.device, ranks: Ranks = ALONE
) -> tuple[str, list[str]]:
    """How ranks share the model, and what backward recomputes in each block; planned before a
    weight is loaded. Raises ValueError for what does not fit."""
    trainable = None if config.trainable == "all" else tuple(shape.new_blocks)
    sizes = config.batch_size // ranks.size, config.seq_len, getattr(torch, config.dtype)
    kept = distilled_share(config)
    work = planner.Workload(shape, trainable, *sizes, device.type, config.frozen, kept=kept)
    libraries = resident_memory() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    limit = _limit(config, device, ranks)
    if limit is not None:
        limit -= libraries + _held_to_compare(config, shape, device)
    try:
        if ranks.size == 1:
            free = ["none"] * len(work.blocks)
            return config.shard, free if limit is None else planner.choose_recompute(work, limit)
        return _layout(config, work, limit, ranks)
    except ValueError as error:
        error = f"{error}{_other_form(work, limit) if ranks.size == 1 else ''}"
        memory = config.memory or "what the GPU has"
        raise ValueError(
            f"{error} (of {memory}, {1 - planner.USABLE:.0%} are kept back for what allocators"
            f" lose, and {libraries / 1e9:.2f} GB are in use already)"
        ) from None


def _limit(config: TrainConfig, device: torch.device, ranks: Ranks) -> float | None:
    """Bytes that tensors may take; None where nobody said, and no layout is to be chosen."""
    if config.memory is not None:
        return planner.usable(config.memory)
    if ranks.size > 1 and config.shard == "auto" and device.type == "cuda":
        return planner.USABLE * torch.cuda.get_device_properties(device).total_memory
    return None


def _layout(config: TrainConfig, work, limit: float | None, ranks: Ranks) -> tuple[str, list[str]]:
    sizes = ranks.size, config.gradient_accumulation_steps
    if config.shard != "auto":
        count, accumulation = sizes
        how = work, limit, count, config.shard, accumulation
        return config.shard, planner_ranks.choose_rank_recompute(*how)
    if limit is None:
        return planner_ranks.layouts(work)[0], ["none"] * len(work.blocks)
    return planner_ranks.choose_shard(work, limit, *sizes)


def _held_to_compare(config: TrainConfig, shape: LlamaConfig, device: torch.device) -> int:
    """Bytes of what the base says of held-out sets: its states, on the CPU, and a trained head."""
    sets, size = len(general_sets(config)), getattr(torch, config.dtype).itemsize
    states = sets * config.eval_tokens * shape.hidden_size * size * (device.type == "cpu")
    head = shape.vocab_size * shape.hidden_size * size * (config.trainable == "all" and sets > 0)
    return states + head


def _other_form(work: planner.Workload, limit: float) -> str:
    """The form of the frozen matrices with which a workload fits that does not, in words."""
    if work.trainable is None:
        return ""
    try:
        return f"; --frozen {planner.cheapest(work, limit)[0].frozen} fits"
    except ValueError:
        return ""


def open_data(config: TrainConfig, shape: LlamaConfig) -> tuple[Mixture, dict[str, TokenDataset]]:
    """Training rows, and the held-out rows of each corpus and of the further sets."""
    vocab, seq_len, packing = shape.vocab_size, config.seq_len, config.packing
    found, kept = corpora(config.data), kept_corpora(config)
    sets = held_out_sets(config.data, config.evaluate, config.keep_data)
    for path in sets.values():
        check_tokenizer(path, config.model)
    if config.keep_data is not None:
        learnt = sum(weight for name, (_, weight) in found.items() if name not in kept)
        found[KEPT] = config.keep_data, own_weight(config, learnt)
    paths, weights = zip(*found.values(), strict=True)
    rows = [open_rows(path, "train", vocab, seq_len, packing, config.seed) for path in paths]
    mixture = Mixture([*found], rows, [*weights], kept=frozenset(kept))
    return mixture, {
        name: open_rows(path, "heldout", vocab, seq_len, packing) for name, path in sets.items()
    }


def general_sets(config: TrainConfig) -> list[str]:
    """The held-out sets that show what is kept."""
    return [*config.evaluate, *kept_corpora(config)]


def _evaluate(run, heldout: dict[str, TokenDataset], base, step: int, progress: Progress) -> None:
    """Perplexity on the held-out sets, and how far the model is from its base, to metrics.jsonl and
    to the reader; what is lost steers the weight of what is kept."""
    config, keeper = run.config, run.keeper
    found = {
        name: perplexity(run.model, rows, config.eval_tokens, base=base.get(name), ranks=run.ranks)
        for name, rows in heldout.items()
    }
    values = {name: result["perplexity"] for name, result in found.items()}
    kls = {name: result["kl"] for name, result in found.items() if "kl" in result}
    if not all(math.isfinite(value) for value in values.values()):
        said = f"step {step}: held-out perplexity {values}, finite one expected"
        raise run.ranks.alike(FloatingPointError(said))
    record = {"step": step, "perplexity": values}
    said = f"held-out perplexity {_listed(values)}"
    if kls:
        of_base = {name: said.perplexity for name, said in base.items()}
        record |= {"kl": kls, "lost": lost(values, of_base, kls, config.evaluate)}
        said += f"; KL to the base {_listed(kls)}"
    if keeper.limit is not None and step:
        keeper.steer(record["lost"])
        said += f"; lost {record['lost']:.2%} of {config.keep_within}, weight {keeper.weight:.3g}"
    run.append(record)
    progress.say(f"step {step}: {said}")


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
