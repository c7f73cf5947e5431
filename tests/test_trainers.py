"""Other people's trainers on a model after `apply`: the losses of twenty steps are stock's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apply_cases import LENGTH, gradients, model_of
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from llamapro_kernels.integrations import transformers as lkt

STEPS, ACCUMULATED, LAYERS = 20, 2, 3
# SGD: Adam would hide gradients of a wrong size, and make much of what is rounded.
COMMON = {
    **{"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0},
    **{"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "seed": 0},
    **{"gradient_accumulation_steps": ACCUMULATED, "bf16": False},
    **{"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True},
}


def rows(count=120, ragged=False):
    torch.manual_seed(4)
    lengths = torch.randint(3, LENGTH + 1, (count,)) if ragged else [LENGTH] * count
    return [torch.randint(2, 64, (int(n),)).tolist() for n in lengths]


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def on_three_models(train):
    """What a function returns for a model after apply, for stock, and for stock in fp64."""
    applied = model_of("llama")
    lkt.apply(applied)
    stock, exact = model_of("llama"), model_of("llama", torch.float64)
    return [train(model) for model in (applied, stock, exact)]


def assert_stock(ours, stock, exact):
    """The three-way rule, on the losses of all steps: they are stored in fp32."""
    assert len(stock) == STEPS and stock != sorted(stock)
    ours, stock, exact = (torch.tensor(losses).double() for losses in (ours, stock, exact))
    error, peer = ((losses - exact).norm() for losses in (ours, stock))
    assert error <= 2 * peer + torch.finfo(torch.float32).eps * exact.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, calls, checkpointing):
    data = [{"input_ids": ids, "labels": ids} for ids in rows()]
    options = TrainingArguments(
        tmp_path, gradient_checkpointing=checkpointing, remove_unused_columns=False, **COMMON
    )
    assert_stock(
        *on_three_models(lambda model: losses_of(Trainer(model, options, train_dataset=data)))
    )
    assert calls["decoder_block"] == STEPS * ACCUMULATED * LAYERS
    assert calls["linear_cross_entropy"] == STEPS * ACCUMULATED


LAYOUTS = {
    "padded": {},
    "packed": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sft_trainer(tmp_path, calls, layout):
    """Its loss is its own fused one, which also counts entropies; our blocks serve the rest."""
    words = models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="t0", eos_token="t1"
    )
    data = Dataset.from_list([{"input_ids": ids} for ids in rows(ragged=True)])

    def train(model):
        options = SFTConfig(str(tmp_path), **COMMON, **LAYOUTS[layout])
        return losses_of(SFTTrainer(model, options, train_dataset=data, processing_class=tokenizer))

    assert_stock(*on_three_models(train))
    assert calls["decoder_block"] == STEPS * ACCUMULATED * LAYERS


# accelerate shards on accelerators alone: on a CPU it is told to.
SHARD_ON_CPU = """
import accelerate
from accelerate.utils import DistributedType

class Sharding(accelerate.Accelerator):
    def __init__(self, fsdp_plugin):
        super().__init__(cpu=True, fsdp_plugin=fsdp_plugin)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin

accelerate.Accelerator = Sharding
"""
FSDP = """
import json
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from apply_cases import model_of
from test_trainers import STEPS, rows
import llamapro_kernels as lk
from llamapro_kernels.integrations import transformers as lkt

torch.set_num_threads(1)
blocks, block = [], lk.decoder_block
lk.decoder_block = lambda *args, **options: blocks.append(1) or block(*args, **options)
for apply in (True, False):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_offload=False
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = model_of("llama")
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    if apply:
        lkt.apply(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    losses = []
    for ids in rows(2 * STEPS)[accelerator.process_index :: 2]:
        tokens = torch.tensor([ids])
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    if accelerator.is_main_process:
        print(json.dumps({"losses": losses, "blocks": len(blocks)}))
    blocks.clear()
torch.distributed.destroy_process_group()
"""


def exact_losses():
    """Those of the script above, of one process in fp64."""
    model = model_of("llama", torch.float64)
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(model.model.layers[1].requires_grad_(True).parameters(), lr=0.1)
    losses = []
    for tokens in torch.tensor(rows(2 * STEPS)).view(STEPS, 2, LENGTH):
        losses.append(gradients(model, {"input_ids": tokens, "labels": tokens})["loss"].item())
        optimizer.step()
    return losses


def test_accelerate_fsdp2(tmp_path):
    """Two processes, one of three blocks trained: sharded weights, in pieces; then stock's."""
    script = tmp_path / "script.py"
    script.write_text(SHARD_ON_CPU + FSDP)
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    environment |= {"ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert_stock(*[result["losses"] for result in results], exact_losses())
    assert [result["blocks"] for result in results] == [STEPS * LAYERS, 0]
