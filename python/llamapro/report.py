"""What a run gained and what it kept, as one Markdown page with pictures."""

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from llamapro.data.packing import open_rows
from llamapro.data.tokens import are_samples
from llamapro.eval.perplexity import perplexity, what_the_base_says
from llamapro.hardware import pick_device
from llamapro.hf import Checkpoint
from llamapro.markdown import table
from llamapro.model import Llama
from llamapro.proof import frozen_verdict, same_bytes
from llamapro.report_benchmarks import add_scores, benchmarks, read_evaluations, scores_of
from llamapro.report_pictures import draw, draw_frontier
from llamapro.storage import check_regular, new_directory, read_json, write_json
from llamapro.tokenizer import encode, load_tokenizer
from llamapro.train.config import KEPT, as_options, held_out_sets
from llamapro.train.keep import lost
from llamapro.train.run import BEFORE

NAMES = {"new_blocks": "expanded, new blocks trained", "all": "full fine-tuning"}
PROMPT = "def read_lines(path):\n"
FRONTIER = "report-frontier.png"
LOST = 0.05  # of a rise of perplexity: above it, the verdict is no longer "kept"


def report(
    base,
    runs,
    out,
    *,
    max_tokens: int = 16384,
    prompt: str = PROMPT,
    notes: str = "",
    evaluations=(),
) -> Path:
    """Measure the base and every run's final model, and write report.md, its pictures and
    report.json to `out`.

    base: model directory. runs: finished run directories; the held-out sets, sequence length and
    dtype are those of the first. max_tokens: of each held-out set. evaluations: files that
    `llamapro.eval.evaluate` wrote of these models. Every figure is measured here or read from the
    run's own files and these.
    Raises, before anything is measured, FileExistsError when `out` exists, FileNotFoundError for
    an unfinished run, and ValueError for a run of another base or evaluations that are not of
    these models or not comparable.
    """
    if not runs or max_tokens < 1:
        raise ValueError(f"a run and a token of each set expected, got {len(runs)}, {max_tokens}")
    with new_directory(out) as directory:
        runs = [_read_run(Path(run)) for run in runs]
        for run in runs:
            _check_base(base, run)
        encode_prompt(base, prompt)
        evaluations = read_evaluations(evaluations)
        models = [Path(base), *(run["path"] / "final" for run in runs)]
        scores = scores_of(models, evaluations)
        sets, says = _sets(runs), {}
        how = (runs[0]["config"], sets, max_tokens, prompt)
        known = [{"name": "base"}]
        known += [{"name": name, **run} for name, run in zip(_names(runs), runs, strict=True)]
        rows = [
            {**row, "path": path, **_measure(path, *how, says)}
            for row, path in zip(known, models, strict=True)
        ]
        draw(rows, directory / "report.png")
        figures = [_figures(row, rows[0], sets) for row in rows]
        add_scores(figures, scores)
        more = benchmarks(figures, evaluations)
        if draw_frontier(figures, directory / FRONTIER, LOST):
            more += ["", f"![what was learnt against what was lost]({FRONTIER})"]
        commands = _commands(rows, evaluations, max_tokens, prompt)
        page = _page(rows, figures, [*more, *([] if not notes else ["", notes]), *commands], prompt)
        (directory / "report.md").write_text(page, encoding="utf-8")
        write_json(directory / "report.json", figures)
    return Path(out) / "report.md"


def _read_run(path: Path) -> dict:
    if not (path / "summary.json").exists():
        raise FileNotFoundError(f"{path}: a finished run expected, got no summary.json")
    try:
        summary = read_json(path / "summary.json")
        check_regular(path / "metrics.jsonl")  # a device may have no end
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: a finished run's JSON expected, got {error}") from None
    missing = {"config", "dtype", "device", "tokens_per_second"} - set(summary)
    if missing:
        raise ValueError(f"{path}/summary.json: {sorted(missing)} expected, got none")
    summary["config"] = {**BEFORE, **summary["config"]}
    return {**summary, "path": path, "metrics": metrics, "frozen": frozen_verdict(path)}


def _check_base(base, run: dict) -> None:
    """Neither expansion nor the start of a run changes the embeddings."""
    start, name = run["config"]["model"], "model.embed_tokens.weight"
    if not same_bytes(*(Checkpoint(model).tensors[name].load() for model in (base, start))):
        raise ValueError(
            f"{run['path']}: a run that started from {base} expected, got one from {start},"
            " whose embeddings differ"
        )


