import json

import pytest
import torch
from llamapro import Llama, expand
from llamapro.new_blocks import activate, load_new_blocks, merge, save_new_blocks
from llamapro.model_files import CheckpointError
from safetensors.torch import load_file


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@torch.no_grad()
def train(model, seed=1):
    """Change everything that is new."""
    torch.manual_seed(seed)
    for i in model.config.new_blocks:
        for parameter in model.blocks[i].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("placement", ["interleaved", "prefix", "suffix", [0, 2, 5]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_saving_whole(tiny, tmp_path, placement, dtype):
    base = tiny().to(dtype).save_pretrained(tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    model = train(expand(Llama.from_pretrained(base), 3, placement))
    model.save_pretrained(tmp_path / "whole", files_from=base)
    save_new_blocks(model, tmp_path / "new")
    assert merge(base, tmp_path / "new", tmp_path / "merged") == tmp_path / "merged"
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
