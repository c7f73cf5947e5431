"""MT-Bench: a model's answers and a judge's grades, against endpoints that fail in many ways."""

import json
import re
from collections import Counter

import pytest
from llamapro.eval import dialogue
from llamapro.eval.dialogue import judge, rating, read_questions, write_answers
from llamapro.eval.endpoint import Endpoint, EndpointError
from llamapro.eval.records import finished
from scripted_endpoint import TIMEOUT, Broken, scripted

TEMPLATES = {
    "single-v1": "Q {question} A {answer}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
    "single-math-v1-multi-turn": "{ref_answer_1} {ref_answer_2} {question_2} {answer_2} {{x}}",
}
CATEGORIES = ("writing", "writing", "math", "math", "stem", "coding")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def bench(tmp_path):
    """Six questions in FastChat's format."""
    root = tmp_path / "bench"
    questions = [
        {"question_id": i, "category": category, "turns": [f"q{i}.1", f"q{i}.2"]}
        for i, category in enumerate(CATEGORIES)
    ]
    references = [
        {"question_id": i, "model_id": "gpt-4", "choices": [{"turns": [f"r{i}.1", f"r{i}.2"]}]}
        for i in (2, 3, 5)
    ]
    prompts = [
        {"name": name, "system_prompt": f"system of {name}", "prompt_template": template}
        for name, template in TEMPLATES.items()
    ]
    write_lines(root / "mt_bench" / "question.jsonl", questions)
    write_lines(root / "mt_bench" / "reference_answer_gpt-4.jsonl", references)
    write_lines(root / "mt_bench" / "judge_prompts.jsonl", prompts)
    return root


class Model:
    """Answers with how many messages it saw, and notes what it was asked; stops after `most`."""

    def __init__(self, most=10**6):
        self.calls, self.most = [], most

    def __call__(self, conversations, **sampling):
        if len(self.calls) >= self.most:
            raise KeyboardInterrupt
        self.calls.append(([[*c] for c in conversations], sampling))
        return [f"{c[-1]['content']} {{answer}} {len(c)}" for c in conversations]


@pytest.fixture
def answers(bench, tmp_path):
    write_answers(bench, Model(), tmp_path / "answers.jsonl", "mine")
    return tmp_path / "answers.jsonl"


def test_answers_are_fastchats(bench, tmp_path):
    model, out = Model(), tmp_path / "new" / "answers.jsonl"
    assert write_answers(bench, model, out, "mine", max_new_tokens=7, top_p=0.9, seed=3) == 6
    for answer in (records := read_lines(out)):
        number = answer["question_id"]
        said = [f"q{number}.1 {{answer}} 1", f"q{number}.2 {{answer}} 3"]
        assert answer["choices"] == [{"index": 0, "turns": said}]
        assert answer["model_id"] == "mine" and answer["tstamp"] > 0
    assert sorted(a["question_id"] for a in records) == [*range(6)]
    assert len({a["answer_id"] for a in records}) == 6
    asked = Counter()
    for conversations, sampling in model.calls:
        assert sampling == {
            **{"max_new_tokens": 7, "temperature": sampling["temperature"]},
            **{"top_p": 0.9, "seed": 3},
        }
        for conversation in conversations:
            roles = [message["role"] for message in conversation]
            assert roles in (["user"], ["user", "assistant", "user"])
            number = int(conversation[0]["content"][1])
            asked[CATEGORIES[number], sampling["temperature"]] += 1
    assert asked == {("writing", 0.7): 4, ("math", 0.0): 4, ("stem", 0.1): 2, ("coding", 0.0): 2}


