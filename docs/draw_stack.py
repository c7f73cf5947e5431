"""The picture of the README: `python docs/draw_stack.py` writes docs/stack.svg."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle

NEW, FROZEN, BELOW, INK = "#f2a541", "#b9cfe6", "#f3f6f9", "#24313f"
LEGEND = {
    "new, trained": NEW,
    "frozen, input gradients only": FROZEN,
    "frozen, no backward at all": BELOW,
}
BASE_BLOCKS = 8
PLACEMENTS = {"interleaved": (4, 9), "top_half": (6, 9), "suffix": (8, 9), "prefix": (0, 1)}
WIDTH, HEIGHT, STEP = 1.5, 0.36, 0.5
TITLE_Y, LEGEND_Y = -0.32, -1.0


def write(axis, x, y, text, size=8, align="center"):
    axis.text(x, y, text, ha=align, va="center", fontsize=size, color=INK)


def box(axis, x, y, color, text="", width=WIDTH):
    axis.add_patch(Rectangle((x, y), width, HEIGHT, fc=color, ec=INK, lw=0.7))
    write(axis, x + width / 2, y + HEIGHT / 2 - 0.01, text)


def arrow(axis, *points):
    """A line through the points, with a head at the last."""
    axis.plot(*zip(*points, strict=True), color=INK, lw=0.9)
    head = {"arrowstyle": "-|>", "color": INK, "lw": 0.9}
    axis.annotate("", points[-1], points[-2], arrowprops=head)


def stack(axis, x, title, new):
    """Blocks from the bottom up; nothing goes back below the lowest new one."""
    originals = iter(range(BASE_BLOCKS))
    for i in range(BASE_BLOCKS + len(new)):
        if i in new:
            box(axis, x, i * STEP, NEW, "new")
        else:
            trained_below = bool(new) and i > min(new)
            box(axis, x, i * STEP, FROZEN if trained_below else BELOW, f"block {next(originals)}")
    write(axis, x + WIDTH / 2, TITLE_Y, title, 9)


def new_block(axis, x):
    """What is inside a new block: zeros come before both sums, so it changes nothing at first."""
    middle, side = x + WIDTH / 2, x + WIDTH + 0.35
    for parts, y in (
        (("RMSNorm", "attention", "o_proj = 0"), 0),
        (("RMSNorm", "MLP", "down_proj = 0"), 2.4),
    ):
        arrow(axis, (middle, y), (middle, y + 0.3))
        for i, part in enumerate(parts):
            box(axis, x, y + 0.3 + 0.58 * i, NEW, part)
            arrow(axis, (middle, y + 0.66 + 0.58 * i), (middle, y + 0.88 + 0.58 * i))
        arrow(axis, (middle, y + 0.08), (side, y + 0.08), (side, y + 2.2), (middle + 0.14, y + 2.2))
        write(axis, middle, y + 2.17, "+", 13)
    arrow(axis, (middle, 4.72), (middle, 4.95))
    write(axis, middle, TITLE_Y, "inside a new block", 9)


def main():
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "stack"}
    figure, axis = pyplot.subplots(figsize=(9.6, 4.3))
    for i, (name, new) in enumerate({"base": (), **PLACEMENTS}.items()):
        stack(axis, 2 * i, name, new)
    new_block(axis, 10.4)
    for i, (text, color) in enumerate(LEGEND.items()):
        box(axis, 1.2 + 3.6 * i, LEGEND_Y, color, width=HEIGHT)
        write(axis, 1.7 + 3.6 * i, LEGEND_Y + HEIGHT / 2, text, 9, "left")
    axis.set(xlim=(-0.1, 12.4), ylim=(-1.05, 5.05))
    axis.axis("off")
    out = Path(__file__).with_name("stack.svg")
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
