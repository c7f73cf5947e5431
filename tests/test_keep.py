"""Keeping what the base knows: the loss, the switch, the limit, and what all of it costs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llamapro import Llama, expand, planner
from llamapro.data.mixture import Mixture
from llamapro.data.packing import PackedDataset
from llamapro.data.tokens import DataError, TokenDataset
from llamapro.frozen import FORMS
from llamapro.storage import read_json, write_json
from llamapro.train import loop as loop_module
from llamapro.train import train
from llamapro.train.config import distilled_share, held_out_sets, parse_share, with_keep_data
from llamapro.train.keep import HIGHEST, LOWEST, Keeper, lost
from llamapro.train.loop import open_data
from llamapro.train.parallel import freeze
from run_files import one_document, records
from torch.utils.flop_counter import FlopCounterMode

KINDS = {"bfd": PackedDataset, "wrapped": TokenDataset}


@pytest.fixture
def other(token_data):
    """General text, as far as these tests go: tokens in no order."""
    data = token_data("other", 2000, 300)
    for part in ("train", "heldout"):
        tokens = np.fromfile(data / f"{part}.bin", np.uint16)
        np.random.default_rng(0).permutation(tokens).tofile(data / f"{part}.bin")
    return str(data)


@pytest.fixture
def keeping(config, other):
    return replace(config, keep=0.25, keep_data=other)


def awake(model):
    """New blocks that do something."""
    for i in model.config.new_blocks:
        for projection in (model.blocks[i].o_proj, model.blocks[i].down_proj):
            torch.nn.init.normal_(projection.weight, std=0.1)
    return model


def batch_of(packing, rows=4, kept=2):
    tokens = one_document(torch.randint(61, (200,)).numpy())
    if packing == "bfd":
        tokens = replace(tokens, ends=torch.tensor([7, 30, 45, 46, 90, 120, 200]).numpy())
    dataset = KINDS[packing](tokens, 16)
    return dataset.collate([dataset.row(i) for i in range(rows)], kept)


@pytest.mark.parametrize("packing", KINDS)
def test_rows_that_are_kept_stand_alone_too(packing):
    batch = batch_of(packing)
    alone = batch.kept.tokens.numel()
    assert torch.equal(batch.tokens.flatten()[-alone:], batch.kept.tokens.flatten())
    assert torch.equal(batch.targets.flatten()[-alone:], batch.kept.targets.flatten())
    if packing == "bfd":
        ends = batch.cu_seqlens
        assert torch.equal(batch.kept.cu_seqlens, ends[ends >= 64 - alone] - (64 - alone))
        assert batch.kept.cu_seqlens[-1] == alone
    else:
        assert batch.kept.tokens.shape == (2, 16) and batch.kept.cu_seqlens is None


def test_kept_rows_come_last():
    sets = [TokenDataset(one_document(range(i, i + 100)), 4) for i in (0, 1000, 2000)]
    mixed = Mixture(["a", "b", "c"], sets, [1, 2, 1], kept=frozenset("b"))
    plain = Mixture(["a", "b", "c"], sets, [1, 2, 1])
    for start in range(0, 80, 8):
        batch, tokens = mixed.batch(start, 8), plain.batch(start, 8).tokens
        from_b = (tokens // 1000 == 1).all(1)
        assert torch.equal(batch.tokens, torch.cat((tokens[~from_b], tokens[from_b])))
        assert torch.equal(batch.kept.tokens, tokens[from_b])


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("placement", ["interleaved", "suffix", "prefix"])
def test_states_of_the_model_and_of_its_base(tiny, packing, placement):
    """To the bit those of two forwards; the base's are the unexpanded model's."""
    base = tiny()
    model = awake(expand(tiny(), 2, placement))
    model.train_new_blocks_only()
    batch = batch_of(packing)
    kept = batch.kept
    where = {"base_tokens": kept.tokens, "base_cu_seqlens": kept.cu_seqlens}
    hidden, states = model.hidden_and_base(batch.tokens, batch.cu_seqlens, **where)
    assert torch.equal(hidden, model.hidden(batch.tokens, batch.cu_seqlens))
    expected = base.hidden(kept.tokens, kept.cu_seqlens)
    assert torch.equal(states, expected) and not states.requires_grad and hidden.requires_grad
    with model.new_blocks_off():
        assert torch.equal(model.hidden(kept.tokens, kept.cu_seqlens), expected)
        with model.new_blocks_off():
            pass
        assert torch.equal(
            model.generate(kept.tokens[:1, :3], 5), base.generate(kept.tokens[:1, :3], 5)
        )
    assert not torch.equal(model.hidden(kept.tokens, kept.cu_seqlens), expected)


def test_a_model_without_new_blocks_has_none_to_switch_off(tiny):
    model = tiny()
    with pytest.raises(ValueError, match="no new block"), model.new_blocks_off():
        pass
    model = expand(model, 2)
    with pytest.raises(RuntimeError, match="midway"), model.new_blocks_off():
        raise RuntimeError("midway")
    assert not model.skipped


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("trainable", ["new_blocks", "all"])
@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_losses_and_gradients_are_those_of_plain_pytorch(
    tiny, keeping, tmp_path, packing, trainable, loss
):
    """In fp64, to its rounding."""
    start = awake(expand(tiny(), 2)).double()
    path = str(start.save_pretrained(tmp_path / "start"))
    settings = replace(keeping, model=path, trainable=trainable, keep_loss=loss)
    model = Llama.from_pretrained(path)
    with torch.no_grad():  # as after some steps
        for block in (model.blocks[i] for i in model.config.new_blocks):
            block.gate_up.weight.mul_(1.3)
    freeze(model, trainable)
    keeper, batch = Keeper(settings, model), batch_of(packing)
    learnt, kept = keeper.losses(batch)
    (learnt + 3 * kept).backward()

    plain = Llama.from_pretrained(path)
    plain.load_state_dict(model.state_dict())
    freeze(plain, trainable)
    logits = plain(batch.tokens, batch.cu_seqlens).flatten(0, 1)
    count, targets = batch.kept.tokens.numel(), batch.targets.flatten()
    entropy = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", ignore_index=-100
    )
    expected = entropy[:-count].sum()
    if loss == "kl":
        with torch.no_grad(), start.new_blocks_off():
            theirs = start(batch.kept.tokens, batch.kept.cu_seqlens).flatten(0, 1).log_softmax(-1)
        ours = logits[-count:].log_softmax(-1)
        terms = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        expected_kept = terms[batch.kept.targets.flatten() != -100].sum()
    else:
        expected_kept = entropy[-count:].sum()
    (expected + 3 * expected_kept).backward()
    torch.testing.assert_close(learnt, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kept, expected_kept, rtol=1e-10, atol=0)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("packing", KINDS)
def test_a_micro_batch_may_be_kept_as_a_whole(tiny, keeping, packing):
    model = awake(expand(tiny(), 2))
    model.train_new_blocks_only()
    learnt, kept = Keeper(keeping, model).losses(batch_of(packing, rows=2, kept=2))
    (learnt + kept).backward()
    assert learnt == 0 < kept


def test_a_model_that_is_its_base_has_no_loss_to_keep(tiny, keeping):
    model = expand(tiny(), 2)
    model.train_new_blocks_only()
    _, kept = Keeper(keeping, model).losses(batch_of("bfd"))
    kept.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert kept == 0 and gradients and not any(g.any() for g in gradients)


def test_a_run_keeps_its_base(config, keeping, tmp_path):
    """Nearer to the base than without, and switched off it is the base to the bit, in bf16."""
    apart = train(replace(config, out=str(tmp_path / "apart"), evaluate={"o": keeping.keep_data}))
    summary = train(keeping)
    assert summary["kl_after"]["kept"] < apart["kl_after"]["o"]
    assert records(keeping, "kl")[0] == {"kept": 0.0}
    steps = records(keeping, "kept_loss")
    assert steps[1] == 0.0 and steps[20] > 0.0
    before, after = (
        Llama.from_pretrained(path) for path in (keeping.model, tmp_path / "run/final")
    )
    tokens = torch.randint(61, (2, 16))
    with after.new_blocks_off():
        assert torch.equal(after(tokens), before(tokens))
    assert not torch.equal(after(tokens), before(tokens))


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_base_in_8_bits_is_its_own_teacher(config, keeping, form):
    """At first it is equal to the model, and no other weights are there."""
    train(replace(keeping, frozen=form, steps=2, gradient_accumulation_steps=4))
    assert records(keeping, "kl")[0] == {"kept": 0.0}
    assert records(keeping, "kept_loss")[1] == 0.0 < records(keeping, "kept_loss")[2]


def test_samples_are_made_once_beside_the_run(tiny, config, tmp_path):
    model = expand(tiny(bos_token_id=1), new_blocks=2).to(torch.bfloat16)
    settings = replace(config, model=str(model.save_pretrained(tmp_path / "m")), keep=0.25)
    summary = train(settings)
    made = tmp_path / "run-samples"
    assert summary["config"]["keep_data"] == str(made) and "kept" in summary["kl_after"]
    assert read_json(made / "meta.json")["tokens"]["train"] >= 0.25 * settings.rows * 16
    seen = (made / "train.bin").stat()
    again = replace(settings, out=str(tmp_path / "again"), keep_data=str(made))
    assert train(again)["perplexity_after"] == summary["perplexity_after"]
    assert (made / "train.bin").stat() == seen
    with pytest.raises(FileExistsError, match="samples of another base or size"):
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        train(replace(settings, steps=30))


def test_samples_among_the_data_are_kept(config, other, tmp_path):
    meta = Path(other) / "meta.json"
    write_json(meta, {**read_json(meta), "samples": {}})
    mixed = replace(config, data=(*config.data, f"{other}=0.25"))
    rows, sets = open_data(mixed, Llama.from_pretrained(config.model).config)
    assert rows.kept == {"other"} and [*sets] == ["data", "other"]
    assert distilled_share(mixed) == 0.2 and distilled_share(replace(mixed, keep_loss="ce")) == 0
    assert [*train(mixed)["kl_after"]] == ["other"]
    assert len(records(mixed, "kept_loss")) == 16  # of 80 rows a fifth, each in another step
    with pytest.raises(ValueError, match="data to learn from expected, got samples alone"):
        with_keep_data(replace(config, data=(other,)))
    with pytest.raises(ValueError, match="data to learn from expected, got samples alone"):
        with_keep_data(replace(config, data=(other,), keep=0.2))


def test_resumed_bit_for_bit(keeping, tmp_path, monkeypatch):
    settings = replace(keeping, keep_within="0.1%", eval_every=4)
    whole = train(replace(settings, out=str(tmp_path / "whole")))
    step = loop_module.take_step

    def interrupted(*arguments):
        if arguments[-1] == 13:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop_module, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    monkeypatch.setattr(loop_module, "take_step", step)
    resumed = train(settings, resume=True)
    for name in ("perplexity_after", "kl_after", "lost_after"):
        assert resumed[name] == whole[name]
    for key in ("loss", "kept_weight"):
        assert records(settings, key) == records(
            replace(settings, out=str(tmp_path / "whole")), key
        )
    assert len({*records(settings, "kept_weight").values()}) > 2
    with pytest.raises(ValueError, match=r"keep_within was '0.1%', got None"):
        train(replace(settings, keep_within=None), resume=True)


def test_a_limit_is_kept(config, other, tmp_path):
    """A run loses much without it, and with it, in the end, not more than it says."""
    free = replace(config, steps=40, keep=0.25, keep_data=other, eval_every=5)
    bound = replace(free, keep_within="20%", out=str(tmp_path / "bound"))
    without, within = train(free), train(bound)
    assert without["lost_after"] > 0.4 and within["lost_after"] <= 0.2
    assert within["perplexity_after"]["domain"] < within["perplexity_before"]["domain"]


def test_a_limit_that_was_passed_is_said(keeping, caplog):
    train(replace(keeping, steps=2, keep_within="0.01%"))
    assert "% is lost, more than 0.01%" in caplog.text


@pytest.mark.parametrize(
    "lost_, weight", [(0.0, 0.5), (-1.0, 0.5), (0.01, 2.0), (0.005, 1.0), (1.0, 4.0), (0.004, 0.8)]
)
def test_the_weight_follows_what_is_lost(tiny, keeping, lost_, weight):
    keeper = Keeper(replace(keeping, keep_within="1%"), expand(tiny(), 2))
    keeper.steer(lost_)
    assert math.isclose(keeper.weight, weight)
    for _ in range(20):
        keeper.steer(lost_)
    assert lost_ == 0.005 or keeper.weight in (LOWEST, HIGHEST)


def test_what_is_lost():
    said = dict.fromkeys(("a", "b", "kept"), 10.0)
    values = {"domain": 3.0, "a": 10.1, "b": 9.0, "kept": 50.0}
    assert math.isclose(lost(values, said, {"kept": 2.0}, ["a", "b"]), 0.01)
    assert math.isclose(lost(values, said, {"kept": math.log(1.25)}, []), 0.25)


@pytest.mark.parametrize("trainable", ["new_blocks", "all"])
@pytest.mark.parametrize("placement", ["interleaved", "suffix"])
def test_flops_are_exact(tiny, keeping, tmp_path, trainable, placement):
    """Of a step with a quarter of its rows kept."""
    model = expand(tiny(), 2, placement)
    path = str(model.save_pretrained(tmp_path / "m"))
    freeze(model, trainable)
    keeper = Keeper(replace(keeping, model=path, trainable=trainable), model)
    batch = batch_of("wrapped", rows=8, kept=2)
    with FlopCounterMode(display=False) as counter:
        sum(keeper.losses(batch)).backward()
    trained = None if trainable == "all" else tuple(model.config.new_blocks)
    sizes = 8, 16, torch.float32, "cpu"
    work = planner.Workload(model.config, trained, *sizes, kept=0.25)
    counted = planner.flops(work)
    assert counter.get_total_flops() == sum(counted.values())
    assert counted["base"] and "base" not in planner.flops(replace(work, kept=0.0))
    grown = [planner.memory(w, ["none"] * 6)["weights"] for w in (work, replace(work, kept=0.0))]
    assert grown[0] == grown[1] * (2 if trainable == "all" else 1)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": 0.0}, "keep must be a share above 0 and below 1, got 0.0"),
        ({"keep": 1.0}, "keep must be a share above 0 and below 1, got 1.0"),
        ({"keep_data": "somewhere"}, "keep, the share of its rows, expected"),
        ({"keep_loss": "mse"}, "keep_loss must be one of"),
        ({"keep_within": "0%"}, "a limit such as 1% expected, above 0, got '0%'"),
        ({"keep_within": "0.01"}, "a limit such as 1% expected"),
        ({"keep_within": "-1%"}, "a limit such as 1% expected"),
    ],
)
def test_bad_settings(config, settings, said):
    with pytest.raises(ValueError, match=said):
        replace(config, **settings)


def test_limits():
    assert parse_share("1%") == 0.01 and parse_share(" 0.5 % ") == 0.005
    assert held_out_sets("a", {"b": "c"}, "d") == {"domain": "a", "kept": "d", "b": "c"}


def test_bad_data_is_refused_before_anything_is_written(keeping, tmp_path, token_data):
    for wrong, said in (
        ({"keep_data": str(tmp_path / "none")}, "no meta.json"),
        ({"keep_data": str(token_data("large", top=62))}, "below the vocabulary's 61 expected"),
    ):
        with pytest.raises(DataError, match=said):
            train(replace(keeping, **wrong))
        assert not Path(keeping.out).exists()
    with pytest.raises(DataError, match="bos_token_id in config"):
        train(replace(keeping, keep_data=None))


def test_another_tokenizer_is_refused(chat_path, tmp_path, keeping):
    model = expand(Llama.from_pretrained(chat_path), 2)
    path = model.save_pretrained(tmp_path / "talking", files_from=chat_path)
    meta = Path(keeping.keep_data) / "meta.json"
    write_json(meta, {**json.loads(meta.read_text()), "tokenizer": "another"})
    with pytest.raises(DataError, match="prepared with another tokenizer"):
        train(replace(keeping, model=str(path)))


def test_a_limit_alone_takes_samples_for_a_fifth_of_the_rows(config):
    settled = with_keep_data(replace(config, keep_within="1%"))
    assert settled.keep == 0.2 and settled.keep_data == f"{config.out}-samples"
    assert with_keep_data(config) == config
    assert distilled_share(settled) == pytest.approx(0.2, abs=1e-12)
