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
        optimizer.step(1e-2, loss, 1)
        other.backward()
        adamw.step()
        adamw.zero_grad()
    assert not torch.equal(ours.norm, tiny().norm)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_large_gradient_is_clipped_as_pytorch_does(tiny):
    """To the rounding of a division in the place of a product."""
    ours, theirs = tiny(), tiny()
    optimizer = Optimizer(ours, max_grad_norm=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for loss, other in zip(losses(ours), losses(theirs), strict=True):
        loss.backward()
        norm = optimizer.step(1e-2, loss, 1)
        other.backward()
        assert norm > 0.01
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        adamw.step()
        adamw.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(tiny, what):
    """Neither masters nor moments nor the count, though the step is queued before it is known."""
    model = tiny().to(torch.bfloat16)
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    batches = losses(model, 3)
    first = next(batches)
    first.backward()
    optimizer.step(1e-2, first, 1)
    before = copy.deepcopy((model.state_dict(), optimizer.state(), optimizer.steps))
    second = next(batches)
    (second * (torch.inf if what == "gradient" else 1)).backward()
    with pytest.raises(FloatingPointError, match=r"step 2: .* the step was not taken"):
        optimizer.step(1e-2, second * (torch.nan if what == "loss" else 1), 2)
    for then, now in zip(
        before, (model.state_dict(), optimizer.state(), optimizer.steps), strict=True
    ):
        assert all(torch.equal(then[name], now[name]) for name in then)
    third = next(batches)
    third.backward()
    optimizer.step(1e-2, third, 3)
    assert {count.item() for count in optimizer.steps.values()} == {2}


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
        optimizer.step(1e-2, loss, 1)
    for loss in itertools.islice(losses(twin), 2, None):
        loss.backward()
        other.step(1e-2, loss, 1)
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
optimizer.step(1e-3, loss, 1)
assert "torch._dynamo" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
