"""The page of the paper's experiments: tables, verdict and pictures, from the results alone."""

import statistics
from pathlib import Path

from llamapro.markdown import table
from llamapro.report_benchmarks import cell, points
from llamapro.storage import write_json, write_text

from recipes.paper_verdict import CERTAIN, chosen, nats, of_row, taught, verdict

# A color and a marker for each way; rows of the same way are told apart by their numbers.
STYLES = {
    "full": ("black", "s"),
    "lora": ("tab:orange", "^"),
    "lora_equal": ("tab:brown", "v"),
    "top_blocks": ("tab:green", "D"),
    "experts": ("tab:olive", "P"),
    "new_blocks": ("tab:blue", "o"),
}


def write(results: dict, out: Path) -> None:
    """Write results.json, with what the page says of them, and the page."""
    out.mkdir(parents=True, exist_ok=True)
    parts = {"rows": _rows, "sft": _after_sft, "accuracies": _accuracies}
    said = {
        "tables": {name: made for name, part in parts.items() if len(made := part(results)) > 1}
    }
    write_json(out / "results.json", {**results, **said, "verdict": verdict(results)})
    write_text(out / "paper.md", page(results))


def draw(results: dict, out: Path) -> None:
    """Draw the pictures that the page shows, which takes longer than a small run."""
    draw_frontier(results, out / "frontier")
    draw_along(results, out / "along")


def page(results: dict) -> str:
    """The whole page as Markdown."""
    setting, where = results["setting"], results["environment"]
    size = setting["batch_size"] * setting["gradient_accumulation_steps"]
    costs_of_all = results["costs"] + results["sft"]["costs"]
    planned = sum(cost["runs"] for cost in costs_of_all)
    done = results["runs"] + results["sft"]["runs"]
    lines = [
        "# Block expansion beside its rivals",
        f"{setting['model']} learns {setting['domain']}: {setting['tokens']:,} tokens of it in"
        f" every run, in steps of {size} x {setting['seq_len']}; what is replayed comes on top.",
        f"{len(done)} of {planned} runs are done. {setting['dtype']},"
        f" {where['processor']}, torch {where['torch']}, commit {results['commit']}.",
        "",
        "## Rows",
        "Each at the best of its sweep, by the held-out domain; means over seeds, ± their standard"
        " error. Seeds change the order of the rows (and the first values of adapters), not the"
        " base nor the data. Learnt and lost are nats per token: the fall of the domain's log"
        " perplexity, and the mean rise of that of the general sets.",
        "",
        *_table(_rows(results)),
        "",
        *_said_after_sft(results),
        *_said_of_accuracies(results),
        "![What is learnt against what is lost](frontier.png)",
        "",
        "![The same over tokens](along.png)",
        "",
        "## What follows",
        f"Differences within {CERTAIN} standard errors are called noise. Of few seeds that is"
        " little: chance alone exceeds it in three of ten comparisons of two seeds, and in one of"
        " nine of five.",
        "",
        *(f"- {line}" for line in verdict(results)),
        "",
        "## Learning rates",
        f"The sweeps, seed {setting['seeds'][0]}, and perplexity of what was taught: the domain, or"
        " answers. A row with replay takes the rate of the row without.",
        "",
        *_sweeps(results),
        "",
        "## Costs, planned beforehand",
        *costs(costs_of_all),
        "",
        "## Not run",
        *(f"- not run: {name}: {reason}" for name, reason in results["not_run"].items()),
    ]
    return "\n".join(lines) + "\n"


def _table(lines: list[list[str]]) -> list[str]:
    return table(lines[0], lines[1:])


def _rows(results: dict) -> list[list[str]]:
    """The head of the table, and its lines."""
    base = results["base"]
    sets = ["domain", *(name for name in base if name != "domain")]
    head = ["row", "rate", "seeds", "trained", *sets, "KL to the base", "learnt", "lost"]
    cells = [["base", "", "", "", *(f"{base[name]:.2f}" for name in sets), "0", "", ""]]
    rows = chosen(results)
    for name in (cost["row"] for cost in results["costs"]):
        runs = rows.get(name)
        if runs is None:
            cells.append([name, "not run yet", *[""] * (len(head) - 2)])
            continue
        kl = statistics.fmean(statistics.fmean(r["kl"].values()) for r in runs.values())
        cells.append(_cells(name, runs, sets, base, f"{kl:.3f}"))
    return [head, *cells]


def _cells(name: str, runs: dict[int, dict], sets: list[str], base: dict, *kl: str) -> list[str]:
    """A row's means over its seeds."""
    all_of, first = list(runs.values()), next(iter(runs.values()))
    means = [statistics.fmean(r["perplexity"][name] for r in all_of) for name in sets]
    said = [name, f"{first['learning_rate']:g}", str(len(all_of)), f"{first['trained']:,}"]
    said += [*(f"{mean:.2f}" for mean in means), *kl]
    return said + [str(of_row(runs, base, measure)) for measure in ("learnt", "lost")]


def _after_sft(results: dict) -> list[list[str]]:
    """The same of what is left once all parameters learn to answer."""
    base = results["base"]
    sets = ["instructions", "domain", *(name for name in base if name != "domain")]
    rows = chosen(results | results["sft"])
    head = ["row", "rate", "seeds", "trained", *sets, "learnt", "lost"]
    return [head, *(_cells(name, runs, sets, base) for name, runs in rows.items())]


