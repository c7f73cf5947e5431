"""New blocks of sharded models: with FSDP2 by hand, and in a Trainer that accelerate shards."""

import os
import socket

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


def train(rank, base, out, port):
    """Some steps of a Trainer, as torchrun starts them; then the callback of a sharded model."""
    import transformers
    from llamapro.integrations import transformers as lpt

    def expanded():
        model = lpt.expand(transformers.AutoModelForCausalLM.from_pretrained(base), 2)
        lpt.train_new_blocks_only(model)
        return model

    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="localhost")
    rows = torch.randint(3, 61, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=4, save_steps=2, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in rows]
    callback = lpt.BlockExpansionCallback()
    trainer = transformers.Trainer(expanded(), arguments, train_dataset=rows, callbacks=[callback])
    trainer.train()

    model, mesh = expanded(), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    state = transformers.TrainerState(global_step=9, is_world_process_zero=rank == 0)
    callback.on_train_begin(arguments, state, None, model=model)
    callback.on_save(arguments, state, None)
    dist.barrier()
    frozen = model.model.norm.weight.to_local()
    frozen.data[-1] += 1e-3
    with pytest.raises(RuntimeError, match="what is frozen changed"):
        callback.on_train_end(arguments, state, None)
    dist.barrier()
    os._exit(0)


def test_a_trainer_on_two_ranks(tiny, tmp_path):
    pytest.importorskip("accelerate")
    base = tiny().save_pretrained(tmp_path / "base")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (base, tmp_path / "run", port), nprocs=2)
    model, tokens = Llama.from_pretrained(base), torch.arange(20).view(1, 20)
    before = model(tokens)
    load_new_blocks(model, tmp_path / "run" / "checkpoint-9" / "new_blocks")
    assert torch.equal(model(tokens), before)  # an identity: nothing trained it
    load_new_blocks(model, tmp_path / "run" / "checkpoint-4" / "new_blocks")
    assert not torch.equal(model(tokens), before)
