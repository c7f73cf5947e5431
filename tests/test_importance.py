"""Which blocks are copied, by what their removal costs on text that shall be kept."""

import pytest
import torch
from llamapro import Llama
from llamapro.data.packing import open_rows
from llamapro.eval.importance import least_important, removal_costs
from llamapro.eval.perplexity import perplexity
from llamapro.hf import Checkpoint
from llamapro.model import stock_tensors


@pytest.fixture
def base(tiny, tmp_path):
    """Its blocks matter, but for the third, which adds nothing."""
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.down_proj.weight.mul_(20)
    model.blocks[2].make_identity()
    return model.save_pretrained(tmp_path / "base")


def test_the_least_are_copied_each_above_its_own():
    assert least_important([3.0, 1.0, 4.0, 1.5], 1) == [2]
    assert least_important([3.0, 1.0, 4.0, 1.5], 2) == [2, 5]
    assert least_important([3.0, 1.0, 4.0, 1.5], 4) == [1, 3, 5, 7]
    assert least_important([1.0, 1.0], 1) == [1]  # the lower of equals


def test_costs_are_those_of_a_model_without_the_block(base, token_data):
    """Averaged over the sets; the model is as it was."""
    model = Llama.from_pretrained(base)
    sets = [
        open_rows(token_data(name, top=top), "heldout", 61, 16, "bfd")
        for name, top in (("a", 61), ("b", 40))
    ]
    costs = removal_costs(model, sets)
    assert model.skipped == frozenset() and costs[2] == 0
    for i in range(len(model.blocks)):
        without = Llama.from_pretrained(base)
        del without.blocks[i]
        losses = [(perplexity(m, rows)["loss"]) for m in (without, model) for rows in sets]
        assert costs[i] == pytest.approx((sum(losses[:2]) - sum(losses[2:])) / 2, abs=1e-6)


def test_expand_by_importance(run, base, token_data, tmp_path):
    """From the command line, measured on what the data holds out."""
    data, out = token_data(), tmp_path / "expanded"
    costs = removal_costs(Llama.from_pretrained(base), [open_rows(data, "heldout", 61, 64, "bfd")])
    (place,) = expected = least_important(costs, 1)
    words = ["expand", base, out, "--new-blocks", 1, "--placement", "importance", "--data", data]
    code, said = run(*words)
    assert code is None and f"{out}: new blocks at {expected}; logits" in said
    assert Checkpoint(out).config.new_blocks == expected
    grown = stock_tensors(Llama.from_pretrained(out))
    names = (f"model.layers.{i}.mlp.gate_proj.weight" for i in (place - 1, place))
    assert torch.equal(*(grown[name] for name in names))


def test_what_cannot_be_expanded_by_importance_is_refused(
    run, base, token_data, tmp_path, monkeypatch
):
    """Before anything is measured."""
    monkeypatch.delattr("llamapro.eval.importance.removal_costs")
    data, out = token_data(), tmp_path / "expanded"
    words = ["expand", base, out, "--new-blocks", 1]
    expected = "llamapro: --data is for --placement importance, got"
    assert run(*words, "--placement", "importance")[0] == f"{expected} importance and None"
    assert run(*words, "--data", data)[0] == f"{expected} interleaved and {data}"
    importance = ["--placement", "importance", "--data"]
    assert "no meta.json" in run(*words, *importance, tmp_path / "none")[0]
    for count in (0, 9):
        said = f"between 1 and the 4 blocks of the base, got {count}"
        assert said in run(*words[:-1], count, *importance, data)[0]
    assert "the base, got None" in run("expand", base, out, *importance, data)[0]
    out.mkdir()
    assert f"{out} exists" in run(*words, *importance, tmp_path / "none")[0]
    assert [*out.iterdir()] == []
