"""MINT (Wang et al., 2023): tasks that a model solves in a few turns, running Python on its way.

In a turn the model writes a program, whose output it sees, or proposes a solution, at most twice.
What differs from the original: the instructions and the example are our own; there is no search
tool for hotpotqa, and no ALFWorld; the success rate after k turns is read off one dialogue of five,
while the original, for each k, tells the model that it has k; the graders are those of
`graders.py`. Each program runs alone: those before it that ran to their end are run again first,
their output dropped, so that names live on; of one that failed nothing does.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from llamapro.eval import graders
from llamapro.eval.endpoint import Endpoint, EndpointError
from llamapro.eval.records import check_limit, finished, mean, read_records, standard_error
from llamapro.storage import shown

TURNS, PROPOSALS = 5, 2
PROGRAM_SECONDS = 10.0  # for a program and those that are run again before it
MOST_SHOWN = 2000  # characters of an observation
FEEDBACK_TOKENS = 512
RECORD = {"task": str, "id": int, "turns": int, "solved": bool, "failed": list}
CODE = "Write Python code for this:\n\n"
THEOREM = "Answer with a number, a list of numbers, True, False or the letter of an option.\n\n"


@dataclass(frozen=True)
class Task:
    """What stands before a question, and what grades a solution."""

    grade: graders.Grader
    intro: str = ""


TASKS = {
    "gsm8k": Task(graders.is_number),
    "hotpotqa": Task(graders.is_text, "Answer with as few words as possible.\n\n"),
    "humaneval": Task(graders.passes_tests, CODE),
    "math": Task(graders.is_number, "Answer with a decimal number.\n\n"),
    "mbpp": Task(graders.passes_tests, CODE),
    "mmlu": Task(graders.is_choice, "Answer with the letter of an option.\n\n"),
    "theoremqa": Task(graders.is_theorem, THEOREM),
}
INSTRUCTIONS = """\
Solve the task below, step by step, in at most {turns} turns. In each turn, first think in a few
words, and then do one of two things:
1. Write a Python program between <execute> and </execute>. You will be shown what it prints. Names
that it defines can be used in later programs.
2. Propose a solution between <solution> and </solution>: nothing but the answer, or the whole code
where code is asked for. You will be told if it is wrong. You can propose {proposals} solutions.

