"""The block's node under FSDP2: parameters are shards between uses, and the gradients are right."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llamapro import Llama, LlamaConfig, expand
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

CONFIG = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}


def build(recompute):
    torch.manual_seed(0)
    model = expand(Llama(LlamaConfig(**CONFIG)), 2)
    model.train_new_blocks_only()
    for i in model.config.new_blocks:  # past the identity, so that every gradient is there
        for p in model.blocks[i].parameters():
            torch.nn.init.normal_(p, std=0.2)
    for block in model.blocks:
        block.recompute = recompute
    return model


def sharded(rank, store, expected):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for recompute in expected:
        compare(rank, store, recompute, expected[recompute])
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads live on while FSDP holds the group, and one that lets go of a tensor while the
    # interpreter shuts down aborts the process (pytorch/pytorch#179291). So leave without that.
    os._exit(0)


def compare(rank, store, recompute, expected):
    model, tokens = build(recompute), torch.arange(24).view(2, 12)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Each rank has a row; FSDP averages, so that the sum of both losses halved is the mean's.
    model(tokens[rank : rank + 1]).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.full_tensor()
        assert (grad is None) == (name not in expected), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"is sharded: a whole tensor expected"):
        model.save_pretrained(f"{store}-recomputed")


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
def test_two_ranks_have_the_gradients_of_one(tmp_path):
    expected = {}
    for recompute in ("none", "block"):
        model, tokens = build(recompute), torch.arange(24).view(2, 12)
        model(tokens).float().square().mean().backward()
        expected[recompute] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(expected[recompute]) == 2 * 6
    mp.spawn(sharded, (str(tmp_path / "store"), expected), nprocs=2)
