"""Our Llama as Mistral, Qwen2 and Qwen3, against transformers itself."""

import copy
import json

import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.architectures import OURS
from llamapro.config import LAYER
from llamapro.expansion import expand_checkpoint
from llamapro.model import stock_tensors
from llamapro.model_files import read_config
from llamapro.proof import difference, fingerprint, frozen_verdict
from stock_models import NO_IDS, random_model

transformers = pytest.importorskip("transformers")

SLIDING = {"use_sliding_window": True, "sliding_window": 5}
CASES = {  # name: model_type, settings
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, wide heads": ("mistral", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, all blocks slide": ("qwen2", {**SLIDING, "max_window_layers": 0}),
    "qwen2, upper blocks slide": ("qwen2", {**SLIDING, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3, some blocks slide": (
        "qwen3",
        {**SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
}
WINDOWS = {
    "mistral": [5, 5, 5],
    "mistral, wide heads": [4096] * 3,
    "qwen2, all blocks slide": [5, 5, 5],
    "qwen2, upper blocks slide": [None, 5, 5],
    "qwen3, some blocks slide": [5, None, 5],
}
NAMES = ("theirs", "ours")
every_case = pytest.mark.parametrize("case", CASES)


def theirs_on_disk(case, path):
    """A random model of transformers in fp32, written to `path`."""
    model_type, settings = CASES[case]
    model = random_model(model_type, num_hidden_layers=3, **NO_IDS, **settings)
    model.save_pretrained(path)
    return model


def exact_norms(model):
    """RMSNorm in fp64: theirs rounds to fp32 even there."""

    def forward(norm, x):
        return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model


def results(model, tokens):
    """Logits, and the gradients of the loss by stock name; of tied matrices, one."""
    model.zero_grad()
    if isinstance(model, Llama):
        logits = model(tokens).detach()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        holder = copy.deepcopy(model)
        for parameter, source in zip(holder.parameters(), model.parameters(), strict=True):
            parameter.data = source.grad
        return {"logits": logits, **stock_tensors(holder)}
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return {"logits": output.logits.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def by_block(found):
    """Side by side what belongs to a block: of some gradients most cancels, such as a key's bias,
    and what is left has the rounding of what they are sums of."""
    groups = {}
    for name, values in sorted(found.items()):
        match = LAYER.fullmatch(name)
        groups.setdefault(match[1] if match else name, []).append(values.flatten().double())
    return {name: torch.cat(values) for name, values in groups.items()}


@every_case
def test_logits_and_gradients_are_as_right_as_theirs(case, tmp_path):
    """The three-way rule, against theirs in fp64: each block's gradients as one vector."""
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(2))
    truth = results(exact_norms(theirs_on_disk(case, tmp_path / "theirs").double()), tokens)
    for dtype in (torch.float32, torch.bfloat16):
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs = results(load(tmp_path / "theirs", dtype=dtype), tokens)
        ours = results(Llama.from_pretrained(tmp_path / "theirs", dtype), tokens)
        assert ours.keys() == theirs.keys() == truth.keys()
        ours, theirs = by_block(ours), by_block(theirs)
        for name, right in by_block(truth).items():
            stored = torch.finfo(dtype).eps / 2 * right.norm()
            error, peer = ((side[name] - right).norm() for side in (ours, theirs))
            assert error <= 2 * peer + stored, (name, dtype)


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_read(case, tmp_path):
    theirs_on_disk(case, tmp_path / "theirs")
    assert read_config(tmp_path / "theirs").windows == WINDOWS[case]


@every_case
def test_greedy_generation_equals_theirs(case, tmp_path):
    """With a cache, far beyond the window."""
    theirs = theirs_on_disk(case, tmp_path / "theirs")
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = theirs.generate(tokens, max_new_tokens=24, do_sample=False)
    assert torch.equal(Llama.from_pretrained(tmp_path / "theirs").generate(tokens, 24), expected)


@every_case
def test_what_we_write_is_theirs(case, tmp_path):
    """Every field and every bit, in memory and expanded."""
    theirs = theirs_on_disk(case, tmp_path / "theirs")
    model = Llama.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in NAMES)
    assert after == {**after, **before}
    tokens = torch.randint(61, (2, 24))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert torch.equal(stock(tmp_path / "ours")(tokens).logits, expected)
        own = model(tokens)
        assert torch.equal(expand(model, new_blocks=2, placement=[0, 3])(tokens), own)
        model.save_pretrained(tmp_path / "expanded")
        expand_checkpoint(tmp_path / "theirs", tmp_path / "on disk", placement=[0, 3])
        for name in ("expanded", "on disk"):
            assert torch.equal(stock(tmp_path / name)(tokens).logits, expected)
            windows = read_config(tmp_path / name).windows
            assert windows == model.config.windows == [block.window for block in model.blocks]


def stock(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def test_a_copy_slides_as_its_source_does(tmp_path):
    theirs_on_disk("qwen2, upper blocks slide", tmp_path / "theirs")
    expand_checkpoint(tmp_path / "theirs", tmp_path / "out", 3)
    assert read_config(tmp_path / "out").windows == [None, None, 5, 5, 5, 5]
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 4
    assert raw["layer_types"] == full + sliding


@pytest.mark.parametrize("model_type", OURS)
def test_defaults_are_transformers(model_type):
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    ours = LlamaConfig.from_dict({"model_type": model_type}).to_dict()
    ends = {"bos_token_id", "eos_token_id"} if model_type == "llama" else set()
    # A query sees no window that is not in use, and theirs forgets it.
    unused = {"sliding_window"} if theirs.get("use_sliding_window") is False else set()
    known = ours.keys() & theirs.keys() - ends - unused - {"architectures"}
    assert {name: ours[name] for name in known} == {name: theirs[name] for name in known}
    assert len(known) > 12


def test_null_is_no_window_and_missing_is_the_default():
    raw = {"model_type": "mistral"}
    assert set(LlamaConfig.from_dict(raw).windows) == {4096}
    assert set(LlamaConfig.from_dict({**raw, "sliding_window": None}).windows) == {None}
    assert LlamaConfig.from_dict({**raw, "num_key_value_heads": None}).num_key_value_heads == 32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtral"}, r"model_type must be one of \('llama', .* got 'mixtral'"),
        ({"model_type": ["qwen2"]}, r"model_type must be one of .* got \['qwen2'\]"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "MistralForCausalLM expected, got .*Qwen2"),
        ({"sliding_window": 0}, "sliding_window must be from 1"),
        ({"sliding_window": "4096"}, "sliding_window must be a whole number, got '4096'"),
        ({"layer_types": ["full_attention"]}, "must be sliding_attention, got .*full_attention"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window must be None, got 8"),
        ({"model_type": "qwen2", "use_sliding_window": 1}, "must be true or false, got 1"),
        ({"model_type": "qwen2", "layer_types": ["x"] * 32}, r"must be full_attention, got \['x'"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "= 32 entries, got 1"),
        ({"model_type": "qwen3", "layer_types": 1}, "must be full_attention, got 1"),
        ({"model_type": "qwen3", "layer_types": [["full_attention"]] * 32}, "must be full_attent"),
        (
            {"model_type": "qwen3", **SLIDING, "layer_types": ["chunked_attention"] * 32},
            "must be full_attention or sliding_attention, got .'chunked_attention'",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict({"model_type": "mistral", **change})


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_kinds_of_layers_that_nothing_depends_on_are_not_counted(tiny, model_type):
    """What a file says there makes no block more or fewer."""
    model = tiny(model_type=model_type, other={"layer_types": ["full_attention"]})
    assert len(model.blocks) == len(model.config.windows) == 4


def test_a_setting_of_another_architecture_is_refused():
    for setting in ({"sliding_window": 8}, {"use_sliding_window": False}):
        with pytest.raises(ValueError, match=f"a llama has no {next(iter(setting))}, got"):
            LlamaConfig(**setting)
    with pytest.raises(ValueError, match="a qwen2 has no attention_bias, got True"):
        LlamaConfig(model_type="qwen2", attention_bias=True)


def test_a_window_is_part_of_the_fingerprint(tiny):
    before, after = (
        fingerprint(tiny(model_type="mistral", sliding_window=w).requires_grad_(False))
        for w in (None, 5)
    )
    assert difference(before, after) == "windows was None, is [5, 5, 5, 5]"
    assert difference(before, fingerprint(tiny().requires_grad_(False))) is None


@pytest.mark.parametrize("case", ["mistral", "qwen2, upper blocks slide", "qwen3, biases"])
def test_every_command_takes_them(case, token_data, tmp_path, capsys):
    """Trained in its new blocks, what is written is transformers' own, and the base in it."""
    cli = pytest.importorskip("llamapro.cli")
    theirs_on_disk(case, tmp_path / "base")

    def run(*arguments):
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    data, settings = token_data(), ["--device", "cpu", "--dtype", "float32"]
    run("expand", tmp_path / "base", tmp_path / "expanded", "--new-blocks", 1)
    assert "interleaved" in run("plan", tmp_path / "base", "--new-blocks", 1, "--device", "cpu")
    steps = ["--steps", 4, "--batch-size", 2, "--seq-len", 16, "--eval-tokens", 64]
    out = ["--model", tmp_path / "expanded", "--data", data, "--out", tmp_path / "run"]
    run("train", *out, *steps, *settings)
    assert frozen_verdict(tmp_path / "run").endswith("bit-identical")
    assert '"perplexity"' in run("eval", tmp_path / "run" / "final", data, *settings)
    tokens = torch.randint(61, (2, 16))
    with torch.no_grad():
        theirs = stock(tmp_path / "run" / "final")(tokens).logits
        ours = Llama.from_pretrained(tmp_path / "run" / "final")(tokens)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert not torch.equal(theirs, stock(tmp_path / "base")(tokens).logits)
