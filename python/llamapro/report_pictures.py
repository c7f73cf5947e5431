"""The pictures of a report: how training went, what it led to, and what was gained for what."""

from pathlib import Path

from llamapro.report_benchmarks import CERTAIN


def draw(rows: list[dict], path: Path) -> None:
    """Draw the losses of the runs, and the perplexities of all models."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    _draw_losses(left, rows[1:])
    _draw_perplexities(right, rows)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _percent():
    """With as many digits as tell the ticks apart."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1)


def _draw_losses(axis, runs: list[dict]) -> None:
    for run in runs:
        taken = [m for m in run["metrics"] if "loss" in m]
        steps, losses = [m["step"] for m in taken], [m["loss"] for m in taken]
        (line,) = axis.plot(steps, losses, alpha=0.3, linewidth=1)
        last = (losses[max(0, i - 9) : i + 1] for i in range(len(losses)))
        smooth = [sum(few) / len(few) for few in last]
        marker = "." if len(steps) < 10 else None
        axis.plot(steps, smooth, color=line.get_color(), marker=marker)
    axis.set(xlabel="step", ylabel="loss, nats per token", title="training loss (mean of 10 steps)")
    axis.set_xlim(left=0)
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_perplexities(axis, rows: list[dict]) -> None:
    sets = list(rows[0]["perplexity"])
    width = 0.8 / len(rows)
    upright = len(rows) * len(sets) > 8  # side by side the numbers would not have room
    for i, row in enumerate(rows):
        values = [row["perplexity"][name]["perplexity"] for name in sets]
        places = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(sets))]
        color = "0.6" if i == 0 else f"C{i - 1}"
        bars = axis.bar(places, values, width * 0.94, color=color, label=row["name"])
        axis.bar_label(bars, fmt="%.2f", fontsize=8, rotation=90 if upright else 0, padding=2)
    axis.margins(y=0.25 if upright else 0.05)
    slant = 20 if sum(map(len, sets)) > 40 else 0
    axis.set_xticks(range(len(sets)), sets, rotation=slant, ha="right" if slant else "center")
    axis.set(ylabel="perplexity", title="held-out perplexity, lower is better")


def _draw_lost(axis, figures: list[dict], limit: float) -> None:
    for i, row in enumerate(figures):
        axis.plot(row["learnt"], row["lost"], "o", color=f"C{i}", label=row["model"])
    line = {"color": "0.6", "linestyle": "--", "linewidth": 1}
    axis.axhline(limit, **line, label=f"kept: at most {limit:.0%} lost")
    axis.invert_yaxis()
    axis.yaxis.set_major_formatter(_percent())
    axis.set(ylabel="lost of what the base knew", title="domain gain against general loss")


def _draw_changes(axis, figures: list[dict]) -> None:
    for i, row in enumerate(figures):
        change = row["mean change"]
        if change:
            bar = None if change["stderr"] is None else 100 * CERTAIN * change["stderr"]
            place = row["learnt"], 100 * change["value"]
            axis.errorbar(*place, bar, fmt="o", color=f"C{i}", capsize=3, label=row["model"])
    axis.axhline(0, color="0.6", linestyle=":", linewidth=1)
    title = f"benchmarks (bars: {CERTAIN} standard errors)"
    axis.set(ylabel="mean change of accuracy, points", title=title)


def draw_frontier(figures: list[dict], path: Path, limit: float) -> bool:
    """Draw what each run learnt against what it lost, and against its mean change of benchmarks;
    upwards and to the right is better. False, and no picture, where neither is known.

    limit: up to what loss a run counts as one that kept its base.
    """
    panels = []
    if any(row.get("lost") is not None for row in figures):
        panels.append(lambda axis: _draw_lost(axis, figures[1:], limit))
    if any(row.get("mean change") for row in figures):
        panels.append(lambda axis: _draw_changes(axis, figures[1:]))
    if not panels:
        return False
    pyplot = _pyplot()
    size = (5.5 * len(panels), 4.8)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, layout="constrained", squeeze=False
    )
    for axis, fill in zip(axes[0], panels, strict=True):
        axis.plot(0, 0, "o", color="0.6", label="base")
        fill(axis)
        axis.xaxis.set_major_formatter(_percent())
        axis.margins(0.15)
        axis.set(xlabel="learnt: fall of perplexity on the domain")
        axis.spines[["top", "right"]].set_visible(False)
    labelled = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes[0]]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(panels))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
