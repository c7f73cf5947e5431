"""`llamapro eval --tasks`: files, what is refused, and what is gone on with."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_files import data_root, write
from llamapro import Llama
from scripted_endpoint import scripted
from test_harness import path  # noqa: F401  # a fixture

pytest.importorskip("lm_eval")
pytest.importorskip("tyro")
from llamapro import cli
from llamapro.eval import evaluate as module
from llamapro.eval import tasks
from llamapro.eval.dialogue import PROMPTS
from llamapro.eval.evaluate import Evaluation, evaluate, first_questions, flat, results_table


@pytest.fixture
def root(tmp_path):
    root = data_root(tmp_path / "bench")
    tests = "def check(candidate):\n    assert candidate(1) == 1\n"
    problem = {"prompt": "def f(x):\n", "canonical_solution": "    return x\n", "test": tests}
    rows = [{"task_id": f"HumanEval/{i}", "entry_point": "f", **problem} for i in range(3)]
    write(root, "humaneval/HumanEval", rows)
    return root


def run(capsys, *words):
    cli.main([*map(str, words)])
    return capsys.readouterr().out


def cells(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def refused(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    message = stop.value.code
    assert message.startswith("llamapro: ") and "\n" not in message
    return message


def test_a_table_and_a_file_of_lm_evals_form(path, root, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out.json"
    names = "arc_challenge,mmlu,humaneval"
    asked = ["eval", path, "--tasks", names, "--data-root", root, "--limit", 2, "--out", out]
    printed = run(capsys, *asked, "--dtype", "float32")
    found = json.loads(out.read_text())
    assert [*found["seconds"]] == names.split(",")
    assert 0 <= found["results"]["arc_challenge"]["acc_norm"] <= 1
    assert found["n-shot"] == {"arc_challenge": 25, "mmlu": 5, "humaneval": 0} | {
        name: 5 for name in found["n-shot"] if name.startswith("mmlu_")
    }
    assert found["n-samples"]["mmlu"] == 2  # one of each of two subjects, none of the third
    assert 0 <= found["results"]["mmlu"]["acc"] <= 1
    assert found["results"]["humaneval"]["pass@1"] == 0.0
    lines = (tmp_path / "out.humaneval.jsonl").read_text().splitlines()
    assert [json.loads(line)["task_id"] for line in lines] == [f"HumanEval/{i}" for i in range(2)]
    rows = cells(printed)
    assert rows[0] == ["benchmark", "shots", "metric", "value", "questions", "s"]
    assert [row[:3] for row in rows[2:]] == [
        ["arc_challenge", "25", "acc_norm"],
        ["mmlu", "5", "acc"],
        ["humaneval", "0", "pass@1"],
    ]
    assert [row[4] for row in rows[2:]] == ["2"] * 3
    assert str(found["config"]["limit"]) == "2" and found["config"]["fingerprint"]


def test_what_a_file_has_is_not_evaluated_again(path, root, tmp_path, monkeypatch):  # noqa: F811
    out, model = tmp_path / "out.json", Llama.from_pretrained(path)
    first = evaluate(model, path, Evaluation(("winogrande",), root, 2), out)

    def ran_again(*args):
        raise AssertionError("it was evaluated again")

    by_lm_eval = module._by_lm_eval
    monkeypatch.setattr(module, "_by_lm_eval", ran_again)
    assert evaluate(model, path, Evaluation(("winogrande",), root, 2), out) == first
    with pytest.raises(ValueError, match="limit 4 expected, got 2; name another file"):
        evaluate(model, path, Evaluation(("winogrande",), root, 4), out)
    with torch.no_grad():
        model.norm.mul_(2)
    with pytest.raises(ValueError, match=r"out\.json: an evaluation with fingerprint"):
        evaluate(model, path, Evaluation(("winogrande",), root, 2), out)
    with torch.no_grad():
        model.norm.div_(2)
    monkeypatch.setattr(module, "_by_lm_eval", by_lm_eval)
    both = evaluate(model, path, Evaluation(("winogrande", "truthfulqa_mc2"), root, 2), out)
    assert both["results"]["winogrande"] == first["results"]["winogrande"]
    assert both["results"].keys() == {"winogrande", "truthfulqa_mc2"}


BAD = {
    "unknown task": (["--tasks", "arc_chalenge"], "the nearest: arc_challenge, arc_challenge_mt"),
    "no task": (["--tasks", ","], '"paper" or tasks such as'),
    "limit": (["--limit", 0], "limit must be at least 1, got 0"),
    "batch": (["--batch-size", 0], "batch_size"),
    "samples": (["--samples", 3], "a temperature above 0 expected for 3 samples, got 0"),
    "no folder": (["--data-root", "nowhere"], "nowhere: a folder of benchmarks expected"),
    "no file": (["--tasks", "paper"], "expected"),
    "programs": (["--tasks", "mbpp"], "mbpp"),
    "template": (["--tasks", "mint"], "chat template"),
    "feedback": (["--feedback"], "feedback: a judge that gives it expected, got none"),
    "judge": (["--judge", "nowhere"], "an endpoint at http:// or https:// expected"),
    "out in no folder": (["--out", "nowhere/out.json"], "nowhere/out.json: a file in a folder"),
    "out a folder": (["--out", "."], "a regular file expected, got a directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_a_model_is_loaded(path, root, monkeypatch, name):  # noqa: F811
    def loaded(*args):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Llama, "from_pretrained", loaded)
    if name == "unknown task":  # lm-eval takes seconds to read its 14,000
        known = SimpleNamespace(all_tasks=["arc_easy", "arc_challenge_mt"], all_tags=[])
        monkeypatch.setattr(tasks, "_manager", lambda benchmark: known)
    changed, expected = BAD[name]
    words = {"--tasks": "winogrande", "--data-root": root}
    pairs = dict(zip(changed[::2], changed[1::2], strict=False)) if len(changed) > 1 else {}
    flags = changed if len(changed) == 1 else []
    words = [w for pair in (words | pairs).items() for w in pair]
    assert expected in refused("eval", path, *words, *flags)


NO_EVALUATION = {
    "text": ("a b", "not JSON"),
    "object": ('{"a": 1}', "an evaluation expected"),
    "list": ('{"results": [], "config": {}}', "an evaluation expected"),
    "limit": ('{"results": {}, "config": {"limit": 3}}', "with limit 2 expected, got 3; name"),
}


@pytest.mark.parametrize("name", NO_EVALUATION)
def test_a_file_that_cannot_be_gone_on_with_is_refused_at_once(path, root, tmp_path, name):  # noqa: F811
    text, expected = NO_EVALUATION[name]
    out = tmp_path / "out.json"
    out.write_text(text)
    with pytest.raises(ValueError, match=f"out.json: .*{expected}"):
        Evaluation(("winogrande",), root, 2).check(path, out)


def test_a_tokenizer_that_will_not_do_is_refused_at_once(path, root):  # noqa: F811
    (path / "tokenizer_config.json").write_text("{}")
    Evaluation(("humaneval",), root).check(path, None)
    with pytest.raises(ValueError, match="a tokenizer with an end of sequence expected, got none"):
        Evaluation(("winogrande",), root).check(path, None)
    (path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json expected, got none"):
        Evaluation(("humaneval",), root).check(path, None)


@pytest.mark.parametrize("name", tasks.BENCHMARKS)
def test_a_row_that_lacks_a_field_is_refused_at_once(path, root, name):  # noqa: F811
    benchmark = tasks.BENCHMARKS[name]
    file = sorted((root / benchmark.folder).glob("*.jsonl"))[-1]
    rows = file.read_text().splitlines()
    for field in benchmark.fields:
        row = json.loads(rows[2])
        del row[field]
        file.write_text("\n".join([*rows[:2], json.dumps(row), *rows[3:]]))
        with pytest.raises(ValueError, match=rf"row 3: \['{field}'\] expected, got \["):
            Evaluation((name,), root).check(path, None)


def test_missing_rows_are_refused_at_once(path, root):  # noqa: F811
    dev = root / "mmlu" / "dev.jsonl"
    dev.write_text("".join(dev.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="mmlu: 5 rows of virology in dev expected, got 4"):
        Evaluation(("mmlu",), root).check(path, None)
    write(root, "winogrande/validation", [])
    with pytest.raises(ValueError, match=r"winogrande: rows of validation .* expected, got none"):
        Evaluation(("winogrande",), root).check(path, None)


def test_a_file_says_from_the_start_which_model_the_answers_beside_it_are_of(
    path,  # noqa: F811
    root,
    tmp_path,
    monkeypatch,
):
    out, model = tmp_path / "out.json", Llama.from_pretrained(path)

    def killed(*args):
        raise RuntimeError

    monkeypatch.setattr(module, "_by_lm_eval", killed)
    with pytest.raises(RuntimeError):
        evaluate(model, path, Evaluation(("winogrande",), root, 2), out)
    with torch.no_grad():
        model.norm.mul_(2)
    with pytest.raises(ValueError, match=r"out\.json: an evaluation with fingerprint"):
        evaluate(model, path, Evaluation(("winogrande",), root, 2), out)


@pytest.mark.parametrize("names", [("mmlu", "mmlu_virology"), ("mmlu_virology", "mmlu")])
def test_a_member_that_is_asked_for_by_itself_has_its_own_result(
    path,  # noqa: F811
    tmp_path,
    monkeypatch,
    names,
):
    def said(model, path, name, asked, out):
        values = {"mmlu_virology": {"acc": 0.25}}
        if name == "mmlu":
            values = {"mmlu": {"acc": 0.5}, "mmlu_virology": {"acc": 0.75}}
        return {"results": values, "n-samples": dict.fromkeys(values, 1)}

    monkeypatch.setattr(module, "_by_lm_eval", said)
    model = Llama.from_pretrained(path)
    found = evaluate(model, path, Evaluation(names), tmp_path / "out.json")
    assert found["results"] == {"mmlu": {"acc": 0.5}, "mmlu_virology": {"acc": 0.25}}
    assert {*found["seconds"]} == {*names}


def test_files_with_a_point_in_their_names_keep_their_answers_apart():
    ours = {
        module._beside(Path(name), "mint").name for name in ("Llama-3.1", "Llama-3.2", "a.json")
    }
    assert ours == {"Llama-3.1.mint.jsonl", "Llama-3.2.mint.jsonl", "a.mint.jsonl"}


def test_data_or_tasks_but_not_both(path, token_data):  # noqa: F811
    assert "expected" in refused("eval", path)
    assert "expected" in refused("eval", path, token_data(), "--tasks", "paper")


def mt_bench(root):
    questions = [
        {"question_id": i, "category": "writing", "turns": ["w1 w2", "w3"]} for i in range(2)
    ]
    write(root, "mt_bench/question", questions)
    reference = {
        "question_id": 9,
        "model_id": "gpt-4",
        "choices": [{"index": 0, "turns": ["w1", "w2"]}],
    }
    write(root, "mt_bench/reference_answer_gpt-4", [reference])
    single = {"type": "single", "system_prompt": "Judge.", "prompt_template": "{question_1}"}
    prompts = [{"name": name, **single} for name in PROMPTS.values()]
    write(root, "mt_bench/judge_prompts", prompts)
    return root


def test_mt_bench_is_answered_and_then_judged(chat_path, tmp_path, monkeypatch):
    """Answers that a file has are not written again when a judge comes later."""
    root, out = mt_bench(tmp_path / "bench"), tmp_path / "out.json"
    model = Llama.from_pretrained(chat_path)
    model.config.max_position_embeddings = 2048
    asked = Evaluation(("mt_bench",), root)
    asked.check(chat_path, out)
    found = evaluate(model, chat_path, asked, out)
    assert found["results"]["mt_bench"] == {} and "not judged" in results_table(found)
    before = (tmp_path / "out.mt_bench.jsonl").read_bytes()
    with scripted(lambda request: "Rating: [[7]]") as (endpoint, _):
        found = evaluate(model, chat_path, Evaluation(("mt_bench",), root, judge=endpoint), out)
    assert (tmp_path / "out.mt_bench.jsonl").read_bytes() == before
    assert found["results"]["mt_bench"]["score"] == 7.0
    assert cells(results_table(found))[2] == ["mt_bench", "", "score", "7.00 ± 0.00", "2", "0"]


def test_grades_that_are_missing_are_asked_for_again(chat_path, tmp_path):
    root, out = mt_bench(tmp_path / "bench"), tmp_path / "out.json"
    model = Llama.from_pretrained(chat_path)
    model.config.max_position_embeddings = 2048

    def judged(replies, judge="gpt-4"):
        with scripted(lambda request: replies[len(requests) - 1]) as (endpoint, requests):
            asked = Evaluation(("mt_bench",), root, judge=replace(endpoint, model=judge))
            score = evaluate(model, chat_path, asked, out)["results"]["mt_bench"]["score"]
        assert len(requests) == len(replies)
        return score

    assert judged(["[[4]]", "[[4]]", 400, "[[4]]"]) == 4.0
    assert judged(["[[8]]"]) == 5.0
    assert judged([]) == 5.0
    assert judged(["[[2]]"] * 4, "another") == 2.0


def test_a_limit_is_spread_over_the_members_of_a_group():
    class Leaf:
        def __init__(self, name, size):
            self.task_name, self.eval_docs = name, range(size)

    class Group:
        def get_all_tasks(self):
            return [Leaf("a", 1), Leaf("b", 5), Leaf("c", 5)]

    assert first_questions(Leaf("alone", 9), 4) == {"alone": [0, 1, 2, 3]}
    assert first_questions(Group(), 6) == {"a": [0], "b": [0, 1, 2], "c": [0, 1]}
    assert sum(map(len, first_questions(Group(), 100).values())) == 11


def test_metrics_have_plain_names():
    values = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 3}
    assert flat(values) == {"acc": 0.5}
    filters = {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2}
    assert flat(filters) == {"exact_match": 0.1, "exact_match,flexible-extract": 0.2}
