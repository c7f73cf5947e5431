"""What a model goes on with: texts of its tokens, and where they stop."""

import pytest
from llamapro import Llama, LlamaConfig
from llamapro.eval import completion as module
from llamapro.eval.completion import Completer
from llamapro.storage import write_json
from stock_models import SIZES

tokenizers = pytest.importorskip("tokenizers")
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_end|>")
PIECES = ("▁", "▁▁", "▁▁▁", "a", "x", "▁x", "\u00e9")


@pytest.fixture
def path(tmp_path):
    """A tiny model with a tokenizer as Llama 2 has it: pieces with spaces in front, and bytes."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("▁", "▁"), ("▁▁", "▁"), ("▁", "x")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    )
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    sizes = SIZES | {"vocab_size": len(names), "max_position_embeddings": 64}
    directory = Llama(LlamaConfig(**sizes, eos_token_id=2)).save_pretrained(tmp_path / "model")
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>"})
    return directory


@pytest.fixture
def scripted(path, monkeypatch):
    """A completer whose model says the same tokens after every prompt, and what it was let say."""

    def build(*names):
        completer, said = Completer(Llama.from_pretrained(path), path), []
        ids = [completer.tokenizer.token_to_id(name) for name in names]

        def continue_all(model, prompts, lengths, *, stop, ended=None, **how):
            said[:] = [[] for _ in prompts]
            for row, prompt in enumerate(prompts):
                for token in ids[: lengths[row] - len(prompt)]:
                    said[row].append(token)
                    if token in stop or (ended and ended(row, said[row])):
                        break
            return [[*prompt, *new] for prompt, new in zip(prompts, said, strict=True)]

        monkeypatch.setattr(module, "continue_all", continue_all)
        return completer, said

    return build


def test_a_program_keeps_the_space_that_it_begins_with(scripted):
    """Else the first line of a function's body would be one column short."""
    completer, _ = scripted("▁▁▁", "▁x", "<0x0A>", "▁▁▁", "▁x", "</s>")
    assert completer.complete(["x\n"], max_new_tokens=20) == ["    x\n    x"]
    assert completer.continued([[5]], 20) == ["   x\n    x"]  # as lm-eval's own backend reads it


def test_a_special_token_stops_where_it_is_one_of_the_stops(scripted):
    completer, said = scripted("x", "<|im_end|>", "a", "a", "</s>")
    assert completer.complete(["x"], max_new_tokens=20, stop=["</s>", "<|im_end|>"]) == ["x"]
    assert len(said[0]) == 2
    assert completer.complete(["x"], max_new_tokens=20) == ["xaa"]


def test_empty_stops_stop_nothing(scripted):
    completer, _ = scripted("x", "a", "▁x", "x", "</s>")
    assert completer.complete(["x"], max_new_tokens=20, stop=["", "xx"]) == ["xa "]


@pytest.mark.parametrize("stop", ["\u00e9x", "\u20ac", "a\n", " x"])
def test_stops_may_span_tokens_and_be_parts_of_characters(scripted, stop):
    """A euro is three bytes here; generation ends with the token that completes the stop."""
    names = [*["a"] * 5, "\u00e9", "x", "<0xE2>", "<0x82>", "<0xAC>", "a", "<0x0A>", "▁x", "a", "a"]
    completer, said = scripted(*names)
    whole = completer.complete(["x"], max_new_tokens=30)[0]
    assert whole == "aaaaa\u00e9x\u20aca\n xaa"
    assert completer.complete(["x"], max_new_tokens=30, stop=[stop]) == [whole.partition(stop)[0]]
    last = {"\u00e9x": 7, "\u20ac": 10, "a\n": 12, " x": 13}
    assert len(said[0]) == last[stop]


def test_prompts_longer_than_the_context_lose_their_beginning(path):
    completer = Completer(Llama.from_pretrained(path), path)
    long = [*range(4, 200)]
    assert completer.continued([long], 20) == completer.continued([long[-44:]], 20)
    with pytest.raises(ValueError, match="1 to 63 new tokens in a context of 64 expected, got 64"):
        completer.continued([long], 64)
