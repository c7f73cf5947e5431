"""What keeping a base costs: a step with KL on a fifth of its rows, beside one without."""

import numpy as np
import pytest
import torch
from bench_step import SMOLLM2, checkpoint
from compare import DEVICE, interleave
from llamapro import Llama, planner
from llamapro.data.packing import open_rows
from llamapro.hardware import keep_freed_memory
from llamapro.storage import write_json
from llamapro.train import TrainConfig
from llamapro.train.keep import Keeper
from llamapro.train.loop import freeze
from llamapro.train.optimizer import Optimizer

ROWS, LENGTH, KEPT = 5, 256, 1


def token_data(path):
    """A data directory of random tokens."""
    path.mkdir()
    tokens = np.random.default_rng(0).integers(SMOLLM2["vocab_size"], size=20_000, dtype=np.uint16)
    meta = {"dtype": "uint16", "separator": 0, "max_token": int(tokens.max())}
    for part in ("train", "heldout"):
        tokens.tofile(path / f"{part}.bin")
    counts = dict.fromkeys(("train", "heldout"), len(tokens))
    write_json(path / "meta.json", {**meta, "tokens": counts})
    return str(path)


def stepper(model, keeper, rows, kept):
    """A function that takes one step, with the last of the rows to be kept."""
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    batch = rows.collate([rows.row(i) for i in range(ROWS)], kept)

    def step():
        loss = sum(keeper.losses(batch))
        loss.backward()
        optimizer.step(1e-6, loss.detach(), 1)

    return step


@pytest.mark.parametrize("trainable", ["new_blocks", "all"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_keeping(benchmark, dtype, trainable, tmp_path):
    keep_freed_memory()
    path, data = checkpoint(tmp_path / "model", dtype), token_data(tmp_path / "data")
    how = {"trainable": trainable, "dtype": dtype, "keep": KEPT / ROWS, "keep_data": data}
    config = TrainConfig(model=path, data=(data,), out=str(tmp_path / "run"), **how)
    model = Llama.from_pretrained(path, device=DEVICE)
    freeze(model, trainable)
    rows = open_rows(data, "train", SMOLLM2["vocab_size"], LENGTH, "wrapped")
    keeper = Keeper(config, model)
    steps = {name: stepper(model, keeper, rows, n) for name, n in (("kept", KEPT), ("not", 0))}
    for step in steps.values():
        step()
    medians = interleave(steps, rounds=5)
    trained = None if trainable == "all" else tuple(model.config.new_blocks)
    sizes = ROWS, LENGTH, getattr(torch, dtype), DEVICE
    work = planner.Workload(model.config, trained, *sizes, kept=KEPT / ROWS)
    flops = sum(planner.flops(work).values())
    benchmark.extra_info |= {
        "device": DEVICE,
        "torch": torch.__version__,
        "with KL / without": round(medians["kept"] / medians["not"], 3),
        "planned, by FLOPs": round(flops / (flops - planner.flops(work)["base"]), 3),
    }
    benchmark.pedantic(steps["kept"], rounds=1)
