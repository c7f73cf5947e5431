"""`apply` on models of transformers: what they compute, train and save, against themselves."""

import copy

import pytest
import torch
from apply_cases import (
    BATCH,
    KINDS,
    LAYOUTS,
    LENGTH,
    assert_three_way,
    batch_of,
    gradients,
    model_of,
    over_batches,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from llamapro_kernels.integrations import transformers as lkt

PIECES = ("attention", "block", "rms_norm", "rope", "swiglu", "loss")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_transformers(kind, layout, dtype, calls):
    model = model_of(kind, dtype)
    peer, truth = (over_batches(m, layout) for m in (model, model_of(kind, torch.float64)))
    assert lkt.apply(model) == dict.fromkeys(PIECES, "applied")
    assert_three_way(over_batches(model, layout), peer, truth, dtype)
    assert (calls["decoder_block"], calls["linear_cross_entropy"]) == (3 * 3, 3)


@pytest.mark.parametrize("pieces", [["block"], ["block", "loss"], ["block", "attention"]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_transformers(kind, pieces, calls):
    """Without the block the pieces serve; without the attention too, by PyTorch's masks."""
    model, layout = model_of(kind), "left padding"
    peer, truth = (over_batches(m, layout) for m in (model, model_of(kind, torch.float64)))
    said = lkt.apply(model, **dict.fromkeys(pieces, False))
    assert {name for name, why in said.items() if why == "not asked for"} == {*pieces}
    assert_three_way(over_batches(model, layout), peer, truth, torch.float32)
    assert calls["decoder_block"] == 0 and calls["rms_norm"] >= 3 * 7 and calls["swiglu"] == 3 * 3
    assert calls["flash_attention"] == (0 if "attention" in pieces else 3 * 3)


OTHERS = {  # what is served of decoders without a block of ours
    "olmo2": {"attention", "rms_norm", "rope", "swiglu"},
    "phi3": {"attention", "rms_norm", "rope", "swiglu"},
    "gemma": {"attention", "rope"},
    "granite": {"attention", "rms_norm", "rope", "swiglu"},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_get_what_fits(kind, calls):
    model, layout = model_of(kind, head_dim=8), "left padding"
    exact = model_of(kind, torch.float64, head_dim=8)
    peer, truth = (over_batches(m, layout) for m in (model, exact))
    said = lkt.apply(model)
    assert {name for name, why in said.items() if why == "applied"} == OTHERS[kind], said
    assert "expected, got" in said["block"]
    assert_three_way(over_batches(model, layout), peer, truth, torch.float32)
    assert calls["flash_attention"] == 3 * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_becomes_recomputation(reentrant, calls):
    """The same bits; no layer is run a second time by PyTorch."""
    model, batch = model_of("llama"), batch_of("right padding")
    lkt.apply(model)
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saved = count_saved(model, batch)
    assert all(torch.equal(v, expected[k]) for k, v in gradients(model, batch).items())
    assert calls["decoder_block"] == 3 * 3
    model.gradient_checkpointing_disable()
    assert saved < 0.5 * count_saved(model, batch)


def count_saved(model, batch):
    """Bytes that a forward pass keeps for backward, weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch)
    return sum(size for where, size in kept.items() if where not in weights)


def test_checkpointing_where_the_block_does_not_fit():
    """A hooked layer is checkpointed as transformers would."""
    model, batch = model_of("llama"), batch_of("no padding")
    lkt.apply(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: out)
    expected, much = gradients(model, batch), count_saved(model, batch)
    model.gradient_checkpointing_enable()
    assert all(torch.equal(v, expected[k]) for k, v in gradients(model, batch).items())
    assert count_saved(model, batch) < 0.5 * much


def test_frozen_blocks_keep_nothing_below_the_first_that_trains(calls):
    model, batch = model_of("llama"), batch_of("no padding")
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    lkt.apply(model)
    grads = gradients(model, batch)
    assert all(name.startswith("model.layers.2.") for name in grads.keys() - {"loss"})
    model.model.layers[2].requires_grad_(False)
    model.model.layers[2].mlp.down_proj.weight.requires_grad_(True)
    assert count_saved(model, batch) < 16 * BATCH * LENGTH * 32 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model = model_of(kind)
    truth = over_batches(model_of(kind, torch.float64), "no padding")

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return over_batches(model, "no padding")

    peer = run()
    lkt.apply(model)
    ours = run()
    assert ours["loss"].dtype == torch.float32
    assert_three_way(ours, peer, truth, torch.bfloat16)


def test_compile():
    """What inductor makes of a block is seen in test_block.py."""
    torch.compiler.reset()
    model, batch = model_of("qwen3", num_hidden_layers=1), batch_of("left padding")
    lkt.apply(model)
    expected = gradients(model, batch)
    compiled = gradients(torch.compile(model, backend="aot_eager"), batch)
    for name, value in expected.items():
        torch.testing.assert_close(compiled[f"_orig_mod.{name}" if name != "loss" else name], value)


@pytest.mark.parametrize("first", ["adapter", "apply"])
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_are_never_bypassed(first, merged, calls):
    """LoRA on some projections, with weights that matter."""

    def adapted(model):
        torch.manual_seed(3)
        targets = LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2]
        )
        model = get_peft_model(model, targets)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model

    batch = batch_of("left padding")
    peer, truth = (adapted(model_of("llama", d)) for d in (torch.float32, torch.float64))
    ours = model_of("llama")
    if first == "apply":
        lkt.apply(ours)
    ours = adapted(ours)
    if first == "adapter":
        lkt.apply(ours)
    if merged:
        for model in (peer, truth, ours):
            model.merge_adapter()
        for model in (peer, truth, ours):
            model.requires_grad_(True)
    assert_three_way(*(gradients(m, batch) for m in (ours, peer, truth)), torch.float32)
    assert calls["decoder_block"] == 1 and calls["flash_attention"] == 2
    whole = ours.merge_and_unload()
    calls.clear()
    whole.train()(**batch)
    assert calls["decoder_block"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_generation(kind, calls):
    model, batch = model_of(kind).eval(), batch_of("left padding")
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False}
    caches = (None, "static")
    with torch.no_grad():
        logits = model(**batch).logits
        texts = [model.generate(**prompt, **options, cache_implementation=c) for c in caches]
        lkt.apply(model)
        ours = model(**batch)
        torch.testing.assert_close(
            ours.logits[batch["attention_mask"] == 1], logits[batch["attention_mask"] == 1]
        )
        assert ours.loss.isfinite() and calls["linear_cross_entropy"] == 0
        for cache, text in zip(caches, texts, strict=True):
            assert torch.equal(
                model.generate(**prompt, **options, cache_implementation=cache), text
            )


def test_attentions_and_states_are_given_when_asked_for(calls):
    model, batch = model_of("mistral").eval(), batch_of("left padding")
    seen = batch["attention_mask"] == 1
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**batch, **asked)
        model.set_attn_implementation("sdpa")
        lkt.apply(model)
        ours = model(**batch, **asked)
        assert calls["decoder_block"] == 0
        states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
        assert calls["decoder_block"] in (0, 3)
    for a, b in zip(ours.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a[0, :, 3:], b[0, :, 3:])
    for result in (ours.hidden_states, states):
        for a, b in zip(result, expected.hidden_states, strict=True):
            torch.testing.assert_close(a[seen], b[seen])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_stock(kind, tmp_path):
    model, batch = model_of(kind), batch_of("no padding")
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    lkt.apply(model)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == names
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path / "out")
    model_of(kind).save_pretrained(tmp_path / "stock")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again.model.layers[0]) is type(model_of(kind).model.layers[0])
    with torch.no_grad():
        logits = model_of(kind).eval()(batch["input_ids"]).logits
        torch.testing.assert_close(again.eval()(batch["input_ids"]).logits, logits)


def test_an_optimizer_made_before_apply_still_trains():
    model, batch = model_of("llama"), batch_of("no padding")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lkt.apply(model)
    gradients(model, batch)
    before = model.model.layers[1].self_attn.k_proj.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model.model.layers[1].self_attn.k_proj.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_revert(kind):
    model, batch = model_of(kind), batch_of("left padding")
    classes, expected = [type(m) for m in model.modules()], gradients(model, batch)
    lkt.apply(model)
    assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
    twin = copy.deepcopy(model)
    lkt.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(v, expected[k]) for k, v in gradients(model, batch).items())
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)
    lkt.revert(twin)  # a copy has a state of its own


def test_no_function_of_transformers_is_exchanged():
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    other = model_of("llama")
    lkt.apply(model_of("llama"))
    assert vars(modeling_llama) == before
    assert type(other) is modeling_llama.LlamaForCausalLM


def quantized():
    model = model_of("llama")
    model.is_quantized = True
    return model


BAD = {
    "no decoder": (lambda: nn.Linear(3, 3), {}, "with decoder layers expected, got Linear"),
    "quantized": (quantized, {}, "not quantized expected, got a quantized LlamaForCausalLM"),
    "recompute": (lambda: model_of("llama"), {"recompute": "all"}, "recompute must be one of"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_apply_refuses(bad):
    make, options, message = BAD[bad]
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        lkt.apply(model, **options)
    assert [type(m) for m in model.modules()] == classes


def test_apply_twice_and_revert_without():
    model = model_of("llama")
    with pytest.raises(ValueError, match="apply was called on expected, got LlamaForCausalLM"):
        lkt.revert(model)
    lkt.apply(model)
    with pytest.raises(ValueError, match="was called on this LlamaForCausalLM before"):
        lkt.apply(model)
    with pytest.raises(TypeError, match="atention"):
        lkt.apply(model_of("llama"), atention=False)


def test_smollm2(smollm2, calls):
    """The real one: loss and gradients of its text, left-padded, beside stock transformers."""
    from llamapro.proof import PROOF_TEXT
    from llamapro.tokenizer import load_tokenizer

    ids = load_tokenizer(smollm2).encode(PROOF_TEXT).ids
    tokens = torch.tensor([ids, [0] * 20 + ids[:-20]])
    seen = torch.ones_like(tokens)
    seen[1, :20] = 0
    labels = tokens.masked_fill(seen == 0, -100)
    labels[1, 20] = -100
    batch = {"input_ids": tokens, "attention_mask": seen, "labels": labels}

    def run(dtype, applied):
        model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype).train()
        model.requires_grad_(False)
        model.model.layers[25].requires_grad_(True)
        if applied:
            lkt.apply(model)
        return gradients(model, batch)

    peer, truth = run(torch.float32, False), run(torch.float64, False)
    assert_three_way(run(torch.float32, True), peer, truth, torch.float32)
    assert calls["decoder_block"] == 30
