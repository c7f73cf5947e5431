"""Conversations: the ids that transformers gives, and which of them are targets."""

import json
from pathlib import Path

import numpy as np
import pytest
from llamapro.data import prepare as module
from llamapro.data.chat import ChatTemplate
from llamapro.data.prepare import prepare
from llamapro.data.sources import open_corpus
from llamapro.data.tokens import DataError

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent / "templates"
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Of each template its special tokens, what an answer becomes that is a target, and where
# `{% generation %}` goes: (from, to), in which TARGET is what it stands around.
TURN = "'<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>{}\\n' }}}}"
MARKED = """'<|im_start|>' + message.role + '\\n' }}}}{{% if message.role == 'assistant' -%}}
{{% generation %}}{{{{- message.content + '<|im_end|>' }}}}{{% endgeneration %}}{{% else %}}
{{{{- message.content + '<|im_end|>' }}}}{{% endif %}}{{{{- '\\n' }}}}"""
LLAMA2 = "{{ ' ' + content.strip() + ' ' + eos_token }}"
LLAMA3 = "message['content'] | trim + '<|eot_id|>' %}"
TEMPLATES = {
    "smollm2": (
        CHATML,
        "{}<|im_end|>",
        "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
    "llama2": (
        *(LLAMA, " {} </s>", LLAMA2),
        "{% generation %}" + LLAMA2 + "{% endgeneration %}",
    ),
    "llama3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        *("{}<|eot_id|>", "\\n\\n' + " + LLAMA3, "\\n\\n' %}{% set end = " + LLAMA3),
    ),
    "mistral": (
        *(LLAMA, " {}</s>", '{{- " " + message["content"] + eos_token }}'),
        '{% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}',
    ),
    "chatml": (CHATML, "{}<|im_end|>", TURN.format(""), MARKED.format()),
    "qwen": (CHATML, "{}<|im_end|>", TURN.format("' + '"), MARKED.format()),
}
CONVERSATIONS = [
    [("user", "How are you?"), ("assistant", "Well, and you?")],
    [
        *(
            ("system", "Be brief."),
            ("user", "One  word\nfor é漢?"),
            ("assistant", "uni\n  code é漢"),
        ),
        *(("user", "Thank you. "), ("assistant", "2. <b>Welcome</b>"), ("user", "Bye")),
    ],
]
CONVERSATIONS = [[{"role": r, "content": c} for r, c in turns] for turns in CONVERSATIONS]


def answers(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def template(name, marked=False):
    text = (FOLDER / f"{name}.jinja").read_text()
    if not marked:
        return text
    before, after = TEMPLATES[name][2:]
    assert before in text
    text = text.replace(before, after)
    if name == "llama3":  # its turns are put together in a variable
        turn = "{% if message['role'] == 'assistant' %}{% generation %}{{ end }}"
        turn += "{% endgeneration %}{% else %}{{ end }}{% endif %}"
        text = text.replace("{{ content }}", "{{ content }}" + turn)
    return text


@pytest.fixture
def model(tmp_path):
    """Builds a model directory with a template, and transformers' tokenizer of the same."""

    def build(text, special=CHATML, processor=None):
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        if processor:
            tokenizer.post_processor = processor
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        learned = "assistant user system Well, and you?\n    x"
        tokenizer.train_from_iterator([learned] * 3, trainer)
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "config.json").write_text('{"eos_token_id": 2}')
        (directory / "tokenizer_config.json").write_text(json.dumps(special))
        (directory / "chat_template.jinja").write_text(text)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(directory / "tokenizer.json"), chat_template=text, **special
        )
        return directory, theirs

    return build


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_targets(model, name, messages):
    """The ids are those of transformers; the targets are the answers and what ends them."""
    special, target = TEMPLATES[name][:2]
    directory, theirs = model(template(name), special)
    ours = ChatTemplate.of(directory)
    ids, mask = ours.encode(messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=False)
    asked = {"add_generation_prompt": True, "return_dict": False}
    assert ours.prompt_ids(messages[:-1]) == theirs.apply_chat_template(messages[:-1], **asked)
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1)
    said = [theirs.decode([ids[i] for i in run]) for run in runs if mask[run[0]]]
    assert said == [target.format(answer) for answer in answers(messages)]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["plain", "turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_marks_generation(model, name, messages):
    """It gives the mask of transformers, and that of the same template without marks."""
    special = TEMPLATES[name][0]
    directory, theirs = model(template(name, marked=True), special)
    ids, mask = ChatTemplate.of(directory).encode(messages)
    theirs = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids and theirs["assistant_masks"] == mask.tolist()
    plain = ChatTemplate.of(model(template(name), special)[0]).encode(messages)
    assert plain[0] == ids and plain[1].tolist() == mask.tolist()


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_start_of_an_answer_is_a_target(model, trim):
    """Code that is indented is learned with its first indentation, as the token holds the line's
    end before it; also where the tokenizer leaves white space out of a token's place."""
    processor = tokenizers.processors.ByteLevel(trim_offsets=trim)
    directory, theirs = model(template("chatml"), processor=processor)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "    x  y"}]
    ids, mask = ChatTemplate.of(directory).encode(messages)
    assert "ĊĠĠĠ" in theirs.convert_ids_to_tokens(ids)
    said = [i for i, target in zip(ids, mask, strict=True) if target]
    assert theirs.decode(said) == "\n    x  y<|im_end|>"


def test_a_special_token_in_a_message_is_one(model):
    directory, theirs = model(template("chatml"))
    messages = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    ids, _ = ChatTemplate.of(directory).encode(messages)
    assert ids == theirs.apply_chat_template(messages, return_dict=False)
    assert ids.count(SPECIAL.index("<|im_end|>")) == 3


