"""What the numbers of the paper's experiments say, computed from them.

A row learns as many nats per token as the logarithm of the domain's perplexity falls, and loses as
many as that of the general sets rises, on average. Two rows are compared seed by seed: they saw the
same tokens in the same order.
"""

import itertools
import math
import statistics
from dataclasses import dataclass

from llamapro.train.config import parse_share

CERTAIN = 2  # standard errors, below which a difference is noise
MEASURES = {"learnt": "learns", "lost": "loses"}
AFTER_SFT = {"answered": "learns to answer", **MEASURES}


@dataclass(frozen=True)
class Measured:
    """A mean over seeds and its standard error, which one seed does not have."""

    mean: float
    stderr: float | None

    @classmethod
    def of(cls, values: list[float]) -> "Measured":
        count = len(values)
        error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
        return cls(statistics.fmean(values), error)

    @property
    def sign(self) -> int:
        """1 or -1 for what is surely above or below 0, 0 within noise."""
        if self.stderr is None or abs(self.mean) <= CERTAIN * self.stderr:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.stderr is None else f" ± {self.stderr:.3f}")


def best_rate(runs: list[dict], row: str, seed: int) -> float:
    """The learning rate of a row's sweep with the lowest perplexity of what is taught."""
    swept = [run for run in runs if run["row"] == row and run["seed"] == seed]
    return min(swept, key=taught)["learning_rate"]


def taught(run: dict) -> float:
    """Perplexity of what a run was taught: the domain, or answers to instructions."""
    return run["perplexity"]["instructions" if run["sft"] else "domain"]


def chosen(results: dict) -> dict[str, dict[int, dict]]:
    """The runs of each row at its best rate, by seed; rows that are not run yet have none."""
    runs, seed, found = results["runs"], results["setting"]["seeds"][0], {}
    for cost in results["costs"]:
        mine = [run for run in runs if run["row"] == cost["row"]]
        if not mine:
            continue
        rate = best_rate(runs, mine[0]["plain"], seed)
        found[cost["row"]] = {r["seed"]: r for r in mine if r["learning_rate"] == rate}
    return found


def nats(run: dict, base: dict, measure: str) -> float:
    """What a run has learnt, or lost; how well it answers, which has no zero."""
    if measure == "answered":
        return -math.log(taught(run))
    changes = {name: math.log(run["perplexity"][name] / value) for name, value in base.items()}
    gain = -changes.pop("domain")
    return gain if measure == "learnt" else statistics.fmean(changes.values())


def of_row(runs: dict[int, dict], base: dict, measure: str) -> Measured:
    """A row's mean over its seeds."""
    return Measured.of([nats(run, base, measure) for run in runs.values()])


def difference(a: dict[int, dict], b: dict[int, dict], base: dict, measure: str) -> Measured:
    """How much more a row learns, or loses, than another on the same seeds."""
    seeds = sorted(a.keys() & b.keys())
    return Measured.of([nats(a[s], base, measure) - nats(b[s], base, measure) for s in seeds])


def verdict(results: dict) -> list[str]:
    """Sentences, each of which follows from the numbers."""
    rows, base = chosen(results), results["base"]
    seeds = len(results["setting"]["seeds"])
    if seeds < 2:
        return ["There is one seed, so no standard error: no difference is told from noise."]
    if not _complete(results, rows):
        return ["Not all runs are there yet."]
    lines = [_first(rows, base, "learnt"), _first(rows, base, "lost"), _frontier(rows, base)]
    names = {(r["way"], r["placement"], r["blocks"]): n for n, r in _plain(rows).items()}
    blocks = results["setting"]["blocks"]
    ours = names["new_blocks", "interleaved", blocks]
    others = [name for name in _plain(rows) if name != ours]
    lines.append(_at_equal_gain(results, ours))
    lines += [_against(rows, base, ours, other) for other in others]
    for name, runs in rows.items():
        run = next(iter(runs.values()))
        if run["replayed"]:
            lines.append(_against(rows, base, name, run["plain"]))
        if run["within"]:
            lines.append(_limit(name, runs, base, run["within"]))
    return lines + _at_the_edge(rows, results["setting"]["rates"]) + _after_sft(results)


def _after_sft(results: dict) -> list[str]:
    """Each row that was taught the domain beside the base, and beside each other."""
    sft = results | results["sft"]
    rows = chosen(sft)
    if not _complete(sft, rows):
        return ["Not all runs of SFT are there yet."]
    pairs = [(a, b) for b, a in itertools.combinations(rows, 2)]
    return [_against(rows, results["base"], a, b, AFTER_SFT) for a, b in pairs]


def _complete(results: dict, rows: dict) -> bool:
    """Whether each row has all of its seeds."""
    seeds = len(results["setting"]["seeds"])
    return len(rows) == len(results["costs"]) and all(len(r) == seeds for r in rows.values())


