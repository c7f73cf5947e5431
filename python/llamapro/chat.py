"""Talk to a model in a terminal."""

import readline  # noqa: F401  # what was typed before comes back with the arrow keys
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.decoders import DecodeStream

from llamapro.data.chat import ChatTemplate
from llamapro.generate import stream
from llamapro.tokenizer import load_tokenizer, stop_ids

HELP = "Ctrl-C stops an answer, /new forgets what was said, Ctrl-D ends"


class Dialogue:
    """A model, and what was said so far as messages of its own chat template.

    What no longer fits the model's context is forgotten, the oldest question and answer first.
    """

    def __init__(self, model, path, system: str | None = None, max_new_tokens: int = 512):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.template, self.tokenizer = ChatTemplate.of(path), load_tokenizer(path)
        self.stop = stop_ids(Path(path), self.tokenizer)
        self.first = [{"role": "system", "content": system}] if system else []
        self.messages = [*self.first]

    def answer(self, text: str, **sampling) -> Iterator[str]:
        """The pieces of an answer as they come. An answer that is left is kept as far as it came.

        Raises ValueError for a question that does not fit the context by itself.
        """
        self.messages.append({"role": "user", "content": text})
        tokens = torch.tensor([self._prompt()], device=self.model.norm.device)
        steps = stream(self.model, tokens, self.max_new_tokens, stop=self.stop, **sampling)
        decode, said = DecodeStream(skip_special_tokens=True), []
        try:
            for step in steps:
                piece = decode.step(self.tokenizer, int(step))
                if piece:
                    said.append(piece)
                    yield piece
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said)})

    def _prompt(self) -> list[int]:
        room = self.model.config.max_position_embeddings - self.max_new_tokens
        begun = len(self.first)
        while len(ids := self.template.prompt_ids(self.messages)) > room:
            if len(self.messages) <= begun + 1:
                self.messages.pop()
                raise ValueError(f"a question of at most {room} tokens expected, got {len(ids)}")
            del self.messages[begun : begun + 2]
        return ids


def talk(dialogue: Dialogue, **sampling) -> None:
    """Read questions from standard input and print the answers, until it ends."""
    asked = "> " if sys.stdin.isatty() else ""
    if asked:
        print(HELP)
    while True:
        try:
            text = input(asked).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if text == "/new":
            dialogue.messages = [*dialogue.first]
        elif text:
            _print_answer(dialogue, text, sampling)


def _print_answer(dialogue: Dialogue, text: str, sampling: dict) -> None:
    pieces = dialogue.answer(text, **sampling)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(" ...", end="")
    except ValueError as error:
        print(error, end="")
    print()
