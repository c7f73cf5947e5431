import pytest
import torch
from llamapro import Llama, expand
from llamapro import generate as module
from llamapro.generate import Slots, continue_all
from torch.overrides import TorchFunctionMode

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 2, 14], [15, 16], [17] * 20, [18, 19], [3] * 40]
WINDOWED = {"model_type": "mistral", "sliding_window": 6}


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["llama", "window"])
def test_prompts_of_any_length_are_continued_as_each_alone(tiny, monkeypatch, changes):
    """Whatever takes an ended one's place, and in however many passes prompts are read."""
    model = tiny(max_position_embeddings=64, **changes).double()
    monkeypatch.setattr(module, "TOKENS_AT_A_TIME", 30)
    alone = [
        model.generate(torch.tensor([prompt]), 45 - len(prompt), stop=[3, 4])[0].tolist()
        for prompt in PROMPTS
    ]
    for rows in (1, 2, 3, None):
        ended = []
        found = continue_all(model, PROMPTS, 45, stop=[3, 4], rows=rows, tell=ended.append)
        assert found == alone and sum(ended) == len(PROMPTS), rows


def test_rows_end_at_lengths_of_their_own_and_where_they_are_told_to(tiny):
    model = tiny().double()
    lengths = [4, 20, 9, 2, 20, 10, 50]
    asked = {i: [] for i in range(len(PROMPTS))}

    def ended(row, new):
        asked[row].append(len(new))
        return row == 5 and len(new) == 3

    found = continue_all(model, PROMPTS, lengths, stop=[], rows=3, ended=ended)
    assert [len(row) for row in found] == [4, 20, 9, 2, 20, 5, 50]
    whole = continue_all(model, PROMPTS, lengths, stop=[])
    assert all(row == longer[: len(row)] for row, longer in zip(found, whole, strict=True))
    assert asked[1] == [*range(1, 19)] and asked[3] == asked[4] == []


def test_no_prompt_gives_no_text(tiny):
    assert continue_all(tiny(), [], 5, stop=[]) == []


@pytest.mark.parametrize("form", ["8bit", "8bit-compact"])
def test_an_expanded_model_in_8_bits_continues_prompts_as_each_alone(tiny, tmp_path, form):
    path = expand(tiny(initializer_range=0.5), new_blocks=1).save_pretrained(tmp_path / "model")
    model = Llama.from_pretrained(path, frozen=form)
    found = continue_all(model, PROMPTS, 45, stop=[3], rows=3)
    for prompt, row in zip(PROMPTS, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), 45 - len(prompt), stop=[3])[0].tolist()
        assert row == alone


def test_a_mask_of_numbers_is_refused(tiny, monkeypatch):
    """PyTorch would add it to the scores: ones for what is seen, and zeros, would mask nothing."""
    model = tiny()
    go_on = Slots._go_on

    def with_numbers(*args):
        *pair, mask = go_on(*args)
        return *pair, mask.float()

    monkeypatch.setattr(Slots, "_go_on", with_numbers)
    with pytest.raises(ValueError, match=r"a bool mask \(B, S\) .*, torch\.float32"):
        continue_all(model, PROMPTS[:2], 10, stop=[])


def test_modes_for_functions_hear_of_every_op_without_gradients_too(tiny):
    class Listener(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    model, tokens, heard = tiny(), torch.tensor([[5, 6, 7]]), []
    with torch.no_grad(), Listener():
        model.hidden(tokens)
    assert heard.count("llamapro.flash_attention") == len(model.blocks)
