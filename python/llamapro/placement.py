"""Which block goes where in an expanded stack."""

import itertools
import logging
import operator
from dataclasses import dataclass

log = logging.getLogger("llamapro")

PLACEMENTS = ("interleaved", "top_half", "prefix", "suffix")


@dataclass(frozen=True)
class Slot:
    """A place in the expanded stack: the base block it holds, or a new copy of it."""

    source: int
    new: bool


def place_blocks(
    blocks: int, new_blocks: int | None, placement="interleaved", per_group: int = 1
) -> list[Slot]:
    """The expanded stack, bottom to top, of a base with `blocks` blocks.

    placement: "interleaved" cuts the base into new_blocks / per_group groups, as even as can be,
    and stacks copies of the top `per_group` blocks of each on it; "top_half" does so in the upper
    half alone, or in as many blocks as there are groups; "prefix" and "suffix" put
    copies of the lowest or highest `new_blocks` blocks below or above all; a list of positions in
    the expanded stack puts a copy of the nearest base block below at each.
    Raises ValueError for counts and positions that do not fit.
    """
    if placement not in ("interleaved", "top_half") and per_group != 1:
        raise ValueError(f"per_group is for interleaved blocks, got {per_group} for {placement!r}")
    if not isinstance(placement, str):
        return _place_at(blocks, new_blocks, placement)
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {PLACEMENTS} or positions, got {placement!r}")
    if not new_blocks or new_blocks < 1 or new_blocks > blocks:
        raise ValueError(
            f"new_blocks must be between 1 and the {blocks} blocks of the base, got {new_blocks}"
        )
    base = [Slot(i, False) for i in range(blocks)]
    if placement == "interleaved":
        return _interleave(base, new_blocks, per_group)
    if placement == "top_half":
        below = blocks - max(blocks // 2, new_blocks)
        return base[:below] + _interleave(base[below:], new_blocks, per_group)
    if placement == "prefix":
        return [Slot(i, True) for i in range(new_blocks)] + base
    return base + [Slot(i, True) for i in range(blocks - new_blocks, blocks)]


def _interleave(base: list[Slot], new_blocks: int, per_group: int) -> list[Slot]:
    groups, rest = divmod(new_blocks, per_group) if per_group > 0 else (0, 0)
    if not groups or rest or len(base) // groups < per_group:
        raise ValueError(
            f"per_group must divide new_blocks = {new_blocks} and not exceed the blocks of a group,"
            f" got {per_group}"
        )
    first = base[0].source
    cuts = [len(base) * g // groups for g in range(groups + 1)]
    sizes = sorted({end - start for start, end in itertools.pairwise(cuts)})
    if len(sizes) > 1:
        log.warning(
            "%d blocks do not divide into %d groups: groups have %s blocks",
            len(base),
            groups,
            " or ".join(map(str, sizes)),
        )
    slots = []
    for start, end in itertools.pairwise(cuts):
        copies = range(first + end - per_group, first + end)
        slots += base[start:end] + [Slot(i, True) for i in copies]
    return slots


def _place_at(blocks: int, new_blocks: int | None, placement) -> list[Slot]:
    try:
        positions = [operator.index(position) for position in placement]
    except TypeError:
        raise ValueError(f"placement must be a name or whole numbers, got {placement!r}") from None
    total = blocks + len(positions)
    wrong = [p for p in positions if not 0 <= p < total]
    if not positions or wrong or len(set(positions)) < len(positions):
        raise ValueError(
            f"positions must be distinct and within 0..{total - 1} of the expanded stack,"
            f" got {positions}"
        )
    if new_blocks is not None and new_blocks != len(positions):
        raise ValueError(f"{len(positions)} positions given for new_blocks = {new_blocks}")
    slots, below = [], 0
    for position in range(total):
        if position in positions:
            slots.append(Slot(max(below - 1, 0), True))
        else:
            slots.append(Slot(below, False))
            below += 1
    return slots
