"""Whether a solution of a MINT task is right.

Tolerances are the original's: 5% for gsm8k and math, 4% for floats of theoremqa, integers after
rounding, lists in any order. Simpler than its graders: a number is read without algebra (after the
last "=", a fraction, a power of ten, one number among words), where the original evaluates what
is written. Stricter: a text must be the reference, after SQuAD's normalization, where the original
is content with one that contains it; and a choice must be named first or quoted, where the original
finds its letter anywhere.
"""

import re
import string
from collections.abc import Callable

TOLERANCE, THEOREM_TOLERANCE = 0.05, 0.04  # of the reference
TIMEOUT = 10.0  # seconds for a program and its tests
NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?")
EXPONENT = r"10\s*(?:\^|\*\*)\s*[{(]?([-+]?\d+)[})]?"
POWER = re.compile(r"\s*(?:x|\*|\N{MULTIPLICATION SIGN}|\\times|\\cdot)\s*" + EXPONENT)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
FRACTION = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")
FENCE = re.compile(r"\A\s*```(?:python|py)?\n(.*?)```\s*\Z", re.DOTALL)
LEADING = re.compile(r"(?:the )?(?:correct |final )?(?:answer|option|choice)(?: is)?:? ")
LETTER = re.compile(r"\(?([a-z])\s*(?:[).:].*)?", re.DOTALL)
OPTION = re.compile(r"(?:\A|,)\s*([A-Z]) \)\s*")
BOOLS = {"true": True, "yes": True, "false": False, "no": False}
# Given a solution, the task's row and what runs a program.
Grader = Callable[[str, dict, Callable], bool]


def is_number(solution: str, row: dict, _) -> bool:
    return _near(number(solution), number(str(row["reference"])), TOLERANCE)


def is_choice(solution: str, row: dict, _) -> bool:
    """By its letter, or by the words of one option alone."""
    reference = str(row["reference"]).lower()
    if letter := LETTER.fullmatch(_bare(solution)):
        return letter[1] == reference
    options = OPTION.split(row["prompt"].split("Options:")[-1])
    named = zip(options[1::2], options[2::2], strict=True)
    quoted = [letter.lower() for letter, text in named if _bare(text) == _bare(solution)]
    return quoted == [reference]


def is_text(solution: str, row: dict, _) -> bool:
    """By exact match, normalized as SQuAD does it."""
    return bool(_words(row["reference"])) and _words(solution) == _words(row["reference"])


def is_theorem(solution: str, row: dict, run) -> bool:
    """By the type of the answer."""
    reference, kind = row["reference"], str(row.get("answer_type"))
    if kind == "bool":
        first = re.match(r"\w*", _bare(solution))[0]
        return isinstance(reference, bool) and BOOLS.get(first) is reference
    if kind == "option":
        return is_choice(solution, row, run)
    if kind.startswith("list of "):
        inside = re.search(r"[\[({](.*)[\])}]", solution, re.DOTALL)
        found = [number(part) for part in (inside[1] if inside else solution).split(",")]
        return isinstance(reference, list) and _same(found, reference)
    return _same([number(solution)], [reference])


def passes_tests(solution: str, row: dict, run) -> bool:
    """A program with the reference's asserts."""
    return run(f"{unfenced(solution)}\n\n{row['reference']}\n", timeout=TIMEOUT).passed


def unfenced(program: str) -> str:
    """A program without the fence of Markdown that may stand around it."""
    fenced = FENCE.match(program)
    return fenced[1] if fenced else program


def number(text: str) -> float | None:
    """The number that a text is or, among words, the one that it holds."""
    text = text.lower().replace("\N{MINUS SIGN}", "-").split("=")[-1]
    text = re.sub(EXPONENT, r"1e\1", POWER.sub(r"e\1", LATEX_FRACTION.sub(r"\1/\2", text)))
    if fraction := FRACTION.search(text):
        over, under = (float(part.replace(",", "")) for part in fraction.groups())
        text = text.replace(fraction[0], repr(over / under)) if under else ""
    found = NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def _same(found: list, reference: list) -> bool:
    """Whether these are the reference's numbers, in any order."""
    if len(found) != len(reference) or None in found:
        return False
    if not all(isinstance(one, int | float) for one in reference):
        return False
    pairs = zip(sorted(found), sorted(reference), strict=True)
    return all(
        _near(value, right, THEOREM_TOLERANCE)
        if isinstance(right, float)
        else abs(value - right) < 0.5
        for value, right in pairs
    )


def _near(value: float | None, reference: float | None, tolerance: float) -> bool:
    if value is None or reference is None:
        return False
    return abs(value - reference) <= tolerance * abs(reference)


def _bare(text: str) -> str:
    """A text in lower case, without what often stands around an answer."""
    text = " ".join(text.lower().split()).strip("$`'\" .")
    return LEADING.sub("", text, count=1)


def _words(text) -> list[str]:
    kept = "".join(letter for letter in str(text).lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]
