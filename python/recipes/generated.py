"""A tiny base and texts that need no download: what the experiments are tried with."""

import json
import random
from pathlib import Path

import torch
from llamapro.config import LlamaConfig
from llamapro.data.prepare import prepare
from llamapro.model import Llama
from llamapro.storage import new_directory, write_json
from llamapro.train import TrainConfig, train

WORDS = {
    "general": "the cat sat on a mat and then she ran to her friend who had found one big red ball",
    "domain": "court finds that appellant shall pay fees under section nine of this act as amended",
}
DOCUMENTS = 200
STEPS = 80  # after which the base knows the words and mostly which one follows


def write_texts(folder: Path, kind: str) -> Path:
    """Documents of words that follow each other by a rule, a file for each."""
    if folder.exists():
        return folder
    chance, words = random.Random(kind), WORDS[kind].split()
    with new_directory(folder) as directory:
        for number in range(DOCUMENTS):
            at, said = chance.randrange(len(words)), []
            for _ in range(chance.randint(20, 60)):
                said.append(words[at])
                at = (at + chance.choice((1, 1, 1, 2, 5))) % len(words)
            (directory / f"{number}.txt").write_text(" ".join(said) + f" {number}.\n")
    return folder


def write_instructions(folder: Path) -> Path:
    """Questions of one word, answered by those that follow it in general texts."""
    if folder.exists():
        return folder
    words = WORDS["general"].split()
    rows = (
        {"prompt": word, "completion": " ".join(words[(i + n) % len(words)] for n in range(1, 9))}
        for i, word in enumerate(words)
    )
    with new_directory(folder) as directory:
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_base(out: Path, seq_len: int) -> Path:
    """A Llama of 40 thousand parameters, in fp32, that has read the general text."""
    start, data, run = out / "start", out / "text", out / "run"
    if not start.exists():
        _random_model(out, seq_len).save_pretrained(start, files_from=out / "tokenizer")
    if not data.exists():
        prepare([write_texts(out / "general", "general")], start, data)
    settings = TrainConfig(
        model=str(start),
        data=(str(data),),
        out=str(run),
        trainable="all",
        steps=STEPS,
        seq_len=seq_len,
        learning_rate=1e-2,
        dtype="float32",
        device="cpu",
        eval_every=STEPS,
    )
    if not (run / "summary.json").exists():
        train(settings, resume=run.exists())
    return run / "final"


def _random_model(out: Path, seq_len: int) -> Llama:
    """With its tokenizer, a piece for each byte and some for what the texts say, beside it."""
    tokenizer, files = _tokenizer(), out / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(files / "tokenizer.json"))
    write_json(files / "config.json", {})
    ends = {"bos_token": "<bos>", "eos_token": "<eos>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}  # what reads tokenizer.json alone
    write_json(files / "tokenizer_config.json", kind | ends)
    torch.manual_seed(0)
    return Llama(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=tokenizer.get_vocab_size(),
            max_position_embeddings=seq_len,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS.values(), trainer)
    return tokenizer