def _names(runs: list[dict]) -> list[str]:
    """What was trained; where that repeats, also the shortest end of the path that tells apart."""
    kinds = [_kind(run["config"]) for run in runs]
    parts = [run["path"].absolute().parts for run in runs]
    length = 1
    while len({p[-length:] for p in parts}) < len({*parts}):
        length += 1
    return [
        f"{kind} ({'/'.join(p[-length:])})" if kinds.count(kind) > 1 else kind
        for kind, p in zip(kinds, parts, strict=True)
    ]


def _kind(config: dict) -> str:
    """What was trained, and what was kept by."""
    if not config.get("keep"):
        return NAMES[config["trainable"]]
    loss = {"kl": "KL", "ce": "cross-entropy"}[config["keep_loss"]]
    limit = f" within {config['keep_within']}" if config["keep_within"] else ""
    return f"{NAMES[config['trainable']]}, {config['keep']:.0%} kept{limit} by {loss}"


@dataclass
class Sets:
    """The held-out sets: their directories by name, and which show what is learnt, or kept."""

    paths: dict[str, str]
    learnt: list[str]
    kept: list[str]
    general: list[str]  # of the kept ones, those that are no samples


def _sets(runs: list[dict]) -> Sets:
    """Those of the first run, with what the first that keeps its base keeps it by."""
    config = runs[0]["config"]
    keep_data = next((d for run in runs if (d := run["config"]["keep_data"])), None)
    general = [*config["evaluate"]]
    paths = held_out_sets(config["data"], config["evaluate"], keep_data)
    samples = {name for name, path in paths.items() if name == KEPT or are_samples(path)}
    kept = [name for name in paths if name in samples or name in general]
    return Sets(paths, [name for name in paths if name not in kept], kept, general)


def _measure(
    model_path, config: dict, sets: Sets, max_tokens: int, prompt: str, says: dict
) -> dict:
    """Perplexity on every held-out set and a greedy continuation of the prompt.

    says: takes what the first model, the base, says of the sets that show what is kept.
    """
    device = pick_device(config["device"])
    model = Llama.from_pretrained(model_path, getattr(torch, config["dtype"]), device)
    vocab, seq_len, packing = model.config.vocab_size, config["seq_len"], config["packing"]
    rows = {n: open_rows(p, "heldout", vocab, seq_len, packing) for n, p in sets.paths.items()}
    if not says:
        says |= what_the_base_says(model, {name: rows[name] for name in sets.kept}, max_tokens)
    values = {n: perplexity(model, of, max_tokens, base=says.get(n)) for n, of in rows.items()}
    return {"perplexity": values, "continuation": complete(model, model_path, prompt)}


def complete(model: Llama, model_path, prompt: str, max_new_tokens: int = 48, **sampling) -> str:
    """Prompt and continuation as text."""
    tokenizer, ids = encode_prompt(model_path, prompt)
    tokens = torch.tensor([ids], device=model.norm.device)
    return tokenizer.decode(model.generate(tokens, max_new_tokens, **sampling)[0].tolist())


