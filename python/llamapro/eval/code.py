"""Benchmarks of programs: HumanEval, MBPP, and GSM8K by programs (PoT), which run in a sandbox."""

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamapro.data.sources import rows_of
from llamapro.eval import sandbox
from llamapro.eval.code_shots import SOLUTIONS
from llamapro.eval.records import check_limit, mean, standard_error
from llamapro.storage import shown

AT_A_TIME = 64  # completions that are asked for together, and then run
TOP_P = 0.95  # of samples, as in the Codex paper
TOLERANCE = 1e-3  # of GSM8K's answers, absolute, as in PAL
COLUMN_0 = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # the Codex paper's stops
MBPP_TEST = range(11, 511)  # the split of the MBPP paper; its prompts are of tasks 1 to 10
MBPP_SHOTS = (2, 3, 4)


@dataclass(frozen=True)
class Problem:
    """A prompt, and what makes a program of its completion.

    answer: what the program's last line of output has to be; None where it asserts what counts.
    """

    task_id: str
    prompt: str
    before: str
    after: str
    answer: float | None = None

    def program(self, completion: str) -> str:
        return self.before + completion + self.after

    def judge(self, outcome: sandbox.Outcome) -> tuple[bool, str]:
        """Whether a program's end counts, and why."""
        if self.answer is None or not outcome.passed:
            return outcome.passed, outcome.reason
        got = outcome.stdout.strip().rpartition("\n")[2]
        try:
            passed = abs(float(got) - self.answer) < TOLERANCE
        except ValueError:  # the program may have printed what it likes, or nothing
            passed = False
        return passed, "passed" if passed else f"{self.answer} expected, got {shown(got)}"


@dataclass(frozen=True)
class Task:
    """A benchmark: its files below a data root, a pattern, and the problems of its rows."""

    files: str
    fields: dict[str, type]
    problems: Callable[[list[dict], Path], list[Problem]]
    stop: tuple[str, ...]
    max_new_tokens: int
    shots: int = 0
    seconds: float = 3.0  # of each program: human-eval's


