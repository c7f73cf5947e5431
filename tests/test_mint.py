"""MINT: dialogues of a few turns with programs and proposed solutions, and their graders."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from llamapro.eval import graders
from llamapro.eval.endpoint import EndpointError
from llamapro.eval.mint import SESSION, TASKS, evaluate, read_task
from scripted_endpoint import Broken, scripted

OPTIONS = "Which?\nOptions: A ) red , B ) blue-ish , C ) 0.5 W , D ) A and B"
ROWS = {
    "gsm8k": [
        {"id": i, "prompt": f"What is {i} + 40?", "reference": str(i + 40)} for i in range(4)
    ],
    "hotpotqa": [{"id": 0, "prompt": "Who?", "reference": "The Beatles, of Liverpool"}],
    "mmlu": [{"id": 0, "prompt": OPTIONS, "reference": "d"}],
    "mbpp": [
        {
            "id": 3,
            "prompt": '"""\nDouble.\nassert f(1) == 2\n"""\n',
            "reference": "assert f(2) == 4",
        }
    ],
}


@dataclass
class Outcome:
    passed: bool
    reason: str
    stdout: str


def run(program, *, timeout):
    """A stand-in for a sandbox: a plain process."""
    command = [sys.executable, "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    said = (done.stderr.splitlines() or [""])[-1]
    reason = f"exit {done.returncode}: {said}" if done.returncode else "passed"
    return Outcome(not done.returncode, reason, done.stdout)


def not_run(program, *, timeout):
    raise AssertionError("no program was expected")


@pytest.fixture
def bench(tmp_path):
    for task, rows in ROWS.items():
        (tmp_path / "bench" / "mint" / task).mkdir(parents=True)
        file = tmp_path / "bench" / "mint" / task / "test_prompts.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "bench"


class Model:
    """Says in a dialogue's turn what `script`, given its number and turn, says; notes what it was
    asked; stops at the call after `most`."""

    def __init__(self, script, most=10**6):
        self.script, self.most, self.calls = script, most, []

    def __call__(self, conversations, **sampling):
        if len(self.calls) >= self.most:
            raise KeyboardInterrupt
        self.calls.append(([[*c] for c in conversations], sampling))
        return [self.script(_number(c), len(c) // 2 + 1) for c in conversations]


def _number(conversation):
    return int(re.findall(r"What is (\d+) \+", conversation[0]["content"])[-1])


def solve_late(number, turn):
    """Task i is solved in turn i + 1."""
    return f"<solution>{number + 40}</solution>" if turn > number else "I wonder"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_success_rates_by_turn(bench):
    found = evaluate(bench, model := Model(solve_late), not_run, tasks=["gsm8k"], turns=3)
    metrics = found["metrics"]
    assert metrics["sr@1"] == 0.25 and metrics["sr@2"] == 0.5 and metrics["sr@3"] == 0.75
    assert metrics["gsm8k/sr@2"] == 0.5 and found["n"] == 4 and found["failed"] == []
    assert metrics["sr@3_stderr"] == pytest.approx(0.25)
    assert set(metrics) == {f"{t}sr@{k}" for t in ("", "gsm8k/") for k in (1, 2, 3)} | {
        "sr@3_stderr"
    }
    # Turn by turn, those that are not over together.
    assert [len(conversations) for conversations, _ in model.calls] == [4, 3, 2]
    sampling = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    assert all(asked == sampling for _, asked in model.calls)


def test_the_mean_is_over_all_tasks(bench):
    def script(conversations, **_):
        return ["<solution>44.5</solution>" for _ in conversations]  # within 5% of 43 alone

    metrics = evaluate(bench, script, not_run, tasks=["hotpotqa", "gsm8k"], turns=1)["metrics"]
    assert metrics["sr@1"] == 0.2
    assert metrics["gsm8k/sr@1"] == 0.25 and metrics["hotpotqa/sr@1"] == 0.0


def test_what_the_model_is_told(bench, tmp_path):
    """A program, an error, nothing, a wrong solution, the right one; what it makes up after its
    action is cut."""
    said = [
        "First <execute>\n```python\nx = 20\nprint(2 * x)\n```\n</execute>\nObservation:\n99",
        "<execute>print('half'); x / 0</execute> <solution>1</solution>",
        "Hm <execute> x",
        "<solution>7</solution><solution>40</solution>",
        "<execute>x * 2</execute>",
    ]
    out = tmp_path / "out.jsonl"
    model = Model(lambda _, turn: said[turn - 1])
    evaluate(bench, model, run, tasks=["gsm8k"], limit=1, out=out)
    (record,) = read_lines(out)
    first, *rest = record["messages"]
    assert "What is 0 + 40?" in first["content"] and "at most 5 turns" in first["content"]
    assert "You have 5 steps left and 2 chances to propose solution left." in first["content"]
    assert [m["role"] for m in rest] == ["assistant", "user"] * 4 + ["assistant"]
    assert [m["content"] for m in rest[::2]] == [
        "First <execute>\n```python\nx = 20\nprint(2 * x)\n```\n</execute>",
        "<execute>print('half'); x / 0</execute>",
        "Hm <execute> x",
        "<solution>7</solution>",
        "<execute>x * 2</execute>",
    ]
    shown = [
        "Observation:\n40\nYou have 4 steps left and 2 chances",
        "Observation:\nhalf\nexit 1: ZeroDivisionError: division by zero\nYou have 3 steps left",
        "Observation:\nI see no program between <execute> and </execute>, and no solution",
        "Observation:\nThis solution is wrong.\nYou have 1 steps left and 1 chances to propose",
    ]
    assert all(m["content"].startswith(s) for m, s in zip(rest[1::2], shown, strict=True))
    ended = {"turns": 5, "solved": False, "failed": [], "of_turns": 5, "feedback": None}
    assert ended.items() <= record.items()


def test_two_wrong_solutions_end_a_dialogue(bench):
    model = Model(lambda *_: "<solution>1</solution>")
    found = evaluate(bench, model, not_run, tasks=["gsm8k"], limit=1)
    assert len(model.calls) == 2 and found["metrics"]["sr@5"] == 0


def session(*programs):
    return run(SESSION.format(earlier=list(programs[:-1]), program=programs[-1]), timeout=10)


def test_names_live_on_and_earlier_output_does_not():
    outcome = session("import math\ndef f(x):\n    return x + 1\nprint('old')", "y = f(1)\ny", "y")
    assert outcome == Outcome(True, "passed", "2\n")
    assert session("print('a')\nNone").stdout == "a\n"
    assert session("run = source = 3", "run + source").stdout == "6\n"
    assert session("if __name__ == '__main__':\n    print(1)").stdout == "1\n"
    failed = session("x = 1", "x +")
    assert not failed.passed and "SyntaxError" in failed.reason and failed.stdout == ""


def test_a_program_that_failed_leaves_no_name(bench, tmp_path):
    said = ["<execute>x = 5\n1 / 0</execute>", "<execute>x</execute>", "<solution>40</solution>"]
    out, model = tmp_path / "out.jsonl", Model(lambda _, turn: said[turn - 1])
    found = evaluate(bench, model, run, tasks=["gsm8k"], limit=1, out=out)
    assert "NameError" in read_lines(out)[0]["messages"][4]["content"]
    assert found["metrics"]["sr@2"] == 0 and found["metrics"]["sr@3"] == 1


def test_long_output_is_cut(bench, tmp_path):
    out, model = tmp_path / "out.jsonl", Model(lambda *_: "<execute>'x' * 9999</execute>")
    evaluate(bench, model, run, tasks=["gsm8k"], limit=1, turns=2, out=out)
    shown = read_lines(out)[0]["messages"][2]["content"]
    assert shown.startswith("Observation:\n'" + 1999 * "x" + " ... (cut)\nYou have")


def test_a_killed_run_goes_on(bench, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    asked = {"tasks": ["gsm8k"], "out": out, "batch": 2, "turns": 4}
    with pytest.raises(KeyboardInterrupt):
        evaluate(bench, Model(solve_late, most=4), not_run, **asked)
    assert [r["id"] for r in read_lines(out)] == [0, 1]
    with open(out, "a") as file:
        file.write('{"task": "gsm8k", "id": 2, "tur')
    found = evaluate(bench, model := Model(solve_late), not_run, **asked)
    numbers = {_number(c) for conversations, _ in model.calls for c in conversations}
    assert numbers == {2, 3} and [r["id"] for r in read_lines(out)] == [0, 1, 2, 3]
    assert found == evaluate(bench, Model(solve_late), not_run, tasks=["gsm8k"], turns=4)
    assert found == evaluate(bench, Model(solve_late, most=0), not_run, **asked)
    with pytest.raises(ValueError, match=f"^{out}: dialogues with .*5.* expected, got some with"):
        evaluate(bench, Model(solve_late), not_run, tasks=["gsm8k"], out=out)


def test_feedback(bench, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = {"tasks": ["gsm8k"], "limit": 3, "turns": 3, "out": out}
    with scripted(lambda r: Broken.NO_JSON if "What is 2" in str(r) else " Try it. ") as (
        endpoint,
        requests,
    ):
        found = evaluate(bench, Model(solve_late), not_run, feedback=endpoint, **asked)
    # None after the turn that ends a dialogue: one for task 1, two for task 2, each tried twice.
    assert len(requests) == 1 + 2 * 2
    system, user = requests[0]["messages"]
    assert system["role"] == "system" and user["content"].count("What is 1 + 40?") == 1
    assert "Student:\nI wonder" in user["content"] and "41" not in user["content"]
    told = next(r for r in read_lines(out) if r["id"] == 1)["messages"][2]["content"]
    left = "You have 2 steps left and 2 chances to propose solution left."
    assert told.endswith(f"{left}\nExpert feedback:\nTry it.")
    assert [(f["task"], f["id"], f["turn"]) for f in found["failed"]] == [
        ("gsm8k", 2, 1),
        ("gsm8k", 2, 2),
    ]
    assert all(f["reason"].startswith(endpoint.url) for f in found["failed"])
    assert found["metrics"]["sr@3"] == 1
    with scripted(lambda _: 1 / 0, check=401) as (endpoint, _):
        # All is there already, so nothing is asked; but not of the others.
        assert evaluate(bench, None, not_run, feedback=endpoint, **asked) == found
        model = Model(solve_late)
        with pytest.raises(EndpointError, match="HTTP 401"):
            evaluate(bench, model, not_run, feedback=endpoint, tasks=["gsm8k"])
        assert model.calls == []


def test_bad_input(bench):
    def refused(error, message, **asked):
        with pytest.raises(error, match=message) as raised:
            evaluate(bench, None, not_run, **asked)
        assert len(str(raised.value).splitlines()) == 1

    refused(ValueError, "^limit must be at least 1, got 0$", limit=0)
    refused(ValueError, "^turns must be at least 1, got 0$", turns=0)
    refused(ValueError, "a MINT task as gsm8k expected, got 'gsm8'", tasks=["gsm8"])
    refused(ValueError, "as gsm8k or hotpotqa or .* expected, got '#'", tasks=["#"])
    refused(FileNotFoundError, f"{bench}/mint/humaneval/test_prompts.json: a file", limit=1)
    file = bench / "mint" / "mmlu" / "test_prompts.json"
    for reference in (None, "none", 3):
        file.write_text(json.dumps({**ROWS["mmlu"][0], "reference": reference}))
        refused(ValueError, f"^{file}, id 0: a reference for mmlu expected, got", tasks=["mmlu"])


FORTY = ["40", "40.0", "$40$", "x = 40", "40 apples", "80/2", r"\frac{80}{2}", "4 x 10^1", "41.9"]
FORTY += ["a = 3, so b = 40", "4e1", r"\boxed{40}", "+40", "0.4 * 10**2", "42"]
NUMBERS = {
    "40": FORTY,
    "-0.001": ["-10^-3", "-1/1,000", "\N{MINUS SIGN}0.001"],
    "1200": ["1,200", "$1,200.00"],
    "0": ["0"],
}
NOT_FORTY = ["", "forty", "42.1", "37.9", "-40", "40 or 41", "1/0", "x", "80/2/2", "4,0"]


def test_numbers():
    for reference, right in NUMBERS.items():
        for solution in right:
            assert graders.is_number(solution, {"reference": reference}, None), solution
    for solution in NOT_FORTY:
        assert not graders.is_number(solution, {"reference": "40"}, None), solution
    assert not graders.is_number("0.001", {"reference": "0"}, None)


def test_choices():
    row = ROWS["mmlu"][0]
    for solution in ("D", "d", "(d)", "D) A and B", "D.", "The answer is D", "Option D", "A and B"):
        assert graders.is_choice(solution, row, None), solution
    for solution in ("A", "a ) red", "red", "", "red and blue", "E", "Done", "B: D"):
        assert not graders.is_choice(solution, row, None), solution
    assert graders.is_choice("blue-ish.", {**row, "reference": "b"}, None)


def test_texts():
    row = ROWS["hotpotqa"][0]
    assert graders.is_text(" beatles of  liverpool!", row, None)
    for solution in ("", "Beatles", "They are the Beatles, of Liverpool", "beatles liverpool of"):
        assert not graders.is_text(solution, row, None)


@pytest.mark.parametrize(
    "kind, reference, right, wrong",
    [
        ("float", 2.0, ["2", "2.07", "x = 1.93"], ["2.09", "1.91", "two", "[2]x3"]),
        ("integer", 25, ["25", "24.6"], ["24.4", "26", ""]),
        (
            "bool",
            False,
            ["False", "no", "No, since x", "the answer is false"],
            ["True", "", "nope"],
        ),
        ("list of integer", [4, 1, 1], ["[1, 1, 4]", "(4, 1, 1)", "x = [4,1,1]"], ["[1, 4]", "[]"]),
        ("option", "a", ["a", "(A)", "a ) f is"], ["b", "is a", ""]),
    ],
)
def test_theorems(kind, reference, right, wrong):
    row = {"reference": reference, "answer_type": kind, "prompt": "?"}
    assert all(graders.is_theorem(solution, row, None) for solution in right)
    assert not any(graders.is_theorem(solution, row, None) for solution in wrong)


def test_programs():
    row = ROWS["mbpp"][0]
    for program, right in (("def f(x): return 2 * x", True), ("def f(x): return 2", False)):
        assert graders.passes_tests(program, row, run) == right
        assert graders.passes_tests(f"```python\n{program}\n```", row, run) == right


def test_docstring_marks_are_dropped(bench, tmp_path):
    out = tmp_path / "out.jsonl"
    evaluate(bench, lambda c, **_: [""] * len(c), not_run, tasks=["mbpp"], turns=1, out=out)
    asked = read_lines(out)[0]["messages"][0]["content"]
    assert asked.endswith("Task: Write Python code for this:\n\nDouble.\nassert f(1) == 2")


def execute(program, *, timeout):
    """In this process, which is enough for programs that come with the data."""
    # This one's own reference solution takes six seconds.
    program = program.replace("amicable_numbers_sum(9999)==31626", "amicable_numbers_sum(999)==504")
    try:
        exec(program, {"__name__": "of the test"})
    except Exception as error:
        return Outcome(False, repr(error), "")
    return Outcome(True, "passed", "")


SIZES = {"gsm8k": 48, "hotpotqa": 43, "humaneval": 45, "math": 100, "mbpp": 91, "mmlu": 76}
SIZES["theoremqa"] = 49


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")
@pytest.mark.parametrize("task", TASKS)
def test_real_references(real_data, task):
    """All reference solutions are right, and no solution at all is not."""
    rows = read_task(real_data / "bench", task)
    assert len(rows) == SIZES[task]

    def solution(row):
        if task == "humaneval":
            return row["prompt"] + "\n" + row["canonical_solution"]
        return row["code"] if task == "mbpp" else str(row["reference"])

    by_prompt = {row["prompt"].strip('" \n'): row for row in rows}

    def answer(conversations, **_):
        asked = (c[0]["content"].split("Now the task.")[1] for c in conversations)
        found = [next(r for p, r in by_prompt.items() if p in text) for text in asked]
        return [f"<solution>{solution(row)}</solution>" for row in found]

    found = evaluate(real_data / "bench", answer, execute, tasks=[task], turns=1)
    assert found["n"] == len(rows) and found["metrics"]["sr@1"] == 1
    assert not any(TASKS[task].grade("<none>", row, execute) for row in rows)
