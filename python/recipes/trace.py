"""Sequential learning on TRACE: one task after the other, all of them evaluated after each.

`make trace` runs it. A base learns by new blocks for each task, by one set of new blocks, by LoRA,
merged after each task, or in full; all see the same rows in the same order. What has been run is
not run again, so it can be stopped, and goes on.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from llamapro.command_line import said_in_one_line
from llamapro.data.packing import open_rows
from llamapro.data.prepare import prepare
from llamapro.eval import trace
from llamapro.eval.completion import Completer
from llamapro.eval.records import check_limit
from llamapro.expansion import expand_checkpoint
from llamapro.hardware import environment, pick_device
from llamapro.hf import Checkpoint
from llamapro.markdown import table
from llamapro.model import Llama
from llamapro.storage import new_directory, read_json, shown, write_json, write_text
from llamapro.tokenizer import encode, load_tokenizer, stop_ids
from llamapro.train import TrainConfig, train

from recipes import assets
from recipes.records import settle
from recipes.rivals import adapt

# Peak learning rates; not swept. TRACE's own for full fine-tuning and LoRA.
RATES = {"expansion": 2e-4, "expansion_reused": 2e-4, "lora": 1e-4, "full": 1e-5}
HELD_OUT = 0.05  # of the training rows, whose perplexity a run measures
SPARE = 8  # tokens of a row for its begin and end, and where prompt and answer meet
# A prompt and its answer, as TRACE has them: nothing between, nothing around.
TEMPLATE = "{{ %s }}{%% for m in messages %%}{{ m.content }}{%% if m.role == 'assistant' %%}"
TEMPLATE += "{{ %s }}{%% endif %%}{%% endfor %%}"


@dataclass
class TraceConfig:
    """The experiment."""

    data_root: Path
    """The folder of benchmarks, with trace/TASK/train.json and test.json."""
    model: Path | None = None
    """The base, a model directory; SmolLM2-135M unless one is named."""
    out: Path = Path("runs/trace")
    """The folder of all that is made: results.json and results.md, and what is gone on with."""
    methods: tuple[Literal["expansion", "expansion_reused", "lora", "full"], ...] = tuple(RATES)
    """How the base learns."""
    tasks: tuple[str, ...] = tuple(trace.TASKS)
    """What it learns, in this order."""
    limit: int | None = 100
    """How many test rows of each task are asked."""
    new_blocks: int = 6
    """How many blocks an expansion adds."""
    rank: int = 8
    """The rank of LoRA's adapters, which are beside every matrix of the blocks."""
    epochs: int = 5
    """How often the rows of each task are gone through."""
    batch_size: int = 8
    """How many rows of tokens a step has."""
    seq_len: int = 512
    """How many tokens a row has; longer prompts lose their beginning, as in TRACE."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """The dtype of weights and activations."""
    device: str = "auto"
    """The device; auto is CUDA when there is one."""
    seed: int = 0
    """The seed of the order of the rows."""

    def __post_init__(self):
        trace.check_tasks(self.tasks)
        check_limit(self.limit)
        for name, given in (("methods", self.methods), ("tasks", self.tasks)):
            if not given or len({*given}) < len(given):
                raise ValueError(f"{name}: one or more, each once, expected, got {shown(given)}")
        for name in ("epochs", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def sequence(config: TraceConfig) -> dict:
    """Run what is missing; write the results after each method, and return them."""
    for task in config.tasks:  # what can be wrong, first
        for part in ("train", "test"):
            trace.read_rows(config.data_root, task, part)
    base = config.model or assets.smollm2()
    setting = _settle(config, base)
    for task in config.tasks:
        _prepare(config, base, task)
    where = {"environment": environment(pick_device(config.device))}
    results = {"setting": setting, **where, "base": _scores(config, base, base, "base")}
    results["methods"] = {}
    for method in config.methods:
        results["methods"][method] = _learn(config, base, method)
        write_json(config.out / "results.json", results)
        write_text(config.out / "results.md", page(results))
    return results


def _settle(config: TraceConfig, base: Path) -> dict:
    """The setting, which must be that of what is there already; methods may be added."""
    setting = {**asdict(config), "model": base, "rates": RATES}
    for name in ("out", "methods"):
        del setting[name]
    return settle(config.out / "setting.json", setting)


def _prepare(config: TraceConfig, base: Path, task: str) -> None:
    """The training rows of a task as tokens, the loss on the answers alone."""
    out, reader = config.out / "data" / task, _reader(config, base)
    if out.exists():
        return
    tokenizer, lines = load_tokenizer(reader), []
    for row in trace.read_rows(config.data_root, task, "train"):
        prompt = fitted(tokenizer, row, config.seq_len - SPARE)
        lines.append(json.dumps({"prompt": prompt, "completion": row.answer}) + "\n")
    rows = config.out / "rows" / f"{task}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    write_text(rows, "".join(lines))
    prepare([rows], reader, out, heldout=HELD_OUT)


def _reader(config: TraceConfig, base: Path) -> Path:
    """The base's tokenizer, with a template that says prompts as evaluation does."""
    out, tokenizer = config.out / "tokenizer", load_tokenizer(base)
    if out.exists():
        return out
    ends = stop_ids(base, tokenizer)
    if not ends:
        raise ValueError(f"{base}: an end of sequence in config.json expected, got none")
    begin = tokenizer.decode(encode(tokenizer, ""), skip_special_tokens=False)
    texts = (json.dumps(t, ensure_ascii=False) for t in (begin, tokenizer.id_to_token(ends[0])))
    with new_directory(out) as directory:
        shutil.copyfile(base / "tokenizer.json", directory / "tokenizer.json")
        write_json(directory / "config.json", {"eos_token_id": ends[0]})
        write_text(directory / "chat_template.jinja", TEMPLATE % tuple(texts))
    return out