def evaluate(
    task: str,
    data_root: Path,
    complete: Callable[..., list[str]],
    *,
    limit: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    k: Sequence[int] = (1,),
    seed: int = 0,
    allow_unsafe: bool = False,
    done: Callable[[dict], None] | None = None,
    workers: int = 2,
) -> dict:
    """{"metrics": {"pass@1", "pass@1_stderr", ...}, "samples", "n"} of a task of `TASKS`.

    complete: called with prompts and max_new_tokens, stop, temperature, top_p and seed, gives what
    a model says next, cut before the first stop. samples: of each problem, an unbiased estimate of
    pass@k needs k of them. limit: the first problems alone. done: called with each sample, a dict
    of "task_id", "completion", "passed" and "reason", as soon as it is known. workers: programs
    that run side by side. allow_unsafe: of `sandbox.run`.

    Raises ValueError, FileNotFoundError and sandbox.IsolationError before anything runs.
    """
    _check(limit, samples, k, workers)
    problems = load(task, data_root)[:limit]
    sandbox.check(allow_unsafe)
    asked = [problem for problem in problems for _ in range(samples)]
    sampling = {"temperature": temperature, "top_p": TOP_P if temperature else 1.0}
    limits = {"max_new_tokens": TASKS[task].max_new_tokens, "stop": TASKS[task].stop}
    running = {"workers": workers, "timeout": TASKS[task].seconds, "allow_unsafe": allow_unsafe}
    said = []
    for start in range(0, len(asked), AT_A_TIME):
        part = asked[start : start + AT_A_TIME]
        prompts = [problem.prompt for problem in part]
        # Another seed each time: samples of the same problem may lie on both sides of a border.
        completions = complete(prompts, **limits, **sampling, seed=seed + start // AT_A_TIME)
        if len(completions) != len(part):
            raise ValueError(f"{len(part)} completions expected, got {len(completions)}")
        for sample in _run(part, completions, running):
            said.append(sample)
            if done:
                done(sample)
    metrics = _metrics([sample["passed"] for sample in said], samples, k)
    return {"metrics": metrics, "samples": said, "n": len(problems)}


def _check(limit, samples, k, workers) -> None:
    check_limit(limit)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not k or min(k) < 1:
        raise ValueError(f"k of at least 1 expected, got {shown(tuple(k))}")
    if samples < max(k):
        raise ValueError(f"pass@{max(k)} needs at least {max(k)} samples, got {samples}")


def _run(problems, completions, running) -> list[dict]:
    """The samples of problems, in their order."""
    both = [*zip(problems, completions, strict=True)]
    outcomes = sandbox.run_all([problem.program(text) for problem, text in both], **running)
    samples = []
    for (problem, text), outcome in zip(both, outcomes, strict=True):
        passed, reason = problem.judge(outcome)
        sample = {"task_id": problem.task_id, "completion": text}
        samples.append({**sample, "passed": passed, "reason": reason})
    return samples


def _metrics(passed: list[bool], samples: int, k: Sequence[int]) -> dict[str, float | None]:
    """pass@k, a mean over problems, and its standard error, of which one problem has none."""
    counts = [sum(passed[at : at + samples]) for at in range(0, len(passed), samples)]
    metrics: dict[str, float | None] = {}
    for number in k:
        values = [pass_at_k(samples, count, number) for count in counts]
        metrics[f"pass@{number}"] = mean(values)
        metrics[f"pass@{number}_stderr"] = standard_error(values)
    return metrics


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, unbiased, from how many of n did (Chen et al. 2021):
    1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def load(task: str, data_root: Path) -> list[Problem]:
    """The problems of a task. Raises ValueError for one that is unknown, or a row that lacks a
    field, and FileNotFoundError for a file that is missing."""
    if task not in TASKS:
        near = ", ".join(difflib.get_close_matches(task, TASKS, cutoff=0.3)) or ", ".join(TASKS)
        raise ValueError(f"unknown task {task!r}; the nearest: {near}")
    kind = TASKS[task]
    return kind.problems(_rows(Path(data_root), kind.files, kind.fields), Path(data_root))


def _rows(data_root: Path, pattern: str, fields: dict[str, type]) -> list[dict]:
    """The rows of files, in the order of their names, with fields that are checked."""
    files = sorted(data_root.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"{data_root / pattern}: a file of the benchmark expected, got none"
        )
    rows = []
    for file in files:
        for number, row in rows_of(file).numbered():
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    got = shown(row.get(name))
                    raise ValueError(
                        f"{file}, row {number}: {name} as {kind.__name__} expected, got {got}"
                    )
            rows.append(row)
    if not rows:
        raise ValueError(f"{files[0]}: a row expected, got none")
    return rows


def _human_eval(rows: list[dict], data_root: Path) -> list[Problem]:
    """The prompt as it is; it begins the program too."""
    return [
        Problem(
            row["task_id"],
            row["prompt"],
            before=row["prompt"],
            after=f"\n{row['test']}\ncheck({row['entry_point']})",
        )
        for row in rows
    ]


def _mbpp(rows: list[dict], data_root: Path) -> list[Problem]:
    """The prompt of the MBPP paper, in the words of its tables."""
    by_id = {row["task_id"]: row for row in rows}
    missing = [number for number in MBPP_SHOTS if number not in by_id]
    if missing:
        raise ValueError(
            f"{data_root}: MBPP's tasks {MBPP_SHOTS} for its prompt expected, got none of {missing}"
        )
    shots = "".join(
        f"{_mbpp_question(by_id[number])}{_lines(by_id[number]['code'])}\n[DONE]\n\n"
        for number in MBPP_SHOTS
    )
    return [
        Problem(
            f"mbpp/{number}",
            shots + _mbpp_question(by_id[number]),
            before="",
            after="\n".join(["", _lines(by_id[number]["test_setup_code"]), *_tests(by_id[number])]),
        )
        for number in MBPP_TEST
        if number in by_id
    ]


def _mbpp_question(row: dict) -> str:
    tests = "\n".join(_tests(row))
    return (
        f"You are an expert Python programmer, and here is your task: {row['text'].strip()} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _tests(row: dict) -> list[str]:
    return [_lines(str(test)) for test in row["test_list"]]


def _lines(text: str) -> str:
    """A text with line ends as Python writes them; MBPP's are those of Windows."""
    return text.replace("\r\n", "\n")


def _gsm8k(rows: list[dict], data_root: Path) -> list[Problem]:
    """Questions answered by what `solution` returns, after examples from the training set."""
    asked = {"question": str}
    train = [row["question"] for row in _rows(data_root, "gsm8k/train*.jsonl", asked)]
    shots = ""
    for start, body in SOLUTIONS.items():
        question = next((text for text in train if text.startswith(start)), None)
        if question is None:
            raise ValueError(f"{data_root}/gsm8k: a question expected that begins {start!r}")
        shots += f"{_gsm8k_question(question)}\n{body}\n\n"
    return [
        Problem(
            f"gsm8k/{number}",
            shots + _gsm8k_question(row["question"]),
            before="def solution():\n",
            after="\nprint('\\n%r' % float(solution()))",
            answer=_number(row, number),
        )
        for number, row in enumerate(rows)
    ]


def _gsm8k_question(question: str) -> str:
    """Without the end of its last line: tokens of examples hold it together with what follows."""
    return f"Question: {question.strip()}\n\ndef solution():"


def _number(row: dict, number: int) -> float:
    """What stands behind "####" in an answer of GSM8K."""
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)\s*$", row["answer"])
    if not found:
        got = shown(row["answer"][-50:])
        raise ValueError(
            f"gsm8k's row {number}: an answer that ends in #### and a number expected, got {got}"
        )
    return float(found[1].replace(",", ""))


TASKS = {
    "humaneval": Task(
        "humaneval/HumanEval.jsonl",
        {name: str for name in ("task_id", "prompt", "test", "entry_point")},
        _human_eval,
        stop=COLUMN_0,
        max_new_tokens=512,
    ),
    "mbpp": Task(
        "mbpp/mbpp.jsonl",
        {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
        _mbpp,
        stop=("[DONE]",),
        max_new_tokens=512,
        shots=len(MBPP_SHOTS),
        seconds=15.0,  # a reference, that of task 123, takes half of it
    ),
    "gsm8k_pot": Task(
        "gsm8k/test*.jsonl",
        {"question": str, "answer": str},
        _gsm8k,
        stop=(*COLUMN_0, "\nQuestion:"),
        max_new_tokens=512,
        shots=len(SOLUTIONS),
    ),
}
