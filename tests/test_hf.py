import errno
import json
import resource
import shutil
import struct

import pytest
import torch
from llamapro import Llama, hf
from llamapro.config import stock_shapes
from llamapro.hf import Checkpoint, TensorEntry, write_safetensors
from llamapro.model import stock_tensors
from llamapro.model_files import CheckpointError
from safetensors.torch import load_file, save_file


def rewrite(path, change):
    """Apply `change` to the tensors of a single-file model."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_save_and_load_give_the_same_bits(tiny, tmp_path):
    model = tiny(attention_bias=True, mlp_bias=True).to(torch.bfloat16)
    back = Llama.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert back.config.to_dict() == {
        **model.config.to_dict(),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    for name, tensor in stock_tensors(model).items():
        assert torch.equal(stock_tensors(back)[name], tensor), name


def test_files_have_stock_names_only(tiny_path):
    names = load_file(tiny_path / "model.safetensors").keys()
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not any("qkv" in name or "gate_up" in name for name in names)


def test_tied_embeddings_are_one_parameter_and_one_tensor(tiny, tmp_path):
    model = tiny(tie_word_embeddings=True)
    back = Llama.from_pretrained(model.save_pretrained(tmp_path / "out"))
    assert back.lm_head.weight is back.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_library_reads_what_we_write(dtype, tmp_path):
    tensors = {
        "odd": torch.randn(3, 5).to(dtype),
        "wide": torch.randn(7, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=dtype),
        "view": torch.randn(8, 6).to(dtype)[::2, 1:4],
    }
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()
    ]
    write_safetensors(tmp_path / "x.safetensors", entries)
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def drop_norm(tensors):
    del tensors["model.layers.1.input_layernorm.weight"]


def add_stranger(tensors):
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)


def transpose_up(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = tensors[
        "model.layers.2.mlp.up_proj.weight"
    ].T.contiguous()


def integers(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_norm, r"missing: 'model\.layers\.1\.input_layernorm"),
        (add_stranger, r"unexpected: 'model\.layers\.0\.self_attn\.q_norm"),
        (transpose_up, r"up_proj.weight \(32, 48\), expected \(48, 32\)"),
        (integers, r"model.norm.weight. must be one of .* got I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tiny_path, change, message):
    rewrite(tiny_path, change)
    with pytest.raises(CheckpointError, match=message):
        Llama.from_pretrained(tiny_path)


def test_truncated_file(tiny_path):
    file = tiny_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        Llama.from_pretrained(tiny_path)


def test_header_that_lies(tiny_path):
    file = tiny_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        Llama.from_pretrained(tiny_path)


def test_missing_shard(tiny_path):
    weights = dict.fromkeys(load_file(tiny_path / "model.safetensors"), "model-1.safetensors")
    index = {"weight_map": {**weights, "model.norm.weight": "model-2.safetensors"}}
    (tiny_path / "model.safetensors").rename(tiny_path / "model-1.safetensors")
    (tiny_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"2 shards, missing: \['model-2.safetensors'\]"):
        Llama.from_pretrained(tiny_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(tiny_path, name):
    (tiny_path / "model.safetensors").rename(tiny_path / name)
    with pytest.raises(CheckpointError, match=rf"pickled weights \['{name}'\], which are refused"):
        Llama.from_pretrained(tiny_path)


def test_not_a_model_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        Llama.from_pretrained(tmp_path / "nowhere")


def test_an_output_that_exists_is_kept(tiny, tiny_path):
    before = (tiny_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="exists"):
        tiny(num_hidden_layers=1).save_pretrained(tiny_path)
    assert (tiny_path / "model.safetensors").read_bytes() == before


def test_a_disk_too_small_is_noticed_before_writing(tiny, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="needs") as caught:
        tiny().save_pretrained(tmp_path / "new" / "out")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tiny, tmp_path):
    """The system refuses to let a file grow, as a disk that fills up meanwhile would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError):
            tiny().save_pretrained(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_tied_file_with_both_names(tiny, tmp_path):
    """Trained, the second name must not keep the old values."""
    path = tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in Checkpoint(path).tensors
    rewrite(path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"tied, but lm_head\.weight differs"):
        Llama.from_pretrained(path)


def test_a_head_that_came_untied_is_not_lost(tiny, tmp_path):
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    with pytest.raises(ValueError, match="another parameter"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("text, message", [("[]", "got list"), ("{", "not JSON")])
def test_a_config_that_is_none(tiny_path, text, message):
    (tiny_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Llama.from_pretrained(tiny_path)


def test_dtype_is_that_of_most_values(tiny_path):
    def half(tensors):
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].to(torch.bfloat16)

    rewrite(tiny_path, half)
    assert Checkpoint(tiny_path).dtype == torch.bfloat16
    assert Llama.from_pretrained(tiny_path).norm.dtype == torch.bfloat16


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_by_arithmetic_are_those_of_a_model(tiny, tied, biases):
    model = tiny(tie_word_embeddings=tied, attention_bias=biases, mlp_bias=not biases, head_dim=12)
    shapes = {name: tuple(tensor.shape) for name, tensor in stock_tensors(model).items()}
    assert stock_shapes(model.config) == shapes


def test_layers_are_counted_before_anything_is_built(tiny_path, monkeypatch):
    file = tiny_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 999}))
    monkeypatch.setattr(hf, "stock_shapes", None)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers = 4 expected, .* says 999"):
        Llama.from_pretrained(tiny_path)


def test_names_in_a_header_are_shown_on_one_line(tiny_path):
    rewrite(tiny_path, lambda tensors: tensors.update({"a\nb": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"unexpected: 'a\\nb'$"):
        Llama.from_pretrained(tiny_path)
