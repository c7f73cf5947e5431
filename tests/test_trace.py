"""TRACE: what grades an answer, OP and BWT, and a model that learns three tasks."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from llamapro import Llama
from llamapro.data.packing import open_rows
from llamapro.eval import trace
from llamapro.eval.completion import Completer
from llamapro.eval.trace import Row, backward_transfer, overall_performance, scores
from llamapro.hf import Checkpoint
from llamapro.storage import read_json

pytest.importorskip("peft")
from recipes import trace as recipe
from recipes.rivals import Stock
from recipes.trace import TraceConfig, sequence

LEARNT = {  # what is asked, and what is always right
    "FOMC": ("{}\nStance:", "B"),
    "NumGLUE-cm": ("{}\nAnswer:", "7"),
    "C-STANCE": ("{}\n态度:", "A"),
}
WORDS = ["cat", "dog", "saw", "far", "old", "new"]


@pytest.fixture
def data_root(tmp_path):
    """Three tasks in TRACE's layout; one prompt of each is longer than a row of training."""
    random.seed(0)
    for task, (prompt, answer) in LEARNT.items():
        folder = tmp_path / "bench" / "trace" / task
        folder.mkdir(parents=True)
        for part, count in (("train", 30), ("test", 6)):
            texts = [" ".join(random.choices(WORDS, k=3)) for _ in range(count)]
            if part == "train":
                texts[0] *= 20
            rows = [{"prompt": prompt.format(text), "answer": answer} for text in texts]
            (folder / f"{part}.json").write_text(json.dumps(rows))
    return tmp_path / "bench"


@pytest.fixture
def config(tiny, tokenizer, tmp_path, data_root):
    """Two methods on a random model that reads bytes."""
    sizes = {"vocab_size": 300, "max_position_embeddings": 512, "eos_token_id": 0}
    base = tiny(**sizes).save_pretrained(tmp_path / "base", files_from=tokenizer)
    return TraceConfig(
        data_root=data_root,
        model=base,
        out=tmp_path / "out",
        methods=("expansion", "lora"),
        tasks=tuple(LEARNT),
        limit=4,
        new_blocks=2,
        epochs=10,
        batch_size=4,
        seq_len=64,
        device="cpu",
    )


@pytest.mark.parametrize(
    "task, said, answer, score",
    [
        ("C-STANCE", "态度:A", "A", 1),
        ("C-STANCE", "支持", "A", 0),
        ("FOMC", " B. hawkish", "B", 1),
        ("FOMC", "hawkish", "B", 0),
        ("FOMC", "", "B", 0),
        ("ScienceQA", "B\nA clause is", "B\nBecause it is", 1),
        ("ScienceQA", "A", "B\nA clause", 0),
        ("NumGLUE-cm", " 1,000.0 ", "1000", 1),
        ("NumGLUE-cm", "friday.", "Friday", 1),
        ("NumGLUE-ds", "21.6", "21.62", 0),
        ("NumGLUE-ds", "6 eyes", "6", 0),
        ("NumGLUE-ds", "", "6", 0),
        ("MeetingBank", "the bill was PASSED", "The bill passed.", 2 * 3 / 8),
        ("MeetingBank", "", "The bill passed.", 0),
        ("MeetingBank", "größer 你好", "Größer, 你们", 2 * 2 / 7),
        ("Py150", "x = <NUM_LIT:10>", "x = 10", 1),
        ("Py150", "return <STR_LIT>0", "return <NUM_LIT>", 1),
        ("Py150", "abcd", "acbd", 2 * 3 / 8),
    ],
)
def test_answers_are_graded(task, said, answer, score):
    assert trace.TASKS[task].grade(said, Row("?", answer)) == pytest.approx(score, abs=1e-12)


def test_similarity_is_that_of_the_longest_common_subsequence():
    """By the quadratic recurrence, of sequences around the width of a machine word, too."""
    random.seed(0)
    for size in (0, 1, 5, 63, 64, 65, 130):
        a, b = random.choices("abcd", k=size), random.choices("abcd", k=70)
        lengths = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = max(lengths[i, j + 1], lengths[i + 1, j])
                lengths[i + 1, j + 1] = lengths[i, j] + 1 if x == y else longer
        assert trace.similarity(a, b) == 2 * lengths[-1, -1] / (len(a) + len(b))


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    random.seed(0)
    for _ in range(20):
        said, answer = (" ".join(random.choices(WORDS, k=random.randint(1, 90))) for _ in "ab")
        expected = scorer.score(answer, said)["rougeL"].fmeasure
        assert trace.rouge_l(said, Row("?", answer)) == pytest.approx(expected, rel=1e-12)


def test_sari_by_hand():
    """Source "a b c", output "a b d", reference "a d", n = 1..4, where 0 / 0 is 1."""
    added = mean_f1(precision=[1, 0, 0, 1], recall=[1, 0, 1, 1])  # d; b d and a d; a b d
    kept = mean_f1(precision=[1 / 2, 0, 1, 1], recall=[1, 1, 1, 1])  # a of a, b; none of a b
    deleted = (1 + 1 + 1 + 1) / 4  # c; b c; a b c
    expected = (added + kept + deleted) / 3
    assert trace.sari("A b d", Row("a b c", "a d")) == pytest.approx(expected, rel=1e-12)
    assert trace.sari("a d", Row("a b c", "a d")) == 1
    copied = (mean_f1([1, 1, 1, 1], [0, 0, 1, 1]) + mean_f1([1 / 3, 0, 0, 1], [1] * 4) + 1) / 3
    assert trace.sari("a b c", Row("a b c", "a d")) == pytest.approx(copied, rel=1e-12)


