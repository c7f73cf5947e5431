import json
import re

import pytest
import torch
from llamapro import Llama, expand
from llamapro.model_files import CheckpointError
from llamapro.new_blocks import merge
from safetensors.torch import load_file
from stock_models import random_model

transformers = pytest.importorskip("transformers")
lpt = pytest.importorskip("llamapro.integrations.transformers")

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
ARCHITECTURES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, **KINDS},
    "qwen3": {"head_dim": 8, "attention_bias": True},
    "phi3": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **KINDS},
    "gemma3_text": {"head_dim": 8, **KINDS},
    "olmo2": {},
}


def build(kind="llama", **changes):
    return random_model(kind, **{**IDS, **ARCHITECTURES[kind], **changes})


TOKENS = torch.arange(40).view(2, 20) % 61


@torch.no_grad()
def seen(model):
    """Logits, and what is generated with a cache."""
    generated = model.generate(TOKENS, max_new_tokens=9, do_sample=False)
    return model(TOKENS).logits, generated


def same(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("placement", ["interleaved", "top_half", "suffix", [0, 2, 5]], ids=str)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_expansion_changes_no_bit(kind, placement, tmp_path):
    model = build(kind)
    before = seen(model)
    count = 3 if isinstance(placement, list) else 2
    assert lpt.expand(model, count, placement) is model
    assert len(model.model.layers) == model.config.num_hidden_layers == 4 + count
    assert same(before, seen(model))
    model.save_pretrained(tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert back.config.llama_pro == model.config.llama_pro
    assert same(before, seen(back))


@torch.no_grad()
def train(model, seed=1):
    """Change everything that is new, as training does."""
    torch.manual_seed(seed)
    for i in model.config.llama_pro["new_blocks"]:
        for parameter in model.model.layers[i].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_new_blocks_are_loaded_onto_a_base_from_elsewhere(kind, dtype, tmp_path):
    build(kind).to(dtype).save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = train(lpt.expand(load(tmp_path / "base"), 2, "suffix"))
    after = seen(model)
    lpt.save_new_blocks(model, tmp_path / "new")
    base = load(tmp_path / "base")
    before = seen(base)
    lpt.load_new_blocks(base, tmp_path / "new", "law")
    assert same(after, seen(base)) and not same(before, after)
    assert base.config.to_dict() == model.config.to_dict()
    lpt.activate(base, None)
    assert same(before, seen(base)) and len(base.model.layers) == 4
    assert base.config.to_dict() == load(tmp_path / "base").config.to_dict()


@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_one_base_has_one_fingerprint(tied, rope, tmp_path):
    """As a transformers model, as our Llama and as files, in fp32 and in bf16."""
    changes = {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": tied}
    if rope == "llama3":
        changes["rope_parameters"] = {
            "rope_type": rope,
            "rope_theta": 5000,
            "factor": 8.0,
            "low_freq_factor": 1,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    base = tmp_path / "base"
    build(**changes).to(torch.bfloat16).save_pretrained(base)
    prints = set()
    for dtype in (torch.float32, torch.bfloat16):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        ours = Llama.from_pretrained(base, dtype=dtype)
        for model in (lpt.expand(theirs, 2), expand(ours, 2)):
            out = tmp_path / f"{dtype} {type(model)}"
            lpt.save_new_blocks(model, out)
            merge(base, out, tmp_path / f"{out.name} merged")
            about = json.loads((out / "new_blocks.json").read_text())
            prints.add((about["base_fingerprint"], about["base_dtype"]))
            lpt.load_new_blocks(ours, out)
            lpt.load_new_blocks(theirs, out)
    assert len(prints) == 2


def test_new_blocks_of_llamas_are_exchanged(tmp_path):
    """Saved by one library's model, loaded by the other's."""
    base = tmp_path / "base"
    build(attention_bias=False, mlp_bias=False).save_pretrained(base)
    model = train(lpt.expand(transformers.AutoModelForCausalLM.from_pretrained(base), 2))
    lpt.save_new_blocks(model, tmp_path / "new")
    ours = Llama.from_pretrained(base)
    lpt.load_new_blocks(ours, tmp_path / "new", "law")
    lpt.save_new_blocks(ours, tmp_path / "again")
    for name in ("new_blocks.json", "new_blocks.safetensors"):
        first, second = (load_json_or_tensors(tmp_path / d / name) for d in ("new", "again"))
        assert first == second
    lpt.activate(ours, None)
    assert len(ours.blocks) == 4


def load_json_or_tensors(file):
    if file.suffix == ".json":
        return json.loads(file.read_text())
    return {name: tensor.tolist() for name, tensor in load_file(file).items()}


def test_two_domains_and_the_base_in_one_model(tmp_path):
    """Swapped a hundred times, no bit of any moves."""
    build("qwen2").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = {None: seen(model)}
    for seed, (name, placement) in enumerate({"law": [1, 2], "code": "suffix"}.items()):
        domain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        train(lpt.expand(domain, 2, placement), seed)
        expected[name] = seen(domain)
        lpt.save_new_blocks(domain, tmp_path / name)
        lpt.load_new_blocks(model, tmp_path / name, name)
    assert not same(expected["law"], expected["code"])
    for i in range(100):
        name = ("law", None, "code", None)[i % 4]
        lpt.activate(model, name)
        assert len(model.model.layers) == (6 if name else 4)
        assert torch.equal(model(TOKENS).logits, expected[name][0])
        assert i % 20 or same(expected[name], seen(model))


def test_only_new_blocks_train(tmp_path):
    model = lpt.expand(build(num_hidden_layers=12), 2, [1, 12])
    lpt.train_new_blocks_only(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1", "12"} and len(trained) == 2 * 16
    patterns = lpt.new_block_patterns(model.config)
    names = {name for name, _ in model.named_parameters()}
    escaped = [re.sub(r"\.(?!\+)", r"\\.", pattern) for pattern in patterns]  # as axolotl does
    for match in (re.match, re.search, re.fullmatch):
        for form in (patterns, escaped):
            assert {n for n in names if any(match(p, n) for p in form)} == trained
    assert patterns == ["^model[.]layers[.]1[.].+", "^model[.]layers[.]12[.].+"]
    assert lpt.new_block_patterns(build().config) == []
    with pytest.raises(ValueError, match="no new block to train"):
        lpt.train_new_blocks_only(build())


def test_what_is_set_later_reaches_the_copies():
    model = lpt.expand(build(), 2)
    model.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {
        "eager"
    }
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    states = model(TOKENS, output_hidden_states=True).hidden_states
    assert len(states) == 7 and torch.equal(states[2], states[3])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_large_first_gradients_are_said(kind, caplog):
    lpt.expand(build(kind), 2)
    assert ("first gradients" in caplog.text) == (kind in ("olmo2", "gemma2", "gemma3_text"))


def quantized():
    model = build()
    model.hf_quantizer = object()
    return model


def with_adapters():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))


def with_injected_adapters():
    peft = pytest.importorskip("peft")
    model = build()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["down_proj"]), model)
    del model.peft_config
    return model


def without_layers():
    model = build()
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    model.empty = torch.nn.ModuleList()
    return model


def of(config):
    return transformers.AutoModelForCausalLM.from_config(config)


WRONG = {
    "quantized": (quantized, {}, "a model in floating point expected, got a quantized Llama"),
    "adapters": (with_adapters, {}, "a model without adapters expected, got PeftModel.*: expand"),
    "injected": (with_injected_adapters, {}, r"down_proj must be torch.nn.Linear, got peft\."),
    "no layers": (without_layers, {}, r"one stack of 4 decoder layers expected, got \[\]"),
    "no model": (lambda: torch.nn.Linear(2, 2), {}, "a model of transformers expected, got Linear"),
    "GPT-2": (
        lambda: of(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)),
        {},
        "model_type must be one of .* got 'gpt2'",
    ),
    "T5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(num_layers=1, d_model=8, d_kv=4, d_ff=8, vocab_size=9)
        ),
        {},
        "got 't5'",
    ),
    "Mixtral": (
        lambda: random_model("mixtral", num_local_experts=2),
        {},
        "got 'mixtral'",
    ),
    "position": (build, {"placement": [9]}, r"within 0\.\.4 .* got \[9\]"),
    "count": (build, {"new_blocks": 5}, "between 1 and the 4 blocks"),
    "name": (build, {"new_blocks": 2, "placement": "middle"}, "'middle'"),
}


