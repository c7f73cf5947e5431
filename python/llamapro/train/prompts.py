"""What samples of a model go on from: the beginning of a sequence, texts, or questions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from llamapro.data.chat import ChatTemplate
from llamapro.data.sources import open_corpus
from llamapro.data.tokens import DataError
from llamapro.model_files import read_config
from llamapro.tokenizer import load_tokenizer, stop_ids, tokenizer_fingerprint

PREFIX = 16  # tokens of a text that a sample goes on from
Sample = tuple[list[int], np.ndarray | None]  # ids, and which of them are targets, None for all


def open_prompts(path: Path, sources, chat: bool, bos_token: str | None, seq_len: int):
    """The prompts of a model directory's samples, see `replay`."""
    has_one = (path / "tokenizer.json").exists()
    tokenizer = load_tokenizer(path) if has_one or sources or chat or bos_token else None
    common = {"stop": stop_ids(path, tokenizer)}
    common["fingerprint"] = tokenizer_fingerprint(path) if tokenizer else None
    if chat:
        return Dialogues(**common, path=path, questions=_questions(sources), seq_len=seq_len)
    if sources:
        return Prefixes(**common, prompts=_prefixes(sources, tokenizer, seq_len))
    begin = _begin(path, tokenizer, bos_token)
    common["stop"] = sorted({*common["stop"], begin})  # as another sample would begin
    return Prefixes(**common, prompts=[[begin]])


def _begin(path: Path, tokenizer, name: str | None) -> int:
    """The id of the token that samples begin with."""
    config = read_config(path)
    if name is None:
        found, what = config.bos_token_id, "bos_token_id in config.json"
    else:
        found = tokenizer and tokenizer.token_to_id(name)
        what = f"{name!r} in the vocabulary"
    if found is None or not 0 <= found < config.vocab_size:
        raise DataError(
            f"{path}: {what} expected, got {found}: name the token that samples begin"
            " with, or give texts to go on from"
        )
    return found


def _prefixes(prompts, tokenizer, seq_len: int) -> list[list[int]]:
    """The first tokens of every `seq_len` of the texts, after what the tokenizer begins with."""
    if seq_len <= 2 * PREFIX:
        raise DataError(f"samples of more than {2 * PREFIX} tokens expected, got {seq_len}")
    corpus = open_corpus(prompts)
    if corpus.is_chat:
        raise DataError(
            f"texts expected, got conversations in {[*map(str, prompts)]}; ask for chat"
        )
    marked = tokenizer.encode("a")
    begin = [
        i for i, special in zip(marked.ids, marked.special_tokens_mask, strict=True) if special
    ]
    found = []
    for document in corpus.documents():
        ids = tokenizer.encode(document.read(), add_special_tokens=False).ids
        pieces = (ids[at : at + PREFIX] for at in range(0, len(ids), seq_len))
        found += [[*begin, *piece] for piece in pieces if len(piece) == PREFIX]
    if not found:
        raise DataError(f"texts of {PREFIX} tokens or more expected in {[*map(str, prompts)]}")
    return found


def _questions(prompts) -> list[str]:
    """What users say first, in conversations, or each text."""
    if not prompts:
        return []
    corpus = open_corpus(prompts)
    read = (document.read() for document in corpus.documents())
    if corpus.is_chat:
        read = (next((m["content"] for m in turns if m["role"] == "user"), "") for turns in read)
    found = [text for text in read if text.strip()]
    if not found:
        raise DataError(f"a question expected, got none in {[*map(str, prompts)]}")
    return found


@dataclass
class Prefixes:
    """Samples that go on from some tokens each."""

    stop: list[int]
    fingerprint: str | None  # of the tokenizer
    prompts: list[list[int]]

    @property
    def said(self) -> list:
        return self.prompts

    def draw(self, places: Iterable[int], sample: Callable) -> list[Sample]:
        """The samples at these places; sample(prompts) continues lists of ids."""
        asked = [self.prompts[place % len(self.prompts)] for place in places]
        return [(ids, None) for ids in sample(asked)]


@dataclass
class Dialogues:
    """Samples that are a question and its answer, by the model's chat template."""

    stop: list[int]
    fingerprint: str
    path: Path
    questions: list[str]  # sampled where there are none
    seq_len: int

    @property
    def said(self) -> list:
        return [self.template.template, *self.questions]

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.of(self.path)

    def draw(self, places: Iterable[int], sample: Callable) -> list[Sample]:
        """As of `Prefixes`."""
        asked = self.questions and [self.questions[i % len(self.questions)] for i in places]
        asked = asked or self._ask(len(places), sample)
        prompts = [self.template.prompt_ids([_user(text)]) for text in asked if text.strip()]
        prompts = [prompt for prompt in prompts if len(prompt) < self.seq_len]
        answered = zip(prompts, sample(prompts) if prompts else [], strict=True)
        return [(ids, np.arange(len(ids)) >= len(prompt)) for prompt, ids in answered]

    def _ask(self, count: int, sample: Callable) -> list[str]:
        """Questions by the model itself, from where the template puts a user's."""
        mark = "\N{SYMBOL FOR SUBSTITUTE}"
        before, _, _ = self.template.render([_user(mark)]).partition(mark)
        tokenizer = self.template.tokenizer
        begin = tokenizer.encode(before, add_special_tokens=False).ids
        return [tokenizer.decode(row[len(begin) :]) for row in sample([begin] * count)]


def _user(text: str) -> dict:
    return {"role": "user", "content": text}
