import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llamapro import Llama, LlamaConfig, expand, expansion
from llamapro.expansion import expand_checkpoint
from llamapro.hf import Checkpoint, TensorEntry, write_model
from llamapro.placement import Slot, place_blocks
from llamapro.proof import PROOF_TEXT, IdentityError
from safetensors.torch import load_file, save_file

PLACEMENTS = ["interleaved", "prefix", "suffix", [0, 2, 5]]


def new(slots):
    return [i for i, slot in enumerate(slots) if slot.new]


def sources(slots):
    return [slot.source for slot in slots]


def test_the_papers_placement():
    slots = place_blocks(32, 8)
    assert new(slots) == [4, 9, 14, 19, 24, 29, 34, 39]
    assert [slots[i].source for i in new(slots)] == [3, 7, 11, 15, 19, 23, 27, 31]


def test_copies_of_the_top_blocks_of_each_group():
    slots = place_blocks(8, 4, per_group=2)
    assert sources(slots) == [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7]
    assert new(slots) == [4, 5, 10, 11]


def test_prefix_and_suffix():
    assert sources(place_blocks(4, 2, "prefix")) == [0, 1, 0, 1, 2, 3]
    assert new(place_blocks(4, 2, "prefix")) == [0, 1]
    assert sources(place_blocks(4, 2, "suffix")) == [0, 1, 2, 3, 2, 3]
    assert place_blocks(4, 2, "suffix") == place_blocks(4, 2, per_group=2)
    for placement in ("suffix", [1, 2]):
        with pytest.raises(ValueError, match="per_group is for interleaved blocks, got 2"):
            place_blocks(4, 2, placement, per_group=2)


def test_positions_copy_the_block_below_and_at_the_bottom_the_one_above():
    slots = place_blocks(3, None, [0, 2, 3])
    assert sources(slots) == [0, 0, 0, 0, 1, 2]
    assert new(slots) == [0, 2, 3]
    assert place_blocks(32, 8) == place_blocks(32, None, range(4, 40, 5))


def test_uneven_groups_are_said_aloud(caplog):
    slots = place_blocks(30, 4)
    assert new(slots) == [7, 16, 24, 33]
    assert "30 blocks do not divide into 4 groups: groups have 7 or 8 blocks" in caplog.text


@given(st.integers(1, 40), st.data())
def test_every_placement_keeps_the_base_in_order(blocks, data):
    count = data.draw(st.integers(1, blocks))
    kind = data.draw(st.sampled_from(["interleaved", "prefix", "suffix", "positions"]))
    if kind == "positions":
        places = st.integers(0, blocks + count - 1)
        kind = data.draw(st.lists(places, min_size=count, max_size=count, unique=True))
    slots = place_blocks(blocks, count, kind)
    assert [s.source for s in slots if not s.new] == list(range(blocks))
    assert len(new(slots)) == count
    if kind == "interleaved":
        gaps = [b - a for a, b in zip([-1, *new(slots)], new(slots), strict=False)]
        assert max(gaps) - min(gaps) <= 1 and slots[-1].new


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, 0), "between 1 and the 4 blocks"),
        ((4, 5), "got 5"),
        ((4, None), "got None"),
        ((4, 2, "middle"), "'middle'"),
        ((4, 3, "interleaved", 2), "got 2"),
        ((4, 4, "interleaved", 0), "got 0"),
        ((6, 6, "interleaved", 4), "got 4"),
        ((4, None, [7]), r"within 0\.\.4 .* got \[7\]"),
        ((4, None, [-1]), r"got \[-1\]"),
        ((4, None, [2, 2]), r"distinct .* got \[2, 2\]"),
        ((4, None, []), r"got \[\]"),
        ((4, None, [1.5]), r"whole numbers, got \[1\.5\]"),
        ((4, None, 3), "whole numbers, got 3"),
        ((4, None, torch.tensor([2, 2])), r"distinct .* got \[2, 2\]"),
        ((4, 3, [1, 2]), "2 positions given for new_blocks = 3"),
    ],
)
def test_bad_counts_and_positions(arguments, message):
    with pytest.raises(ValueError, match=message):
        place_blocks(*arguments)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_expand_in_place_changes_no_bit(tiny, placement, biases):
    model = tiny(attention_bias=biases, mlp_bias=biases)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    tokens = torch.randint(61, (2, 9))
    before = model(tokens)
    assert expand(model, new_blocks=3, placement=placement) is model
    assert torch.equal(model(tokens), before)
    assert model.config.num_hidden_layers == len(model.blocks) == 7
    assert len(model.config.new_blocks) == 3 and model.config.llama_pro["base_blocks"] == 4


