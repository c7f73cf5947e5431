"""Expansion on disk of architectures that transformers alone runs, against transformers."""

import json
import logging
import sys

import pytest
import torch
from llamapro import expansion
from llamapro.architectures import ARCHITECTURES, OTHERS
from llamapro.config import LAYER
from llamapro.expansion import expand_checkpoint
from llamapro.model_files import CheckpointError
from llamapro.proof import IdentityError
from safetensors.torch import load_file, save_file
from stock_models import NO_IDS, random_model

transformers = pytest.importorskip("transformers")

COMMON = {"head_dim": 8, "sliding_window": 5, **NO_IDS}
CASES = {  # name: model_type, settings
    "phi3": ("phi3", {}),
    "gemma": ("gemma", {"attention_bias": True}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 2}),
    "olmo2": ("olmo2", {"attention_bias": True}),
}


def save(path, model_type, **settings):
    """A random model's directory."""
    random_model(model_type, **COMMON | settings).save_pretrained(path)
    return path


@pytest.fixture(params=CASES)
def base(request, tmp_path):
    model_type, settings = CASES[request.param]
    return save(tmp_path / "base", model_type, **settings)


@torch.no_grad()
def logits(path, tokens):
    return transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits


def config_of(path):
    return json.loads((path / "config.json").read_text())


def names(path):
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", ["interleaved", [0, 3, 6]], ids=str)
def test_no_logit_changes(base, tmp_path, placement, dtype):
    """Also beyond the window, and with a cache, in which every block has a place of its own."""
    base = resaved(base, tmp_path / dtype_name(dtype), dtype)
    expand_checkpoint(base, tmp_path / "out", None if placement == [0, 3, 6] else 2, placement)
    tokens = torch.randint(61, (2, 16))
    assert torch.equal(logits(base, tokens), logits(tmp_path / "out", tokens))
    sides = [
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (base, tmp_path / "out")
    ]
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(*(side.generate(tokens, **options) for side in sides))


