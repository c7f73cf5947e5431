"""Several corpora, drawn by weight."""

import math
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from llamapro.data.tokens import IGNORED, Batch, DataError, TokenDataset


def corpora(data) -> dict[str, tuple[str, float]]:
    """Directory and weight of each corpus in `data`, a DIR or a list of DIR[=WEIGHT], by the name
    of its directory. Raises DataError for what is no weight, and for a name that is there twice.
    """
    found = {}
    for text in [data] if isinstance(data, str) else data:
        path, weight = _weighted(text)
        name = Path(path).name
        if name in found:
            raise DataError(f"corpora of different names expected, got {name!r} twice")
        found[name] = path, weight
    if not found:
        raise DataError("a data directory expected, got none")
    return found


def _weighted(text: str) -> tuple[str, float]:
    """A directory's own name may hold an equals sign."""
    path, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        weight = float(weight)
    except ValueError:
        raise DataError(f"DIR or DIR=WEIGHT with a number expected, got {text!r}") from None
    if not 0 < weight < float("inf"):
        raise DataError(f"a weight above 0 and finite expected, got {text!r}")
    return path, weight


def absolute(data) -> list[str]:
    """The same corpora by the whole paths of directories that are there."""
    found = corpora(data).values()
    whole = [str(Path(path).resolve()) if os.path.exists(path) else path for path, _ in found]
    weights = [weight for _, weight in found]
    return [
        path if weight == 1 else f"{path}={weight}"
        for path, weight in zip(whole, weights, strict=True)
    ]


@dataclass
class Mixture:
    """Rows of several corpora, each in its own epoch order, as many of each as its weight says.

    After any number of rows, each corpus has given its share of them to within one row (Tijdeman,
    "The chairman assignment problem", 1980). `taken` holds how many rows each has given: this is
    the place in the data, and going on after a stop needs no other state. The corpora `kept` are
    those from which nothing shall be learnt: what the base says of them is to stay.
    """

    names: list[str]
    rows: list[TokenDataset]
    weights: list[float]
    taken: list[int] = field(default_factory=list)
    kept: frozenset[str] = frozenset()

    def __post_init__(self):
        self.taken = self.taken or [0] * len(self.rows)
        exact = [Fraction(str(weight)) for weight in self.weights]
        common = math.lcm(*(weight.denominator for weight in exact))
        self._parts = [int(weight * common) for weight in exact]

    @property
    def epochs(self) -> dict[str, float]:
        """How often each corpus was gone through."""
        taken = zip(self.names, self.taken, self.rows, strict=True)
        return {name: count / len(rows) for name, count, rows in taken}

    def described(self, count: int) -> list[str]:
        """What `count` rows will take of each corpus, a line each."""
        total, lines = sum(self.weights), []
        for name, weight, rows in zip(self.names, self.weights, self.rows, strict=True):
            epochs, tokens = weight / total * count / len(rows), len(rows.tokens.ids)
            share = f"{weight:.3g} of {total:.3g}"
            lines.append(f"{name} {share}: {epochs:.2g} epochs of {tokens:,} tokens")
        return lines

    @property
    def spread(self) -> tuple[tuple[int, float], ...]:
        """The lengths of packed documents, and how many of each a row holds on average."""
        total = sum(self.weights)
        shares = zip(self.rows, self.weights, strict=True)
        return tuple((n, count * w / total) for rows, w in shares for n, count in rows.spread)

    def batch(self, start: int, count: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """The rows that are drawn after `start` others; those of the corpora `kept` come last, and
        stand alone as the batch's `kept`, too.

        part: (rank, ranks) of which this is one, whose rows alone are wanted; the others have the
        rest of them. Where some have rows that are kept, this one has one, too, though it may not
        count, so that all of them ask the base; that one is padding.
        """
        if sum(self.taken) > start:
            self.taken = [0] * len(self.rows)
        while sum(self.taken) < start:
            self.taken[self._next()] += 1
        drawn = []
        for _ in range(count):
            corpus = self._next()
            rows = self.rows[corpus]
            row = rows.row(rows.drawn(self.taken[corpus]))
            drawn.append((self.names[corpus] in self.kept, row))
            self.taken[corpus] += 1
        drawn.sort(key=lambda pair: pair[0])
        mine = drawn[part[0] :: part[1]]
        kept = sum(is_kept for is_kept, _ in mine)
        if not drawn[-1][0] or kept:
            return self.rows[0].collate([row for _, row in mine], kept)
        tokens, targets, lengths = mine[-1][1]
        none = tokens, np.full_like(targets, IGNORED), lengths
        batch = self.rows[0].collate([*(row for _, row in mine), none], 1)
        documents = batch.documents and batch.documents - len(lengths)
        return batch._replace(documents=documents, padding=batch.padding + len(tokens))

    def _next(self) -> int:
        """The corpus that is due first, of those that may give the next row by then; in whole
        numbers, so that no rounding decides."""
        parts, total, spans = self._parts, sum(self._parts), 2 * len(self.rows) - 2
        if not spans:
            return 0
        number = sum(self.taken) + 1
        behind = [part * number - n * total for part, n in zip(parts, self.taken, strict=True)]
        return min(
            (i for i, rows in enumerate(behind) if spans * rows >= total),
            key=lambda i: Fraction((spans - 1) * total - spans * behind[i], parts[i]),
        )
