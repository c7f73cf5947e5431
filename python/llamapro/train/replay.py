"""A base's own samples as a data directory: what it knows, without the data that it was made with.

Samples come in batches, each with random numbers of its own, so that a process that was killed goes
on with the batch that it was at. Every tenth sample is held out. One that says little or repeats
itself is dropped, and a base of which most are like that is refused.
"""

import hashlib
import itertools
import json
import logging
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from llamapro.data.shards import Shards
from llamapro.data.tokens import PARTS, DataError
from llamapro.generate import continue_all
from llamapro.hardware import pick_device, pick_sampling_dtype
from llamapro.hf import Checkpoint
from llamapro.model import Llama
from llamapro.proof import combined, digest, fingerprint
from llamapro.storage import new_directory, read_json, write_json
from llamapro.train.prompts import Dialogues, Prefixes, Sample, open_prompts

CACHE = {"cpu": 2**30, "cuda": 2**33}  # bytes for the keys and values of a batch
MOST_ROWS = 128  # of a batch
HELD_OUT = 10  # every so many samples
GRAM = 4  # tokens, of which repetition is counted
MOST_REPEATED = 0.5  # share of the grams of a sample that it may have said before
SAY_EVERY = 10.0  # seconds
log = logging.getLogger("llamapro")


def replay(
    base,
    out,
    *,
    tokens: int,
    prompts=(),
    chat: bool = False,
    bos_token: str | None = None,
    temperature: float = 1.0,
    seq_len: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> dict:
    """Sample `tokens` tokens for training, and a ninth as many held out, from a model directory
    into the new data directory `out`, and return its meta.json.

    base: of an expanded model, the new blocks are switched off. A sample begins with the token
    `bos_token`, by default the model's, and ends with it or an end of sequence, or at `seq_len`
    tokens. prompts: sources as `prepare` takes them; samples go on from the first 16 tokens of each
    `seq_len` of their texts instead. chat: each is a question and its answer by the model's chat
    template; the questions are those of `prompts`, or else sampled too, and the answers alone are
    targets. dtype: "auto" is bfloat16, or float32 on a CPU that has no instructions for that.

    Killed or stopped, it goes on when it is called again with the same arguments. Raises DataError
    for settings that make no sense, a base without a beginning token, prompts that are not text,
    and for degenerate samples; FileExistsError when `out` exists.
    """
    if tokens < 1 or seq_len < 2 or not 0 < temperature < math.inf:
        raise DataError(
            "a token or more, samples of at least two and a temperature above 0 expected, got"
            f" {tokens}, {seq_len} and {temperature}"
        )
    path, where = Checkpoint(base).path, pick_device(device)
    dtype = pick_sampling_dtype(where) if dtype == "auto" else dtype
    source = open_prompts(path, prompts, chat, bos_token, seq_len)
    with new_directory(out, resumes=True) as directory:
        model = Llama.from_pretrained(base, getattr(torch, dtype), where).requires_grad_(False)
        sampler = Sampler(model, source, tokens, temperature, seq_len, seed)
        kind = np.dtype(np.uint16 if model.config.vocab_size <= 2**16 else np.uint32)
        with Shards(directory, sampler.identity(), kind, chat) as shards:
            try:
                _fill(shards, sampler)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("stopped; the same command goes on from here") from None
            meta = {
                "vocab_size": model.config.vocab_size,
                "separator": source.stop[0] if source.stop else -1,
                "kind": "chat" if chat else "text",
                "tokenizer": source.fingerprint,
                "sources": [{"name": f"samples of {path.name}", "rows": None, "licence": None}],
                "samples": {**sampler.settings, "base": base_digest(path)},
            }
            meta["samples"]["dropped"] = shards.dropped
        meta |= shards.summary()
        meta["samples"] |= statistics(directory, meta)
        write_json(directory / "meta.json", meta)
    return meta


@dataclass
class Sampler:
    """Draws batches of samples: batch for batch the same, whatever was drawn before."""

    model: Llama
    source: Prefixes | Dialogues
    tokens: int
    temperature: float
    seq_len: int
    seed: int

    @cached_property
    def rows(self) -> int:
        """How many samples are made together: not many more than will be needed."""
        config, dtype = self.model.config, self.model.norm.dtype
        heads = config.num_hidden_layers * config.num_key_value_heads
        held = 2 * heads * config.head_dim * self.seq_len * dtype.itemsize
        needed = math.ceil(self.tokens / self.seq_len * HELD_OUT / (HELD_OUT - 1))
        return max(8, min(MOST_ROWS, needed, CACHE[self.model.norm.device.type] // held))

    @property
    def settings(self) -> dict:
        """What was asked for, as meta.json has it."""
        names = ("tokens", "temperature", "seq_len", "seed")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> str:
        """A hash of all that decides what is written."""
        said = [combined(fingerprint(self.model)), str(self.model.norm.dtype), self.source.said]
        said += [self.source.stop, self.settings, self.rows]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()

    def draw(self, batch: int) -> list[Sample]:
        """The samples of a batch."""
        generator = torch.Generator(self.model.norm.device)
        state = np.random.SeedSequence((self.seed, batch)).generate_state(1)
        generator.manual_seed(int(state[0]))
        how = {"stop": self.source.stop, "temperature": self.temperature, "generator": generator}

        def continued(prompts):
            return continue_all(self.model, prompts, self.seq_len, **how)

        places = range(batch * self.rows, (batch + 1) * self.rows)
        with self.model.as_base():
            return self.source.draw(places, continued)


def base_digest(model) -> str:
    """Of the tensors of a model directory that expansion and the training of new blocks leave."""
    names = ("model.embed_tokens.weight", "model.norm.weight")
    tensors = Checkpoint(model).tensors
    return combined({name: digest(tensors[name].load()) for name in names})


def sample_settings(data) -> dict:
    """What `replay` was asked for when it made a data directory."""
    said = read_json(Path(data) / "meta.json").get("samples", {})
    return {name: said.get(name) for name in ("tokens", "temperature", "seq_len", "seed", "base")}


def _fill(shards: Shards, sampler: Sampler) -> None:
    """Draw batches until there is what was asked for, and some held out."""
    tokens = sampler.tokens
    began, said, first = time.perf_counter(), time.perf_counter(), shards.count("train")
    for batch in itertools.count(shards.done):
        made = shards.count("train")
        if made >= tokens and shards.count("heldout"):
            return
        now = time.perf_counter()
        if now - said >= SAY_EVERY and made > first:
            said, left = now, (now - began) / (made - first) * (tokens - made)
            log.info("sampling: %d of %d tokens, %.1f min left", made, tokens, left / 60)
        drawn = sampler.draw(batch)
        good = _not_degenerate(drawn)
        shards.dropped += len(drawn) - len(good)
        aside = [number % HELD_OUT == batch % HELD_OUT for number in range(len(good))]
        for part, wanted in (("train", False), ("heldout", True)):
            chosen = [row for row, held in zip(good, aside, strict=True) if held == wanted]
            dtype = shards.dtype
            shards.append(part, [(np.array(ids, dtype), mask) for ids, mask in chosen])
        shards.finish(batch + 1)


def _not_degenerate(drawn: list) -> list:
    """Those that say something, without repeating themselves or another one.

    Raises DataError when more than half of a batch do not.
    """
    seen, good = set(), []
    for ids, mask in drawn:
        if len(ids) > 2 and tuple(ids) not in seen and repetition(ids) <= MOST_REPEATED:
            good.append((ids, mask))
        seen.add(tuple(ids))
    if 2 * len(good) < len(drawn) or not good:
        raise DataError(
            f"degenerate: of {len(drawn)} samples {len(drawn) - len(good)} say nothing, or repeat"
            " themselves or each other; a temperature near 1, another beginning, or texts to go on"
            " from expected"
        )
    return good


def grams(ids) -> np.ndarray:
    """Every GRAM tokens of a sample, (n, GRAM)."""
    windows = np.lib.stride_tricks.sliding_window_view
    return windows(np.asarray(ids), GRAM) if len(ids) >= GRAM else np.empty((0, GRAM), int)


def repetition(ids) -> float:
    """The share of a sample's grams that it has said before."""
    all_of = grams(ids)
    return 1 - len(np.unique(all_of, axis=0)) / len(all_of) if len(all_of) else 0.0


def statistics(directory: Path, meta: dict) -> dict:
    """What the samples are like: their number and length, and, of the first million tokens of each
    part, the share of grams that their sample repeats, and of those that are distinct among all."""
    ids = [np.fromfile(directory / f"{part}.bin", meta["dtype"], 10**6) for part in PARTS]
    ends = [np.fromfile(directory / f"{part}.bin.index", "<u8").astype(int) for part in PARTS]
    rows = [
        row
        for held, upto in zip(ids, ends, strict=True)
        for row in np.split(held, upto[upto < len(held)])
    ]
    count, all_of = sum(map(len, ends)), np.concatenate([grams(row) for row in rows])
    return {
        "samples": count,
        "mean_length": sum(meta["tokens"].values()) / count,
        "repetition": float(np.mean([repetition(row) for row in rows])),
        "distinct_grams": len(np.unique(all_of, axis=0)) / max(1, len(all_of)),
    }