def _said_after_sft(results: dict) -> list[str]:
    setting = results["setting"]
    if not results["sft"]["costs"]:
        return []
    return [
        f"Then SFT: all parameters, {setting['sft_tokens']:,} tokens of {setting['instructions']}."
        " Learnt and lost are against the base as above.",
        "",
        *_table(_after_sft(results)),
        "",
    ]


def _accuracies(results: dict) -> list[list[str]]:
    """Shares of right answers with their standard errors, and the mean change."""
    found = results.get("accuracies", [])
    names = dict.fromkeys(name for figures in found for name in figures["benchmarks"])
    lines = [
        [
            figures["model"],
            *(cell(figures["benchmarks"].get(name)) for name in names),
            points(figures.get("mean change")),
        ]
        for figures in found
    ]
    return [["row, first seed", *names, "mean change"], *lines]


def _said_of_accuracies(results: dict) -> list[str]:
    if "accuracies" not in results:
        return []
    questions = results["setting"]["limit"]
    asked = "all questions" if questions is None else f"the first {questions} questions"
    return [
        f"Right answers, ± their standard error over {asked} of each benchmark, and the change"
        " against the base; none, where it lies within the errors:",
        "",
        *_table(_accuracies(results)),
        "",
    ]


def _sweeps(results: dict) -> list[str]:
    seed, base = results["setting"]["seeds"][0], results["base"]
    cells = [
        [r["row"], f"{r['learning_rate']:g}", f"{taught(r):.2f}"]
        + [f"{nats(r, base, measure):.3f}" for measure in ("learnt", "lost")]
        for r in results["runs"] + results["sft"]["runs"]
        if r["seed"] == seed and r["plain"] == r["row"]
    ]
    return table(["row", "learning rate", "perplexity", "learnt", "lost"], cells)


def costs(rows: list[dict]) -> list[str]:
    """What each row costs, as a table, and all of them."""
    cells = [
        [r["row"], f"{r['trained']:,}", str(r["steps"]), f"{r['flops']:.2e}", str(r["runs"])]
        for r in rows
    ]
    total = sum(row["flops"] * row["runs"] for row in rows)
    count = sum(row["runs"] for row in rows)
    head = ["row", "parameters trained", "steps", "FLOPs of a run", "runs"]
    return [*table(head, cells), "", f"{count} runs, {total:.2e} FLOPs in all."]


def _canvas(columns: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (6.5 * columns + 3, 6)
    figure, axes = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes[0]


def _save(pyplot, figure, axis, path: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=110)
    pyplot.close(figure)


def _style(run: dict) -> dict:
    """The color and marker of a row; hollow where the base is replayed."""
    color, marker = STYLES[run["way"]]
    return {"color": color, "marker": marker, "markerfacecolor": "w" if run["replayed"] else color}


def _number(axis, number: int, x: float, y: float) -> None:
    """A row's number beside its last point."""
    axis.annotate(str(number), (x, y), (5, 4), textcoords="offset points", fontsize=8)


def draw_frontier(results: dict, path: Path) -> None:
    """Draw what each row learnt against what it lost at every learning rate, the base at the
    origin; to the right and up is better."""
    pyplot, figure, (axis,) = _canvas(1)
    base, rows = results["base"], chosen(results)
    axis.plot(0, 0, "*", color="k", markersize=12, label="base")
    for number, cost in enumerate(results["costs"], 1):
        mine = [run for run in results["runs"] if run["row"] == cost["row"]]
        if not mine:
            continue
        style = _style(mine[0])
        swept = sorted(mine, key=lambda run: run["learning_rate"])
        swept = [run for run in swept if run["seed"] == results["setting"]["seeds"][0]]
        points = [(nats(r, base, "learnt"), nats(r, base, "lost")) for r in swept]
        faint = {"color": style["color"], "alpha": 0.4, "linewidth": 1, "marker": "."}
        axis.plot(*zip(*points, strict=True), **faint)
        x, y = (of_row(rows[cost["row"]], base, measure) for measure in ("learnt", "lost"))
        how = {"xerr": x.stderr, "yerr": y.stderr, "capsize": 2, "linestyle": "none"}
        axis.errorbar(x.mean, y.mean, **how, **style, label=f"{number}. {cost['row']}")
        _number(axis, number, x.mean, y.mean)
    axis.invert_yaxis()
    axis.set(xlabel="learnt of the domain, nats per token")
    axis.set(ylabel="lost of the general sets, nats per token (upwards is better)")
    axis.set_title("dots: every learning rate of the sweep; bars: standard errors over seeds")
    _save(pyplot, figure, axis, path)


def draw_along(results: dict, path: Path) -> None:
    """Draw what each row learnt and lost along its way, on the first seed."""
    pyplot, figure, axes = _canvas(2)
    base, rows = results["base"], chosen(results)
    for number, cost in enumerate(results["costs"], 1):
        runs = rows.get(cost["row"])
        if not runs:
            continue
        run = next(iter(runs.values()))
        share = results["setting"]["tokens"] / cost["steps"]
        tokens = [record["step"] * share for record in run["along"]]
        style = _style(run)
        for axis, measure in zip(axes, ("learnt", "lost"), strict=True):
            values = [nats(record, base, measure) for record in run["along"]]
            axis.plot(tokens, values, **style, linewidth=1, label=f"{number}. {cost['row']}")
            _number(axis, number, tokens[-1], values[-1])
    axes[1].invert_yaxis()
    for axis, measure in zip(axes, ("learnt", "lost"), strict=True):
        axis.set(xlabel="tokens of the domain", ylabel=f"{measure}, nats per token")
    _save(pyplot, figure, axes[0], path)