def test_where_the_template_is_found(model):
    directory, _ = model("")
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="model: a chat template expected"):
        ChatTemplate.of(directory)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for written, special in (
        ("yes", "<s>"),
        (named, {"content": "<s>", "lstrip": False}),
    ):
        config = {"chat_template": written, "bos_token": special, "sep_token": None}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        found = ChatTemplate.of(directory)
        assert found.template == "yes" and found.special_tokens == {"bos_token": "<s>"}


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_conversations_become_token_files(model, tmp_path):
    directory, _ = model(template("chatml"))
    rows = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!" * i}]
        for i in range(1, 30)
    ]
    file = rows_file(tmp_path / "chat.jsonl", [{"messages": m, "n": 1} for m in rows])
    meta = prepare([file], directory, tmp_path / "out", heldout=0.3)
    assert (
        meta["kind"] == "chat" and meta["documents"]["train"] + meta["documents"]["heldout"] == 29
    )
    assert meta["sources"][0]["rows"] == "messages" and meta["sources"][0]["documents"] == 29
    encoded = [ChatTemplate.of(directory).encode(m) for m in rows]
    expected = {tuple(ids): mask.tolist() for ids, mask in encoded}
    order = [tuple(ids) for ids, _ in encoded]
    found = []
    for part in ("train", "heldout"):
        ids = np.fromfile(tmp_path / "out" / f"{part}.bin", dtype=meta["dtype"])
        loss = np.fromfile(tmp_path / "out" / f"{part}.bin.loss", dtype=np.uint8)
        ends = np.fromfile(tmp_path / "out" / f"{part}.bin.index", dtype="<u8").astype(int)
        assert len(ids) == len(loss) == ends[-1] == meta["tokens"][part]
        cut = [np.split(values, ends)[:-1] for values in (ids, loss)]
        documents = [tuple(d.tolist()) for d in cut[0]]
        assert documents == sorted(documents, key=order.index), "in the order of the rows"
        assert [expected[d] for d in documents] == [mask.tolist() for mask in cut[1]]
        found += documents
    assert sorted(found) == sorted(order)


def test_a_stopped_one_goes_on(model, tmp_path, monkeypatch):
    directory, _ = model(template("chatml"))
    rows = [{"prompt": f"{i}?", "completion": f"{i}!" * (i % 7)} for i in range(100)]
    file = rows_file(tmp_path / "chat.jsonl", rows)
    prepare([file], directory, tmp_path / "calm")
    monkeypatch.setattr(module, "BATCH", 500)
    encode, given = ChatTemplate.encode_all, []

    def stop(chat, documents):
        given.append(len(documents))
        if len(given) == 5:
            raise KeyboardInterrupt
        return encode(chat, documents)

    monkeypatch.setattr(ChatTemplate, "encode_all", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([file], directory, tmp_path / "out")
    prepare([file], directory, tmp_path / "out")
    assert len(given) > 6 and sum(given) - given[4] == 100
    calm, out = (
        {f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("calm", "out")
    )
    assert calm == out and len(calm) == 7


def test_real_conversations(real_data, model, tmp_path):
    directory, theirs = model(template("smollm2"))
    for name in ("alpaca_en_demo.json", "dolly_hhrlhf_small.jsonl"):
        file = real_data / "sft" / name
        meta = prepare([file], directory, tmp_path / name, heldout=0)
        messages = [document.read() for document in open_corpus([file]).documents()]
        ids = [theirs.apply_chat_template(turns, return_dict=False) for turns in messages]
        written = np.fromfile(tmp_path / name / "train.bin", dtype=np.uint16)
        assert meta["documents"]["train"] == len(messages) and meta["duplicates"] == 0
        assert written.tolist() == [token for document in ids for token in document]
        loss = np.fromfile(tmp_path / name / "train.bin.loss", dtype=bool)
        answers = "".join(turns[-1]["content"] + "<|im_end|>" for turns in messages)
        assert theirs.decode(written[loss]) == answers


def turns(*roles):
    return [{"role": role, "content": "x"} for role in roles]


REWRITES = (
    "{% for m in messages %}{{ m.role }}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
)
REFUSES = "{{ raise_exception('no such luck') }}"


@pytest.mark.parametrize(
    "messages, text, message",
    [
        ([], "", "a conversation expected, got no message"),
        (turns("user", "user"), "", "message 2: role 'assistant' expected, got 'user'"),
        (turns("assistant", "user"), "", "message 1: role 'user' expected, got 'assistant'"),
        (turns("system", "assistant"), "", "message 2: role 'user' expected, got 'assistant'"),
        (turns("user", "tool"), "", "message 2: role 'assistant' expected, got 'tool'"),
        (turns("user", "assistant", "system"), "", "message 3: role 'user' expected, got 'sys"),
        (turns("user"), "", "a turn of the assistant expected"),
        ([{"role": "user", "content": None}], "", "message 1: a text as content expected, got N"),
        (turns("user", "assistant"), REFUSES, "the chat template refuses it: no such luck"),
        (turns("user", "assistant"), "{{ messages[7].role }}", "the chat template refuses it"),
        (turns("user", "assistant"), "{% for %}", "the chat template refuses it"),
        (turns("user", "assistant"), "fixed", "the chat template marks no word of the assistant"),
        (turns(*["user", "assistant"] * 2), REWRITES, "message 2: .* rewrites earlier turns"),
    ],
)
def test_bad_conversations(model, tmp_path, messages, text, message):
    directory, _ = model(text or template("chatml"))
    rows = [*([] if text else [turns("user", "assistant")]), messages]
    file = rows_file(tmp_path / "c.jsonl", [{"messages": row} for row in rows])
    with pytest.raises(DataError, match=f"c.jsonl, row {len(rows)}: {message}"):
        prepare([file], directory, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
