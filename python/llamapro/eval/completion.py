"""Texts that a model goes on with: up to stop strings, and as answers in dialogues."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from llamapro.data.chat import ChatTemplate
from llamapro.generate import continue_all
from llamapro.tokenizer import encode, load_tokenizer, stop_ids


class Completer:
    """A `Llama`, and the directory that its tokenizer and its chat template are in.

    rows: how many texts are generated at a time.
    """

    def __init__(self, model, path, rows: int = 8):
        self.model, self.path, self.rows = model, Path(path), rows
        self.tokenizer = load_tokenizer(path)
        self.ends = stop_ids(self.path, self.tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate.of(self.path)

    def complete(self, prompts: Sequence[str], *, max_new_tokens: int, **how) -> list[str]:
        """What texts go on with, see `continued`; with a space where it begins with one."""
        ids = [encode(self.tokenizer, prompt) for prompt in prompts]
        return self.continued(ids, max_new_tokens, after=self._letter, **how)

    def answer(self, conversations: Sequence[list[dict]], *, max_new_tokens: int, **how):
        """The next messages of conversations, lists of {"role", "content"}, see `continued`."""
        prompts = [self.template.prompt_ids(messages) for messages in conversations]
        return [text.strip() for text in self.continued(prompts, max_new_tokens, **how)]

    def continued(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        after: Sequence[int] = (),
        tell=lambda count: None,
    ) -> list[str]:
        """What prompts of ids go on with, without special tokens, cut before the first of the
        strings `stop`; empty ones are none.

        after: ids that what is said is read after, since decoders take a space off the beginning.
        A prompt that leaves no room in the model's context loses its beginning. Raises ValueError
        where max_new_tokens fill the context by themselves.
        """
        context = self.model.config.max_position_embeddings
        if not 0 < max_new_tokens < context:
            raise ValueError(
                f"1 to {context - 1} new tokens in a context of {context} expected,"
                f" got {max_new_tokens}"
            )
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        cut = [prompts[place][max_new_tokens - context :] for place in order]
        stop = [text for text in stop if text]
        longest = max((len(text.encode()) for text in stop), default=0)

        def ended(row, new):  # a token is a byte at least: what has just ended is in the last ones
            # With special tokens, as a stop such as <|im_end|> may be one.
            tail = self.tokenizer.decode(new[-longest - 2 :], skip_special_tokens=False)
            return any(text in tail for text in stop)

        found = continue_all(
            self.model,
            cut,
            [len(ids) + max_new_tokens for ids in cut],
            stop=self.ends,
            rows=self.rows,
            ended=ended if stop else None,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator(self.model.norm.device).manual_seed(seed),
            tell=tell,
        )
        texts = [""] * len(prompts)
        for place, ids, row in zip(order, cut, found, strict=True):
            texts[place] = cut_before(self._text(row[len(ids) :], after), stop)
        return texts

    @cached_property
    def _letter(self) -> list[int]:
        return self.tokenizer.encode("a", add_special_tokens=False).ids

    def _text(self, ids: list[int], after: Sequence[int]) -> str:
        before = self.tokenizer.decode(after, skip_special_tokens=True)
        whole = self.tokenizer.decode([*after, *ids], skip_special_tokens=True)
        return whole.removeprefix(before)


def cut_before(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some strings, whole where there is none of them."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=None)]
