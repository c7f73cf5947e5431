"""Rows of whole documents: how they are filled, and that documents do not see each other."""

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from llamapro.data.packing import PackedDataset, best_fit
from llamapro.data.tokens import DataError, TokenDataset, Tokens
from llamapro.eval.perplexity import perplexity
from llamapro.planner import Workload
from torch.utils.flop_counter import FlopCounterMode

from llamapro_kernels.attention import visible_pairs

RNG = np.random.default_rng(0)


def corpus(lengths, counted=None, top=61):
    """Documents of these lengths, each of random tokens."""
    ends = np.cumsum(lengths)
    return Tokens(RNG.integers(3, top, ends[-1]).astype(np.uint16), ends, counted)


def pieces(batch):
    """(tokens, targets) of each document in a batch, as lists."""
    ends = batch.cu_seqlens[: batch.documents + 1].tolist()
    flat = batch.tokens[0], batch.targets[0]
    return [tuple(part[a:b].tolist() for part in flat) for a, b in pairwise(ends)]


def best_fit_one_by_one(lengths, room):
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in rooms if left >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else room) - length)
    return sorted(rooms)


@pytest.mark.parametrize("room, count", [(1, 3), (7, 1), (16, 40), (39, 60), (64, 500), (8, 0)])
def test_rows_are_filled_as_best_fit_fills_them(room, count):
    lengths = RNG.integers(1, room + 1, count)
    order, rows = best_fit(lengths, room)
    assert sorted(order) == list(range(count))
    filled = [int(lengths[order[a:b]].sum()) for a, b in pairwise(rows)]
    assert all(0 < row <= room for row in filled)
    assert sorted(room - row for row in filled) == best_fit_one_by_one(lengths.tolist(), room)


