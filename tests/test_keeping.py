"""Keeping what the base knows: new blocks switched off, and the loss that reads them so."""

import copy

import pytest
import torch
from apply_cases import LAYOUTS, assert_three_way, batch_of, model_of
from llamapro.integrations import transformers as lpt
from test_hf_expansion import ARCHITECTURES, TOKENS, build, same, seen, train
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, DynamicCache

import llamapro_kernels as lk
from llamapro_kernels.integrations import transformers as lkt

KEPT, WEIGHT = lpt.KEPT, 0.7


@pytest.mark.parametrize("placement", ["interleaved", "prefix"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_with_its_new_blocks_off_is_its_base(kind, placement, tmp_path):
    """Bit for bit, generation with a cache included, in memory and where it is saved."""
    model = build(kind)
    before, names = seen(model), list(model.state_dict())
    after = seen(train(lpt.expand(model, 2, placement)))
    config, modules = model.config.to_dict(), list(model.named_modules())
    with lpt.new_blocks_off(model):
        assert same(before, seen(model)) and list(model.state_dict()) == names
    assert not same(before, after) and same(after, seen(model))
    assert model.config.to_dict() == config and list(model.named_modules()) == modules
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(6))
    with lpt.new_blocks_off(model):
        model.save_pretrained(tmp_path)
    assert same(before, seen(AutoModelForCausalLM.from_pretrained(tmp_path)))


def test_new_blocks_come_back_after_an_error_and_after_the_outer_block():
    model = train(lpt.expand(build(), 2))
    with pytest.raises(KeyError), lpt.new_blocks_off(model):
        with pytest.raises(IndexError), lpt.new_blocks_off(model):
            raise IndexError
        assert len(model.model.layers) == 4
        raise KeyError
    assert len(model.model.layers) == 6 and "llamapro_off" not in vars(model)
    with (
        pytest.raises(ValueError, match="a model with new blocks expected"),
        lpt.new_blocks_off(build()),
    ):
        pass


def test_off_with_the_kernels_is_the_base_with_the_kernels(calls):
    base, model = build("qwen2"), train(lpt.expand(build("qwen2"), 2))
    lkt.apply(base), lkt.apply(model)
    with lpt.new_blocks_off(model):
        assert torch.equal(model(TOKENS, use_cache=False).logits, base(TOKENS).logits)
    assert calls["decoder_block"] == 4


def pair(kind="llama", dtype=torch.float32, apply=False, moved=True, **settings):
    """A base, and the same expanded, frozen, and moved away from it."""
    base = model_of(kind, **settings)
    model = lpt.expand(copy.deepcopy(base), 1)
    lpt.train_new_blocks_only(model)
    if moved:
        train(model)  # before the dtype, on which random numbers depend
    base, model = base.to(dtype), model.to(dtype)
    if apply:
        lkt.apply(model)
    return base.eval(), model


def keeping(batch, seed=0):
    """The batch with some tokens kept that would be learnt: of one row alone, if there are two."""
    torch.manual_seed(seed)
    kept = torch.rand(batch["labels"].shape) < 0.6
    kept[1:] = False
    return {**batch, "labels": batch["labels"].masked_fill(kept & (batch["labels"] >= 0), KEPT)}


def plain(model, base, batch, count=None):
    """The loss in plain PyTorch, with logits, by a base of its own."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    with torch.no_grad():
        theirs = base(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    learnt, kept = labels >= 0, labels == KEPT
    total = cross_entropy(logits[learnt], labels[learnt], reduction="sum")
    divergence = kl_div(logits.log_softmax(-1), theirs, reduction="none", log_target=True)
    total = total + WEIGHT * divergence[kept].sum()
    return total / (labels != -100).sum() if count is None else total / count


def found(model, loss):
    """A loss and every gradient of it, by name."""
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return {"loss": loss.detach(), **grads}


def side_by_side(results):
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


@pytest.mark.parametrize("apply", [False, True], ids=["stock", "applied"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_loss_and_gradients(kind, layout, apply):
    base, model = pair(kind, apply=apply)
    batches = [keeping(batch_of(layout, seed), seed) for seed in range(3)]
    loss, ours = lpt.BaseKeepingLoss(model, WEIGHT), []
    for i, batch in enumerate(batches):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        assert outputs.logits.shape[1] == 1
        ours.append(found(model, loss(outputs, batch["labels"], (None, 5, torch.tensor(7))[i])))
    sides = [ours]
    for dtype in (torch.float32, torch.float64):
        base, model = pair(kind, dtype)
        sides.append(
            [found(model, plain(model, base, b, (None, 5, 7)[i])) for i, b in enumerate(batches)]
        )
    assert_three_way(*map(side_by_side, sides), torch.float32)


@pytest.mark.parametrize("apply", [False, True], ids=["stock", "applied"])
def test_before_training_nothing_is_lost(apply):
    """To the bit, and in autocast, which is over when a Trainer's loss is computed."""
    _, model = pair(moved=False)
    loss, batch = lpt.BaseKeepingLoss(model), batch_of("no padding")
    if apply:  # after the loss was made, for once
        lkt.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch["input_ids"])
    results = found(model, loss(outputs, torch.full_like(batch["labels"], KEPT)))
    assert not any(tensor.any() for tensor in results.values())