def encode_prompt(model_path, prompt: str):
    """The tokenizer and the ids of the prompt; with a token for the beginning, where it has one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a prompt in UTF-8 expected, got {prompt!r}: {error}") from None
    tokenizer = load_tokenizer(model_path)
    ids = encode(tokenizer, prompt)
    if not ids:
        raise ValueError(f"a prompt of at least one token expected, got {prompt!r}")
    return tokenizer, ids


def _page(rows: list[dict], figures: list[dict], more: list[str], prompt: str) -> str:
    base, runs = rows[0], rows[1:]
    config = runs[0]["config"]
    sets = list(base["perplexity"])
    lines = [
        "# What was learnt and what was kept",
        "",
        *verdicts(figures),
        "",
        "Learnt: by how much perplexity fell on what was learnt from. Kept: by how much it rose on"
        " the other sets, at most; without one, what KL(base || model), in nats per token, says of"
        " samples of the base.",
        "",
        *details(figures),
    ]
    counts = ", ".join(f"{base['perplexity'][name]['tokens']} tokens of {name}" for name in sets)
    lines += [
        "",
        f"Perplexity on {counts}, held out by file, in rows of {config['seq_len']}; the change is"
        f" against the base. {_same_data(runs)} Computed in"
        f" {runs[0]['dtype']} on {runs[0]['device']}. Peak memory is of the whole process. Frozen"
        " tensors are compared by a hash in memory before and after the run, and byte by byte in"
        " the files.",
        "",
        "![training loss and perplexity](report.png)",
        *more,
        "",
        f"## Greedy continuation of `{prompt.strip()}`",
    ]
    for row in rows:
        lines += ["", f"{row['name']}:", "```python", row["continuation"], "```"]
    return "\n".join(lines) + "\n"


def _commands(rows: list[dict], evaluations, max_tokens: int, prompt: str) -> list[str]:
    """The section with the command lines of the runs and of the report."""
    base, *runs = rows
    places = [base["path"], *(run["path"].parent for run in runs)]
    words = ["llamapro", "report", *places, "--out", "OUT", "--max-tokens", max_tokens]
    words += [] if prompt == PROMPT else ["--prompt", prompt]
    words += ["--evaluations", *(e.file for e in evaluations)] if evaluations else []
    commands = [*(command(run["config"]) for run in runs), words]
    return ["", "## Commands", "```", *(shlex.join(map(str, c)) for c in commands), "```"]


def _same_data(runs: list[dict]) -> str:
    """What the runs saw, when it was the same."""
    configs = [run["config"] for run in runs]
    sizes = ("steps", "batch_size", "gradient_accumulation_steps", "seq_len")
    names = ("data", "seed", "packing", "keep", *sizes)
    if any(c[name] != configs[0][name] for c in configs for name in names):
        return "The runs differ in the data they saw."
    room = math.prod(configs[0][name] for name in sizes[1:])  # in runs of before it was counted
    tokens = sum(m.get("tokens", room) for m in runs[0]["metrics"] if "loss" in m)
    return f"Each run saw {tokens} tokens, the same in the same order."


def _figures(row: dict, base: dict, sets: Sets) -> dict:
    """What is known of a model; of the base less than of the others."""
    values, of_base = (
        {name: found["perplexity"] for name, found in r["perplexity"].items()} for r in (row, base)
    )
    kls = {name: row["perplexity"][name]["kl"] for name in sets.kept}
    known = {"model": row["name"], "perplexity": values, "kl": kls}
    if row is base:
        return known
    falls = [1 - values[name] / of_base[name] for name in sets.learnt]
    share = lost(values, of_base, kls, sets.general) if kls else None
    trained, total = row["trainable_parameters"] / 1e6, row["parameters"] / 1e6
    return known | {
        "learnt": sum(falls) / len(falls),
        "lost": share,
        "kept": _verdict(share),
        "trained": f"{trained:.1f} M of {total:.1f} M ({trained / total:.0%})",
        "learning rate": row["config"]["learning_rate"],
        "tokens/s": round(row["tokens_per_second"]),
        "peak GB": row["peak_memory_bytes"] / 1e9,
        "frozen tensors": row["frozen"],
    }


def _verdict(share: float | None) -> str:
    if share is None:
        return "not measured"
    return f"kept to {max(share, 0.0):.1%}" if share <= LOST else f"{share:.0%} lost"


def verdicts(figures: list[dict]) -> list[str]:
    """What each model learnt and kept, in a number each and a word."""
    lines = []
    for row in figures[1:]:
        kl = ", ".join(f"{name} {value:.3f}" for name, value in row["kl"].items())
        lines.append([row["model"], f"{row['learnt']:.1%}", row["kept"], kl or "not measured"])
    return table(["model", "learnt", "kept", "KL to the base"], lines)


def details(figures: list[dict]) -> list[str]:
    """Perplexities and costs of each model."""
    base, *runs = figures
    of_base = base["perplexity"]
    head = ["model", *(f"{name} perplexity" for name in of_base), "trained", "learning rate"]
    head += ["tokens/s", "peak memory", "frozen tensors"]
    lines = [["base", *(f"{value:.2f}" for value in of_base.values()), *"-----"]]
    for row in runs:
        found = row["perplexity"].items()
        changed = [f"{value:.2f} ({value / of_base[name] - 1:+.1%})" for name, value in found]
        said = [row["trained"], f"{row['learning rate']:g}", str(row["tokens/s"])]
        said += [f"{row['peak GB']:.2f} GB", row["frozen tensors"]]
        lines.append([row["model"], *changed, *said])
    return table(head, lines)


def command(config: dict) -> list[str]:
    """The command line of a run, as words: what differs from the defaults."""
    return ["llamapro", "train", *as_options(config)]
