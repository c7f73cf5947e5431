"""Files of benchmarks changed at random, and those that a killed evaluation left; see fuzz.py.

They may lie wherever their owner likes, so links are followed.
"""

import shutil

import pytest
from fuzz import change_bytes, change_json, not_a_file, truncate, try_changes
from hypothesis import strategies as st
from llamapro.eval.dialogue import PROMPTS, judge
from llamapro.eval.endpoint import Endpoint
from llamapro.eval.mint import evaluate
from row_files import write_rows
from scripted_endpoint import scripted

ANSWER = {"question_id": 1, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}]}
ROWS = {
    "answers.jsonl": [ANSWER],
    "mt_bench/question.jsonl": [{"question_id": 1, "category": "math", "turns": ["p", "q"]}],
    "mt_bench/reference_answer_gpt-4.jsonl": [ANSWER],
    "mt_bench/judge_prompts.jsonl": [
        {"name": name, "system_prompt": "", "prompt_template": "{ref_answer_1}"}
        for name in PROMPTS.values()
    ],
    "mint/theoremqa/test_prompts.json": [
        {"id": 1, "prompt": "?", "reference": [1, 2.5], "answer_type": "list of float"},
        {"id": 2, "prompt": "?", "reference": "a", "answer_type": "option"},
    ],
}
FILES = [*ROWS, "judgments.jsonl", "dialogues.jsonl"]


def use(directory, endpoint):
    judge(directory, directory / "answers.jsonl", directory / "judgments.jsonl", endpoint)
    held = {"tasks": ["theoremqa"], "out": directory / "dialogues.jsonl", "turns": 1}
    evaluate(directory, lambda conversations, **_: [""] * len(conversations), None, **held)


def change_line(content, draw):
    lines = content.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = change_json(lines[place], draw) + b"\n"
    return b"".join(lines)


def change(file, draw):
    way = draw(st.sampled_from([change_line] * 5 + [change_bytes, truncate, None]))
    if way is None:
        not_a_file(file, draw)
    else:
        file.write_bytes(way(file.read_bytes(), draw))


@pytest.fixture
def source(tmp_path):
    for name, rows in ROWS.items():
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file.with_suffix(".jsonl"), rows).rename(file)
    with scripted(lambda _: "[[4]]") as (endpoint, _):
        use(tmp_path / "source", endpoint)
    return tmp_path / "source"


def test_files_that_were_changed(source, tmp_path):
    directory, nobody = tmp_path / "changed", Endpoint("http://127.0.0.1:9", "j")

    def change_one(draw):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        change(directory / draw(st.sampled_from(FILES)), draw)

    try_changes(200, change_one, lambda _: use(directory, nobody))