def test_the_base_has_no_dropout_and_modes_stay():
    base, model = pair(attention_dropout=0.5)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    ids, head = batch_of("no padding")["input_ids"], model.lm_head.weight
    torch.manual_seed(0)
    states = model.model(ids)[0][:, :-1]
    expected = lk.linear_kl_divergence(states, base.model(ids)[0][:, :-1], head)
    loss = lpt.BaseKeepingLoss(model)
    torch.manual_seed(0)
    ours = loss(model(ids), torch.full_like(ids, KEPT))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert [module.training for module in model.modules()] == modes and 0 < sum(modes) < len(modes)


def test_the_base_computes_kept_rows_alone():
    _, model = pair()
    loss, rows = lpt.BaseKeepingLoss(model), []
    model.model.layers[0].register_forward_hook(lambda m, args, output: rows.append(len(output)))
    model.model.register_forward_hook(lambda *_: rows.append("whole"))
    ids = torch.arange(1, 31).view(5, 6)
    labels = ids.clone()
    labels[1, 3] = labels[4, 2:] = KEPT
    labels[2, 0] = KEPT  # which nothing predicts
    loss(model(ids), labels)
    loss(model(ids), ids)
    assert rows == [5, "whole", 2, 5, "whole"]


def test_the_logits_of_an_evaluation_are_whole():
    """So are those with labels, whose loss transformers computes from them."""
    _, model = pair()
    ids, whole = batch_of("no padding")["input_ids"], (2, 11, 64)
    expected = model(ids, labels=ids)
    lpt.BaseKeepingLoss(model)
    outputs = model(ids, labels=ids)
    assert torch.equal(outputs.loss, expected.loss) and outputs.logits.shape == whole
    assert model.eval()(ids).logits.shape == whole
    with torch.no_grad():
        assert model.train()(ids).logits.shape == whole


def test_an_error_in_the_base_leaves_the_model_as_it_was():
    _, model = pair()
    loss, ids = lpt.BaseKeepingLoss(model), torch.arange(1, 12)[None]
    outputs, modules = model(ids), list(model.named_modules())

    def fail(*_):
        raise RuntimeError("full")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="full"):
        loss(outputs, torch.full_like(ids, KEPT))
    handle.remove()
    assert list(model.named_modules()) == modules
    assert all(module.training for module in model.modules())


def of_a_base():
    return model_of("llama")


def unfrozen():
    _, model = pair()
    model.model.norm.requires_grad_(True)
    return model


def with_a_bias():
    _, model = pair()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
    return model


def with_a_cap():
    model = lpt.expand(build("gemma2"), 2)
    lpt.train_new_blocks_only(model)
    return model


def sharded():
    _, model = pair()
    model.lm_head.weight.full_tensor = None  # as a DTensor has
    return model


def with_adapters():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(pair()[1], peft.LoraConfig(target_modules=["q_proj"]))


MODELS = {
    "base": (of_a_base, "a model with new blocks expected: expand it first"),
    "unfrozen": (unfrozen, "a frozen base .* 1 of its tensors that train, such as model.norm"),
    "bias": (with_a_bias, r"without bias and soft cap expected, got Linear\(.*bias=True"),
    "cap": (with_a_cap, "without bias and soft cap expected, got Linear.* and 30.0"),
    "sharded": (sharded, "whole on each device expected, got a sharded one"),
    "headless": (lambda: pair()[1].model, "one torch.nn.Linear .* got None"),
    "adapters": (with_adapters, "a model without adapters expected"),
}


@pytest.mark.parametrize("make, message", MODELS.values(), ids=MODELS)
def test_a_model_whose_base_cannot_be_kept(make, message):
    with pytest.raises(ValueError, match=message):
        lpt.BaseKeepingLoss(make())


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(weight):
    with pytest.raises(ValueError, match="weight must be above 0 and finite, got"):
        lpt.BaseKeepingLoss(pair()[1], weight)


def test_labels_that_are_none_of_this_forward():
    _, model = pair()
    loss, ids = lpt.BaseKeepingLoss(model), torch.arange(1, 12)[None]
    wrong = {
        r"got -102": ids.masked_fill(ids == 4, -102),
        r"last forward expected, got \(1, 10\) and \(1, 11\)": ids[:, 1:],
        r"last forward expected, got None and \(1, 11\)": None,
    }
    for message, labels in wrong.items():
        outputs = model(ids)
        with pytest.raises(ValueError, match=message):
            loss(outputs, labels)
    with pytest.raises(ValueError, match=r"got \(1, 11\) and None"):
        loss(outputs, ids)
    outputs = model(ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="without past_key_values expected"):
        loss(outputs, torch.full_like(ids, KEPT))
    outputs = model(ids)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"such as lm_head\.weight"):
        loss(outputs, ids)
