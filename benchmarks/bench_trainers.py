"""A step of transformers' Trainer after `apply`, against the same Trainer without, and our loop.

All have the same random weights, trainable tensors, tokens and optimizer; the Trainer's sides
differ by one line.
"""

import pytest
import torch
from bench_step import Products, our_step, stepper, their_model
from bench_step import checkpoint as expanded_smollm2
from compare import DEVICE
from llamapro.hardware import keep_freed_memory
from transformers import Trainer, TrainingArguments

from llamapro_kernels.integrations import transformers as lkt

CASES = [("bfloat16", 2, 512, "new_blocks"), ("bfloat16", 2, 512, "all")]


def trainers_step(folder, *, apply, path, batch, length, trainable):
    model = their_model(path, trainable)
    if apply:
        assert lkt.apply(model)["block"] == "applied"
    options = TrainingArguments(str(folder), report_to=[], use_cpu=DEVICE == "cpu")
    trainer = Trainer(model, options)

    def loss_of(model, tokens, targets):
        inputs = {"input_ids": tokens, "labels": targets, "shift_labels": targets}
        return trainer.training_step(model, inputs, num_items_in_batch=targets.numel())

    return stepper(model, loss_of, batch, length, backward=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_trainers_step(compare, case, tmp_path):
    dtype, batch, length, trainable = case
    keep_freed_memory()
    path = expanded_smollm2(tmp_path / "model", dtype)
    same = {"path": path, "batch": batch, "length": length, "trainable": trainable}
    products = Products()
    with products:
        our_step(**same)()
    peers = {
        "Trainer": trainers_step(tmp_path, apply=False, **same),
        "our loop": our_step(**same),
    }
    ours = trainers_step(tmp_path, apply=True, **same)
    compare(ours, peers, dtype=getattr(torch, dtype), rounds=3, roof=products.repeat)