def test_first_only_output_projections_learn_then_everything(tiny):
    model = expand(tiny(attention_bias=True, mlp_bias=True), new_blocks=2)
    model.train_new_blocks_only()
    tokens = torch.randint(61, (2, 16))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(tokens, tokens).backward()
    moving = {name.split(".", 2)[2] for name, p in gradients(model) if p.any()}
    assert moving == {"o_proj.weight", "o_proj.bias", "down_proj.weight", "down_proj.bias"}
    optimizer.step()
    optimizer.zero_grad()
    model.loss(tokens, tokens).backward()
    assert all(gradient.any() for _, gradient in gradients(model))


def gradients(model):
    return [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]


def test_growing_again(tiny):
    model = expand(tiny(), new_blocks=2)
    assert model.config.new_blocks == [2, 5]
    tokens = torch.randint(61, (1, 6))
    before = model(tokens)
    expand(model, new_blocks=1, placement="suffix")
    assert torch.equal(model(tokens), before)
    assert model.config.llama_pro == {"new_blocks": [6], "base_blocks": 6, "base": None}


def test_growing_again_with_all_new_blocks(tiny):
    model = expand(tiny(), new_blocks=2)
    expand(model, placement=[0], keep_new=True)
    assert model.config.new_blocks == [0, 3, 6] and model.config.llama_pro["base_blocks"] == 4


