"""What a run would do: its data, its cost and its first micro-batch, and nothing is trained."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from llamapro import planner
from llamapro.data.tokens import IGNORED, Batch
from llamapro.hardware import pick_device, pick_dtype
from llamapro.hf import Checkpoint
from llamapro.planner_ranks import rank_memory, rows_of_a_rank
from llamapro.ranks import Ranks, started_together
from llamapro.tokenizer import load_tokenizer
from llamapro.train.config import TrainConfig, distilled_share, own_samples, with_keep_data
from llamapro.train.keep import sample_count, without_own_samples
from llamapro.train.loop import open_data, policies

SHOWN = 2000  # tokens of the first micro-batch


def dry_run(config: TrainConfig) -> None:
    """Print what `llamapro train` would train on, what a step costs, and its first micro-batch:
    targets that count in green, and between brackets where there is no colour.

    Raises as `llamapro.train.train` does before its first step; writes nothing.
    """
    console = Console(highlight=False, soft_wrap=True)
    shape, device = Checkpoint(config.model).config, pick_device(config.device)
    config = with_keep_data(config)
    there = config.keep_data != own_samples(config) or Path(config.keep_data).exists()
    rows, heldout = open_data(config if there else without_own_samples(config), shape)
    if not there:
        tokens = sample_count(config)
        console.print(f"kept: {tokens:,} tokens of the base would be sampled to {config.keep_data}")
    for line in rows.described(config.rows):
        console.print(line)
    for name, part in heldout.items():
        console.print(f"held out, {name}: {len(part.tokens.ids):,} tokens, {len(part):,} rows")
    console.print(_cost(config, shape, device, rows.spread))
    batch = rows.batch(0, config.batch_size)
    counts = f"{batch.counted:,} targets count, {batch.padding:,} tokens of padding"
    console.print(f"the first micro-batch of {batch.tokens.numel():,} tokens: {counts}")
    for text in _documents(batch, load_tokenizer(config.model), not console.is_terminal):
        console.rule(characters="-")
        console.print(text)


def _cost(config: TrainConfig, shape, device, documents) -> str:
    dtype = pick_dtype(device) if config.dtype == "auto" else config.dtype
    sizes = config.batch_size, config.seq_len, getattr(torch, dtype), device.type
    trainable = None if config.trainable == "all" else tuple(shape.new_blocks)
    kept = distilled_share(config)
    work = planner.Workload(shape, trainable, *sizes, config.frozen, documents, kept)
    ranks = started_together()
    shard, recompute = policies(config, shape, device, Ranks(size=ranks))
    total = sum(planner.flops(work, recompute).values())
    if ranks == 1:
        memory = f"{planner.memory(work, recompute)['total'] / 1e9:.2f} GB"
    else:
        a_rank = replace(work, batch=rows_of_a_rank(work.batch, ranks))
        how = recompute, ranks, shard, config.gradient_accumulation_steps
        memory = f"{rank_memory(a_rank, *how)['total'] / 1e9:.2f} GB on each of {ranks} ranks"
        memory += f", --shard {shard}"
    trained = len(work.trained) * planner.parameters(shape)["block"]
    if trainable is None:
        trained += planner.parameters(shape)["rest"]
    return (
        f"{config.steps} steps of {config.gradient_accumulation_steps} x {config.batch_size} x"
        f" {config.seq_len} tokens in {dtype}: {trained / 1e6:.1f} M parameters trained,"
        f" {total / work.tokens / 1e9:.2f} GFLOPs a token, {memory}"
    )


def _documents(batch: Batch, tokenizer, brackets: bool) -> list[Text]:
    """The texts of the rows, or of the documents that are packed in them."""
    if batch.cu_seqlens is None:
        parts = zip(batch.tokens, batch.targets, strict=True)
    else:
        ends = pairwise(batch.cu_seqlens[: batch.documents + 1].tolist())
        parts = ((batch.tokens[0, a:b], batch.targets[0, a:b]) for a, b in ends)
    texts, left = [], SHOWN
    for tokens, targets in parts:
        if left <= 0:
            return [*texts, Text("...")]
        ids = [*tokens[:left].tolist(), int(targets[-1])]
        counted = [False, *(targets[:left] != IGNORED).tolist()]
        texts.append(_marked(ids if ids[-1] >= 0 else ids[:-1], counted, tokenizer, brackets))
        left -= len(tokens)
    return texts


def _marked(ids: list[int], counted: list[bool], tokenizer, brackets: bool) -> Text:
    """Runs of tokens that count, or do not, decoded each."""
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and counted[end] == counted[start]:
            continue
        part = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        marked = f"[{part}]" if brackets and counted[start] else part
        text.append(marked, style="green" if counted[start] else "dim")
        start = end
    return text