def test_killed_answers_go_on(bench, tmp_path):
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_answers(bench, Model(most=5), out, "mine", batch=1)
    first = read_lines(out)
    assert len(first) == 2
    with open(out, "a") as file:
        file.write(json.dumps(first[0])[:-9])  # a line that was being written
    model = Model()
    assert write_answers(bench, model, out, "mine", batch=2) == 4
    assert read_lines(out)[:2] == first
    assert sorted(a["question_id"] for a in read_lines(out)) == [*range(6)]
    asked = {c[0]["content"] for conversations, _ in model.calls for c in conversations}
    assert asked.isdisjoint(f"q{a['question_id']}.1" for a in first)
    assert write_answers(bench, Model(most=0), out, "mine") == 0


def test_one_process_writes_at_a_time(bench, answers):
    with (
        finished(answers, {}),
        pytest.raises(BlockingIOError, match=f"^{answers}: another process is writing there"),
    ):
        write_answers(bench, Model(most=0), answers, "mine")


def test_answers_of_two_models_are_kept_apart(bench, answers):
    with pytest.raises(ValueError, match="answers of 'other' alone expected, got some of 'mine'"):
        write_answers(bench, Model(most=0), answers, "other")


def test_what_the_judge_is_asked(bench, answers, tmp_path):
    with scripted(lambda _: "Rating: [[7]]") as (endpoint, requests):
        judge(bench, answers, tmp_path / "out.jsonl", endpoint)
    prompts = {
        (r["question_id"], r["turn"]): r["user_prompt"] for r in read_lines(tmp_path / "out.jsonl")
    }
    first, second = "{answer} 1", "{answer} 3"
    assert prompts[0, 1] == f"Q q0.1 A q0.1 {first}"
    assert prompts[0, 2] == f"q0.1 q0.1 {first} q0.2 q0.2 {second}"
    assert prompts[2, 1] == f"Q q2.1 R r2.1 A q2.1 {first}"
    assert prompts[5, 2] == f"r5.1 r5.2 q5.2 q5.2 {second} {{x}}"
    assert len(requests) == 12
    for request in requests:
        system, user = request["messages"]
        assert system["role"] == "system" and user["role"] == "user"
        assert (request["temperature"], request["max_tokens"]) == (0.0, 2048)
    systems = Counter(request["messages"][0]["content"] for request in requests)
    assert systems == {f"system of {name}": 3 for name in TEMPLATES}


def test_scores(bench, answers, tmp_path):
    """Each turn of question i is graded i + turn, but the second of the last has no rating."""

    def grade(request):
        prompt = request["messages"][1]["content"]
        number, turn = max((int(i), t) for i, t in re.findall(r"q(\d)\.(\d)", prompt))
        return "[[no]]" if (number, turn) == (5, "2") else f"So [[{number + int(turn)}]], not [[1]]"

    out = tmp_path / "out.jsonl"
    with scripted(grade) as (endpoint, _):
        found = judge(bench, answers, out, endpoint)
    # First turns: 1 ... 6, second ones 2 ... 6; questions 1.5, 2.5, 3.5, 4.5, 5.5, 6.
    metrics = found["metrics"]
    assert metrics.pop("score_stderr") == pytest.approx(0.7120003121, rel=1e-9)
    assert metrics == pytest.approx(
        {
            **{"turn_1": 3.5, "turn_2": 4.0, "score": 41 / 11},
            **{"writing": 2.0, "math": 4.0, "stem": 5.5, "coding": 6.0},
        }
    )
    reason = "a rating from 1 to 10 as [[5]] expected, got '[[no]]'"
    assert found["failed"] == [{"question_id": 5, "turn": 2, "reason": reason}]
    assert found["judged"] == 11
    record = next(r for r in read_lines(out) if (r["question_id"], r["turn"]) == (5, 2))
    assert record.pop("tstamp") > 0 and "q5.2" in record.pop("user_prompt")
    judged_by = {"model": "mine", "judge": ["j", "single-math-v1-multi-turn"]}
    said = {"judgment": "[[no]]", "score": -1}
    assert record == {"question_id": 5, "turn": 2, **judged_by, **said}


