"""A base's own samples: what is in them, that they go on after a stop, and what is refused."""

import json

import numpy as np
import pytest
import torch
from llamapro import Llama, expand
from llamapro.data.tokens import DataError, are_samples, load_tokens
from llamapro.generate import continue_all
from llamapro.train import replay as module
from llamapro.train.replay import GRAM, repetition, replay
from stock_models import SPECIAL

BEGIN, END = 1, 2
FILES = ("train.bin", "train.bin.index", "heldout.bin", "heldout.bin.index", "meta.json")


@pytest.fixture
def base(tiny, tmp_path):
    return tiny(bos_token_id=BEGIN).save_pretrained(tmp_path / "base")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "MOST_ROWS", 16)


def sampled(base, out, tokens=1500, **settings):
    return replay(base, out, **{"tokens": tokens, "seq_len": 24, "dtype": "float32", **settings})


def documents(data, part="train"):
    tokens = load_tokens(data, part, 61)
    return np.split(tokens.ids.astype(int), tokens.ends[:-1].astype(int))


def test_samples_begin_and_end_as_sequences_do(base, tmp_path):
    meta = sampled(base, tmp_path / "data")
    rows = documents(tmp_path / "data")
    for row in rows:
        assert row[0] == BEGIN and 2 < len(row) <= 24
        assert row[-1] in (BEGIN, END) or len(row) == 24
        assert not {BEGIN, END} & {*row[1:-1]}
    assert are_samples(tmp_path / "data") and meta["tokens"]["train"] >= 1500
    aside = documents(tmp_path / "data", "heldout")
    assert 0.05 < len(aside) / len(rows) < 0.2
    said, every = meta["samples"], [*rows, *aside]
    assert said["samples"] == len(every)
    assert said["mean_length"] == np.mean([*map(len, every)])
    grams = [tuple(row[i : i + GRAM]) for row in every for i in range(len(row) - GRAM + 1)]
    assert said["distinct_grams"] == len({*grams}) / len(grams)


def test_tokens_are_drawn_as_the_model_says(tiny):
    """Of each token, as many as its probability, to five standard deviations."""
    model, count = tiny(initializer_range=0.5), 20_000
    probabilities = model(torch.tensor([[BEGIN]]))[0, 0].div(0.7).softmax(-1).double()
    generator = torch.Generator().manual_seed(0)
    how = {"stop": [END], "temperature": 0.7, "generator": generator}
    rows = continue_all(model, [[BEGIN]] * count, 2, **how)
    counts = torch.bincount(torch.tensor(rows)[:, 1], minlength=61)
    deviation = (count * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - count * probabilities).abs() <= 5 * deviation + 1).all()


def test_prompts_of_any_length_are_continued_as_each_alone(tiny):
    model = tiny()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, END, 14], [15, 16], [17] * 20, [18, 19]]
    rows = continue_all(model, prompts, 20, stop=[3, 4])
    for prompt, row in zip(prompts, rows, strict=True):
        alone = model.generate(torch.tensor([prompt]), 20 - len(prompt), stop=[3, 4])[0].tolist()
        assert row == alone
    with pytest.raises(ValueError, match="a prompt of 1 to 20 tokens expected, got 0"):
        continue_all(model, [[], [1, 2, 3]], 20, stop=[])


