"""Conversations as a model's own template writes them, and which of their tokens are targets."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamapro.data.sources import needed
from llamapro.data.tokens import DataError
from llamapro.model_files import MAX_COMPANION_BYTES, file_in, read_object
from llamapro.storage import one_line, shown
from llamapro.tokenizer import load_tokenizer

TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # that a template may name
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a model directory, rendered by transformers, and its tokenizer.

    Special tokens are recognized wherever they stand, as transformers does it: also where the
    content of a message looks like one.
    """

    tokenizer: object
    template: str
    special_tokens: dict[str, str]

    @classmethod
    def of(cls, model_directory) -> "ChatTemplate":
        """Raises DataError when the directory has no chat template."""
        from tokenizers import processors

        directory = Path(model_directory)
        config, special = _tokenizer_config(directory)
        tokenizer = load_tokenizer(directory)
        # It would add special tokens, which the template writes, and cut white space off offsets.
        tokenizer.post_processor = processors.Sequence([])
        return cls(tokenizer, _template(directory, config), special)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The text of a conversation. Raises DataError when the template refuses it."""
        return self._render(messages, add_generation_prompt)[0]

    def _render(self, messages, prompt=False, spans=False) -> tuple[str, list[tuple[int, int]]]:
        templates = needed("transformers.utils.chat_template_utils")
        try:
            (text,), found = templates.render_jinja_template(
                conversations=[_without_none(messages)],
                chat_template=self.template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=spans,
                **self.special_tokens,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise DataError(f"the chat template refuses it: {one_line(error)}") from None
        return text, found[0] if spans else []

    def targets(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text, and what of it is targets, as (start, end) in characters.

        That is what `{% generation %}` of the template says. Without, it is each turn of the
        assistant: its words and what ends the turn, but no white space after that. Raises DataError
        for turns that are out of order, and where the text up to a turn does not begin the whole,
        as in a template that rewrites earlier turns.
        """
        check_turns(messages)
        if GENERATION.search(self.template):
            text, spans = self._render(messages, spans=True)
        else:
            text = self.render(messages)
            answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
            spans = [self._span(text, messages, i) for i in answers]
        if not any(start < end for start, end in spans):
            raise DataError("the chat template marks no word of the assistant")
        return text, spans

    def _span(self, text: str, messages: list[dict], turn: int) -> tuple[int, int]:
        before = self.render(messages[:turn], add_generation_prompt=True)
        upto = self.render(messages[: turn + 1])
        if not text.startswith(upto) or not upto.startswith(before):
            raise DataError(
                f"message {turn + 1}: the chat template rewrites earlier turns; mark what is"
                " trained with {% generation %} in it"
            )
        return len(before), len(upto.rstrip())

    def encode_all(self, targets: list[tuple[str, list]]) -> list[tuple[list[int], np.ndarray]]:
        """Token ids, and a mask of targets, of each of some results of `targets`."""
        texts = [text for text, _ in targets]
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            (e.ids, _mask(e.offsets, spans)) for e, (_, spans) in zip(encoded, targets, strict=True)
        ]

    def encode(self, messages: list[dict]) -> tuple[list[int], np.ndarray]:
        """Token ids of a conversation, and a mask of those that are targets."""
        return self.encode_all([self.targets(messages)])[0]

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        text = self.render(messages, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> np.ndarray:
    """1 for each token that overlaps a span."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, end in spans:
        mask[(starts < end) & (ends > start)] = 1
    return mask


def check_turns(messages: list[dict]) -> None:
    """Raise DataError unless user and assistant take turns, after at most one system message."""
    if not messages:
        raise DataError("a conversation expected, got no message")
    roles = [message.get("role") for message in messages]
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("content"), str):
            got = shown(message.get("content"))
            raise DataError(f"message {number}: a text as content expected, got {got}")
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2 + 1)
    for number, (role, wanted) in enumerate(zip(turns, expected, strict=False)):
        if role != wanted:
            where = number + 1 + len(roles) - len(turns)
            raise DataError(f"message {where}: role {wanted!r} expected, got {shown(role)}")
    if "assistant" not in turns:
        raise DataError(f"a turn of the assistant expected, got roles {roles}")


def _without_none(messages: list[dict]) -> list[dict]:
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _tokenizer_config(directory: Path) -> tuple[dict, dict[str, str]]:
    """tokenizer_config.json, and the special tokens that it or its older companion names."""
    config, older = (
        read_object(directory, name) if (directory / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    special = {}
    for name in (f"{token}_token" for token in TOKENS):
        token = config.get(name) or older.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return config, special


def _template(directory: Path, config: dict) -> str:
    """chat_template.jinja, or what tokenizer_config.json has: a template, or several by name."""
    if (directory / "chat_template.jinja").exists():
        file = file_in(directory, "chat_template.jinja", MAX_COMPANION_BYTES)
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: UTF-8 text expected: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise DataError(
            f"{directory}: a chat template expected, as the sources are conversations; got neither"
            " chat_template.jinja nor chat_template in tokenizer_config.json"
        )
    return template