def mean_f1(precision, recall):
    p, r = sum(precision) / 4, sum(recall) / 4
    return 2 * p * r / (p + r)


def test_op_and_bwt_by_hand():
    matrix = [[0.5, 0.1, 0.0], [0.25, 0.75, 0.125], [0.25, 0.5, 1.0]]
    assert overall_performance(matrix) == (0.25 + 0.5 + 1.0) / 3
    assert backward_transfer(matrix) == ((0.25 - 0.5) + (0.5 - 0.75)) / 2
    assert overall_performance([[0.5]]) == 0.5 and backward_transfer([[0.5]]) is None
    for wrong in ([], [[0.5, 0.1]], [[0.5, 0.1], [0.2]]):
        with pytest.raises(ValueError, match=r"a score of each task after each expected, got"):
            backward_transfer(wrong)


def test_scores_ask_the_first_rows(data_root):
    def complete(prompts, *, max_new_tokens, stop):
        assert (max_new_tokens, stop) == (16, ("\n",))
        assert all(prompt.endswith("Answer:") for prompt in prompts)
        return ["7", "8", "7", "7"]

    found = scores(data_root, "NumGLUE-cm", complete, limit=4)
    assert found == {"score": 0.75, "score_stderr": 0.25, "n": 4}


def test_bad_input_is_said_in_one_line(data_root, config):
    with pytest.raises(ValueError, match=r"a TRACE task as NumGLUE-ds or NumGLUE-cm expected, got"):
        scores(data_root, "NumGLUE", None)
    with pytest.raises(FileNotFoundError, match=r"20Minuten/test.json: rows of prompt and answer"):
        scores(data_root, "20Minuten", None)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        replace(config, limit=0)
    with pytest.raises(ValueError, match="each once, expected, got"):
        replace(config, tasks=("FOMC", "FOMC"))
    file = data_root / "trace" / "FOMC" / "train.json"
    for rows, said in (
        ([], "train.json: rows of prompt and answer expected, got none"),
        ([{"prompt": "a", "answer": 1}], "row 1: prompt and answer as texts expected, got"),
    ):
        file.write_text(json.dumps(rows))
        with pytest.raises(ValueError, match=said):
            sequence(config)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"FOMC/train.json: rows of prompt and answer"):
        sequence(config)
    assert not config.out.exists()


def test_answers_alone_are_learnt_after_what_evaluation_asks(config, data_root):
    recipe._prepare(config, config.model, "FOMC")
    tokens = open_rows(config.out / "data" / "FOMC", "train", 300, config.seq_len, "bfd").tokens
    tokenizer = Completer(Llama.from_pretrained(config.model), config.model).tokenizer
    asked = [row.prompt for row in trace.read_rows(data_root, "FOMC", "train")]
    starts = [0, *tokens.ends[:-1]]
    for start, end in zip(starts, tokens.ends, strict=True):
        ids, counted = tokens.ids[start:end], tokens.counted[start:end]
        prompt, answer = (tokenizer.decode(ids[counted == x].tolist(), False) for x in (0, 1))
        assert answer == "B<eos>" and any(text.endswith(prompt) for text in asked)
        assert ids[counted == 0].tolist() == tokenizer.encode(prompt).ids
        assert len(ids) <= config.seq_len


def test_lora_sees_the_documents_that_our_model_sees(config):
    """Its loss on packed rows is ours."""
    from transformers import AutoModelForCausalLM

    recipe._prepare(config, config.model, "FOMC")
    rows = open_rows(config.out / "data" / "FOMC", "train", 300, config.seq_len, "bfd")
    batch = rows.collate([rows.row(place) for place in range(3)])
    assert batch.documents > 3
    ours = Llama.from_pretrained(config.model).loss(
        batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens
    )
    stock = Stock(AutoModelForCausalLM.from_pretrained(config.model))
    theirs = stock.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


def test_three_tasks_are_learnt_and_nothing_is_run_twice(config, monkeypatch):
    for method in config.methods:
        monkeypatch.setitem(recipe.RATES, method, 5e-3)
    results = sequence(config)
    base = [results["base"][task]["score"] for task in config.tasks]
    for method in config.methods:
        found = results["methods"][method]
        matrix = np.array(found["matrix"])
        learnt = matrix.diagonal()
        assert (learnt > base).all(), (method, matrix)
        assert found["op"] == pytest.approx(matrix[2].mean(), rel=1e-12)
        assert found["bwt"] == pytest.approx((matrix[2] - learnt)[:2].mean(), rel=1e-12)
        assert f"| {method}" in (config.out / "results.md").read_text()
    assert read_json(config.out / "results.json") == results
    _check_earlier_blocks_stay(config)

    for name in ("train", "adapt", "Completer", "expand_checkpoint", "prepare"):
        monkeypatch.setattr(recipe, name, None)
    assert sequence(config) == results
    with pytest.raises(ValueError, match=r"setting.json: limit 3 expected, got 4; name another"):
        sequence(replace(config, limit=3))


def _check_earlier_blocks_stay(config):
    """The second task's model has two blocks more, which are new, and all of the first one's."""
    finals = [config.out / f"expansion/{stage}/run/final" for stage in ("1-FOMC", "2-NumGLUE-cm")]
    configs = [Checkpoint(path).config for path in (config.model, *finals)]
    assert np.diff([c.num_hidden_layers for c in configs]).tolist() == [2, 2]
    assert [len(c.new_blocks) for c in configs] == [0, 2, 2]
    first, second = (Llama.from_pretrained(path).state_dict().values() for path in finals)
    assert all(any(torch.equal(one, other) for other in second) for one in first)
