"""New blocks of sharded models: with FSDP2 by hand, and in a Trainer that accelerate shards."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llamapro import Llama, expand
from llamapro.new_blocks import load_new_blocks, save_new_blocks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is not distributed")


def files(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def trained(base):
    model = expand(Llama.from_pretrained(base), 2)
    torch.manual_seed(0)
    for i in model.config.new_blocks:
        for parameter in model.blocks[i].parameters():
            torch.nn.init.normal_(parameter)
    return model


def saved_by_two(rank, base, out):
    dist.init_process_group("gloo", init_method=f"file://{out}-store", rank=rank, world_size=2)
    model, mesh = trained(base), init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save_new_blocks(model, out)
    dist.barrier()
    os._exit(0)  # see test_fsdp.py


def test_a_sharded_model_saves_what_a_whole_one_does(tiny, tmp_path):
    base = tiny().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    mp.spawn(saved_by_two, (base, tmp_path / "two"), nprocs=2)
    assert files(tmp_path / "two") == files(save_new_blocks(trained(base), tmp_path / "one"))
    load_new_blocks(Llama.from_pretrained(base), tmp_path / "two")
