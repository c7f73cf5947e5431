"""A training step of SmolLM2-135M and six new blocks, against transformers.

Both have the same random weights, trainable tensors and optimizer. The roof is the matrix products
of our step alone. Memory is the largest resident set of a process that takes two steps.
"""

import json
import subprocess
import sys

import pytest
import torch
from compare import DEVICE
from llamapro import Llama, LlamaConfig, expand
from llamapro.hardware import keep_freed_memory, peak_memory
from llamapro.placement import place_blocks
from llamapro.train.loop import freeze
from llamapro.train.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from llamapro_kernels import cpu, library
from llamapro_kernels.matmul import matmul

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
}
ONEDNN = torch.ops.mkldnn._linear_pointwise.default
MM, ADDMM, ADDMM_ = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_
TILED = cpu.ops.matmul.default if cpu.BUILD else None
PRODUCTS = (MM.default, MM.out, ADDMM.default, ADDMM.out, ADDMM_.default, ONEDNN, TILED)
CASES = [
    ("bfloat16", 2, 512, "new_blocks"),
    ("bfloat16", 1, 2048, "new_blocks"),
    ("bfloat16", 2, 512, "all"),
    ("float32", 2, 512, "new_blocks"),
]


def checkpoint(path, dtype="bfloat16", placement="interleaved"):
    """A directory that both sides load: random weights, six new blocks."""
    torch.manual_seed(0)
    slots = place_blocks(SMOLLM2["num_hidden_layers"], 6, placement)
    positions = [i for i, slot in enumerate(slots) if slot.new]
    model = expand(Llama(LlamaConfig(**SMOLLM2)), placement=positions)
    return str(model.to(getattr(torch, dtype)).save_pretrained(path))


def our_model(path, trainable="new_blocks", recompute="none"):
    model = Llama.from_pretrained(path, device=DEVICE)
    freeze(model, trainable)
    for block in model.blocks:
        block.recompute = recompute
    return model


def their_model(path, trainable="new_blocks", checkpointing=False, compiled=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(DEVICE).train()
    model.requires_grad_(trainable == "all")
    for i in model.config.llama_pro["new_blocks"]:
        model.model.layers[i].requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        model.compile(dynamic=False)
    return model


def their_loss(model, tokens, targets):
    return model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def stepper(model, loss_of, batch, length, backward=True):
    """A function that takes one step on random tokens and returns the loss before it.

    backward: False where `loss_of` has done that already.
    """
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    torch.manual_seed(1)
    rows = torch.randint(SMOLLM2["vocab_size"], (batch, length + 1), device=DEVICE)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step():
        loss = loss_of(model, tokens, targets)
        if backward:
            loss.backward()
        optimizer.step(1e-4, loss, 1)
        return (loss.detach(),)

    return step


class Products(TorchDispatchMode):
    """Records the matrix products that run, to repeat them on random numbers."""

    def __init__(self):
        super().__init__()
        self.seen, self.operands = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() == "llamapro::linear_cross_entropy":  # has products inside
            with self:
                op = library._ops["linear_cross_entropy"]
                backend = op.backend_for(args[0].device.type, args[0].dtype)
                return op.implementations[backend]["forward"](*args)
        if function in PRODUCTS:
            tensors = [self.like(t) for t in args if isinstance(t, torch.Tensor)]
            self.seen.append((function, tensors[:2] if function is TILED else tensors[-2:]))
        return function(*args, **(kwargs or {}))

    def like(self, t):
        key = (t.shape, t.stride(), t.dtype)
        if key not in self.operands:
            copy = torch.empty_strided(*key[:2], dtype=t.dtype, device=t.device)
            self.operands[key] = copy.normal_()
        return self.operands[key]

    def repeat(self):
        for function, operands in self.seen:
            if function is ONEDNN:
                ONEDNN(*operands, None, "none", [], "")
            else:
                (matmul if function is TILED else torch.mm)(*operands)


def our_step(batch, length, **options):
    return stepper(our_model(**options), Llama.loss, batch, length)


def their_step(batch, length, **options):
    return stepper(their_model(**options), their_loss, batch, length)


SIDES = {"ours": our_step, "theirs": their_step}


def peak(side, **options):
    """GB, of a process of its own."""
    command = [sys.executable, __file__, side, json.dumps(options)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e9


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step(compare, benchmark, case, tmp_path):
    dtype, batch, length, trainable = case
    keep_freed_memory()
    same = {
        "path": checkpoint(tmp_path / "model", dtype),
        "batch": batch,
        "length": length,
        "trainable": trainable,
    }
    products = Products()
    with products:
        our_step(**same)()
    peers = {
        "transformers": their_step(**same),
        "transformers compiled": their_step(**same, compiled=True),
    }
    ours = our_step(**same)
    compare(ours, peers, dtype=getattr(torch, dtype), rounds=7, roof=products.repeat)
    if DEVICE == "cpu":
        memory = peak("ours", **same)
        benchmark.extra_info |= {
            "peak GB": round(memory, 2),
            "transformers' peak / ours": round(peak("theirs", **same) / memory, 2),
        }


@pytest.mark.parametrize("placement", ["interleaved", "top_half", "suffix"])
def test_placement(compare, benchmark, placement, tmp_path):
    """What backward recomputes, against transformers with and without gradient checkpointing."""
    keep_freed_memory()
    path = checkpoint(tmp_path / "model", placement=placement)
    same = {"path": path, "batch": 2, "length": 512}
    sides = {
        "recompute mlp": ("ours", {"recompute": "mlp"}),
        "recompute block": ("ours", {"recompute": "block"}),
        "transformers": ("theirs", {}),
        "transformers checkpointing": ("theirs", {"checkpointing": True}),
    }
    peers = {name: SIDES[side](**same, **options) for name, (side, options) in sides.items()}
    products = Products()
    with products:
        our_step(**same)()
    compare(our_step(**same), peers, dtype=torch.bfloat16, rounds=5, roof=products.repeat)
    if DEVICE == "cpu":
        memory = peak("ours", **same)
        ratios = {
            f"{name} peak / ours": round(peak(side, **same, **options) / memory, 2)
            for name, (side, options) in sides.items()
        }
        benchmark.extra_info |= {"peak GB": round(memory, 2), **ratios}


if __name__ == "__main__":
    keep_freed_memory()
    step = SIDES[sys.argv[1]](**json.loads(sys.argv[2]))
    step()
    step()
    print(peak_memory(torch.device(DEVICE)))
