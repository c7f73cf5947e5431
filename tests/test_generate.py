import pytest
import torch
from llamapro import generate as module
from llamapro.generate import continue_all

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 2, 14], [15, 16], [17] * 20, [18, 19], [3] * 40]
WINDOWED = {"model_type": "mistral", "sliding_window": 6}


@pytest.mark.parametrize("changes", [{}, WINDOWED], ids=["llama", "window"])
@pytest.mark.parametrize("rows", [1, 2, 3, None])
def test_prompts_of_any_length_are_continued_as_each_alone(tiny, monkeypatch, changes, rows):
    """Whatever takes an ended one's place, and in however many passes prompts are read."""
    model = tiny(max_position_embeddings=64, **changes).double()
    monkeypatch.setattr(module, "TOKENS_AT_A_TIME", 30)
    ended = []
    found = continue_all(model, PROMPTS, 45, stop=[3, 4], rows=rows, tell=ended.append)
    for prompt, row in zip(PROMPTS, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), 45 - len(prompt), stop=[3, 4])[0].tolist()
        assert row == alone
    assert sum(ended) == len(PROMPTS)


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
