"""MT-Bench (Zheng et al., 2023): two-turn dialogues, graded by a judge with FastChat's own prompts.

Questions, prompts, temperatures, what a rating is and both files are FastChat's, so that its judge
can grade the answers, and its tables can show the judgments. A rating outside 1 to 10, the scale
that the prompts name, is none here.
"""

import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from llamapro.eval.endpoint import Endpoint, EndpointError
from llamapro.eval.records import check_limit, finished, mean, read_records, standard_error, texts
from llamapro.storage import one_line, shown

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "neutral": 0.0}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
WITH_REFERENCE = ("math", "reasoning", "coding")
REFERENCES = "reference_answer_gpt-4.jsonl"
TURNS = (1, 2)
PROMPTS = {  # by turn, and whether there is a reference answer
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
JUDGE_TOKENS = 2048
RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
NO_RATING = -1  # as FastChat writes it
ANSWER = {"question_id": int, "model_id": str, "choices": list}
PROMPT = {"name": str, "system_prompt": str, "prompt_template": str}
JUDGMENT = {"question_id": int, "turn": int, "model": str, "judge": list, "user_prompt": str}
JUDGMENT |= {"judgment": str}
# Given conversations and max_new_tokens, temperature, top_p, seed: what the model says in each.
Answer = Callable[..., list[str]]


class Question(NamedTuple):
    """Two turns, and a reference answer to each where the category has them."""

    id: int
    category: str
    turns: list[str]
    reference: list[str] | None


def read_questions(data_root: Path, limit: int | None = None) -> list[Question]:
    """The questions of `data_root`/mt_bench; with a limit so many, evenly spread, since questions
    of one category stand together.

    Raises FileNotFoundError or ValueError for files that are not FastChat's.
    """
    check_limit(limit)
    folder = Path(data_root) / "mt_bench"
    references = _turns_by_question(folder / REFERENCES)
    file = folder / "question.jsonl"
    rows = read_records(file, {"question_id": int, "category": str, "turns": list})
    questions = [_question(row, references, file) for row in rows]
    count = min(limit or len(questions), len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _question(row: dict, references: dict[int, list[str]], file: Path) -> Question:
    number, category = row["question_id"], row["category"]
    place = f"{file}, question {number}"
    if category not in TEMPERATURES:
        known = ", ".join(TEMPERATURES)
        raise ValueError(f"{place}: a category of {known} expected, got {shown(category)}")
    if category not in WITH_REFERENCE:
        reference = None
    elif number in references:
        reference = references[number]
    else:
        raise ValueError(f"{place}: an answer in {REFERENCES} expected, got none")
    return Question(number, category, texts(row["turns"], len(TURNS), place), reference)


def _turns_by_question(answers: Path) -> dict[int, list[str]]:
    """What was answered to each question, by the first choice."""
    found = {}
    for record in read_records(answers, ANSWER):
        number, choices = record["question_id"], record["choices"]
        first = choices[0] if choices and isinstance(choices[0], dict) else {}
        found[number] = texts(first.get("turns"), len(TURNS), f"{answers}, question {number}")
    return found


def write_answers(
    data_root: Path,
    answer: Answer,
    out: Path,
    model_id: str,
    *,
    limit: int | None = None,
    max_new_tokens: int = 1024,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 8,
) -> int:
    """Append a model's answers to `out`, a file as FastChat's, and say how many were missing there.

    What the file answers is not asked again. Questions that are asked together have the same
    temperature. Raises ValueError where the file has answers of another model.
    """
    questions = read_questions(data_root, limit)
    with finished(out, ANSWER) as answers:
        _check_model(answers.path, answers.records, model_id)
        known = {record["question_id"] for record in answers.records}
        missing = [question for question in questions if question.id not in known]
        for temperature, together in _batches(missing, batch):
            sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
            said = _both_turns(together, answer, max_new_tokens=max_new_tokens, **sampling)
            for question, turns in zip(together, said, strict=True):
                ids = {"question_id": question.id, "answer_id": uuid.uuid4().hex}
                choices = [{"index": 0, "turns": turns}]
                said_by = {"model_id": model_id, "choices": choices, "tstamp": time.time()}
                answers.append({**ids, **said_by})
    return len(missing)


def _check_model(file: Path, records: list[dict], model_id: str) -> None:
    others = {record["model_id"] for record in records} - {model_id}
    if others:
        got = shown(sorted(others)[0])
        raise ValueError(f"{file}: answers of {shown(model_id)} alone expected, got some of {got}")


def _batches(questions: list[Question], size: int) -> Iterator[tuple[float, list[Question]]]:
    for temperature in sorted(set(TEMPERATURES.values())):
        same = [q for q in questions if TEMPERATURES[q.category] == temperature]
        for start in range(0, len(same), size):
            yield temperature, same[start : start + size]


def _both_turns(questions: list[Question], answer: Answer, **sampling) -> list[list[str]]:
    """What the model answers to the first turn of each question, and then to the second."""
    conversations = [[] for _ in questions]
    for turn in range(len(TURNS)):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        said = answer(conversations, **sampling)
        for text, conversation in zip(said, conversations, strict=True):
            conversation.append({"role": "assistant", "content": text})
    return [[m["content"] for m in c if m["role"] == "assistant"] for c in conversations]


def judge(
    data_root: Path, answers: Path, out: Path, endpoint: Endpoint, *, limit: int | None = None
) -> dict:
    """Grade the answers of a file by a judge, appending to `out`, a file as FastChat's.

    {"metrics": {"turn_1", "turn_2", "score", "score_stderr" and the mean of each category},
    "judged": how many turns have a score, "failed": [{question_id, turn, reason}]}: each turn of
    each question is in one of the latter two. A mean of nothing is None; the standard error is over
    questions, as the turns of one are not independent. What the file has a judgment of, in answer
    to the same prompt, is not asked again; what the endpoint failed to answer is, the next time.
    Raises EndpointError at once where the endpoint refuses.
    """
    questions = read_questions(data_root, limit)
    requests = _requests(data_root, questions, Path(answers), endpoint.model)
    unanswered = f"{answers}: an answer expected, got none"
    outcomes = {(question.id, turn): unanswered for question in questions for turn in TURNS}
    with finished(out, JUDGMENT) as judgments:
        known = {_about(record): record for record in judgments.records}
        if any(_about(request) not in known for request in requests):
            endpoint.check()
        for request in requests:
            place = request["question_id"], request["turn"]
            record = known.get(_about(request))
            try:
                if record is None:
                    record = _judgment(request, endpoint)
                    judgments.append(record)
                outcomes[place] = _score(record)
            except EndpointError as error:
                outcomes[place] = str(error)
    return _result(questions, outcomes)


def _requests(data_root: Path, questions: list[Question], answers: Path, judge: str) -> list[dict]:
    """Of each turn that is answered, a judgment without what the judge says; and "system"."""
    file = Path(data_root) / "mt_bench" / "judge_prompts.jsonl"
    prompts = {record["name"]: record for record in read_records(file, PROMPT)}
    for name in PROMPTS.values():
        if name not in prompts:
            raise ValueError(f"{file}: a prompt {name} expected, got none")
    said, model = _turns_by_question(answers), _only_model(answers)
    return [
        {
            "question_id": question.id,
            "model": model,
            "judge": [judge, name],
            "user_prompt": _filled(prompts[name], question, said[question.id], turn, file),
            "turn": turn,
            "system": prompts[name]["system_prompt"],
        }
        for question in questions
        if question.id in said
        for turn in TURNS
        for name in [PROMPTS[turn, question.reference is not None]]
    ]


def _only_model(answers: Path) -> str:
    records = read_records(answers, ANSWER)
    if not records:
        raise ValueError(f"{answers}: answers expected, got none")
    _check_model(answers, records, records[0]["model_id"])
    return records[0]["model_id"]


def _filled(prompt: dict, question: Question, said: list[str], turn: int, file: Path) -> str:
    """A prompt's template as str.format fills it, but for fields that reach into their values."""
    fields = {"question": question.turns[0], "answer": said[0]}
    for number in TURNS:
        fields[f"question_{number}"] = question.turns[number - 1]
        fields[f"answer_{number}"] = said[number - 1]
        if question.reference:
            fields[f"ref_answer_{number}"] = question.reference[number - 1]

    def value(match: re.Match) -> str:
        if match[1] is None:
            return match[0][0]
        if match[1] not in fields:
            got = shown(match[0])
            raise ValueError(f"{file}: {prompt['name']}: fields {', '.join(fields)}; got {got}")
        return fields[match[1]]

    return re.sub(r"\{\{|\}\}|\{(\w+)\}", value, prompt["prompt_template"])


def _about(record: dict) -> tuple:
    """What makes a judgment one of the same answer to the same question by the same judge."""
    names = ("question_id", "turn", "model", "judge", "user_prompt")
    return tuple(str(record[name]) for name in names)


def _judgment(request: dict, endpoint: Endpoint) -> dict:
    record = {name: value for name, value in request.items() if name != "system"}
    messages = [
        {"role": "system", "content": request["system"]},
        {"role": "user", "content": request["user_prompt"]},
    ]
    said = endpoint.chat(messages, max_tokens=JUDGE_TOKENS, temperature=0.0)
    return {**record, "judgment": said, "score": rating(said), "tstamp": time.time()}


def rating(judgment: str) -> int | float:
    """The first number in double brackets, else in single ones; NO_RATING where there is none from
    1 to 10."""
    found = next(filter(None, (pattern.search(judgment) for pattern in RATINGS)), None)
    number = float(found[1]) if found else NO_RATING
    if not 1 <= number <= 10:
        return NO_RATING
    return int(number) if number.is_integer() else number


def _score(record: dict) -> int | float | str:
    """Of a judgment, or the reason why it has none."""
    score = rating(record["judgment"])
    if score != NO_RATING:
        return score
    return f"a rating from 1 to 10 as [[5]] expected, got {shown(one_line(record['judgment']))}"


def _result(questions: list[Question], outcomes: dict[tuple[int, int], float | str]) -> dict:
    failed = [
        {"question_id": number, "turn": turn, "reason": outcome}
        for (number, turn), outcome in outcomes.items()
        if isinstance(outcome, str)
    ]
    scores = {place: score for place, score in outcomes.items() if not isinstance(score, str)}
    metrics = {
        f"turn_{turn}": mean([score for place, score in scores.items() if place[1] == turn])
        for turn in TURNS
    }
    metrics["score"] = mean([*scores.values()])
    of_questions, of_categories = defaultdict(list), {q.category: [] for q in questions}
    categories = {question.id: question.category for question in questions}
    for (number, _), score in scores.items():
        of_questions[number].append(score)
        of_categories[categories[number]].append(score)
    metrics["score_stderr"] = standard_error([mean(found) for found in of_questions.values()])
    metrics |= {category: mean(found) for category, found in of_categories.items()}
    return {"metrics": metrics, "judged": len(scores), "failed": failed}
