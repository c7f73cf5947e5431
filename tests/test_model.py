import json

import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.generate import KVCache
from stock_models import random_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "grouped": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 4, "num_key_value_heads": 4},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True, "tie_word_embeddings": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "llama3 rope": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "all": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {**LLAMA3, "rope_theta": 1e4},
    },
}


@pytest.fixture
def transformers(monkeypatch):
    """transformers, with an RMSNorm that stays in fp64: theirs rounds to fp32 even there."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    return transformers


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def theirs_on_disk(transformers, path, changes, shard="5GB"):
    model = random_model("llama", torch.float64, **changes)
    model.save_pretrained(path, max_shard_size=shard)
    return transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(transformers, name, tmp_path):
    """In fp64, loaded from their files and from ours."""
    theirs = theirs_on_disk(transformers, tmp_path / "theirs", CONFIGS[name])
    ours = Llama.from_pretrained(tmp_path / "theirs")
    tokens = torch.randint(61, (2, 40))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert difference(ours(tokens), expected) < 1e-9
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64)
        assert difference(back(tokens).logits, expected) < 1e-9


def test_sharded_files_load(transformers, tmp_path):
    theirs = theirs_on_disk(transformers, tmp_path / "theirs", {}, shard="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    tokens = torch.randint(61, (1, 9))
    with torch.no_grad():
        ours = Llama.from_pretrained(tmp_path / "theirs")(tokens)
        assert difference(ours, theirs(tokens).logits) < 1e-9


def test_config_of_transformers_4_is_read(tiny_path):
    file = tiny_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["rope_parameters"]
    raw.update(rope_theta=123.0, rope_scaling={"type": "linear", "factor": 2.0})
    config = LlamaConfig.from_dict(raw)
    assert config.rope_theta == 123.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_unknown_fields_survive(tiny_path):
    raw = {**json.loads((tiny_path / "config.json").read_text()), "pretraining_tp": 1, "mine": [3]}
    assert LlamaConfig.from_dict(raw).to_dict()["mine"] == [3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "qwen3_moe"}, "'qwen3_moe'"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "positive factor, got None"),
        ({"rope_parameters": {**LLAMA3, "factor": 0}}, "positive factor, got 0"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, got '64'"),
        ({"num_hidden_layers": 4.0}, r"num_hidden_layers must be a whole number, got 4\.0"),
        ({"head_dim": 7}, "head_dim must be even, at least 2, got 7"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
        ({"llama_pro": {"new_blocks": [9]}}, r"\[9\]"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tiny_path, change, message):
    file = tiny_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    (tiny_path / "model.safetensors").unlink()  # refused before weights are looked at
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(tiny_path)


def test_cached_generation_equals_recomputation(tiny):
    model = tiny().double()
    tokens = torch.randint(61, (2, 5))
    out = model.generate(tokens, 9, stop=())
    for length in range(5, 14):
        assert torch.equal(model(out[:, :length])[:, -1].argmax(-1), out[:, length])


def test_generation_equals_transformers(transformers, tmp_path):
    theirs = theirs_on_disk(transformers, tmp_path / "theirs", {})
    tokens = torch.randint(61, (1, 5))
    expected = theirs.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(Llama.from_pretrained(tmp_path / "theirs").generate(tokens, 12), expected)


def test_rows_stop_on_their_own(tiny):
    model = tiny()
    tokens = torch.randint(61, (3, 4))
    free = model.generate(tokens, 8, stop=())
    stop = free[0, 5].item()
    out = model.generate(tokens, 8, stop=[stop])
    ends = (out[0, 4:] == stop).nonzero()[0].item() + 4
    assert torch.equal(out[0, : ends + 1], free[0, : ends + 1])
    assert (out[0, ends:] == stop).all()


def test_generation_stops_at_the_configs_eos(tiny):
    free = tiny().generate(torch.tensor([[5, 7]]), 8, stop=())
    out = tiny(eos_token_id=[60, free[0, 4].item()]).generate(torch.tensor([[5, 7]]), 8)
    assert torch.equal(out, free[:, : out.shape[1]]) and out.shape[1] <= 5


def test_temperature_flattens(tiny):
    model, tokens = tiny(), torch.full((200, 1), 7)
    generator = torch.Generator().manual_seed(0)
    counts = [
        model.generate(tokens, 1, temperature=t, generator=generator)[:, -1].unique().numel()
        for t in (1e-4, 1.0, 100.0)
    ]
    assert counts[0] == 1 < counts[1] < counts[2] and counts[2] > 45


def test_autocast_serves_an_fp32_model(tiny):
    """As in a trainer with mixed precision: bf16 products on fp32 weights."""
    model, tokens = tiny(), torch.randint(61, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens)
    loss.backward()
    assert abs(loss.item() - model.loss(tokens, tokens).item()) < 2**-7 * loss.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_an_empty_batch_has_empty_logits(tiny):
    assert tiny()(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 61)


def test_dtype_of_loading(tiny_path):
    assert Llama.from_pretrained(tiny_path, dtype=torch.bfloat16).norm.dtype == torch.bfloat16
    assert Llama.from_pretrained(tiny_path).norm.dtype == torch.float32


def test_top_p_samples_only_the_likeliest(tiny):
    model = tiny()
    tokens = torch.randint(61, (1, 4))
    probabilities = model(tokens)[0, -1].softmax(-1).sort(descending=True)
    nucleus = int((probabilities.values.cumsum(0) < 0.3).sum()) + 1
    allowed = set(probabilities.indices[:nucleus].tolist())
    generator = torch.Generator().manual_seed(0)
    draw = {
        model.generate(tokens, 1, temperature=1.0, top_p=0.3, generator=generator)[0, -1].item()
        for _ in range(200)
    }
    assert draw <= allowed and len(draw) == len(allowed)


def test_packed_documents_see_only_themselves(tiny):
    model = tiny().double()
    first, second = torch.randint(61, (1, 5)), torch.randint(61, (1, 7))
    packed = model(
        torch.cat((first, second), 1), cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32)
    )
    # The second document is rotated by other angles, which are fp32: up to 12 rad, half an ulp.
    tolerance = {"rtol": 0.0, "atol": 12 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(packed[:, :5], model(first), **tolerance)
    torch.testing.assert_close(packed[:, 5:], model(second), **tolerance)


def test_loss_is_the_mean_over_valid_targets(tiny):
    model = tiny().double()
    tokens = torch.randint(61, (2, 8))
    targets = torch.randint(61, (2, 8)).masked_fill(torch.arange(8) < 3, -100)
    expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(tokens, targets), expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_saved_below_the_first_new_block(tiny):
    model = expand(tiny(), placement=[3])
    model.train_new_blocks_only()
    tokens = torch.randint(61, (1, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cos, sin = torch.ones(8, 8), torch.zeros(8, 8)
        x = model.embed_tokens(tokens)
        for block in model.blocks[:3]:
            x = block(x, cos, sin)
        assert not saved and not x.requires_grad
        assert model.blocks[3](x, cos, sin).requires_grad and saved


def test_a_frozen_head_gets_no_gradient_buffer(tiny):
    model = expand(tiny(), new_blocks=1, placement="suffix")
    model.train_new_blocks_only()
    tokens = torch.randint(61, (1, 8))
    model.loss(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_training_compiles_as_one_graph(tiny):
    model = tiny()
    tokens = torch.randint(61, (2, 8))
    expected = model.loss(tokens, tokens)
    compiled = torch.compile(model.loss, fullgraph=True)(tokens, tokens)
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("bad", [-1, 61])
def test_token_ids_beyond_the_vocabulary(tiny, bad):
    with pytest.raises(IndexError, match=r"0\.\.60"):
        tiny()(torch.tensor([[3, bad]]))


def test_no_new_block_to_train(tiny):
    with pytest.raises(ValueError, match="expand"):
        tiny().train_new_blocks_only()


@torch.no_grad()
def test_cache_grows_by_what_it_is_given(tiny):
    model = tiny()
    cache = KVCache(model, 8)
    model(torch.randint(61, (1, 3)), cache=cache)
    model(torch.randint(61, (1, 2)), cache=cache)
    assert cache.length == 5
    with pytest.raises(ValueError, match="room for 8 tokens, got 9"):
        model(torch.randint(61, (1, 4)), cache=cache)


@torch.no_grad()
def test_cached_generation_under_autocast(tiny):
    """The keys are kept in the dtype in which the blocks compute."""
    model, tokens = tiny(), torch.randint(61, (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        cached = model(tokens, cache=KVCache(model, 8))
        assert torch.equal(cached, model(tokens))


def test_smollm2_equals_transformers(smollm2):
    """In fp32: logits to 1e-4 of the largest, and the same greedy continuation."""
    transformers = pytest.importorskip("transformers")
    from llamapro.tokenizer import load_tokenizer

    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ours = Llama.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = load_tokenizer(smollm2)
    tokens = torch.tensor([tokenizer.encode("def add(a, b):\n    return a + b\n\n\ndef").ids])
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens) - expected).abs().max() <= 1e-4 * expected.abs().max()
    continued = theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False
    )
    assert torch.equal(ours.generate(tokens, 24), continued)
    tokens = torch.tensor([tokenizer.encode("The capital of France is").ids])
    assert "Paris" in tokenizer.decode(ours.generate(tokens, 8)[0].tolist())