def test_a_stopped_one_goes_on_as_if_it_had_not(base, tmp_path, monkeypatch):
    sampled(base, tmp_path / "whole", tokens=2000)
    draw = module.Sampler.draw

    def stopped(self, batch):
        if batch == 2:
            raise KeyboardInterrupt
        return draw(self, batch)

    monkeypatch.setattr(module.Sampler, "draw", stopped)
    with pytest.raises(KeyboardInterrupt, match="goes on from here"):
        sampled(base, tmp_path / "data", tokens=2000)
    drawn = []
    monkeypatch.setattr(module.Sampler, "draw", lambda s, n: drawn.append(n) or draw(s, n))
    sampled(base, tmp_path / "data", tokens=2000)
    assert drawn[0] == 2 and len(drawn) > 2
    for name in FILES:
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_seed_decides(base, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sampled(base, tmp_path / name, tokens=400, seed=seed)
    a, b, c = ((tmp_path / name / "train.bin").read_bytes() for name in "abc")
    assert a == b != c


def test_of_an_expanded_model_the_base_is_sampled(tiny, base, tmp_path):
    model = expand(Llama.from_pretrained(base), new_blocks=2)
    torch.nn.init.normal_(model.blocks[model.config.new_blocks[0]].down_proj.weight)
    sampled(base, tmp_path / "of base", tokens=400)
    sampled(model.save_pretrained(tmp_path / "expanded"), tmp_path / "of expanded", tokens=400)
    a, b = ((tmp_path / name / "train.bin").read_bytes() for name in ("of base", "of expanded"))
    assert a == b


def test_samples_go_on_from_texts(chat_path, tmp_path, monkeypatch):
    monkeypatch.setattr("llamapro.train.prompts.PREFIX", 4)
    words = [f"w{i % 50}" for i in range(24 * 40 + 3)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    sampled(chat_path, tmp_path / "data", prompts=[tmp_path / "text.txt"])
    ids = [i % 50 + len(SPECIAL) for i in range(24 * 40 + 3)]
    starts = {tuple(ids[at : at + 4]) for at in range(0, 24 * 40, 24)}
    assert {tuple(row[:4]) for row in documents(tmp_path / "data")} <= starts


@pytest.mark.parametrize("asked", ["by the model", "by a file"])
def test_of_chat_the_answers_alone_are_targets(asked, chat_path, tmp_path):
    prompts = []
    if asked == "by a file":
        turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
        prompts = [tmp_path / "rows.jsonl"]
        prompts[0].write_text(json.dumps({"messages": turns}) + "\n")
    meta = sampled(chat_path, tmp_path / "data", prompts=prompts, chat=True, seq_len=40)
    tokens = load_tokens(tmp_path / "data", "train", 61)
    assert meta["kind"] == "chat" and tokens.counted is not None
    user, assistant = SPECIAL.index("<user>"), SPECIAL.index("<assistant>")
    starts = [0, *tokens.ends[:-1].astype(int)]
    for start, end in zip(starts, tokens.ends.astype(int), strict=True):
        ids, counted = tokens.ids[start:end].tolist(), tokens.counted[start:end]
        answer = ids.index(assistant) + 1
        assert ids[0] == user and not counted[:answer].any() and counted[answer:].all()
        if asked == "by a file":
            assert ids[1:3] == [len(SPECIAL) + 1, len(SPECIAL) + 2]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"tokens": 0}, "a token or more.* got 0, 24"),
        ({"seq_len": 1}, "samples of at least two"),
        ({"temperature": 0.0}, "a temperature above 0 expected"),
        ({"bos_token": "<s>"}, "tokenizer.json expected"),
        ({"prompts": ["nowhere"]}, "tokenizer.json expected"),
        ({"chat": True}, "tokenizer.json expected"),
    ],
)
def test_bad_settings(base, tmp_path, settings, said):
    with pytest.raises((DataError, FileNotFoundError), match=said):
        sampled(base, tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


def test_a_base_without_a_beginning(tiny_path, chat_path, tmp_path):
    with pytest.raises(DataError, match=r"bos_token_id in config.json expected, got None"):
        sampled(tiny_path, tmp_path / "data")
    with pytest.raises(DataError, match="'<begin>' in the vocabulary expected"):
        sampled(chat_path, tmp_path / "data", bos_token="<begin>")


def test_degenerate_samples_are_refused(tiny, tmp_path):
    model = tiny(bos_token_id=BEGIN)
    with torch.no_grad():
        model.norm.mul_(1e4)  # the most probable token is certain
    path = model.save_pretrained(tmp_path / "certain")
    with pytest.raises(DataError, match=r"degenerate: of 16 samples 1[56] say nothing, or repeat"):
        sampled(path, tmp_path / "data")


def test_repetition():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 13) == 0.9


def test_what_exists_is_left(base, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(FileExistsError):
        sampled(base, tmp_path / "data")