def test_ratings():
    said = {"[[5]]": 5, "[5] [[6]]": 6, "[8]": 8, "[[7.5]]": 7.5, "[[ 5 ]]": -1, "5": -1, "": -1}
    said |= {"[[10]]": 10, "[[0]]": -1, "[[11]]": -1, "[[1.]]": 1, f"[[{'9' * 400}]]": -1}
    assert {text: rating(text) for text in said} == said


TROUBLES = {
    500: "HTTP 500",
    Broken.SLOW: f"no whole answer within {TIMEOUT} s; given up after try 1",
    Broken.CUT_OFF: "cut off",
    Broken.NO_JSON: "JSON with",
    "I will not say": "a rating from 1 to 10 as [[5]] expected, got 'I will not say'",
    401: "HTTP 401",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_turn_ends_with_a_score_or_a_reason(bench, answers, tmp_path, trouble):
    def grade(request):
        return trouble if "q3." in request["messages"][1]["content"] else "[[4]]"

    out = tmp_path / "out.jsonl"
    timeout = {"timeout": TIMEOUT} if trouble is Broken.SLOW else {}
    with scripted(grade, waits=(), **timeout) as (endpoint, _):
        found = judge(bench, answers, out, endpoint)
    assert [(f["question_id"], f["turn"]) for f in found["failed"]] == [(3, 1), (3, 2)]
    assert all(TROUBLES[trouble] in f["reason"] for f in found["failed"])
    assert found["judged"] == 10 and found["metrics"]["score"] == 4
    with scripted(lambda _: "[[6]]") as (endpoint, requests):
        found = judge(bench, answers, out, endpoint)
    # What the judge said stays; what the endpoint did not bring is asked for again.
    said = isinstance(trouble, str)
    assert len(requests) == (0 if said else 2) and found["judged"] == (10 if said else 12)


def test_an_error_that_passes_costs_nothing(bench, answers, tmp_path):
    replies = iter([429, 500, *["[[4]]"] * 12])
    with scripted(lambda _: next(replies), waits=(0.0, 0.0)) as (endpoint, _):
        found = judge(bench, answers, tmp_path / "out.jsonl", endpoint)
    assert found["judged"] == 12 and found["failed"] == []


def test_a_killed_judge_goes_on(bench, answers, tmp_path, monkeypatch):
    out, real = tmp_path / "out.jsonl", dialogue._judgment

    def stopping(*arguments):
        if len(read_lines(out)) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    with scripted(lambda _: "[[4]]") as (endpoint, requests):
        monkeypatch.setattr(dialogue, "_judgment", stopping)
        with pytest.raises(KeyboardInterrupt):
            judge(bench, answers, out, endpoint)
        monkeypatch.undo()
        out.write_text(out.read_text()[:-20])  # the fifth was being written
        found = judge(bench, answers, out, endpoint)
        assert len(requests) == 5 + 8 and found["judged"] == 12
        prompts = [request["messages"][1]["content"] for request in requests]
        assert len(set(prompts)) == 12
        assert judge(bench, answers, out, endpoint) == found
        assert len(requests) == 13
    # Another judge, and answers that were made anew, are judged anew.
    with scripted(lambda _: "[[5]]", model="other") as (endpoint, requests):
        assert judge(bench, answers, out, endpoint)["metrics"]["score"] == 5
        assert len(requests) == 12
    answers.write_text(answers.read_text().replace("q3.2 {answer}", "changed"))
    with scripted(lambda _: "[[10]]") as (endpoint, requests):
        assert judge(bench, answers, out, endpoint)["metrics"]["math"] == 5.5
        assert len(requests) == 1


@pytest.mark.parametrize("check", [401, 404])
def test_an_endpoint_that_refuses_is_one_error_before_anything(bench, answers, tmp_path, check):
    with (
        scripted(lambda _: "[[4]]", check=check) as (endpoint, requests),
        pytest.raises(EndpointError, match=f"^{endpoint.url}: HTTP {check}"),
    ):
        judge(bench, answers, tmp_path / "out.jsonl", endpoint)
    assert requests == []


def test_questions_without_an_answer_fail(bench, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert write_answers(bench, Model(), out, "mine", limit=2) == 2
    assert [q.category for q in read_questions(bench, 2)] == ["writing", "math"]
    with scripted(lambda _: "[[4]]") as (endpoint, _):
        some = judge(bench, out, tmp_path / "out.jsonl", endpoint, limit=2)
        every = judge(bench, out, tmp_path / "out.jsonl", endpoint)
    assert some["judged"] == every["judged"] == 4 and some["failed"] == []
    assert {f["reason"] for f in every["failed"]} == {f"{out}: an answer expected, got none"}
    assert len(every["failed"]) == 8 and every["metrics"]["stem"] is None


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("question.jsonl", None, None, "a file with a record in each line expected, got none"),
        ("question.jsonl", '"stem"', '"new"', "question 4: a category of .* expected, got 'new'"),
        ("question.jsonl", '["q1.1", "q1.2"]', "[3]", r"question 1: a list of 2 texts .*\[3\]"),
        ("question.jsonl", '"category": "stem"', '"x": 1', "record 5: category as str .* None"),
        ("question.jsonl", '{"question_id": 0', "{", "line 1: not JSON"),
        (
            "reference_answer_gpt-4.jsonl",
            '"question_id": 5',
            '"question_id": 9',
            "question 5: an answer in",
        ),
        ("judge_prompts.jsonl", None, None, "a file with a record"),
        ("judge_prompts.jsonl", '"single-math-v1"', '"x"', "a prompt single-math-v1 expected"),
        ("judge_prompts.jsonl", "{answer}", "{reply}", r"single-v1: fields .* got '{reply}'"),
    ],
)
def test_bad_files(bench, answers, tmp_path, file, old, new, message):
    path = bench / "mt_bench" / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    endpoint = Endpoint("http://127.0.0.1:9", "j")  # which is not asked
    with pytest.raises((ValueError, FileNotFoundError), match=f"{bench}.*{message}") as raised:
        judge(bench, answers, tmp_path / "out.jsonl", endpoint)
    assert len(str(raised.value).splitlines()) == 1


