"""The command line: llamapro expand | merge | prepare | replay | train | ..."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch

from llamapro import expansion, new_blocks, planner, planner_ranks
from llamapro import report as report_module
from llamapro.command_line import positional, said_in_one_line, tyro, with_config_file
from llamapro.data import prepare as prepare_module
from llamapro.data.packing import PackedDataset
from llamapro.data.tokens import load_tokens
from llamapro.eval.importance import by_importance
from llamapro.frozen import FORMS
from llamapro.hardware import matmul_rate, pick_device
from llamapro.inference import chat, evaluate, generate
from llamapro.model_files import read_config
from llamapro.placement import PLACEMENTS
from llamapro.ranks import check_alone, speaks
from llamapro.storage import check_new
from llamapro.train import replay as replay_module
from llamapro.train.config import DTYPES, TrainConfig
from llamapro.train.dry_run import dry_run as show_what_it_would_do
from llamapro.train.loop import train as run_training


def expand(
    base: positional(Path, "BASE"),
    out: positional(Path, "OUT"),
    new_blocks: int | None = None,
    placement: str = "interleaved",
    data: Path | None = None,
    per_group: int = 1,
    keep_new: bool = False,
) -> None:
    """Add identity blocks to a model directory and prove that nothing changed.

    Args:
        base: The Hugging Face model directory to expand.
        out: The new directory that the expanded model is written to.
        new_blocks: How many blocks are added.
        placement: Where they go: interleaved, top_half, prefix, suffix, importance, or positions
            in the expanded stack, such as 4,9,14.
        data: For importance, text that shall be kept, as `llamapro prepare` writes it: copied are
            the blocks whose removal costs least on what it holds out.
        per_group: How many blocks are copied onto each group of interleaved ones.
        keep_new: Of an expanded base, count the earlier new blocks as new still.
    """
    where = placement
    if set(placement) <= set("0123456789-,[] "):  # as people and `llamapro plan` write positions
        where = [int(p) if p.strip("-").isdigit() else p for p in _words(placement)]
    if (placement == "importance") != (data is not None):
        raise ValueError(f"--data is for --placement importance, got {placement} and {data}")
    if data is not None:
        check_new(out)
        where = by_importance(base, data, new_blocks)
    positions = expansion.expand_checkpoint(
        base, out, new_blocks, where, per_group=per_group, keep_new=keep_new
    )
    print(f"{out}: new blocks at {positions}; logits on real tokens are bit-equal to {base}'s")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip("[] ").split(",")]


def merge(
    base: positional(Path, "BASE"),
    new_blocks_directory: positional(Path, "NEW_BLOCKS"),
    out: positional(Path, "OUT"),
) -> None:
    """Join a base and new blocks that were saved alone: the whole expanded model.

    Args:
        base: The Hugging Face model directory that the new blocks were made for.
        new_blocks_directory: The directory with new_blocks.safetensors and new_blocks.json.
        out: The new directory that the expanded model is written to.
    """
    new_blocks.merge(base, new_blocks_directory, out)
    print(f"{out}: {base} with new blocks at {read_config(out).new_blocks}")


def prepare(
    sources: positional(tuple[str, ...], "SOURCE..."),
    tokenizer: Path,
    out: Path,
    pattern: str = "*",
    heldout: float = 0.1,
    separator: str | None = None,
    text_field: str | None = None,
    licence: str | None = None,
    decontaminate: Path | None = None,
) -> None:
    """Turn text or conversations into a data directory for training and evaluation.

    Stopped or killed, the same command goes on from where it was.

    Args:
        sources: UTF-8 text files; files of rows (.jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet);
            folders that are searched for the pattern, what is hidden there is left out; or
            hf:NAME[:CONFIG][:SPLIT], a dataset of the hub. Rows have the columns text, or messages,
            conversations, prompt and completion, or instruction and output: then the model's chat
            template is applied, and the assistant's words alone are targets.
        tokenizer: The model directory whose tokenizer.json, and chat template, is used.
        out: The new data directory that is written.
        pattern: Which file names are taken from folders, such as *.py. A .json in a folder is text
            unless the pattern names that suffix.
        heldout: The share of the text that is set aside for evaluation, by whole documents.
        separator: The token after each document; by default the model's end of sequence.
        text_field: The column that holds the text, if it is not one of those above.
        licence: The licence of the sources, which meta.json notes; a dataset's is on its card.
        decontaminate: A folder of benchmarks, as .jsonl files; documents that hold 13 consecutive
            words of a question of theirs are dropped.
    """
    meta = prepare_module.prepare(
        sources,
        tokenizer,
        out,
        pattern=pattern,
        heldout=heldout,
        separator=separator,
        text_field=text_field,
        licence=licence,
        decontaminate=decontaminate,
    )
    print(f"{out}: {meta['tokens']} tokens of {meta['documents']} documents")


def replay(
    base: positional(Path, "BASE"),
    out: Path,
    tokens: int,
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(name="from", metavar="PROMPTS...")] = (),
    chat: bool = False,
    bos_token: str | None = None,
    temperature: float = 1.0,
    seq_len: int = 512,
    seed: int = 0,
    dtype: Literal[DTYPES] = "auto",
    device: str = "auto",
) -> None:
    """Sample a model: a data directory of what it knows, to keep it by while it learns.

    Stopped or killed, the same command goes on from where it was. Samples that say nothing or
    repeat themselves are dropped, and where most do, the model is refused.

    Args:
        base: The Hugging Face model directory to sample; of an expanded one, its base.
        out: The new data directory that is written.
        tokens: How many tokens of samples there shall be for training.
        prompts: Texts, as `llamapro prepare` takes them, whose beginnings are gone on from; of
            chat, what users ask. By default samples begin with the beginning of a sequence.
        chat: Sample questions and answers by the model's chat template.
        bos_token: The token that samples begin with; by default the model's.
        temperature: How random the choice is; 1 samples the model as it is.
        seq_len: How many tokens a sample has at most.
        seed: The seed of the samples.
        dtype: The dtype of the weights; auto is bfloat16, or float32 on a CPU that has no
            instructions for that.
        device: The device to run on; auto is CUDA when there is one.
    """
    meta = replay_module.replay(
        base,
        out,
        tokens=tokens,
        prompts=prompts,
        chat=chat,
        bos_token=bos_token,
        temperature=temperature,
        seq_len=seq_len,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    said = meta["samples"]
    print(
        f"{out}: {meta['tokens']} tokens of {said['samples']} samples of {said['mean_length']:.0f}"
        f" on average, {said['dropped']} more were dropped; {said['repetition']:.1%} of a sample's"
        f" 4-grams are repeated in it, {said['distinct_grams']:.1%} of all are distinct"
    )


def train(
    config: Annotated[TrainConfig, tyro.conf.arg(name="")],
    resume: bool = False,
    dry_run: bool = False,
) -> None:
    """Train the new blocks of an expanded model, or everything.

    Options may stand in a YAML or JSON file, such as the config.json of a run, that --config names;
    those of the command line win.

    Args:
        resume: Go on from the newest checkpoint of the run, with the same settings.
        dry_run: Show the data, what a step costs and the first micro-batch, and train nothing.
    """
    if dry_run:
        if speaks():
            show_what_it_would_do(config)
        return
    summary = run_training(config, resume=resume)
    if speaks():
        print(f"{config.out}/final: perplexity {summary['perplexity_after']}")


def plan(
    base: positional(str, "BASE"),
    new_blocks: int,
    placement: Literal[("every", *PLACEMENTS)] = "every",
    seq_len: int = 4096,
    batch_size: int = 1,
    data: Path | None = None,
    keep: float = 0.0,
    memory: str | None = None,
    frozen: Literal[FORMS] | None = None,
    dtype: Literal[DTYPES[1:]] = "bfloat16",
    device: str = "auto",
    gpus: int = 1,
    shard: Literal[("auto", *planner_ranks.SHARDS)] = "auto",
) -> None:
    """What post-pre-training will cost, from the configuration alone, before a weight is loaded.

    Args:
        base: The Hugging Face model directory, or a Hub name; only its config.json is read.
        new_blocks: How many blocks are added.
        placement: Where they go; by default every placement is shown side by side.
        seq_len: How many tokens a row has.
        batch_size: How many rows a step has, of all GPUs together.
        data: The data directory whose documents are packed in the rows, so that attention's work is
            that of their lengths; by default a row is one document.
        keep: The share of the rows on which the base is distilled, as training's keep does.
        memory: How much memory a device has, such as 80GB: blocks recompute more in backward until
            the step fits in 95 % of it.
        frozen: How the frozen matrices are held; by default in dtype, or with memory in the form
            that fits with least recomputation, on one device. Training takes that only when told.
        dtype: The dtype of weights and activations.
        device: The device whose matrix products bound the speed.
        gpus: How many GPUs share the rows: with several, memory and traffic of each one.
        shard: What several GPUs shard: none of the base, which sends least, or all of it (full); by
            default both are shown, and which of them training takes. 8 bits need none.
    """
    where, kind, config = pick_device(device), getattr(torch, dtype), read_config(base)
    lengths = ()
    if data is not None:
        lengths = PackedDataset(load_tokens(data, "train", config.vocab_size), seq_len).spread
    if not 0 <= keep < 1:
        raise ValueError(f"keep must be a share from 0 to below 1, got {keep}")
    wanted = PLACEMENTS if placement == "every" else (placement,)
    limit = None if memory is None else planner.usable(memory)
    if gpus != 1:
        sizes = planner_ranks.rows_of_a_rank(batch_size, gpus), seq_len, kind, "cuda"
        sizes += (frozen or FORMS[0],)
        work = planner.Workload(config, None, *sizes, documents=lengths, kept=keep)
        print(planner_ranks.plan_ranks(work, new_blocks, wanted, gpus, shard, limit))
        return
    if shard != "auto":
        raise ValueError(f"--shard {shard} is for several GPUs: --gpus 2 or more expected, got 1")
    work = planner.Workload(
        config, None, batch_size, seq_len, kind, where.type, documents=lengths, kept=keep
    )
    rate = matmul_rate(where, kind, 8192 if where.type == "cuda" else 1024)
    print(planner.plan(work, new_blocks, wanted, limit=limit, rate=rate, frozen=frozen))


def report(
    base: positional(Path, "BASE"),
    runs: positional(tuple[Path, ...], "RUN..."),
    out: Path,
    max_tokens: int = 16384,
    prompt: str = report_module.PROMPT,
    evaluations: tuple[Path, ...] = (),
) -> None:
    """Compare a base with the finished runs that started from it: report.md and its pictures.

    Args:
        base: The Hugging Face model directory that the runs started from.
        runs: The run directories of `llamapro train`.
        out: The new directory that the report is written to.
        max_tokens: How many tokens of each held-out set are measured.
        prompt: The text that every model continues.
        evaluations: Files with evaluations of these models by benchmarks.
    """
    options = {"max_tokens": max_tokens, "prompt": prompt, "evaluations": evaluations}
    print(report_module.report(base, runs, out, **options))


COMMANDS = {
    "expand": expand,
    "merge": merge,
    "prepare": prepare,
    "replay": replay,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "plan": plan,
    "report": report,
}


def main(args: list[str] | None = None) -> None:
    """Run a command."""
    options = [a.split("=")[0] for a in args or sys.argv[1:] if a.startswith("--")]
    with said_in_one_line():
        for option in options:
            if options.count(option) > 1:  # the last would count alone, without a word
                raise ValueError(f"{option} once expected, got it {options.count(option)} times")
        args = with_config_file(args or sys.argv[1:])
        if args[:1] != ["train"]:
            check_alone()
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="llamapro", args=args)


if __name__ == "__main__":
    main()
