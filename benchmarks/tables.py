"""Every measured or computed table of the README and of docs/, from benchmarks/results/*.json.

    python -m benchmarks.tables    # writes the files

From the repository's root; it needs neither a GPU nor torch. A table stands between
`<!-- table: NAME -->` and `<!-- end -->`, NAME as in TABLES, and shows every result of its kind, so
that a new file needs no other change. What is around it is written by hand.
"""

import json
import re
import statistics
from pathlib import Path

from benchmarks.gpu import report as gpu
from benchmarks.gpu.report import cells, table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "paper.md")
DOCUMENTS += (ROOT / "docs" / "evaluation.md",)
# How a file's name begins; the others are of `benchmarks.gpu`.
KINDS = ("step", "cpu", "demo", "keep", "evaluation", "gpus", "paper")
README_STEPS = "step-nvidia-h200-2026-11-26.json"
README_MODELS = ("Llama-2-7B + 8", "Llama-3.2-1B", "Llama-3.2-1B + 4")
TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.S)


def fill(text: str, name: str) -> str:
    """The text of the document `name` with each table as the results say it now.

    Raises ValueError for a table that is not in TABLES.
    """

    def filled(found):
        if found[2] not in TABLES:
            raise ValueError(f"{name}: a table of {list(TABLES)} expected, got {found[2]!r}")
        return f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}"

    return TABLE.sub(filled, text)


