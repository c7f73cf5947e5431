"""A training step of SmolLM2-135M and six new blocks, against transformers.

Both have the same random weights, trainable tensors and optimizer. The roof is the matrix products
of our step alone. Memory is the largest resident set of a process that takes two steps:

    python benchmarks/bench_step.py ours bfloat16 2 512 new_blocks
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import DEVICE
from llamapro import Llama, LlamaConfig, expand
from llamapro.hardware import keep_freed_memory, peak_memory
from llamapro.optimizer import Optimizer
from llamapro.train import freeze
from torch.utils._python_dispatch import TorchDispatchMode

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
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default)
CASES = [
    ("bfloat16", 2, 512, "new_blocks"),
    ("bfloat16", 1, 2048, "new_blocks"),
    ("bfloat16", 2, 512, "all"),
    ("float32", 2, 512, "new_blocks"),
]


def our_model(dtype, trainable):
    torch.manual_seed(0)
    model = expand(Llama(LlamaConfig(**SMOLLM2)), new_blocks=6).to(DEVICE, getattr(torch, dtype))
    freeze(model, trainable)
    return model


def their_model(path, trainable):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(DEVICE)
    new_blocks = model.config.llama_pro["new_blocks"]
    model.requires_grad_(trainable == "all")
    for i in new_blocks:
        model.model.layers[i].requires_grad_(True)
    return model


def our_loss(model, tokens, targets):
    return model.loss(tokens, targets)


def their_loss(model, tokens, targets):
    return model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def stepper(model, loss_of, batch, length):
    """A function that takes one step on random tokens and returns the loss before it."""
    optimizer = Optimizer(model, clip=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    torch.manual_seed(1)
    rows = torch.randint(SMOLLM2["vocab_size"], (batch, length + 1), device=DEVICE)
    tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step():
        loss = loss_of(model, tokens, targets)
        loss.backward()
        optimizer.clip_and_check(loss, 1)
        optimizer.step(1e-4)
        return (loss.detach(),)

    return step


class Products(TorchDispatchMode):
    """Records the matrix products that run, to repeat them on random numbers."""

    def __init__(self):
        super().__init__()
        self.seen, self.operands = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            self.seen.append(tuple(self.like(t) for t in args if isinstance(t, torch.Tensor))[-2:])
        return function(*args, **(kwargs or {}))

    def like(self, t):
        key = (t.shape, t.stride(), t.dtype)
        if key not in self.operands:
            copy = torch.empty_strided(*key[:2], dtype=t.dtype, device=t.device)
            self.operands[key] = copy.normal_()
        return self.operands[key]

    def repeat(self):
        for a, b in self.seen:
            torch.mm(a, b)


def peak(side, case, path):
    """Bytes, of a process of its own."""
    command = [sys.executable, __file__, side, *map(str, case), str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_step(compare, benchmark, case, tmp_path):
    dtype, batch, length, trainable = case
    keep_freed_memory()
    model = our_model(dtype, trainable)
    path = model.save_pretrained(tmp_path / "model")
    ours = stepper(model, our_loss, batch, length)
    products = Products()
    with products:
        stepper(our_model(dtype, trainable), our_loss, batch, length)()
    theirs, compiled = (their_model(path, trainable) for _ in range(2))
    compiled.compile(dynamic=False)
    peers = {
        "transformers": stepper(theirs, their_loss, batch, length),
        "transformers compiled": stepper(compiled, their_loss, batch, length),
    }
    compare(ours, peers, rtol=2e-3, atol=0, rounds=7, roof=products.repeat)
    if DEVICE == "cpu":
        memory = {side: peak(side, case, path) for side in ("ours", "theirs")}
        benchmark.extra_info |= {
            "peak GB": round(memory["ours"] / 1e9, 2),
            "transformers' peak / ours": round(memory["theirs"] / memory["ours"], 2),
        }


def main(side, dtype, batch, length, trainable, path=None):
    keep_freed_memory()
    if side == "ours":
        step = stepper(our_model(dtype, trainable), our_loss, int(batch), int(length))
    else:
        step = stepper(their_model(Path(path), trainable), their_loss, int(batch), int(length))
    step()
    step()
    print(peak_memory(torch.device(DEVICE)))


if __name__ == "__main__":
    main(*sys.argv[1:])