@pytest.mark.parametrize("make, settings, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_expanded_stays_as_it_is(make, settings, message):
    model = make()
    before = list(model.named_modules())
    config = getattr(model, "config", None) and model.config.to_dict()
    with pytest.raises(ValueError, match=message):
        lpt.expand(model, **(settings or {"new_blocks": 1}))
    assert list(model.named_modules()) == before
    assert (getattr(model, "config", None) and model.config.to_dict()) == config


def test_kernels_are_applied_after_expansion(tmp_path):
    """Sets that were loaded before are swapped with and without them."""
    lkt = pytest.importorskip("llamapro_kernels.integrations.transformers")
    lpt.save_new_blocks(train(lpt.expand(build(), 2)), tmp_path / "law")
    model = build()
    expected = {None: seen(model)}
    lpt.load_new_blocks(model, tmp_path / "law", "law")
    expected["law"], classes = seen(model), {type(module) for module in model.modules()}
    assert lkt.apply(model)["block"] == "applied"
    before = model(TOKENS).logits
    lpt.activate(model, None)
    lpt.activate(model, "law")
    assert torch.equal(model(TOKENS).logits, before)
    for add in (lpt.expand, lambda m, _: lpt.load_new_blocks(m, tmp_path / "law", "other")):
        with pytest.raises(ValueError, match="without llamapro_kernels' apply expected"):
            add(model, 1)
    lpt.activate(model, None)
    lkt.revert(model)
    assert same(expected[None], seen(model))
    lpt.activate(model, "law")
    assert same(expected["law"], seen(model))
    assert {type(module) for module in model.modules()} == classes


def test_another_base_is_refused(tmp_path):
    lpt.save_new_blocks(lpt.expand(build("gemma2"), 2), tmp_path / "new")
    lpt.load_new_blocks(build("gemma2"), tmp_path / "new")
    for changes in ({"attn_logit_softcapping": 9.0}, {"layer_types": ["full_attention"] * 4}):
        model = build("gemma2", **changes)
        with pytest.raises(CheckpointError, match="got the model with"):
            lpt.load_new_blocks(model, tmp_path / "new")
        assert len(model.model.layers) == 4 and not hasattr(model.config, "llama_pro")
    with pytest.raises(ValueError, match=r"its layers at model.layers.0, got a Gemma2Model"):
        lpt.load_new_blocks(build("gemma2").model, tmp_path / "new")
