"""What expansion is compared with: it goes through the loop's own steps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import Llama
from llamapro.model import stock_tensors
from llamapro.train import train
from run_files import records

pytest.importorskip("peft")
from recipes import rivals
from recipes.rivals import Stock, adapt, stock_model, train_experts, train_rival, train_top_blocks


@pytest.fixture
def settings(config, tiny, token_data, tmp_path):
    """A run of 20 steps on an fp32 base, measured on a further set, too."""
    base = tiny().save_pretrained(tmp_path / "base")
    general = str(token_data("general"))
    where = {"model": str(base), "evaluate": {"general": general}}
    return replace(config, **where, trainable="all", dtype="float32", out=str(tmp_path / "rival"))


def test_full_fine_tuning_by_it_is_the_loops(settings, tmp_path):
    """Of transformers' model the losses, evaluations and weights are those of the library's loop,
    to fp32's rounding: so what differs between rows is what trains."""
    ours = replace(settings, out=str(tmp_path / "ours"))
    summary = train(ours)
    model = stock_model(settings).requires_grad_(True)
    found = train_rival(settings, Stock(model), model.save_pretrained)
    assert records(settings).keys() == records(ours).keys() and len(records(ours)) == 20
    for key in ("loss", "learning_rate", "tokens"):
        assert [*records(settings, key).values()] == pytest.approx(
            [*records(ours, key).values()], rel=1e-5
        )
    for key in ("perplexity", "kl"):
        theirs = records(ours, key)
        assert records(settings, key).keys() == theirs.keys()
        for step, values in records(settings, key).items():
            assert values == pytest.approx(theirs[step], rel=1e-4, abs=1e-6)
    assert found["trainable_parameters"] == summary["trainable_parameters"]
    finals = (Llama.from_pretrained(Path(run.out) / "final") for run in (settings, ours))
    torch.testing.assert_close(
        *(dict(model.named_parameters()) for model in finals), rtol=1e-3, atol=1e-4
    )


def test_top_blocks_alone_change(settings):
    summary = train_top_blocks(settings, 1)
    before, after = (
        stock_tensors(Llama.from_pretrained(path))
        for path in (settings.model, Path(settings.out) / "final")
    )
    top = f"model.layers.{max(int(n.split('.')[2]) for n in before if 'layers' in n)}."
    for name in before:
        assert torch.equal(before[name], after[name]) == (not name.startswith(top)), name
    trained = sum(t.numel() for name, t in before.items() if name.startswith(top))
    assert summary["trainable_parameters"] == trained
    assert summary["perplexity_after"]["domain"] < summary["perplexity_before"]["domain"]


def test_adapters_are_merged(settings):
    """What is on disk computes what was trained, and its matrices differ by the rank."""
    rank = 2
    summary = adapt(settings, rank, rivals.ATTENTION)
    before, after = (
        stock_tensors(Llama.from_pretrained(path))
        for path in (settings.model, Path(settings.out) / "final")
    )
    count = 0
    for name, tensor in before.items():
        changed = name.split(".")[-2] in rivals.ATTENTION
        assert torch.equal(tensor, after[name]) == (not changed), name
        if changed:
            values = torch.linalg.svdvals((after[name] - tensor).double())
            assert (values > 1e-5 * values[0]).sum() == rank
            count += rank * sum(tensor.shape)
    assert summary["trainable_parameters"] == count
    assert summary["perplexity_after"]["domain"] < summary["perplexity_before"]["domain"]


def test_experts_begin_as_the_base(settings):
    """Step 0 is the base to rounding: both experts are its MLP."""
    summary = train_experts(settings, [0, 2])
    assert records(settings, "kl")[0]["general"] == pytest.approx(0, abs=1e-6)
    assert summary["perplexity_after"]["domain"] < summary["perplexity_before"]["domain"]
    config = Llama.from_pretrained(settings.model).config
    mlp = 3 * config.hidden_size * config.intermediate_size
    assert summary["trainable_parameters"] == 2 * (mlp + 2 * config.hidden_size)


@pytest.mark.parametrize("kill", [3, 13, 20])
def test_it_goes_on_after_a_kill(settings, tmp_path, monkeypatch, kill):
    """Bit for bit as if there had been none, within the last evaluation, too."""
    calm = replace(settings, out=str(tmp_path / "calm"))
    adapt(calm, 2)
    taken = rivals.take_step

    def killed(*args):
        if args[-1] == kill:
            raise SystemExit
        return taken(*args)

    monkeypatch.setattr(rivals, "take_step", killed)
    if kill == settings.steps:
        monkeypatch.setattr(rivals, "write_json", lambda *_: (_ for _ in ()).throw(SystemExit))
    with pytest.raises(SystemExit):
        adapt(settings, 2)
    monkeypatch.undo()
    adapt(settings, 2)
    for key in ("loss", "perplexity", "kl"):
        assert records(settings, key) == records(calm, key)
    finals = (Llama.from_pretrained(Path(run.out) / "final") for run in (settings, calm))
    first, second = (model.state_dict() for model in finals)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_settings_and_kept_rows_are_refused(settings):
    train_top_blocks(settings, 1)
    with pytest.raises(ValueError, match=r"config.json: seed 1 expected, got 0; name another out"):
        train_top_blocks(replace(settings, seed=1), 1)
    kept = replace(settings, keep=0.2, keep_data=settings.data[0])
    with pytest.raises(ValueError, match=r"a run that keeps no rows expected, got keep 0\.2"):
        train_top_blocks(kept, 1)
