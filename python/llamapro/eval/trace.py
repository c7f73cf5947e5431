"""TRACE (Wang et al., 2023): eight tasks that a model learns one after the other.

Files, prompts, the order of the tasks and what counts in each are TRACE's; scores lie in 0..1.
What differs: answers are greedy, where it samples at temperature 0.1. Simpler than its graders: of
ScienceQA the letter alone is graded, and no reasons are generated; that letter is the answer's
first, also of C-STANCE and FOMC, where the original wants the answer to be nothing else; a number
of NumGLUE may be written in another way (6, 6.0), as may a text (upper case, a full stop);
ROUGE-L takes a text as one sequence. SARI is that of its paper; the script of the hub, which TRACE
calls, takes F for each n, and counts: on 20Minuten it is one to two points of 100 lower.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llamapro.data.sources import rows_of
from llamapro.eval.records import check_limit, mean, standard_error
from llamapro.storage import shown

CHINESE = "\u3400-\u9fff"
WORD = re.compile(rf"[{CHINESE}]|[^\W{CHINESE}]+|[^\w\s]")
LETTER = re.compile(r"[A-Za-z]")
LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
ORDERS = range(1, 5)  # of SARI's n-grams


class Row(NamedTuple):
    """What is asked, and what is to be said."""

    prompt: str
    answer: str


# Given what a model said, and the row: a score in 0..1.
Grader = Callable[[str, Row], float]


@dataclass(frozen=True)
class Task:
    """What grades an answer, and how long it may be."""

    grade: Grader
    max_new_tokens: int
    stop: tuple[str, ...] = ()


def first_letter(said: str, row: Row) -> float:
    """Whether the first letter is that of the answer."""
    letters = [LETTER.search(text) for text in (said, row.answer)]
    return float(None not in letters and letters[0][0] == letters[1][0])


def value(said: str, row: Row) -> float:
    """Whether this is the answer, as a number or as a text."""
    return float(_value(said) == _value(row.answer))


def _value(text: str) -> float | str:
    text = text.strip().rstrip(".").casefold()
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def rouge_l(said: str, row: Row) -> float:
    """ROUGE-L's F1 of the words: `similarity`."""
    return similarity(words(said), words(row.answer))


def edit_similarity(said: str, row: Row) -> float:
    """The ratio of fuzzywuzzy, not rounded, of code with its literals put back: `similarity`."""
    return similarity(_code(said), _code(row.answer))


def _code(text: str) -> str:
    for name, literal in {"<NUM_LIT>": "0", "<STR_LIT>": "", "<CHAR_LIT>": ""}.items():
        text = text.replace(name, literal)
    return LITERAL.sub(r"\1", text).strip()


def similarity(a: Sequence, b: Sequence) -> float:
    """2 LCS / (|a| + |b|), of the longest common subsequence; of two that are empty, 0.

    That is ROUGE-L's F1 of words, and of characters the Levenshtein ratio, 1 - D / (|a| + |b|),
    where D counts insertions and deletions.
    """
    return 2 * _longest_common(a, b) / (len(a) + len(b)) if a and b else 0.0


def _longest_common(a: Sequence, b: Sequence) -> int:
    """The length of the longest common subsequence, by a bit for each element of `a` (Hyyrö,
    "Bit-parallel LCS-length computation revisited", 2004)."""
    places = defaultdict(int)
    for place, element in enumerate(a):
        places[element] |= 1 << place
    full = (1 << len(a)) - 1
    row = full
    for element in b:
        matched = row & places[element]
        row = (row + matched | row - matched) & full
    return len(a) - row.bit_count()


def sari(said: str, row: Row) -> float:
    """SARI (Xu et al., 2016) with one reference: (F_add + F_keep + P_delete) / 3.

    Of the n-grams of the source I, the output O and the reference R, as sets, n = 1..4:

        add     p(n) = |O - I & R| / |O - I|     r(n) = |O - I & R| / |R - I|
        keep    p(n) = |I & O & R| / |I & O|     r(n) = |I & O & R| / |I & R|
        delete  p(n) = |I - O - R| / |I - O|

    P and R are means over n, F = 2 P R / (P + R), and 0 / 0 is 1, so that the reference has 1. The
    source is the whole prompt, as in TRACE.
    """
    found = [[_ngrams(words(text), n) for text in (row.prompt, said, row.answer)] for n in ORDERS]
    added = _f1([(o - i, r - i) for i, o, r in found])
    kept = _f1([(i & o, i & r) for i, o, r in found])
    deleted = mean([_share(i - o, i - r) for i, o, r in found])
    return (added + kept + deleted) / 3