def _plain(rows: dict) -> dict[str, dict]:
    """A run of each row without replay."""
    firsts = {name: next(iter(runs.values())) for name, runs in rows.items()}
    return {name: run for name, run in firsts.items() if run["plain"] == name}


def _first(rows: dict, base: dict, measure: str) -> str:
    """Which row is ahead, and which ones are so within noise."""
    means = {name: of_row(runs, base, measure) for name, runs in rows.items()}
    best = (max if measure == "learnt" else min)(means, key=lambda name: means[name].mean)
    near = [n for n in rows if n != best and not _difference(rows, base, n, best, measure).sign]
    said = "Most is learnt" if measure == "learnt" else "Least is lost"
    line = f"{said} by {best}: {means[best]} nats per token; within noise of it: "
    return line + ("; ".join(near) or "none") + "."


def _frontier(rows: dict, base: dict) -> str:
    """The rows which none other beats in one without being beaten in the other, noise apart."""

    def beats(a: str, b: str) -> bool:
        more = _difference(rows, base, a, b, "learnt").sign
        less = -_difference(rows, base, a, b, "lost").sign
        return min(more, less) >= 0 and max(more, less) > 0

    best = [name for name in rows if not any(beats(other, name) for other in rows)]
    return f"On the frontier, beaten by no other row: {'; '.join(best)}."


def _at_equal_gain(results: dict, ours: str) -> str:
    """What each row loses where it learns as much as ours at its best: between two learning rates
    of its sweep, on a straight line. With replay there is one rate: it counts where more is
    learnt."""
    seed, base = results["setting"]["seeds"][0], results["base"]
    wanted = nats(chosen(results)[ours][seed], base, "learnt")
    losses, missed = {}, []
    for name in (cost["row"] for cost in results["costs"]):
        mine = [r for r in results["runs"] if r["row"] == name and r["seed"] == seed]
        mine.sort(key=lambda run: run["learning_rate"])
        points = [(nats(r, base, "learnt"), nats(r, base, "lost")) for r in mine]
        found = lost_at(points, wanted)
        if found is None and len(points) == 1 and points[0][0] >= wanted:
            found = points[0][1]
        if found is None:
            missed.append(name)
        else:
            losses[name] = found
    ranked = "; ".join(f"{n} {losses[n]:.3f}" for n in sorted(losses, key=losses.__getitem__))
    line = (
        f"Where {wanted:.3f} nats are learnt, as by {ours}, these lose, with seed {seed}: {ranked}"
    )
    return f"{line}; never so much is learnt by: {'; '.join(missed) or 'none'}."


def lost_at(points: list[tuple[float, float]], wanted: float) -> float | None:
    """The least that is lost where so much is learnt, on the line through the points (learnt,
    lost); None where it does not come by."""
    found = []
    for (a, lost_a), (b, lost_b) in itertools.pairwise(points):
        if min(a, b) <= wanted <= max(a, b):
            share = (wanted - a) / (b - a) if b != a else 0.0
            found.append(lost_a + share * (lost_b - lost_a))
    return min(found, default=None)


def _difference(rows: dict, base: dict, a: str, b: str, measure: str) -> Measured:
    return difference(rows[a], rows[b], base, measure)


def _against(rows: dict, base: dict, a: str, b: str, measures: dict = MEASURES) -> str:
    """A row beside another."""
    said = []
    for measure, verb in measures.items():
        by = _difference(rows, base, a, b, measure)
        how = {1: "more", -1: "less", 0: "as much within noise"}[by.sign]
        amount = f"{abs(by.mean):.3f} ± {by.stderr:.3f}"
        said.append(f"{verb} {how} ({amount})" if not by.sign else f"{verb} {amount} {how}")
    return f"{a} against {b}: {', '.join(said)}."


def _at_the_edge(rows: dict, rates: dict) -> list[str]:
    """The rows of which no lower, or no higher, learning rate than the best one was tried."""
    found = [
        f"{name} ({run['learning_rate']:g})"
        for name, run in _plain(rows).items()
        if run["learning_rate"] in (min(rates[run["way"]]), max(rates[run["way"]]))
    ]
    if not found:
        return []
    return [f"A better learning rate may lie beyond the sweep of {'; '.join(found)}."]


def _limit(name: str, runs: dict[int, dict], base: dict, within: str) -> str:
    """How often a limit was held."""
    limit, sets = parse_share(within), base.keys() - {"domain"}
    lost = [max(run["perplexity"][n] / base[n] - 1 for n in sets) for run in runs.values()]
    held = sum(value <= limit for value in lost)
    return (
        f"{name}: the limit was held in {held} of {len(lost)} runs; most was lost {max(lost):.2%}."
    )
