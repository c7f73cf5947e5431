"""The commands that run a model: eval, generate, chat."""

import json
import math
from pathlib import Path
from typing import Literal

import torch

from llamapro import report as report_module
from llamapro.command_line import positional
from llamapro.data.chat import ChatTemplate
from llamapro.data.packing import PACKINGS, open_rows
from llamapro.data.tokens import check_tokenizer
from llamapro.eval.perplexity import evenly_spaced_indices, perplexity
from llamapro.frozen import FORMS
from llamapro.hardware import pick_device, pick_dtype
from llamapro.model import Llama
from llamapro.model_files import read_config
from llamapro.train.config import DTYPES


def evaluate(
    model: positional(Path, "MODEL"),
    data_directory: positional(Path | None, "DATA") = None,
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
    model: positional(Path, "MODEL"),
    prompt: positional(str, "PROMPT"),
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
    model: positional(Path, "MODEL"),
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


def _load(model: Path, dtype: str, device: str, frozen: str) -> Llama:
    where = pick_device(device)
    dtype = pick_dtype(where) if dtype == "auto" else dtype
    return Llama.from_pretrained(model, getattr(torch, dtype), where, frozen)