Example:
Task: A garden has 7 rows of 12 tulips. Three in every 14 tulips are red. How many are not red?
Assistant: I compute the tulips, and take the red ones away.
<execute>
tulips = 7 * 12
print(tulips - tulips * 3 // 14)
</execute>
Observation:
66
You have 4 steps left and 2 chances to propose solution left.
Assistant: 66 of the 84 tulips are not red.
<solution>66</solution>

Now the task. You have {turns} steps left and {proposals} chances to propose solution left.

Task: {task}"""
EXPERT = (
    "You help a student to solve a task in a few turns, by Python programs and proposed solutions."
    " Say in two or three sentences what is good or wrong about the student's last turn, and what"
    " to do next. Do not give the solution away."
)
ACTION = re.compile(r"<(execute|solution)>(.*?)</\1>", re.DOTALL)
NO_ACTION = (
    "I see no program between <execute> and </execute>, and no solution between <solution> and"
    " </solution>."
)
# Runs programs one after the other in the same names, as a notebook: the value of a last expression
# is shown. The earlier ones did run to their end.
SESSION = """\
import ast, contextlib, io
def run(source, names={{"__name__": "__main__"}}):
    tree = ast.parse(source)
    last = [tree.body.pop()] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
    exec(compile(tree, "<program>", "exec"), names)
    exec(compile(ast.Interactive(last), "<program>", "single"), names)
for source in {earlier!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        run(source)
run({program!r})
"""


@dataclass
class Episode:
    """A task on its way."""

    task: str
    row: dict
    messages: list[dict]
    turns_left: int
    programs: list[str] = field(default_factory=list)  # that ran to their end
    turns: int = 0
    proposals: int = 0
    solved: bool = False
    failed: list[dict] = field(default_factory=list)  # feedback that did not come

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.row["id"]

    @property
    def is_over(self) -> bool:
        return self.solved or not self.turns_left or self.proposals == PROPOSALS

    def record(self, asked: dict) -> dict:
        """Of a finished one, with what distinguishes this evaluation from others."""
        ended = {"turns": self.turns, "solved": self.solved, "failed": self.failed}
        return {
            "task": self.task,
            "id": self.row["id"],
            **asked,
            **ended,
            "messages": self.messages,
        }


def evaluate(
    data_root: Path,
    answer: Callable[..., list[str]],
    run: Callable,
    *,
    tasks: list[str] | None = None,
    limit: int | None = None,
    turns: int = TURNS,
    feedback: Endpoint | None = None,
    out: Path | None = None,
    max_new_tokens: int = 512,
    seed: int = 0,
    batch: int = 32,
) -> dict:
    """Success rates of a model on tasks of `data_root`/mint, all or the first `limit` of each.

    {"metrics": {"sr@K": the share that is solved within K turns, for each K; the standard error of
    the last; "TASK/sr@K"}, "n": how many tasks, "failed": feedback that did not come: [{task, id,
    turn, reason}]}. Such a dialogue goes on without it.
    answer: given conversations and max_new_tokens, temperature, top_p, seed, what the model says
        next in each; it is asked greedily, for a turn of many dialogues at once.
    run: given a program and `timeout`, its outcome: `passed`, `reason`, `stdout`.
    feedback: an endpoint that comments on each turn; it does not see the reference.
    out: a file of one model's finished dialogues, to which more are appended; those are not held
        again. Raises ValueError where they had other turns or another feedback.
    """
    check_limit(limit)
    if turns < 1:
        raise ValueError(f"turns must be at least 1, got {turns}")
    episodes = [
        Episode(task, row, [_first_message(task, row, turns)], turns)
        for task in _names(tasks)
        for row in read_task(data_root, task)[:limit]
    ]
    asked = {"of_turns": turns, "feedback": feedback.model if feedback else None}
    sampling = {"temperature": 0.0, "top_p": 1.0, "seed": seed, "max_new_tokens": max_new_tokens}
    with finished(out, RECORD) if out else nullcontext() as file:
        records = {(r["task"], r["id"]): r for r in (file.records if file else ())}
        _check_asked(out, records.values(), asked)
        missing = [episode for episode in episodes if episode.key not in records]
        if missing and feedback:
            feedback.check()
        for start in range(0, len(missing), batch):
            for episode in _play(missing[start : start + batch], answer, run, feedback, sampling):
                records[episode.key] = episode.record(asked)
                if file:
                    file.append(records[episode.key])
    return _result([records[episode.key] for episode in episodes], turns)


def _names(tasks: list[str] | None) -> list[str]:
    for name in tasks or ():
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=2) or TASKS
            raise ValueError(f"a MINT task as {' or '.join(nearest)} expected, got {shown(name)}")
    return [*TASKS] if tasks is None else [*dict.fromkeys(tasks)]


def read_task(data_root: Path, task: str) -> list[dict]:
    """The rows of a task. Raises FileNotFoundError or ValueError where one could not be graded."""
    file, grade = Path(data_root) / "mint" / task / "test_prompts.json", TASKS[task].grade
    rows = read_records(file, {"id": int, "prompt": str})
    for row in rows:
        reference = row.get("reference")
        if grade is graders.passes_tests:
            good = isinstance(reference, str)
        else:
            good = reference is not None and grade(str(reference), row, None)
        if not good:
            got = shown(reference)
            raise ValueError(f"{file}, id {row['id']}: a reference for {task} expected, got {got}")
    return rows


def _first_message(task: str, row: dict, turns: int) -> dict:
    question = row["prompt"].strip()
    if question.startswith('"""'):  # mbpp's are written as docstrings
        question = question.strip('"').strip()
    text = TASKS[task].intro + question
    content = INSTRUCTIONS.format(turns=turns, proposals=PROPOSALS, task=text)
    return {"role": "user", "content": content}


def _check_asked(out: Path | None, records: Iterable[dict], asked: dict) -> None:
    for record in records:
        got = {name: record.get(name) for name in asked}
        if got != asked:
            raise ValueError(f"{out}: dialogues with {asked} expected, got some with {shown(got)}")


def _play(
    episodes: list[Episode], answer: Callable, run: Callable, feedback: Endpoint | None, sampling
) -> Iterator[Episode]:
    """Hold dialogues side by side, and yield each when it is over."""
    while episodes:
        said = answer([episode.messages for episode in episodes], **sampling)
        for episode, text in zip(episodes, said, strict=True):
            _take_turn(episode, text, run, feedback)
            if episode.is_over:
                yield episode
        episodes = [episode for episode in episodes if not episode.is_over]


def _take_turn(episode: Episode, said: str, run: Callable, feedback: Endpoint | None) -> None:
    """Do the first thing that the model asks for, and tell it what came of it.

    What it says after that is forgotten: often an observation that it made up.
    """
    episode.turns += 1
    episode.turns_left -= 1
    action = ACTION.search(said)
    text = said[: action.end()] if action else said
    episode.messages.append({"role": "assistant", "content": text})
    if action is None:
        observed = NO_ACTION
    elif action[1] == "execute":
        observed = _execute(episode, graders.unfenced(action[2].strip("\n")), run)
    else:
        episode.proposals += 1
        episode.solved = TASKS[episode.task].grade(action[2].strip(), episode.row, run)
        observed = "This solution is wrong."
    if episode.is_over:
        return
    steps, chances = episode.turns_left, PROPOSALS - episode.proposals
    left = f"You have {steps} steps left and {chances} chances to propose solution left."
    episode.messages.append({"role": "user", "content": f"Observation:\n{observed}\n{left}"})
    if feedback:
        _comment(episode, feedback)


def _execute(episode: Episode, program: str, run: Callable) -> str:
    """What a program prints, and why it failed if it did."""
    session = SESSION.format(earlier=episode.programs, program=program)
    outcome = run(session, timeout=PROGRAM_SECONDS)
    if outcome.passed:
        episode.programs.append(program)
    parts = (outcome.stdout.rstrip(), "" if outcome.passed else outcome.reason)
    text = "\n".join(filter(None, parts)) or "(no output)"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} ... (cut)"


def _comment(episode: Episode, feedback: Endpoint) -> None:
    """Add what an expert says of the last turn, or note why nothing came."""
    names = {"user": "Task and observations", "assistant": "Student"}
    told = [f"{names[m['role']]}:\n{m['content']}" for m in episode.messages]
    asked = [
        {"role": "system", "content": EXPERT},
        {"role": "user", "content": "\n\n".join(told)},
    ]
    try:
        said = feedback.chat(asked, max_tokens=FEEDBACK_TOKENS, temperature=0.0)
    except EndpointError as error:
        where = {"task": episode.task, "id": episode.row["id"], "turn": episode.turns}
        episode.failed.append({**where, "reason": str(error)})
    else:
        episode.messages[-1]["content"] += f"\nExpert feedback:\n{said.strip()}"


def _result(records: list[dict], turns: int) -> dict:
    metrics = {}
    for within in range(1, turns + 1):
        solved = [(r["task"], r["solved"] and r["turns"] <= within) for r in records]
        metrics[f"sr@{within}"] = mean([good for _, good in solved])
        for task in dict.fromkeys(task for task, _ in solved):
            own = [good for name, good in solved if name == task]
            metrics[f"{task}/sr@{within}"] = mean(own)
        if within == turns:
            metrics[f"sr@{within}_stderr"] = standard_error([good for _, good in solved])
    failed = [failure for record in records for failure in record["failed"]]
    return {"metrics": metrics, "n": len(records), "failed": failed}
