import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.config import LAYER
from llamapro.expansion import expand_checkpoint
from llamapro.hf import Checkpoint
from llamapro.model_files import CheckpointError
from llamapro.new_block_files import Base, base_settings, describe, write_new_blocks
from llamapro.new_blocks import (
    LlamaStack,
    activate,
    load_new_blocks,
    merge,
    new_block_entries,
    save_new_blocks,
)
from llamapro.placement import place_blocks
from safetensors.torch import load_file, save_file
from test_expansion import synthetic

PLACEMENTS = ["interleaved", "prefix", "suffix", [0, 2, 5]]
TOKENS = torch.arange(40).view(2, 20)


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@torch.no_grad()
def train(model, seed=1):
    """Change everything that is new, as training does."""
    torch.manual_seed(seed)
    for i in model.config.new_blocks:
        for parameter in model.blocks[i].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS)


@pytest.fixture
def base(tiny, tmp_path):
    return tiny().save_pretrained(tmp_path / "base")


@pytest.fixture
def make(base, tmp_path):
    """Trains new blocks of the base and saves them; gives the directory and the logits."""

    def build(name, seed=1, placement="interleaved"):
        model = train(expand(Llama.from_pretrained(base), 2, placement), seed)
        return save_new_blocks(model, tmp_path / name), logits(model)

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_merging_is_saving_whole(tiny, tmp_path, placement, dtype):
    """Byte for byte, also where the model came from an expanded directory."""
    tied = placement == "prefix"
    changes = {"tie_word_embeddings": tied, "attention_bias": tied, "mlp_bias": not tied}
    lists = {"use_cache": True, "layer_types": ["full_attention"] * 4, "a": "b"}
    model = tiny(**changes, other=lists).to(dtype)
    base = model.save_pretrained(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    raw = json.loads((base / "config.json").read_text())
    del raw["torch_dtype"]  # as transformers 5 writes it
    (base / "config.json").write_text(json.dumps(raw))
    expand_checkpoint(base, tmp_path / "expanded", 3, placement)
    before = logits(model)
    in_memory = expand(Llama.from_pretrained(base), 3, placement)
    for i, model in enumerate((in_memory, Llama.from_pretrained(tmp_path / "expanded"))):
        assert torch.equal(logits(model), before)
        whole = train(model).save_pretrained(tmp_path / f"whole{i}", files_from=base)
        save_new_blocks(model, tmp_path / f"new{i}")
        merged = merge(base, tmp_path / f"new{i}", tmp_path / f"merged{i}")
        assert merged == tmp_path / f"merged{i}" and files(merged) == files(whole)


def test_what_is_saved_is_the_new_blocks_alone(make):
    path, _ = make("new")
    tensors = load_file(path / "new_blocks.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"2", "5"} and len(tensors) == 2 * 9
    assert "model.layers.5.self_attn.q_proj.weight" in tensors
    about = json.loads((path / "new_blocks.json").read_text())
    assert about["positions"] == [2, 5] and about["sources"] == [1, 3]
    assert about["base_blocks"] == 4 and about["dtype"] == about["base_dtype"] == "float32"


def test_eight_new_blocks_of_llama_2_7b_are_their_own_size():
    """By what would be written, without writing it: 3.2 GB, the model has 16.7."""
    with torch.device("meta"):
        model = expand(Llama(LlamaConfig()), 8).to(torch.bfloat16)
    attention, mlp, norms = 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096
    entries = new_block_entries(LlamaStack(model))
    assert sum(entry.nbytes for entry in entries) == 8 * 2 * (attention + mlp + norms)
    assert len(entries) == 8 * 9


@pytest.mark.parametrize("placement", ["interleaved", "top_half", "prefix", "suffix", [0, 3]])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sources_are_those_of_the_placement(tiny, tmp_path, placement, count):
    if isinstance(placement, list):
        count = len(placement)
    model = expand(tiny(), count, placement)
    path = save_new_blocks(model, tmp_path / "new")
    slots = place_blocks(4, count, placement)
    sources = [slot.source for slot in slots if slot.new]
    assert json.loads((path / "new_blocks.json").read_text())["sources"] == sources


def test_a_copy_is_of_its_originals_kind(tiny, tmp_path):
    """Two positions side by side are two copies of the block below, or of the two below."""
    model = tiny(other={"mlp_layer_kinds": list("abcd")})
    expand(model, placement=[2, 3])
    path = save_new_blocks(model, tmp_path / "new")
    assert json.loads((path / "new_blocks.json").read_text())["sources"] == [1, 1]


def test_two_domains_and_the_base_in_one_model(base, make):
    """Swapped a hundred times, no bit of any moves, and the base's stack is the base's."""
    (law, lawful), (code, coded) = make("law"), make("code", 2, "suffix")
    model = Llama.from_pretrained(base)
    config, expected = model.config, {None: logits(model), "law": lawful, "code": coded}
    load_new_blocks(model, law, "law")
    load_new_blocks(model, code, "code")
    assert torch.equal(logits(model), coded)
    for i in range(100):
        name = ("law", None, "code", None)[i % 4]
        activate(model, name)
        assert len(model.blocks) == model.config.num_hidden_layers == (6 if name else 4)
        assert torch.equal(logits(model), expected[name])
    assert model.config == config
    with pytest.raises(ValueError, match=r"\['law', 'code'\] or None expected, got 'math'"):
        activate(model, "math")
    assert torch.equal(model.generate(TOKENS, 3)[:, 20], expected[None][:, -1].argmax(-1))


def test_own_new_blocks_are_a_set_too(base, make):
    """Those of an expanded model, under the name that a set has when none is given."""
    law, lawful = make("law")
    model = train(expand(Llama.from_pretrained(base), 3, "suffix"), 3)
    own = logits(model)
    load_new_blocks(model, law, "law")
    assert torch.equal(logits(model), lawful) and model.config.new_blocks == [2, 5]
    activate(model, "default")
    assert torch.equal(logits(model), own) and model.config.new_blocks == [4, 5, 6]


def test_blocks_of_the_same_places_are_overwritten_in_place(base, make):
    """So that an optimizer that has them goes on."""
    law, lawful = make("law")
    model = expand(Llama.from_pretrained(base), 2)
    before = [id(parameter) for parameter in model.parameters()]
    load_new_blocks(model, law)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert torch.equal(logits(model), lawful)


def test_an_expanded_base_that_grew_again(base, make, tmp_path):
    """Its first new blocks belong to the base."""
    law, _ = make("law")
    grown = merge(base, law, tmp_path / "grown")
    model = train(expand(Llama.from_pretrained(grown), 1, "suffix"), 5)
    save_new_blocks(model, tmp_path / "new")
    merged = merge(grown, tmp_path / "new", tmp_path / "merged")
    assert torch.equal(logits(Llama.from_pretrained(merged)), logits(model))
    other = Llama.from_pretrained(grown)
    before, config = logits(other), other.config
    load_new_blocks(other, tmp_path / "new")
    assert torch.equal(logits(other), logits(model))
    activate(other, None)
    assert torch.equal(logits(other), before) and other.config == config


def test_a_set_that_comes_back_is_as_the_base_is_by_now(base, make):
    law, _ = make("law")
    model = Llama.from_pretrained(base)
    load_new_blocks(model, law, "law")
    activate(model, None)
    model.eval()
    activate(model, "law")
    assert not any(module.training for module in model.modules())


def test_loaded_blocks_train_and_are_saved_again(base, make, tmp_path):
    law, _ = make("law")
    model = Llama.from_pretrained(base)
    load_new_blocks(model, law, "law")
    model.train_new_blocks_only()
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"2", "5"}
    assert files(save_new_blocks(model, tmp_path / "again")) == files(law)


@pytest.mark.parametrize("stored, used", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_than_the_files(tiny, tmp_path, caplog, stored, used):
    """The base's own bytes stay; new blocks get its dtype, and rounding is said."""
    stored, used = getattr(torch, stored), getattr(torch, used)
    base = tiny().to(stored).save_pretrained(tmp_path / "base")
    model = train(expand(Llama.from_pretrained(base, dtype=used), 2))
    save_new_blocks(model, tmp_path / "new")
    merged = merge(base, tmp_path / "new", tmp_path / "merged")
    original, tensors = (load_file(d / "model.safetensors") for d in (base, merged))
    assert torch.equal(original["lm_head.weight"], tensors["lm_head.weight"])
    new = load_file(tmp_path / "new" / "new_blocks.safetensors")
    for name, tensor in new.items():
        assert tensors[name].dtype == stored and torch.equal(tensors[name], tensor.to(stored))
    said = f"in float32, rounded now as {base} is in bfloat16"
    assert (said in caplog.text) == (stored == torch.bfloat16)
    load_new_blocks(Llama.from_pretrained(base, dtype=stored), tmp_path / "new")
    load_new_blocks(Llama.from_pretrained(base, dtype=used), tmp_path / "new")


def test_a_base_that_was_rounded_is_another(tiny, tmp_path):
    base = tiny().save_pretrained(tmp_path / "base")
    save_new_blocks(train(expand(tiny(), 2)), tmp_path / "new")
    rounded = Llama.from_pretrained(base, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"\(in float32\), got the model with"):
        load_new_blocks(rounded, tmp_path / "new")


OTHER = {
    "weights": lambda model: model.blocks[3].qkv.weight.data[0, 0].add_(1e-6),
    "head": lambda model: model.lm_head.weight.data[0, 0].add_(1e-6),
    "setting": lambda model: setattr(model, "config", replace(model.config, rope_theta=5e3)),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_another_base_is_refused_by_its_fingerprint(base, make, tiny, tmp_path, change):
    law, _ = make("law")
    model = tiny()
    change(model)
    other = model.save_pretrained(tmp_path / "other")
    before = logits(model)
    expected = json.loads((law / "new_blocks.json").read_text())["base_fingerprint"]
    message = rf"law: made for a base with the fingerprint {expected} .*got .* with [0-9a-f]{{32}}$"
    with pytest.raises(CheckpointError, match=message):
        merge(other, law, tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        load_new_blocks(model, law)
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(model), before) and len(model.blocks) == 4


def test_settings_that_nothing_is_computed_with_do_not_count(base, make, tmp_path):
    law, _ = make("law")
    file = base / "config.json"
    raw = {**json.loads(file.read_text()), "eos_token_id": 7, "rope_theta": 10000, "x": 1}
    file.write_text(json.dumps({**raw, "max_position_embeddings": 99}))
    merge(base, law, tmp_path / "out")


def test_a_base_of_another_size_is_refused(make, tiny):
    law, _ = make("law")
    for changes, message in (
        ({"num_hidden_layers": 5}, "a base of 4 blocks expected, got the model with 5"),
        ({"intermediate_size": 40}, r"down_proj.weight': \(32, 40\) expected, got \(32, 48\)"),
        ({"mlp_bias": True}, r"bias': \(32,\) expected, got no such tensor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_new_blocks(tiny(**changes), law)


def damage(law):
    tensors = load_file(law / "new_blocks.safetensors")
    tensors["model.layers.5.input_layernorm.weight"][3] += 1e-6
    save_file(tensors, law / "new_blocks.safetensors")


def test_damage_is_seen(base, make, tmp_path):
    law, _ = make("law")
    damage(law)
    with pytest.raises(CheckpointError, match=r"new_blocks.safetensors is damaged: the digest"):
        merge(base, law, tmp_path / "out")
    weights = law / "new_blocks.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        merge(base, law, tmp_path / "out")
    weights.unlink()
    with pytest.raises(CheckpointError, match="law: new blocks expected"):
        merge(base, law, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"positions": [5, 2]}, r"positions must ascend from 0 up to 5, got \[5, 2\]"),
        ({"positions": [2, 6]}, r"got \[2, 6\]"),
        ({"positions": "2"}, "positions must ascend"),
        ({"positions": []}, "positions must ascend"),
        ({"sources": [1]}, r"sources must be a base block for each position, got \[1\]"),
        ({"sources": [1, 4]}, r"got \[1, 4\]"),
        ({"base_blocks": True}, "base_blocks must be from 1 to 1000, got True"),
        ({"base_blocks": 10**9}, "got 1000000000"),
        ({"base": 3}, "base must be text, got 3"),
        ({"base_fingerprint": None}, "base_fingerprint must be 32 hexadecimal digits, got None"),
        ({"base_fingerprint": "a\nb"}, r"digits, got 'a\\nb'"),
        ({"digest": "x" * 5000}, r"digest must be 32 hexadecimal digits, got 'x+\.\.\.x+'$"),
        ({"base_dtype": "int8"}, "base_dtype must be one of .* got 'int8'"),
        ({"base_dtype": []}, r"got \[\]"),
    ],
)
def test_descriptions_that_are_none(base, make, tmp_path, change, message):
    law, _ = make("law")
    file = law / "new_blocks.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"new_blocks.json: .*{message}"):
        merge(base, law, tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_is_saved_of_a_base(base, make, tiny, tmp_path):
    law, _ = make("law")
    with pytest.raises(ValueError, match="no new block to save"):
        save_new_blocks(tiny(), tmp_path / "none")
    with pytest.raises(FileExistsError):
        save_new_blocks(expand(tiny(), 1), law)
    with pytest.raises(FileExistsError):
        merge(base, law, base)
    assert not (tmp_path / "none").exists()


def test_a_disk_too_small_is_noticed_before_writing(base, make, tmp_path, monkeypatch):
    law, _ = make("law")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="out needs"):
        merge(base, law, tmp_path / "out")
    with pytest.raises(OSError, match="new needs"):
        save_new_blocks(expand(Llama.from_pretrained(base), 2), tmp_path / "new")


def test_a_checkpoint_of_a_run_holds_nothing_frozen(config):
    """The masters and moments of what trains, and digests of the rest."""
    from llamapro.train import train as run

    run(config)
    new = Llama.from_pretrained(config.model).config.new_blocks
    for folder in (Path(config.out) / "checkpoints").iterdir():
        names = load_file(folder / "state.safetensors")
        kinds = ("master", "exp_avg", "exp_avg_sq")
        prefixes = tuple(f"{kind}.blocks.{i}." for kind in kinds for i in new)
        assert len(names) == 3 * len(new) * 6 and all(name.startswith(prefixes) for name in names)


def test_merging_is_out_of_core(tmp_path):
    """The process's largest resident set grows by less than the new blocks or the base have."""
    size = synthetic(tmp_path / "base", blocks=24)
    synthetic(tmp_path / "small", blocks=2, width=64)
    for name in ("base", "small"):
        source = Checkpoint(tmp_path / name)
        base = Base(base_settings(source.config), list(source.tensors.values()))
        half = base.blocks // 2  # copies of the upper half on top
        new = [
            replace(entry, name=f"model.layers.{int(match[1]) + half}.{match[2]}")
            for entry in base.entries
            if (match := LAYER.fullmatch(entry.name)) and int(match[1]) >= half
        ]
        positions, sources = range(base.blocks, base.blocks + half), range(half, base.blocks)
        out = tmp_path / f"{name} new"
        write_new_blocks(out, new, describe(new, list(positions), list(sources), None, base))
    code = f"""
    from llamapro.new_blocks import merge
    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    merge(*({str(tmp_path / "small")!r} + end for end in ("", " new", " merged")))  # loads all code
    before = peak()
    merge(*({str(tmp_path / "base")!r} + end for end in ("", " new", " merged")))
    print(peak() - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    largest = max(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    assert int(result.stdout) < 3 * largest < size / 5, (int(result.stdout), largest, size)
