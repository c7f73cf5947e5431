"""Talking in a terminal, by the model's own chat template."""

import io
import sys

import pytest
import torch
from llamapro.data.tokens import DataError
from llamapro.storage import write_json
from stock_models import SPECIAL

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")
pytest.importorskip("transformers")
chat = pytest.importorskip("llamapro.chat")


@pytest.fixture
def dialogue(tiny, chat_path):
    return chat.Dialogue(tiny(eos_token_id=None), chat_path, system="w1 w2", max_new_tokens=8)


def answers(monkeypatch, model, *texts):
    """The model's next answers, a list of ids each; they end as `stream` ends them."""
    asked, coming = [], [[SPECIAL.index("<end>") if w == "<end>" else w for w in t] for t in texts]

    def stream(given, tokens, count, stop, **sampling):
        asked.append(tokens[0].tolist())
        for i in coming.pop(0):
            yield torch.tensor([[i]])
            if i in stop:
                return

    monkeypatch.setattr(chat, "stream", stream)
    return asked


def test_the_history_is_what_the_template_makes_of_it(dialogue, monkeypatch):
    asked = answers(monkeypatch, dialogue.model, [10, 11, "<end>"], [12, "<end>"])
    assert "".join(dialogue.answer("w3")).split() == ["w5", "w6"]
    list(dialogue.answer("w4"))
    text = dialogue.tokenizer.decode(asked[1], skip_special_tokens=False)
    assert text == (
        "<system> w1 w2 <end> <user> w3 <end> <assistant> w5 w6 <end> <user> w4 <end> <assistant>"
    )
    assert [m["role"] for m in dialogue.messages[-2:]] == ["user", "assistant"]
    assert dialogue.messages[-1]["content"] == "w7"


def test_answers_of_the_model_itself_are_what_generate_gives(dialogue, chat_path):
    said = "".join(dialogue.answer("w3 w9"))
    ids = dialogue.template.prompt_ids(dialogue.messages[:-1])
    tokens = torch.tensor([ids])
    whole = dialogue.model.generate(tokens, 8, stop=[SPECIAL.index("<end>")])
    assert said == dialogue.tokenizer.decode(whole[0, len(ids) :].tolist())


def test_what_no_longer_fits_is_forgotten_from_the_oldest_on(dialogue, monkeypatch):
    """A context of 64 tokens, of which 8 are for the answer; the system's words stay."""
    asked = answers(monkeypatch, dialogue.model, *[[20, "<end>"]] * 8)
    for i in range(8):
        list(dialogue.answer(f"w{i} " * 8))
    assert all(len(ids) <= 64 - 8 for ids in asked)
    text = dialogue.tokenizer.decode(asked[-1], skip_special_tokens=False)
    assert text.startswith("<system> w1 w2 <end> <user> w") and "w7 w7" in text
    assert "w0" not in text


def test_a_question_beyond_the_context_is_refused_and_forgotten(dialogue):
    before = [*dialogue.messages]
    with pytest.raises(ValueError, match="a question of at most 56 tokens expected, got 69"):
        list(dialogue.answer("w3 " * 62))
    assert dialogue.messages == before


def test_ctrl_c_stops_an_answer_and_not_the_program(dialogue, monkeypatch, capsys):
    def stream(*_, **__):
        yield torch.tensor([[10]])
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w3\n\n/new\nw4\n"))
    chat.talk(dialogue)
    assert capsys.readouterr().out == "w5 ...\nw5 ...\n"
    assert dialogue.messages[1:] == [
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ]


def test_what_ends_an_answer(chat_path, dialogue):
    assert dialogue.stop == [1]
    write_json(chat_path / "generation_config.json", {"eos_token_id": [4, 7]})
    assert chat.stop_ids(chat_path, dialogue.tokenizer) == [1, 4, 7]


def test_the_command_line(chat_path, monkeypatch, capsys):
    cli = pytest.importorskip("llamapro.cli")
    texts = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("w3 w4\n"))
        cli.main(
            ["chat", str(chat_path), "--max-new-tokens", "6", "--seed", "5", "--dtype", "float32"]
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()


def test_a_model_without_a_template_is_refused_before_it_is_loaded(chat_path, monkeypatch):
    cli = pytest.importorskip("llamapro.cli")
    monkeypatch.setattr("llamapro.inference._load", None)
    (chat_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="a chat template expected"):
        cli.chat(chat_path)
