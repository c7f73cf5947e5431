"""The command line: llamapro expand | merge | prepare | replay | train | ..."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

try:
    import tyro
except ImportError:
    sys.exit(
        'llamapro\'s command line needs the "train" extra: pip install "llamapro-kernels[train]"'
    )

import torch

from llamapro import expansion, new_blocks, planner
from llamapro import report as report_module
from llamapro.command_line import said_in_one_line, with_config_file
from llamapro.data import prepare as prepare_module
from llamapro.data.chat import ChatTemplate
from llamapro.data.packing import PACKINGS, PackedDataset, open_rows
from llamapro.data.tokens import check_tokenizer, load_tokens
from llamapro.eval.perplexity import evenly_spaced_indices, perplexity
from llamapro.frozen import FORMS
from llamapro.hardware import matmul_rate, pick_device, pick_dtype
from llamapro.model import Llama
from llamapro.model_files import read_config
from llamapro.placement import PLACEMENTS
from llamapro.train import replay as replay_module
from llamapro.train.config import DTYPES, TrainConfig
from llamapro.train.dry_run import dry_run as show_what_it_would_do
from llamapro.train.loop import train as run_training


def _positional(kind, name: str):
    return tyro.conf.Positional[Annotated[kind, tyro.conf.arg(metavar=name)]]


def expand(
    base: _positional(Path, "BASE"),
    out: _positional(Path, "OUT"),
    new_blocks: int | None = None,
    placement: str = "interleaved",
    per_group: int = 1,
    keep_new: bool = False,
) -> None:
    """Add identity blocks to a model directory and prove that nothing changed.

    Args:
        base: The Hugging Face model directory to expand.
        out: The new directory that the expanded model is written to.
        new_blocks: How many blocks are added.
        placement: Where they go: interleaved, top_half, prefix, suffix, or positions in the
            expanded stack, such as 4,9,14.
        per_group: How many blocks are copied onto each group of interleaved ones.
        keep_new: Of an expanded base, count the earlier new blocks as new still.
    """
    where = placement
    if set(placement) <= set("0123456789-,[] "):  # as people and `llamapro plan` write positions
        where = [int(p) if p.strip("-").isdigit() else p for p in _words(placement)]
    positions = expansion.expand_checkpoint(
        base, out, new_blocks, where, per_group=per_group, keep_new=keep_new
    )
    print(f"{out}: new blocks at {positions}; logits on real tokens are bit-equal to {base}'s")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.strip("[] ").split(",")]


def merge(
    base: _positional(Path, "BASE"),
    new_blocks_directory: _positional(Path, "NEW_BLOCKS"),
    out: _positional(Path, "OUT"),
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
    sources: _positional(tuple[str, ...], "SOURCE..."),
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
    base: _positional(Path, "BASE"),
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
        show_what_it_would_do(config)
        return
    summary = run_training(config, resume=resume)
    print(f"{config.out}/final: perplexity {summary['perplexity_after']}")


def evaluate(
    model: _positional(Path, "MODEL"),
    data_directory: _positional(Path | None, "DATA") = None,
    tasks: str | None = None,
    limit: int | None = None,
    data_root: Path | None = None,
    batch_size: int = 8,
    out: Path | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    judge: str | None = None,
    judge_model: str = "gpt-4",
    feedback: bool = False,
    allow_unsafe: bool = False,
    seq_len: int = 512,
    max_tokens: int | None = None,
    packing: Literal[PACKINGS] = "bfd",
    frozen: Literal[FORMS] = FORMS[0],
    dtype: Literal[DTYPES] = "auto",
    device: str = "auto",
) -> None:
    """Perplexity on the held-out part of a data directory, as JSON; or benchmarks, as a table.

    Args:
        model: The Hugging Face model directory to evaluate.
        data_directory: The data directory that `llamapro prepare` made.
        tasks: The benchmarks, with commas between: paper, for the nine of LLaMA Pro; mt_bench;
            mint; or any task of lm-eval by its name.
        limit: How many questions of each benchmark are asked; all by default.
        data_root: A folder with a folder of .jsonl files for each benchmark; by default lm-eval
            loads them from the hub.
        batch_size: How many texts are generated at a time.
        out: The JSON file that results are written to, after each benchmark; what it has by then is
            not evaluated again.
        samples: How many programs are written for each problem, for pass@k; more than one need a
            temperature.
        temperature: How random programs are; 0 takes the most probable token.
        judge: The address of an OpenAI-compatible endpoint that grades answers to MT-Bench, such as
            https://api.openai.com/v1; its key is taken from OPENAI_API_KEY.
        judge_model: The model that judges.
        feedback: Let the judge comment on each turn of MINT too.
        allow_unsafe: Run the model's programs also where nothing can isolate them.
        seq_len: How many tokens a row has; each row starts without context.
        max_tokens: How many tokens are evaluated, evenly spaced; all of them by default.
        packing: How rows are filled: bfd puts whole documents where they fit best, and each starts
            without context; wrapped runs across documents.
        frozen: How the matrices of all but the new blocks are held.
        dtype: The dtype of the weights; auto is bfloat16, unless fp32 is twice as fast here.
        device: The device to run on; auto is CUDA when there is one.
    """
    if (data_directory is None) == (tasks is None):
        raise ValueError("a data directory or --tasks expected, got both or neither")
    if data_directory is not None:
        _print_perplexity(
            model, data_directory, (seq_len, packing), max_tokens, (dtype, device, frozen)
        )
        return
    from llamapro.eval.endpoint import Endpoint
    from llamapro.eval.evaluate import Evaluation, results_table
    from llamapro.eval.evaluate import evaluate as by_benchmarks
    from llamapro.eval.tasks import names_of

    asked = Evaluation(
        names=names_of(tasks),
        data_root=data_root,
        limit=limit,
        rows=batch_size,
        samples=samples,
        temperature=temperature,
        allow_unsafe=allow_unsafe,
        judge=Endpoint(judge, judge_model) if judge else None,
        feedback=feedback,
    )
    read_config(model)
    asked.check(model, out)
    print(results_table(by_benchmarks(_load(model, dtype, device, frozen), model, asked, out)))


def _print_perplexity(model, data_directory, layout, max_tokens, loaded) -> None:
    vocab = read_config(model).vocab_size
    check_tokenizer(data_directory, model)
    rows = open_rows(data_directory, "heldout", vocab, *layout)
    evenly_spaced_indices(rows, max_tokens)  # a bad number is refused before the model is loaded
    result = perplexity(_load(model, *loaded), rows, max_tokens)
    if not math.isfinite(result["perplexity"]):  # JSON has no word for it
        raise FloatingPointError(f"a finite perplexity expected, got {result}")
    print(json.dumps(result))


def generate(
    model: _positional(Path, "MODEL"),
    prompt: _positional(str, "PROMPT"),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    frozen: Literal[FORMS] = FORMS[0],
    dtype: Literal[DTYPES] = "auto",
    device: str = "auto",
) -> None:
    """Continue a text.

    Args:
        model: The Hugging Face model directory to run.
        prompt: The text that is continued.
        max_new_tokens: How many tokens are added at most.
        temperature: How random the choice is; 0 takes the most probable token.
        top_p: Sample from the smallest set of tokens with this much probability.
        frozen: How the matrices of all but the new blocks are held.
        dtype: The dtype of the weights; auto is bfloat16, unless fp32 is twice as fast here.
        device: The device to run on; auto is CUDA when there is one.
    """
    report_module.encode_prompt(model, prompt)  # a bad one is refused at once
    llama = _load(model, dtype, device, frozen)
    sampling = {"temperature": temperature, "top_p": top_p}
    print(report_module.complete(llama, model, prompt, max_new_tokens, **sampling))


def chat(
    model: _positional(Path, "MODEL"),
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int | None = None,
    frozen: Literal[FORMS] = FORMS[0],
    dtype: Literal[DTYPES] = "auto",
    device: str = "auto",
) -> None:
    """Talk to a model in the terminal, by its own chat template.

    Args:
        model: The Hugging Face model directory to run.
        system: What the model is told before the first question.
        max_new_tokens: How many tokens an answer has at most.
        temperature: How random the choice is; 0 takes the most probable token.
        top_p: Sample from the smallest set of tokens with this much probability.
        seed: Makes the answers repeatable.
        frozen: How the matrices of all but the new blocks are held.
        dtype: The dtype of the weights; auto is bfloat16, unless fp32 is twice as fast here.
        device: The device to run on; auto is CUDA when there is one.
    """
    from llamapro.chat import Dialogue, talk

    ChatTemplate.of(model)  # a model without one is refused at once
    llama = _load(model, dtype, device, frozen)
    generator = torch.Generator(llama.norm.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    dialogue = Dialogue(llama, model, system, max_new_tokens)
    talk(dialogue, temperature=temperature, top_p=top_p, generator=generator)


def plan(
    base: _positional(str, "BASE"),
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
) -> None:
    """What post-pre-training will cost, from the configuration alone, before a weight is loaded.

    Args:
        base: The Hugging Face model directory, or a Hub name; only its config.json is read.
        new_blocks: How many blocks are added.
        placement: Where they go; by default every placement is shown side by side.
        seq_len: How many tokens a row has.
        batch_size: How many rows a step has.
        data: The data directory whose documents are packed in the rows, so that attention's work is
            that of their lengths; by default a row is one document.
        keep: The share of the rows on which the base is distilled, as training's keep does.
        memory: How much memory there is, such as 80GB: blocks recompute more in backward until the
            step fits in 95 % of it.
        frozen: How the frozen matrices are held; by default in dtype, or with memory in the form
            that fits with least recomputation. Training takes that only when told.
        dtype: The dtype of weights and activations.
        device: The device whose matrix products bound the speed.
    """
    where, kind, config = pick_device(device), getattr(torch, dtype), read_config(base)
    lengths = ()
    if data is not None:
        lengths = PackedDataset(load_tokens(data, "train", config.vocab_size), seq_len).spread
    if not 0 <= keep < 1:
        raise ValueError(f"keep must be a share from 0 to below 1, got {keep}")
    sizes = batch_size, seq_len, kind, where.type
    print(
        planner.plan(
            planner.Workload(config, None, *sizes, documents=lengths, kept=keep),
            new_blocks,
            PLACEMENTS if placement == "every" else (placement,),
            limit=None if memory is None else planner.usable(memory),
            rate=matmul_rate(where, kind, 8192 if where.type == "cuda" else 1024),
            frozen=frozen,
        )
    )


def report(
    base: _positional(Path, "BASE"),
    runs: _positional(tuple[Path, ...], "RUN..."),
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


def _load(model: Path, dtype: str, device: str, frozen: str) -> Llama:
    where = pick_device(device)
    dtype = pick_dtype(where) if dtype == "auto" else dtype
    return Llama.from_pretrained(model, getattr(torch, dtype), where, frozen)


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
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="llamapro", args=args)


if __name__ == "__main__":
    main()