def _f1(pairs: list[tuple[set, set]]) -> float:
    """Of means over pairs of what was done and what was right."""
    precision = mean([_share(done, right) for done, right in pairs])
    recall = mean([_share(right, done) for done, right in pairs])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share(part: set, right: set) -> float:
    return len(part & right) / len(part) if part else 1.0


def _ngrams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}


def words(text: str) -> list[str]:
    """Words in lower case, Chinese characters, and marks: what ROUGE-L and SARI count."""
    return WORD.findall(text.lower())


TASKS = {  # in TRACE's order
    "C-STANCE": Task(first_letter, 8),
    "FOMC": Task(first_letter, 8),
    "MeetingBank": Task(rouge_l, 256),
    "Py150": Task(edit_similarity, 96, ("\n", "<EOL>")),
    "ScienceQA": Task(first_letter, 8),
    "NumGLUE-cm": Task(value, 16, ("\n",)),
    "NumGLUE-ds": Task(value, 16, ("\n",)),
    "20Minuten": Task(sari, 256),
}


def scores(
    data_root: Path, task: str, complete: Callable[..., list[str]], limit: int | None = None
) -> dict:
    """{"score", "score_stderr", "n"} of a model on the test rows of a task, all or the first.

    complete: called with prompts, max_new_tokens and stop, gives what the model says next, cut
        before the first stop. Raises what `read_rows` does.
    """
    check_limit(limit)
    rows = read_rows(data_root, task, "test")[:limit]
    how = TASKS[task]
    said = complete([row.prompt for row in rows], max_new_tokens=how.max_new_tokens, stop=how.stop)
    graded = [how.grade(text, row) for text, row in zip(said, rows, strict=True)]
    return {"score": mean(graded), "score_stderr": standard_error(graded), "n": len(graded)}


def read_rows(data_root: Path, task: str, part: str) -> list[Row]:
    """The rows of `data_root`/trace/TASK/PART.json; part: "train" or "test".

    Raises ValueError for a task that is none of TASKS and for rows that are not TRACE's,
    FileNotFoundError where there is no such file.
    """
    check_tasks([task])
    file = Path(data_root) / "trace" / task / f"{part}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: rows of prompt and answer expected, got no such file")
    rows = []
    for number, row in rows_of(file).numbered():
        pair = Row(row.get("prompt"), row.get("answer"))
        if [*map(type, pair)] != [str, str] or not pair.prompt:
            got = shown(row)
            raise ValueError(
                f"{file}: row {number}: prompt and answer as texts expected, got {got}"
            )
        rows.append(pair)
    if not rows:
        raise ValueError(f"{file}: rows of prompt and answer expected, got none")
    return rows


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of TASKS, with those that are nearest."""
    for name in names:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=2) or TASKS
            raise ValueError(f"a TRACE task as {' or '.join(nearest)} expected, got {shown(name)}")


def overall_performance(matrix: list[list[float]]) -> float:
    """TRACE's OP: the mean over the tasks of the scores after the last one was learnt.

    matrix: a row for each task that was learnt, with a score of each task after it.
    """
    _check_square(matrix)
    return mean(matrix[-1])


def backward_transfer(matrix: list[list[float]]) -> float | None:
    """TRACE's BWT: the mean over all tasks but the last of the score at the end minus the one right
    after the task itself was learnt; negative where it was forgotten. None for a single task."""
    _check_square(matrix)
    return mean([matrix[-1][task] - matrix[task][task] for task in range(len(matrix) - 1)])


def _check_square(matrix: list[list[float]]) -> None:
    sizes = [len(row) for row in matrix]
    if not matrix or sizes != [len(matrix)] * len(matrix):
        raise ValueError(f"a score of each task after each expected, got rows of {shown(sizes)}")