def resaved(path, out, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.save_pretrained(out)
    return out


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def test_only_output_projections_of_new_blocks_are_zero(base, tmp_path):
    """Everything else is copied, bit for bit; config.json says what is new and keeps the rest."""
    assert expand_checkpoint(base, tmp_path / "out", 2) == [2, 5]
    before, after = tensors(base), tensors(tmp_path / "out")
    sources = [0, 1, 1, 2, 3, 3]
    for name, tensor in after.items():
        match = LAYER.fullmatch(name)
        source = f"model.layers.{sources[int(match[1])]}.{match[2]}" if match else name
        zeroed = match and match[1] in "25" and ("o_proj" in name or "down_proj" in name)
        expected = torch.zeros_like(tensor) if zeroed else before[source]
        assert torch.equal(tensor, expected), name
    raw, expanded = config_of(base), config_of(tmp_path / "out")
    assert expanded["llama_pro"] == {"new_blocks": [2, 5], "base_blocks": 4, "base": "base"}
    grown = {"num_hidden_layers": 6, "layer_types": expanded.get("layer_types")}
    dtypes = {"dtype": "float32", "torch_dtype": "float32", "llama_pro": expanded["llama_pro"]}
    assert {**raw, **grown, **dtypes} == {"layer_types": None, **expanded}


def tensors(path):
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_a_copy_slides_as_its_source_does(case, tmp_path):
    """In an old file too, where the rule alone is: every second block, of those there are."""
    model_type, settings = CASES[case]
    base = save(tmp_path / "base", model_type, **settings)
    raw = config_of(base)
    full, sliding = "full_attention", "sliding_attention"
    assert raw.pop("layer_types") == [sliding, full] * 2
    (base / "config.json").write_text(json.dumps({**raw, **settings}))
    expand_checkpoint(base, tmp_path / "out", 2)
    expected = [sliding, full, full, sliding, full, full]
    assert config_of(tmp_path / "out")["layer_types"] == expected
    tokens = torch.randint(61, (2, 16))
    assert torch.equal(logits(base, tokens), logits(tmp_path / "out", tokens))


def test_growing_again(base, tmp_path):
    expand_checkpoint(base, tmp_path / "one", 2)
    assert expand_checkpoint(tmp_path / "one", tmp_path / "two", 2, "suffix") == [6, 7]
    kept = expand_checkpoint(tmp_path / "one", tmp_path / "kept", 2, "suffix", keep_new=True)
    assert kept == [2, 5, 6, 7]


def test_large_first_gradients_are_said_aloud(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="llamapro"):
        expand_checkpoint(base, tmp_path / "out", 1)
    model_type = config_of(base)["model_type"]
    said = f"{model_type} has norms after its output projections" in caplog.text
    assert said == (model_type in ("gemma2", "gemma3_text", "olmo2"))


def test_why_the_first_gradients_are_said_to_be_large(tmp_path):
    """The derivative of a norm at zero is 1 / sqrt(eps)."""
    base = save(tmp_path / "base", "olmo2")
    expand_checkpoint(base, tmp_path / "out", placement=[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(61, (2, 16))
    model(tokens, labels=tokens).loss.backward()
    old, new = (model.model.layers[i].mlp.down_proj.weight.grad.norm() for i in (1, 2))
    assert new > 30 * old


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "falcon", "gemma3n_text", "gemma3", ""])
def test_others_are_refused_by_name_before_anything_is_written(model_type, tmp_path):
    base = save(tmp_path / "base", "phi3")
    change(base, model_type=model_type, architectures=None)
    for file in base.glob("*.safetensors"):
        file.unlink()  # refused before weights are looked at
    with pytest.raises(CheckpointError, match=rf"config\.json: model_type .* got '{model_type}'"):
        expand_checkpoint(base, tmp_path / "out", 2)
    assert names(tmp_path) == ["base"]


def change(base, **settings):
    (base / "config.json").write_text(json.dumps(config_of(base) | settings))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"architectures": ["Phi3ForTokenClassification"]}, "Phi3ForCausalLM expected, got .*Tok"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got {'bits'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be from 1 to 1000, got 1000000000"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers must be a whole number, got '4'"),
        ({"num_hidden_layers": 5}, "num_hidden_layers = 4 expected, as in the weights"),
        ({"hidden_size": "32"}, r"config\.json: what transformers takes expected: .*hidden_size"),
        ({"hidden_act": "x"}, r"config\.json: what transformers takes expected: .*x"),
        ({"vocab_size": 62}, r"wrong shapes: .*\(61, 32\), expected \(62, 32\)"),
        ({"intermediate_size": 24}, r"wrong shapes: .*down_proj"),
        ({"llama_pro": []}, r"llama_pro must be an object, got \[\]"),
        ({"llama_pro": {"new_blocks": [9]}}, r"new_blocks must be distinct .* got \[9\]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(settings, message, tmp_path):
    base = save(tmp_path / "base", "phi3")
    change(base, **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        expand_checkpoint(base, tmp_path / "out", 2)
    assert "\n" not in str(caught.value) and names(tmp_path) == ["base"]


def test_a_tensor_that_is_missing_is_named(tmp_path):
    """transformers itself would fill it at random."""
    base = save(tmp_path / "base", "gemma2")
    found = tensors(base)
    del found["model.layers.1.pre_feedforward_layernorm.weight"]
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: 'model\.layers\.1\.pre_feedforward"):
        expand_checkpoint(base, tmp_path / "out", 2)


def test_an_adapter_is_not_left_behind_without_a_word(tmp_path):
    base = save(tmp_path / "base", "phi3")
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"a whole model expected, got adapter_config\.json"):
        expand_checkpoint(base, tmp_path / "out", 2)


def test_transformers_is_needed_for_these_alone(tmp_path, monkeypatch, tiny_path):
    base = save(tmp_path / "base", "phi3")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match=r"a phi3 is .* pip install transformers"):
        expand_checkpoint(base, tmp_path / "out", 2)
    assert names(tmp_path) == ["base", "tiny"]
    expand_checkpoint(tiny_path, tmp_path / "out", 2)


def test_a_failed_proof_removes_the_output(base, tmp_path, monkeypatch):
    """A zero that is not written is found."""
    placed = expansion._placed
    monkeypatch.setattr(
        expansion,
        "_placed",
        lambda entry, name, zero: placed(entry, name, zero and "5.mlp" not in name),
    )
    with pytest.raises(IdentityError, match="part at the logits: largest difference"):
        expand_checkpoint(base, tmp_path / "out", 2)
    assert names(tmp_path) == ["base"]


def test_a_base_that_is_not_finite_proves_nothing(tmp_path):
    base = save(tmp_path / "base", "phi3")
    found = tensors(base)
    found["model.norm.weight"][:] = torch.nan
    save_file(found, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IdentityError, match="the base itself is not finite at the logits"):
        expand_checkpoint(base, tmp_path / "out", 2)


def test_every_architecture_is_tried():
    assert {model_type for model_type, _ in CASES.values()} == set(OTHERS)
    mapping = transformers.AutoModelForCausalLM._model_mapping
    for model_type, architecture in ARCHITECTURES.items():
        theirs = type(transformers.AutoConfig.for_model(model_type))
        assert mapping[theirs].__name__ == architecture.causal_lm
