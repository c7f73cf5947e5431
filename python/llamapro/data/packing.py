"""Rows of whole documents that do not see each other, filled best-fit.

A document of n tokens has n - 1 of them to learn from, each with the token that follows: nothing is
predicted across an end. What is longer than a row is cut: text into pieces, none of which is lost,
and a conversation after the last answer that fits whole. Pieces are put, longest first, where the
least room is left ("bfd", best-fit decreasing: Ding et al., arXiv 2404.10830).
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from llamapro.data.tokens import IGNORED, Batch, DataError, TokenDataset, Tokens, load_tokens

PACKINGS = ("bfd", "wrapped")
log = logging.getLogger("llamapro")


def open_rows(data, part: str, vocab_size: int, seq_len: int, packing: str, seed: int = 0):
    """The rows of one part of a data directory. Raises DataError, as `load_tokens` and both kinds
    of rows do."""
    kind = PackedDataset if packing == "bfd" else TokenDataset
    return kind(load_tokens(data, part, vocab_size), seq_len, seed)


@dataclass(frozen=True)
class PackedDataset(TokenDataset):
    """Rows of at most `seq_len` tokens of whole documents, or pieces of longer ones.

    The rows are the same in each epoch, and their order is that of `TokenDataset`. Raises DataError
    when no document has two tokens, or no conversation an answer that fits a row.
    """

    def __len__(self) -> int:
        return len(self._packed[2]) - 1

    def _too_short(self) -> str:
        return f"{self.tokens.name}: a document of two tokens, or an answer, expected, got none"

    @property
    def spread(self) -> tuple[tuple[int, float], ...]:
        """As of `TokenDataset`, of the documents as they are packed."""
        lengths, counts = np.unique(self._packed[1], return_counts=True)
        return tuple(zip(lengths.tolist(), (counts / len(self)).tolist(), strict=True))

    @cached_property
    def _packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where pieces start, and their lengths, row by row; where rows start among them."""
        cut = _answers if self.tokens.counted is not None else _pieces
        starts, lengths = cut(self.tokens, self.seq_len)
        order, rows = best_fit(lengths, self.seq_len)
        return starts[order], lengths[order], rows

    def row(self, place: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens and targets, at most seq_len, and the lengths of the documents in them."""
        starts, lengths, rows = self._packed
        here = range(rows[place], rows[place + 1])
        pieces = [self._piece(int(starts[i]), int(lengths[i])) for i in here]
        tokens, targets = (np.concatenate(part) for part in zip(*pieces, strict=True))
        return tokens, targets, [len(ids) for ids, _ in pieces]

    def collate(self, rows: list, kept: int = 0) -> Batch:
        """(1, B * seq_len): the rows one after the other, and the rest as a last document; the last
        `kept` rows are the base's."""
        tokens, targets, lengths = zip(*rows, strict=True)
        before = sum(len(row) for row in lengths[: len(rows) - kept])
        lengths = [length for row in lengths for length in row]
        rest = len(rows) * self.seq_len - sum(lengths)
        tokens = np.concatenate([*tokens, np.zeros(rest, np.int64)])
        targets = np.concatenate([*targets, np.full(rest, IGNORED)])
        ends = np.cumsum([0, *lengths, *[rest] * (rest > 0)]).astype(np.int32)
        flat = torch.from_numpy(tokens)[None], torch.from_numpy(targets)[None]
        ends, last = torch.from_numpy(ends), None
        if kept:
            begun = ends[before]
            last = Batch(*(part[:, begun:] for part in flat), ends[before:] - begun)
        return Batch(*flat, ends, len(lengths), rest, last)


def _documents(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Where documents start, and how many of their tokens have a next one."""
    ends = np.asarray(tokens.ends).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    if (ends <= starts).any():
        raise DataError(f"{tokens.name}.index: documents of a token or more expected, got none")
    return starts, ends - starts - 1


def _pieces(tokens: Tokens, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of pieces; each goes on where the one before it ended."""
    starts, lengths = _documents(tokens)
    counts = -(-lengths // seq_len)
    of = np.repeat(np.arange(len(counts)), counts)
    before = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    begun = before * seq_len
    return starts[of] + begun, np.minimum(lengths[of] - begun, seq_len)


def _answers(tokens: Tokens, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of conversations, the long ones cut after the last answer that fits."""
    starts, lengths = _documents(tokens)
    for i in np.flatnonzero(lengths > seq_len):
        # One more than fits: an answer ends where the next target does not count.
        counted = tokens.counted[starts[i] + 1 : starts[i] + seq_len + 2]
        ends = np.flatnonzero(counted[:-1] & ~counted[1:])
        lengths[i] = ends[-1] + 1 if len(ends) else 0
    whole = np.asarray(tokens.ends).astype(np.int64) - starts - 1
    dropped, cut = int((lengths == 0).sum()), int(((lengths < whole) & (lengths > 0)).sum())
    if dropped or cut:
        log.warning(
            "%s: of %d conversations %d are cut after the last answer that ends within %d tokens,"
            " %d without one are left out",
            tokens.name,
            len(lengths),
            cut,
            seq_len,
            dropped,
        )
    return starts[lengths > 0], lengths[lengths > 0]


def best_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Put pieces of `lengths`, each 0 < length <= room, into rows: the order of the pieces, row by
    row, and where rows start in it, with the number of pieces at the end.

    The longest first, each where the least room is left that suffices, or into a new row. Pieces of
    one length and rows with the same room left are dealt with together, so that it takes a few
    array operations for each pair of them.
    """
    row_of = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[np.ndarray]] = {}  # rows that are not full
    rooms = rows = 0  # bit r of rooms: there are rows with room r
    order = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[order], prepend=room + 1, append=0))
    for begin, end in pairwise(edges):
        length, pieces = int(lengths[order[begin]]), order[begin:end]
        while len(pieces):
            fitting = rooms >> length
            left = length + (fitting & -fitting).bit_length() - 1 if fitting else room
            each = left // length
            if fitting:
                free = np.concatenate(by_room.pop(left))
                rooms ^= 1 << left
            else:
                free = np.arange(rows, rows - (-len(pieces) // each))
                rows = free[-1] + 1
            placed, pieces = pieces[: len(free) * each], pieces[len(free) * each :]
            row_of[placed] = np.repeat(free, each)[: len(placed)]
            full, some = divmod(len(placed), each)
            filled = left - each * length, free[:full]
            begun = left - some * length, free[full : full + 1]
            for rest, at in (filled, begun, (left, free[full + 1 :])):
                if rest and len(at):
                    by_room.setdefault(rest, []).append(at)
                    rooms |= 1 << rest
    order = np.argsort(row_of, kind="stable")
    return order, np.searchsorted(row_of[order], np.arange(rows + 1))