def test_per_layer_lists_grow_and_others_do_not(tiny):
    model = tiny(
        eos_token_id=[1, 2, 3, 4],
        other={
            "layer_types": ["full_attention"] * 4,
            "mlp_layer_kinds": list("abcd"),
            "x": [1] * 4,
        },
    )
    config = expand(model, new_blocks=2).config
    assert config.other["layer_types"] == ["full_attention"] * 6
    assert config.other["mlp_layer_kinds"] == list("abbcdd")
    assert config.other["x"] == [1] * 4 and config.eos_token_id == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_expand_on_disk_equals_expand_in_place(tiny, tmp_path, placement, tied, dtype):
    model = tiny(tie_word_embeddings=tied, attention_bias=tied, mlp_bias=not tied).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    base = model.save_pretrained(tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    positions = expand_checkpoint(base, tmp_path / "out", 3, placement)
    ours = Llama.from_pretrained(tmp_path / "out")
    other = expand(Llama.from_pretrained(base), new_blocks=3, placement=placement)
    assert ours.config.new_blocks == other.config.new_blocks == positions
    assert ours.config.llama_pro["base"] == "base" and ours.norm.dtype == dtype
    for (name, a), (_, b) in zip(ours.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


def test_transformers_loads_an_expanded_model(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = tiny(other={"layer_types": ["full_attention"] * 4}).save_pretrained(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "out", 2)
    theirs = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("base", "out")
    ]
    tokens = torch.randint(61, (1, 7))
    with torch.no_grad():
        assert torch.equal(theirs[0](tokens).logits, theirs[1](tokens).logits)
        # With a cache, every block needs a place of its own there.
        assert torch.equal(*(m.generate(tokens, max_new_tokens=5, do_sample=False) for m in theirs))


def test_growing_on_disk(tiny_path, tmp_path):
    expand_checkpoint(tiny_path, tmp_path / "one", 2)
    assert expand_checkpoint(tmp_path / "one", tmp_path / "two", 2, "suffix") == [6, 7]
    kept = expand_checkpoint(tmp_path / "one", tmp_path / "kept", 2, "suffix", keep_new=True)
    assert kept == [2, 5, 6, 7]


def test_a_failed_proof_removes_the_output(tiny_path, tmp_path, monkeypatch):
    """A zero that is not written is found, at the block where it matters."""
    placed = expansion._placed
    monkeypatch.setattr(
        expansion,
        "_placed",
        lambda entry, name, zero: placed(entry, name, zero and "layers.5" not in name),
    )
    with pytest.raises(IdentityError, match="block 5, a new copy of block 3"):
        expand_checkpoint(tiny_path, tmp_path / "out", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_the_proof_reaches_the_logits(tiny_path, tmp_path, monkeypatch):
    entries = expansion._expanded_entries

    def other_norm(source, slots):
        ones = replace(source.tensors["model.norm.weight"], load=lambda: torch.full((32,), 1.5))
        return [ones if e.name == ones.name else e for e in entries(source, slots)]

    monkeypatch.setattr(expansion, "_expanded_entries", other_norm)
    with pytest.raises(IdentityError, match="part at the logits"):
        expand_checkpoint(tiny_path, tmp_path / "out", 2)


def test_a_checkpoint_of_two_dtypes(tiny, tmp_path):
    """Each tensor keeps its own."""
    path = tiny().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tensors = load_file(path / "model.safetensors")
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name].float()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    expand_checkpoint(path, tmp_path / "out", 2)
    dtypes = {name: entry.dtype for name, entry in Checkpoint(tmp_path / "out").tensors.items()}
    assert dtypes["model.norm.weight"] == torch.float32
    assert dtypes["model.layers.2.mlp.down_proj.weight"] == torch.bfloat16


@pytest.mark.parametrize("where", [[9], [1, 1]])
def test_bad_positions_write_nothing(tiny_path, tmp_path, where):
    with pytest.raises(ValueError, match="positions"):
        expand_checkpoint(tiny_path, tmp_path / "out", placement=where)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]


def test_an_existing_output_is_kept(tiny_path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError):
        expand_checkpoint(tiny_path, tmp_path / "out", 2)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def synthetic(directory, blocks=24, width=768, max_shard_bytes=16 * 2**20):
    """A sharded bf16 model on disk that is never in memory as a whole."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=16,
    )
    with torch.device("meta"):
        from llamapro.model import stock_tensors

        shapes = {n: tuple(t.shape) for n, t in stock_tensors(Llama(config)).items()}
    entries = [
        TensorEntry(n, torch.bfloat16, s, lambda s=s: torch.rand(s).sub_(0.5).mul_(0.05).bfloat16())
        for n, s in shapes.items()
    ]
    directory.mkdir()
    write_model(directory, config, entries, max_shard_bytes=max_shard_bytes)
    return sum(entry.nbytes for entry in entries)


def test_expansion_is_out_of_core(tmp_path):
    """The process's largest resident set, mapped files included, grows by few shards at most."""
    size = synthetic(tmp_path / "base")
    synthetic(tmp_path / "small", blocks=2, width=64)
    largest = max(f.stat().st_size for f in (tmp_path / "base").glob("*.safetensors"))
    assert size > 15 * largest
    code = f"""
    from llamapro.expansion import expand_checkpoint
    def peak():
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    expand_checkpoint({str(tmp_path / "small")!r}, {str(tmp_path / "warm")!r}, 2)  # loads all code
    before = peak()
    expand_checkpoint({str(tmp_path / "base")!r}, {str(tmp_path / "out")!r}, 6)
    print(peak() - before)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    # The proof maps one of each side and holds a block, which is nearly as large, of one.
    assert int(result.stdout) < 5 * largest, (int(result.stdout), largest, size)
    assert Checkpoint(tmp_path / "out").config.num_hidden_layers == 30


@pytest.mark.parametrize(
    "placement, dtype",
    [
        ("interleaved", torch.bfloat16),
        ("prefix", torch.float32),
        ("suffix", torch.bfloat16),
        ([0, 7, 20], torch.float32),
    ],
    ids=str,
)
def test_smollm2_expands_bit_identically(smollm2, placement, dtype):
    from llamapro.tokenizer import load_tokenizer

    model = Llama.from_pretrained(smollm2, dtype=dtype)
    ids = load_tokenizer(smollm2).encode(PROOF_TEXT).ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        before = model(tokens)
        expand(model, new_blocks=3 if isinstance(placement, list) else 6, placement=placement)
        assert torch.equal(model(tokens), before)


def test_smollm2_learns_from_the_output_projections(smollm2):
    model = expand(Llama.from_pretrained(smollm2, dtype=torch.float32), new_blocks=6)
    model.train_new_blocks_only()
    tokens = torch.tensor([list(range(500, 532))])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for moving in ({"o_proj.weight", "down_proj.weight"}, None):
        model.loss(tokens, tokens).backward()
        moved = {name.split(".", 2)[2] for name, gradient in gradients(model) if gradient.any()}
        every = {name.split(".", 2)[2] for name, _ in gradients(model)}
        assert moved == (moving or every) and len(every) == 6
        assert all(gradient.any() for _, gradient in gradients(model)) == (moving is None)
        optimizer.step()
        optimizer.zero_grad()


def test_slots_are_plain_values():
    assert place_blocks(2, 1) == [Slot(0, False), Slot(1, False), Slot(1, True)]


def test_a_written_config_tells_which_blocks_are_new(tiny_path, tmp_path):
    expand_checkpoint(tiny_path, tmp_path / "out", 2)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["llama_pro"] == {"new_blocks": [2, 5], "base_blocks": 4, "base": "tiny"}
    tensors = (
        load_file(tmp_path / "out" / "model.safetensors")
        if (tmp_path / "out" / "model.safetensors").exists()
        else {}
    )
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        tensors |= load_file(file)
    assert not tensors["model.layers.5.mlp.down_proj.weight"].any()
    assert tensors["model.layers.5.mlp.up_proj.weight"].any()
