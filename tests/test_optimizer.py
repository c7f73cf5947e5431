import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from llamapro.train.optimizer import Optimizer


def losses(model, steps=4):
    """The loss of each of so many batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(61, (2, 9), generator=generator)
        yield model.loss(rows[:, :-1], rows[:, 1:])


def test_it_takes_the_steps_of_torch_optim(tiny):
    """The same bits: matrices decay, vectors do not."""
    ours, theirs = tiny(), tiny()
    optimizer = Optimizer(ours, max_grad_norm=1e9, weight_decay=0.1, betas=(0.9, 0.95))
    parameters = list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    for loss, other in zip(losses(ours), losses(theirs), strict=True):
        loss.backward()
        optimizer.step(1e-2)
        other.backward()
        adamw.step()
        adamw.zero_grad()
    assert not torch.equal(ours.norm, tiny().norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_loaded_state_goes_on(tiny):
    """With the same bits, in another optimizer on a copy of the model."""
    model = tiny().to(torch.bfloat16)
    options = {"max_grad_norm": 1e9, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    optimizer = Optimizer(model, **options)
    for count, loss in enumerate(losses(model)):
        if count == 2:
            twin = tiny().to(torch.bfloat16)
            other = Optimizer(twin, **options)
            other.load_state(copy.deepcopy(optimizer.state()), step=2)
        loss.backward()
        optimizer.step(1e-2)
    for loss in itertools.islice(losses(twin), 2, None):
        loss.backward()
        other.step(1e-2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_steps_are_counted_in_fp32(tiny):
    """In bf16 the count would stay at 256, and in CUDA's kernel be read as something else."""
    model = tiny()
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = Optimizer(model, max_grad_norm=1e9, weight_decay=0.1, betas=(0.9, 0.95))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {count.dtype for count in optimizer.steps.values()} == {torch.float32}


@pytest.mark.parametrize(
    "change", [{"betas": (1.0, 0.95)}, {"betas": (0.9, -0.1)}, {"weight_decay": -0.1}]
)
def test_options_out_of_range(tiny, change):
    with pytest.raises(ValueError, match="expected, got"):
        Optimizer(
            tiny(), **{"max_grad_norm": 1.0, "weight_decay": 0.1, "betas": (0.9, 0.95), **change}
        )


def test_nothing_to_train_is_an_error(tiny):
    with pytest.raises(ValueError, match="no trainable parameter"):
        Optimizer(
            tiny().requires_grad_(False), max_grad_norm=1.0, weight_decay=0.0, betas=(0.9, 0.95)
        )


def test_the_compiler_is_not_loaded(tiny_path):
    """It would be 75 MB of a process that only loads a model and trains it."""
    code = f"""
import sys, torch
from llamapro import Llama
from llamapro.train.optimizer import Optimizer
model = Llama.from_pretrained({str(tiny_path)!r})
optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
tokens = torch.zeros(1, 4, dtype=torch.long)
loss = model.loss(tokens, tokens)
loss.backward()
optimizer.clip_and_check(loss, 1)
optimizer.step(1e-3)
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