def results(kind: str) -> dict[str, dict]:
    """The reports of one kind, by the name of their file."""
    found = {}
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        first = path.name.split("-")[0]
        if kind == (first if first in KINDS else "ops"):
            found[path.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ops() -> str:
    """All that each report of `benchmarks.gpu` says."""
    pages = [f"##{gpu.markdown(report)}\n{source(name)}" for name, report in results("ops").items()]
    return "\n\n".join(pages)


def source(name):
    return f"(benchmarks/results/{name})"


def ops_side_by_side() -> str:
    """The shapes of Llama-2-7B in every report: the share of the roof, and the peers' factors."""
    rows, columns = {}, []
    for report in results("ops").values():
        columns.append(f"{report['device']}, {report['date']}")
        for row in report["rows"]:
            if row["status"] == "ok" and row["shape"].startswith("7B, "):
                key = (row["op"], row["shape"], gpu.wanted(row), row["pass"])
                shown = f"{row['share_of_roof']:.2f}: {gpu.ratios(row)}"
                rows.setdefault(key, {})[columns[-1]] = shown
    lines = table(("op", "shape", "gradients", "pass", *columns))
    for key in sorted(rows, key=lambda key: key[:2]):
        lines.append(cells(*key, *(rows[key].get(column, "-") for column in columns)))
    return "\n".join(lines)


def steps() -> str:
    """All that each report of `benchmarks.gpu.step` says."""
    pages = results("step").items()
    return "\n\n".join(f"{gpu.step_markdown(report)}\n\n{source(name)}" for name, report in pages)


def steps_of_readme() -> str:
    """Tokens/s and memory of three models, beside other libraries."""
    report = results("step")[README_STEPS]
    lines = table(("model, trained, tokens a step", "side", "tokens/s", "peak GB"))
    last = None
    for row in gpu.in_groups(report["rows"]):
        if row["model"] in README_MODELS and row["side"] != "composition":
            *about, side = gpu.step_about(row)
            speed, _, memory = gpu.step_results(row, gpu.roof(report))
            lines.append(cells("" if about == last else ", ".join(about), side, speed, memory))
            last = about
    return "\n".join(lines)


def cpu_steps() -> str:
    """A step on each CPU, against transformers."""
    columns = {
        "transformers": "transformers / ours",
        "compiled": "transformers compiled / ours",
        "peak memory": "transformers' peak / ours",
        "products' share": "share of the matmul roof",
    }
    lines = table(("CPU", "dtype, batch x length, trained", *columns))
    for report in results("cpu").values():
        for row in report["step"]["rows"]:
            figures = (f"{row[key]:.2f}" for key in columns.values())
            lines.append(cells(report["device"], row["case"], *figures))
    return with_sources(lines, "step")


def cpu_placements() -> str:
    """Time and memory of each placement, against ours with everything kept."""
    sides = {'recompute="mlp"': "mlp", 'recompute="block"': "block"}
    sides |= {gpu.SIDES[name]: name for name in ("transformers", "transformers checkpointing")}
    lines = table(("CPU", "placement", *sides))
    for report in results("cpu").values():
        for row in report.get("placement", {"rows": ()})["rows"]:
            figures = (f"{row[s]['time']:.2f} / {row[s]['memory']:.2f}" for s in sides.values())
            lines.append(cells(report["device"], row["placement"], *figures))
    return with_sources(lines, "placement")


def cpu_attention() -> str:
    """Attention alone, a column for each CPU."""
    reports = results("cpu").values()
    cases = "batch x length, heads / key heads x dimension"
    lines = table((cases, *(report["device"] for report in reports)))
    for rows in zip(*(report["attention"]["rows"] for report in reports), strict=True):
        lines.append(cells(rows[0]["case"], *map(attention_cell, rows)))
    return with_sources(lines, "attention")


def attention_cell(row):
    ratio, share = row["sdpa / ours"], row.get("share of the flops roof")
    text = f"{ratio['bf16']:.2f} / {ratio['fp32']:.2f}"
    return text + (f" (roof {share['bf16']:.2f} / {share['fp32']:.2f})" if share else "")


def with_sources(lines, section):
    """The lines of a table, then the files and the command that they come from."""
    reports = {n: report for n, report in results("cpu").items() if section in report}
    command = next(iter(reports.values()))[section]["command"]
    names = ", ".join(f"{name} (commit {r['commit']})" for name, r in reports.items())
    return "\n".join([*lines, "", f"`{command}`, {len(reports)} of benchmarks/results/: {names}."])


def demo() -> str:
    """What `make demo` printed."""
    return "\n\n".join(demo_page(name, report) for name, report in results("demo").items())


def demo_page(name, report):
    verdicts = table(("model", "learnt", "kept", "KL to the base"))
    base, *rows = report["rows"]
    for row in rows:
        kl = ", ".join(f"{name} {value:.3f}" for name, value in row["kl"].items())
        verdicts.append(cells(row["model"], f"{row['learnt']:.1%}", row["kept"], kl))
    head = ("model", *(f"{name} perplexity" for name in base["perplexity"]), "trained")
    lines = table((*head, "learning rate", "tokens/s", "peak memory", "frozen tensors"))
    lines += [cells(*demo_cells(row, base["perplexity"])) for row in report["rows"]]
    where = (
        f"{report['device']}, {report['cores']} cores, {report['dtype']}, {report['steps']} steps"
    )
    facts = f"`{report['command']}`, {where}, commit {report['commit']} {source(name)}."
    return "\n".join([*verdicts, "", *lines, "", facts])


def demo_cells(row, base):
    if "trained" not in row:
        return (row["model"], *(f"{value:.2f}" for value in base.values()), *"-----")
    values = row["perplexity"].items()
    return (
        row["model"],
        *(f"{value:.2f} ({value / base[name] - 1:+.1%})" for name, value in values),
        *(row["trained"], row["learning rate"], row["tokens/s"]),
        *(f"{row['peak GB']:.2f} GB", row["frozen tensors"]),
    )


def keep() -> str:
    """What each way of keeping a base learnt and kept, the mean of its seeds."""
    return "\n\n".join(keep_page(name, report) for name, report in results("keep").items())


def keep_page(name, report):
    lines = table(("trained", "samples, loss", "seeds", "law", "stories", "KL to the base"))
    base, kinds = report["results"][0]["base"], {}
    lines.append(cells("base", "", "", f"{base['law']:.1f}", f"{base['stories']:.2f}", "0"))
    for row in report["results"]:
        kinds.setdefault((row["trained"], row["share"], row["loss"]), []).append(row)
    for (trained, share, loss), rows in sorted(kinds.items(), key=lambda kind: kind[0][:2]):
        law, stories, kl = (statistics.mean(r[n] for r in rows) for n in ("law", "stories", "kl"))
        said = KEPT_BY.get(loss, "") and f"{share:.0%}, {KEPT_BY[loss]}"
        rise = f"{stories:.2f} ({stories / base['stories'] - 1:+.1%})"
        figures = f"{law:.2f}", rise, f"{kl:.3f}"
        lines.append(cells(KEPT_MODELS[trained], said, len(rows), *figures))
    setting, where = report["setting"], report["environment"]
    facts = f"{setting['tokens']:,} tokens of law in rows of {setting['seq_len']}, fp32"
    where = f"{where['processor']}, {where['build']}, torch {where['torch']}"
    facts = f"`make keep`, {facts}, {where}, commit {report['commit']} {source(name)}."
    return "\n".join([*lines, "", facts])


def evaluation() -> str:
    """Our model of lm-eval beside lm-eval's own backend."""
    return "\n\n".join(evaluation_page(*item) for item in results("evaluation").items())


def evaluation_page(name, report):
    head = ("benchmark", "questions", "answers", "that differ", "log-likelihoods differ by")
    lines = table((*head, "s, ours", "s, `hf`", "ratio"))
    for row in report["results"]:
        most, (ours, theirs) = row["largest difference"], row["seconds"]
        differ = row["greedy flags or texts that differ"], "" if most is None else f"{most:.1e}"
        counts = row["task"], row["questions"], row["answers"], *differ
        lines.append(cells(*counts, ours, theirs, f"{row['ratio']:.2f}"))
    where = report["environment"]
    facts = f"{report['model']}, {report['dtype']}, {where['threads']} thread, {where['processor']}"
    facts += f", torch {where['torch']}, commit {report['commit']} {source(name)}."
    return "\n".join([*lines, "", f"`python -m benchmarks.beside_hf`, {facts}"])


def paper() -> str:
    """Expansion beside its rivals, and what follows."""
    return "\n\n".join(paper_page(*item) for item in results("paper").items())


def paper_page(name, report):
    setting, where, runs = report["setting"], report["environment"], report["runs"]
    facts = f"{setting['model']} learns {setting['domain']}: {setting['tokens']:,} tokens of it in"
    facts += f" every run, {setting['dtype']}. `make paper SCALE={name.split('-')[1]}`,"
    facts += f" {len(runs) + len(report['sft']['runs'])} runs, {where['processor']}, torch"
    facts += f" {where['torch']}, commit {report['commit']} {source(name)}."
    lines = []
    for head, *rows in report["tables"].values():
        lines += [*table(head), *(cells(*row) for row in rows), ""]
    return "\n".join([facts, "", *lines, *(f"- {line}" for line in report["verdict"])])


def gpus() -> str:
    """What several GPUs hold and send, computed."""
    return "\n\n".join(gpus_page(*item) for item in results("gpus").items())


def gpus_page(name, report):
    head = ("model", "placement", "GPUs", "shard", "recompute", "GB a GPU", "GB sent a step")
    lines = table((*head, "on the wire, s", "FLOPs, s", "wire / FLOPs"))
    for row in report["rows"]:
        wire, *one_card = row["seconds"].values()
        about = (row[key] for key in ("model", "placement", "GPUs", "shard"))
        again = ", ".join(f"{count} {kind}" for kind, count in row["recompute"].items())
        held = f"{row['memory'] / 1e9:.1f}" + ("" if row["fits"] else ", does not fit")
        time = row["FLOPs' seconds"]
        slow = f" ({one_card[0]:.2f})" if one_card else ""
        figures = f"{wire:.2f}{slow}", f"{time:.2f}", f"{wire / time:.1%}"
        lines.append(cells(*about, again, held, f"{row['sent'] / 1e9:.1f}", *figures))
    facts = "**Computed, not measured**, by `python -m benchmarks.gpus FILE`"
    return "\n".join([*lines, "", f"{facts} {source(name)}."])


KEPT_BY = {"kl": "KL", "ce": "cross-entropy"}
KEPT_MODELS = {"full": "full fine-tuning"}
KEPT_MODELS |= {where: f"+5 blocks, {where}" for where in ("interleaved", "suffix")}

TABLES = {
    "ops": ops,
    "ops side by side": ops_side_by_side,
    "steps": steps,
    "steps of the README": steps_of_readme,
    "CPU steps": cpu_steps,
    "CPU placements": cpu_placements,
    "CPU attention": cpu_attention,
    "demo": demo,
    "keep": keep,
    "paper": paper,
    "evaluation": evaluation,
    "several GPUs": gpus,
}


if __name__ == "__main__":
    for document in DOCUMENTS:
        text = fill(document.read_text(encoding="utf-8"), document.name)
        document.write_text(text, encoding="utf-8")
        print(document)
