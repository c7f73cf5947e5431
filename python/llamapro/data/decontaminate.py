"""Which documents hold a question of a benchmark: the same 13 words one after the other.

13-gram overlap as in GPT-3 (Brown et al., 2020, appendix C): a word is a run of letters and digits,
in lower case. Words and runs are compared by 64-bit hashes.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamapro.data.sources import rows_of
from llamapro.data.tokens import DataError

WORDS = 13
FIELDS = ("question", "prompt", "ctx", "sentence", "text", "problem")
NOT_TESTS = ("train", "dev")  # how the names of files with other splits begin
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a hash is lost
NOT_ASCII_WORDS = re.compile(r"[^\x00-\x7f\w]+")
ASCII_WORDS = bytes(b if b > 127 or chr(b).isalnum() else ord(" ") for b in range(256))
SEEN_BITS = 24  # 16 MB that tell most runs from those of a question at one look
log = logging.getLogger("llamapro")


class Questions:
    """The runs of 13 words of all questions below a folder of benchmarks.

    Read are its .jsonl files, but those that are named train or dev; in their rows, the texts under
    FIELDS: question (ARC, GSM8K, MMLU, TruthfulQA), ctx (HellaSwag), sentence (Winogrande), prompt
    (HumanEval, MBPP sanitized), text (MBPP), problem (MATH). A question of fewer words has no run.
    """

    def __init__(self, root):
        questions = [words for text in _questions(Path(root)) if len(words := _words(text))]
        if not questions:
            fields = ", ".join(FIELDS)
            raise DataError(f"{root}: .jsonl files expected, with questions as {fields}; got none")
        short = sum(len(words) < WORDS for words in questions)
        log.info(
            "%s: %d questions, %d of them too short to be looked for: of less than %d words",
            *(root, len(questions), short, WORDS),
        )
        self.runs = np.unique(np.concatenate([_runs(words) for words in questions]))
        if not len(self.runs):
            raise DataError(f"{root}: questions of {WORDS} words or more expected, got none")
        self.seen = np.zeros(2**SEEN_BITS, dtype=bool)
        self.seen[_first_bits(self.runs)] = True

    def are_in(self, text: str) -> bool:
        """Whether a text has a run of 13 words of any question."""
        runs = _runs(_words(text))
        runs = runs[self.seen[_first_bits(runs)]]
        places = np.searchsorted(self.runs, runs)
        return bool((self.runs[np.minimum(places, len(self.runs) - 1)] == runs).any())


def _questions(root: Path) -> Iterator[str]:
    for file in sorted(root.rglob("*.jsonl")):
        if not file.name.startswith(NOT_TESTS):
            for _, row in rows_of(file).numbered():
                found = (row.get(name) for name in FIELDS)
                yield from (text for text in found if isinstance(text, str))


def _words(text: str) -> np.ndarray:
    """A hash of each word. Bytes are split, which is three times as fast as to search a text."""
    words = NOT_ASCII_WORDS.sub(" ", text.lower()).encode().translate(ASCII_WORDS).split()
    return np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)


def _runs(words: np.ndarray) -> np.ndarray:
    """A hash of each run of so many words: a polynomial of theirs."""
    runs = np.zeros(max(0, len(words) - WORDS + 1), dtype=np.uint64)
    for place in range(WORDS):
        runs = runs * FACTOR + words[place : place + len(runs)]
    return runs


def _first_bits(runs: np.ndarray) -> np.ndarray:
    return runs >> np.uint64(64 - SEEN_BITS)