def test_bad_limits_and_answers(bench, answers, tmp_path):
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"^limit must be at least 1, got {limit}$"):
            write_answers(bench, Model(most=0), tmp_path / "x", "mine", limit=limit)
    for text, message in (
        ("", "answers expected, got none"),
        ('{"question_id": 1, "model_id": "a", "choices": []}', "question 1: a list of 2 texts"),
    ):
        answers.write_text(text)
        with pytest.raises(ValueError, match=f"^{answers}.*{message}"):
            judge(bench, answers, tmp_path / "out.jsonl", Endpoint("http://127.0.0.1:9", "j"))
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(ValueError, match=r"^/dev/null: a regular file expected, got a device"):
        write_answers(bench, Model(most=0), "/dev/null", "mine")


def test_real_questions(real_data, tmp_path):
    """All 80, with FastChat's own prompts and references."""
    out = tmp_path / "answers.jsonl"
    assert write_answers(real_data / "bench", Model(), out, "mine") == 80
    assert len({q.category for q in read_questions(real_data / "bench", 8)}) == 8
    with scripted(lambda _: "Rating: [[8]]") as (endpoint, requests):
        found = judge(real_data / "bench", out, tmp_path / "out.jsonl", endpoint)
    assert found["judged"] == len(requests) == 160 and found["metrics"]["score_stderr"] == 0
    names = Counter(r["judge"][1] for r in read_lines(tmp_path / "out.jsonl"))
    assert [names[name] for name in TEMPLATES] == [50, 30, 50, 30]
    asked = "".join(request["messages"][1]["content"] for request in requests)
    assert asked.count("[The Start of Reference Answer]\nIf you have just overtaken") == 1