def fitted(tokenizer, row: trace.Row, room: int) -> str:
    """The prompt without so much of its beginning that it and the answer take up to `room` tokens;
    whole where the answer alone takes more."""
    ends = tokenizer.encode(row.answer, add_special_tokens=False).ids
    offsets = tokenizer.encode(row.prompt, add_special_tokens=False).offsets
    left = room - len(ends)
    return row.prompt if left < 1 else row.prompt[offsets[-left:][0][0] :]


def _learn(config: TraceConfig, base: Path, method: str) -> dict:
    """A method's way through the tasks: the scores of all after each, OP and BWT."""
    model, found = base, []
    for number, task in enumerate(config.tasks, 1):
        name = f"{method}/{number}-{task}"
        print(f"{method}: {task}, {number} of {len(config.tasks)}", flush=True)
        model = _train(config, method, model, config.out / name, task, first=number == 1)
        found.append(_scores(config, base, model, name))
    matrix = [[scored[task]["score"] for task in config.tasks] for scored in found]
    totals = {"op": trace.overall_performance(matrix), "bwt": trace.backward_transfer(matrix)}
    return {"matrix": matrix, **totals, "scores": found}


def _train(config, method: str, model: Path, stage: Path, task: str, *, first: bool) -> Path:
    """The model that has learnt one more task."""
    if method == "expansion" or (method == "expansion_reused" and first):
        expanded = stage / "expanded"
        if not expanded.exists():
            expand_checkpoint(model, expanded, config.new_blocks)
        model = expanded
    settings = _settings(config, method, model, stage / "run", task)
    final, out = stage / "run" / "final", stage / "run"
    if not (out / "summary.json").exists():
        if method == "lora":
            adapt(settings, config.rank)
        else:
            train(settings, resume=out.exists())
    return final


def _settings(config: TraceConfig, method: str, model: Path, out: Path, task: str) -> TrainConfig:
    data = config.out / "data" / task
    vocab = Checkpoint(model).config.vocab_size
    rows = len(open_rows(data, "train", vocab, config.seq_len, "bfd"))
    return TrainConfig(
        model=str(model),
        data=(str(data),),
        out=str(out),
        trainable="new_blocks" if method.startswith("expansion") else "all",
        steps=math.ceil(config.epochs * rows / config.batch_size),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        learning_rate=RATES[method],
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        eval_every=10**6,
    )


def _scores(config: TraceConfig, base: Path, model: Path, name: str) -> dict:
    """The scores of all tasks, from the file that has them or a model that is asked."""
    file = config.out / name / "scores.json"
    if file.exists():
        return read_json(file)
    dtype, device = getattr(torch, config.dtype), pick_device(config.device)
    complete = Completer(Llama.from_pretrained(model, dtype, device), base).complete
    found = {
        task: trace.scores(config.data_root, task, complete, config.limit) for task in config.tasks
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    return found


def page(results: dict) -> str:
    """The results as Markdown: OP and BWT of each method, and its scores after each task."""
    tasks, methods = results["setting"]["tasks"], results["methods"]
    totals = [[name, _percent(m["op"]), _percent(m["bwt"])] for name, m in methods.items()]
    lines = table(["method", "OP", "BWT"], totals)
    base = ["base", *(_percent(results["base"][task]["score"]) for task in tasks)]
    for name, found in methods.items():
        rows = [
            [task, *map(_percent, row)] for task, row in zip(tasks, found["matrix"], strict=True)
        ]
        lines += ["", f"{name}:", "", *table(["after", *tasks], [base, *rows])]
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    with said_in_one_line():
        config = tyro.cli(TraceConfig)
        sequence(config)
        print((config.out / "results.md").read_text())