def test_every_target_of_every_document_is_there_once():
    """Long documents go on in the next piece; none is predicted from another document."""
    tokens = corpus([5, 1, 40, 2, 17, 16, 33, 9])
    rows = PackedDataset(tokens, 16, seed=1)
    expected = sorted(
        (place, place + 1)
        for end, length in zip(tokens.ends, np.diff(tokens.ends, prepend=0), strict=True)
        for place in range(end - length, end - 1)
    )
    numbered = PackedDataset(Tokens(np.arange(len(tokens.ids)), tokens.ends), 16, seed=1)
    batch = numbered.batch(0, len(rows))
    counted = batch.targets[0] != -100
    got = zip(batch.tokens[0, counted].tolist(), batch.targets[0, counted].tolist(), strict=True)
    assert sorted(got) == expected
    assert batch.tokens.shape == (1, 16 * len(rows)) and batch.cu_seqlens[-1] == 16 * len(rows)
    assert batch.padding == 16 * len(rows) - len(expected)
    assert batch.counted == len(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_document_is_computed_as_alone(tiny, dtype):
    """Three-way rule: against fp64 of the document alone, with itself alone beside it."""
    torch.manual_seed(1)
    model, truth = tiny().to(dtype), tiny().to(dtype).double()
    tokens = corpus([30, 7, 12, 60, 3, 21])
    batch = PackedDataset(tokens, 64).batch(0, 2)
    with torch.no_grad():
        packed = model(batch.tokens, batch.cu_seqlens)[0]
        for a, b in pairwise(batch.cu_seqlens):
            alone = batch.tokens[:, a:b]
            exact, plain = truth(alone)[0], model(alone)[0].double()
            floor = torch.finfo(dtype).eps * exact.abs().max()  # of the last rounding
            assert (packed[a:b].double() - exact).abs().max() <= 2 * (
                plain - exact
            ).abs().max() + floor


def test_the_loss_is_the_mean_over_the_tokens_of_all_documents(tiny):
    """Packed, and padded one document a row: the same loss and gradients to rounding."""
    tokens = corpus([30, 7, 12, 50, 3, 21, 64])
    lengths = np.diff(tokens.ends, prepend=0)
    packed = PackedDataset(tokens, 64)
    batch = packed.batch(0, len(packed))
    model, padded_model = tiny(), tiny()
    rows = torch.zeros(len(lengths), 64, dtype=torch.long)
    targets = torch.full_like(rows, -100)
    for row, (end, length) in enumerate(zip(tokens.ends, lengths, strict=True)):
        ids = torch.from_numpy(tokens.ids[end - length : end].astype(np.int64))
        rows[row, : length - 1], targets[row, : length - 1] = ids[:-1], ids[1:]
    loss = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    padded = padded_model.loss(rows, targets)
    loss.backward()
    padded.backward()
    torch.testing.assert_close(loss, padded, rtol=1e-6, atol=0)  # some roundings of fp32
    for ours, theirs in zip(model.parameters(), padded_model.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    assert perplexity(model, packed)["loss"] == pytest.approx(loss.item(), rel=1e-6)


def chat(*documents):
    """Conversations written as a letter for each token: A counts, u does not."""
    counted = np.array([letter == "A" for letter in "".join(documents)])
    return corpus([len(d) for d in documents], counted)


def test_only_targets_that_count_are_there():
    tokens = chat("uuAAuA", "uA")
    for rows in (PackedDataset(tokens, 8), TokenDataset(tokens, 7)):
        batch = rows.rows([0])
        starts = {int(t): i for i, t in enumerate(tokens.ids)}
        targets = batch.targets[batch.targets != -100].tolist()
        assert sorted(targets) == sorted(tokens.ids[tokens.counted].tolist()), starts


def test_long_conversations_end_with_the_last_answer_that_fits(caplog):
    tokens = chat("uuAAuAAA", "uuuuuuuA", "uA", "uAAAAAAAA", "uuAAAAA")
    with caplog.at_level(logging.WARNING):
        rows = PackedDataset(tokens, 6)
    batch = rows.batch(0, len(rows))
    assert "of 5 conversations 1 are cut" in caplog.text and "2 without one" in caplog.text
    starts = [0, *tokens.ends[:-1]]
    expected = [tokens.ids[starts[i] : starts[i] + n].tolist() for i, n in ((0, 3), (2, 1), (4, 6))]
    assert sorted(ids for ids, _ in pieces(batch)) == sorted(expected)


def test_conversations_without_an_answer_that_fits_are_no_data():
    with pytest.raises(DataError, match="an answer, expected, got none"):
        PackedDataset(chat("uuuuuA", "uuuuuAA"), 4)


def test_documents_of_nothing_are_refused():
    tokens = Tokens(np.arange(6), np.array([3, 3, 6]))
    with pytest.raises(DataError, match="documents of a token or more"):
        PackedDataset(tokens, 4)


@pytest.mark.parametrize("window", [None, 5])
def test_pairs_are_counted(window):
    for queries, keys in ((1, 1), (7, 7), (3, 9), (9, 3), (0, 4)):
        place = torch.arange(queries)[:, None] + keys - queries
        seen = (torch.arange(keys) <= place) & (torch.arange(keys) > place - (window or keys + 9))
        assert visible_pairs(queries, keys, window=window) == int(seen.sum())


def test_the_planner_counts_the_documents_that_are_there(tiny):
    """Against the pairs in the batches of an epoch; padding, a last document, costs a little."""
    rows = PackedDataset(corpus(RNG.integers(2, 90, 200)), 64)
    work = Workload(tiny().config, None, len(rows), 64, documents=rows.spread)
    lengths = rows.batch(0, len(rows)).cu_seqlens.diff()[:-1].tolist()
    assert work.pairs(None) == sum(n * (n + 1) // 2 for n in lengths)
    assert work.pairs(None) < Workload(tiny().config, None, len(rows), 64).pairs(None)


def test_packed_rows_cost_what_rows_cost_but_for_attention(tiny):
    rows = PackedDataset(corpus([20, 30, 40, 60]), 64)
    batch = rows.batch(0, 2)
    with FlopCounterMode(display=False) as packed, torch.no_grad():
        tiny()(batch.tokens, batch.cu_seqlens)
    matrices = sum(p.numel() for p in tiny().parameters() if p.dim() == 2)
    matrices -= tiny().embed_tokens.weight.numel()
    counts = packed.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert products == 2 * batch.tokens.numel() * matrices


def test_the_loss_of_conversations_is_that_of_transformers(tiny, tmp_path):
    """Packed and masked, against labels of -100 where nothing counts: loss and every gradient."""
    transformers = pytest.importorskip("transformers")
    tokens = chat("uuuAAuAAA", "uAAAA", "uuuuuuAuuAA", "uuA")
    rows = PackedDataset(tokens, 16)
    batch = rows.batch(0, len(rows))
    model = tiny()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        model.save_pretrained(tmp_path / "m")
    )
    loss = model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens)
    expected = 0.0
    for end, length in zip(tokens.ends, np.diff(tokens.ends, prepend=0), strict=True):
        ids = torch.from_numpy(tokens.ids[end - length : end].astype(np.int64))[None]
        labels = ids.where(torch.from_numpy(tokens.counted[end - length : end])[None], -100)
        counted = int((labels[:, 1:] != -100).sum())
        expected += theirs(ids, labels=labels).loss * counted / batch.counted
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # some roundings of fp32
    gradients = dict(theirs.named_parameters())
    block = model.blocks[0]
    for ours, name in (
        (model.embed_tokens.weight, "model.embed_tokens.weight"),
        (block.attention_norm, "model.layers.0.input_layernorm.weight"),
        (block.down_proj.weight, "model.layers.0.mlp.down_proj.weight"),
        (model.lm_head.weight, "lm_head.weight"),
    ):
        difference = (ours.grad - gradients[name].grad).norm()
        assert difference <= 1e-5 * gradients[name].grad.norm(), name
