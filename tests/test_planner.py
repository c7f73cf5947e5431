"""The plan of a run against what really runs: FLOPs exactly, memory closely; and the search."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from llamapro import Llama, LlamaConfig, expand
from llamapro.placement import PLACEMENTS, place_blocks
from llamapro.planner import (
    USABLE,
    Workload,
    choose_recompute,
    flops,
    largest_batch,
    memory,
    parameters,
    parse_bytes,
    plan,
)
from torch.utils.flop_counter import FlopCounterMode

from llamapro_kernels.block import RECOMPUTE

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LLAMA2_7B = LlamaConfig()
QWEN3 = LlamaConfig(  # whose heads are wide, so that their norms are at the peak
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    model_type="qwen3",
    sliding_window=24,
    max_window_layers=3,
)
NO_WINDOW = {"sliding_window": None, "max_window_layers": 0, "other": {}}
CASES = {
    "SmolLM2 + 6": (SMOLLM2, 6),
    "Llama-2-7B + 8": (LLAMA2_7B, 8),
    "Qwen3, half of it slides": (QWEN3, 2),
    "Mistral": (LlamaConfig(model_type="mistral", sliding_window=9, num_hidden_layers=4), 2),
}


def workload(base, new_blocks, placement, batch=2, length=64, everything=False):
    """A model without memory, and what is to be planned for it."""
    with torch.device("meta"):
        model = expand(Llama(base), new_blocks, placement)
    if not everything:
        model.train_new_blocks_only()
    trainable = None if everything else tuple(model.config.new_blocks)
    return model, Workload(model.config, trainable, batch, length)


def step(model, work):
    tokens = torch.zeros(work.batch, work.length, dtype=torch.long, device="meta")
    return model.loss(tokens, tokens)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block", "mixed"])
@pytest.mark.parametrize("placement", ["interleaved", "prefix", "suffix"])
@pytest.mark.parametrize("case", CASES)
def test_flops_are_exact(case, placement, recompute):
    model, work = workload(*CASES[case], placement)
    kinds = [RECOMPUTE[i % 3] if recompute == "mixed" else recompute for i in work.blocks]
    for block, kind in zip(model.blocks, kinds, strict=True):
        block.recompute = kind
    with FlopCounterMode(display=False) as counted:
        step(model, work).backward()
    assert counted.get_total_flops() == sum(flops(work, kinds).values())


def test_parameters_are_counted():
    for config in (SMOLLM2, QWEN3, replace(QWEN3, model_type="qwen2", other={})):
        with torch.device("meta"):
            model = Llama(config)
        counts = parameters(config)
        total = config.num_hidden_layers * counts["block"] + counts["rest"]
        assert total == sum(p.numel() for p in model.parameters())


def test_flops_of_full_training_are_exact():
    model, work = workload(SMOLLM2, 6, "interleaved", everything=True)
    with FlopCounterMode(display=False) as counted:
        step(model, work).backward()
    assert counted.get_total_flops() == sum(flops(work).values())


def test_the_papers_placement_costs_84_of_120():
    """Of the products with the blocks' weights: 40 forward, 36 input and 8 weight gradients."""
    _, work = workload(LLAMA2_7B, 8, "interleaved", batch=1, length=1)
    assert work.config.new_blocks == [4, 9, 14, 19, 24, 29, 34, 39]
    block = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) // 32  # FLOPs of a token
    head, pairs = 2 * 4096 * 32000, 4 * 4096
    assert flops(work) == {
        "forward": 40 * block,
        "input gradient": 36 * block,
        "weight gradient": 8 * block,
        "attention": 40 * pairs + 36 * pairs // 2 * 5,
        "head": 2 * head,
        "recomputed": 0,
    }


MEASURE = """
import json, sys, torch
from dataclasses import replace
from llamapro import Llama, LlamaConfig, expand
from llamapro.hardware import keep_freed_memory, peak_memory, resident_memory
from llamapro.train.optimizer import Optimizer
from llamapro.train.parallel import freeze

keep_freed_memory(False)  # holes in the C library's heap are not planned
setting = json.loads(sys.argv[1])
config = LlamaConfig(**setting["config"])
dtype = getattr(torch, setting["dtype"])
torch.set_default_dtype(dtype)
def train(config, new_blocks):
    model = expand(Llama(config), new_blocks, setting["placement"])
    freeze(model, setting["trainable"])
    if setting["frozen"] != "bf16":
        model.freeze_in_8_bits(setting["frozen"] == "8bit-compact")
    for block, recompute in zip(model.blocks, setting["recompute"]):
        block.recompute = recompute
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    for size in (1, 16), (setting["batch"], setting["length"]):  # the first step makes the moments
        tokens = torch.randint(config.vocab_size, size)
        loss = model.loss(tokens, tokens)
        loss.backward()
        optimizer.step(1e-4, loss, 1)
train(replace(config, num_hidden_layers=1, other={}), 1)  # libraries keep code and buffers by shape
before = resident_memory()
train(config, setting["new"])
print(peak_memory(torch.device("cpu")) - before)
"""
HALF = replace(SMOLLM2, num_hidden_layers=15)
MEASURED = {  # placement, trainable, batch, dtype; what is computed again is measured further below
    "bf16": ("interleaved", "new_blocks", 2, torch.bfloat16),
    "everything": ("interleaved", "all", 1, torch.bfloat16),
    "suffix": ("suffix", "new_blocks", 2, torch.float32),
}


def measure(work, placement, recompute, base):
    """Bytes of a process's peak above what the libraries take."""
    shape = {k: v for k, v in base.to_dict().items() if k in LlamaConfig.__dataclass_fields__}
    new = len(work.blocks) - base.num_hidden_layers
    setting = {
        **{"config": shape, "new": new, "placement": placement, "recompute": recompute},
        **{"trainable": "all" if work.trainable is None else "new_blocks"},
        **{"batch": work.batch, "length": work.length, "dtype": str(work.dtype).split(".")[1]},
        "frozen": work.frozen,
    }
    command = [sys.executable, "-c", MEASURE, json.dumps(setting)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # the code under test
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@on_linux
@pytest.mark.parametrize("case", MEASURED)
def test_memory_is_what_was_planned(case):
    """To 5 % of what was measured."""
    placement, trainable, batch, dtype = MEASURED[case]
    _, work = workload(HALF, 3, placement, batch, 512, trainable == "all")
    work = replace(work, dtype=dtype, device="cpu")
    recompute = ["none"] * len(work.blocks)
    planned, measured = memory(work, recompute)["total"], measure(work, placement, recompute, HALF)
    print(f"{case}: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert planned == pytest.approx(measured, rel=0.05)


@on_linux
def test_memory_of_head_norms_is_what_was_planned():
    """What they add to a Llama of the same sizes, to 10 %: a few MB is what a process varies by."""
    planned, measured = [], []
    for model_type in ("qwen3", "llama"):
        base = replace(QWEN3, model_type=model_type, num_hidden_layers=2, **NO_WINDOW)
        _, work = workload(base, 1, "suffix", 8, 512)
        work = replace(work, dtype=torch.float32, device="cpu")
        planned.append(memory(work, ["none"] * 3)["total"])
        measured.append(measure(work, "suffix", ["none"] * 3, base))
    print(f"planned {planned}, measured {measured}")
    assert planned[0] - planned[1] == pytest.approx(measured[0] - measured[1], rel=0.1)


@on_linux
def test_the_largest_batch_needs_what_was_planned_and_is_within_its_limit():
    _, work = workload(HALF, 3, "interleaved", 1, 256)
    work, limit = replace(work, dtype=torch.float32, device="cpu"), 0.62e9
    work = replace(work, batch=largest_batch(work, USABLE * limit))
    recompute = choose_recompute(work, USABLE * limit)
    assert work.batch > 1 and {*recompute} == {*RECOMPUTE}
    planned, measured = (
        memory(work, recompute)["total"],
        measure(work, "interleaved", recompute, HALF),
    )
    print(f"{recompute}: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert planned == pytest.approx(measured, rel=0.05) and measured <= limit


def test_policies_fit_the_limit_and_no_more_is_computed_again_than_that_takes():
    _, work = workload(LLAMA2_7B, 8, "interleaved", batch=4, length=4096)
    totals = [memory(work, [kind] * 40)["total"] for kind in RECOMPUTE]
    assert totals == sorted(totals, reverse=True)
    assert choose_recompute(work, totals[0]) == ["none"] * 40
    for limit in ((totals[0] + totals[1]) / 2, (totals[1] + totals[2]) / 2, totals[2]):
        recompute = choose_recompute(work, limit)
        assert memory(work, recompute)["total"] <= limit
        for i in work.blocks_in_backward:  # no block could keep more
            for kind in RECOMPUTE[: RECOMPUTE.index(recompute[i])]:
                assert memory(work, [*recompute[:i], kind, *recompute[i + 1 :]])["total"] > limit
    with pytest.raises(ValueError, match="needs at least"):
        choose_recompute(work, totals[2] * 0.9)


def test_largest_batch():
    _, work = workload(LLAMA2_7B, 8, "suffix", batch=1, length=2048)
    batch = largest_batch(work, 80e9)
    choose_recompute(replace(work, batch=batch), 80e9)
    with pytest.raises(ValueError, match=f"a batch of {batch + 1} x 2048 tokens needs at least"):
        choose_recompute(replace(work, batch=batch + 1), 80e9)
    assert largest_batch(work, 1e9) == 0


def fits(work, recompute, limit):
    return memory(work, recompute)["total"] <= limit


def tried_one_by_one(work, limit):
    """What `choose_recompute` finds, by asking for the memory of everything on the way."""
    recompute = ["none"] * len(work.blocks)
    for policy, i in itertools.product(RECOMPUTE[1:], work.blocks_in_backward):
        if fits(work, recompute, limit):
            break
        recompute[i] = policy
    for i in work.blocks_in_backward:
        for policy in RECOMPUTE[: RECOMPUTE.index(recompute[i])]:
            less = [*recompute[:i], policy, *recompute[i + 1 :]]
            if fits(work, less, limit):
                recompute = less
                break
    return recompute if fits(work, recompute, limit) else None


SEARCHES = {  # base, new blocks, placement, batch, length, dtype, everything
    "7B interleaved": (LLAMA2_7B, 8, "interleaved", 4, 4096, torch.bfloat16, False),
    "7B suffix": (LLAMA2_7B, 8, "suffix", 16, 2048, torch.bfloat16, False),
    "SmolLM2 all": (SMOLLM2, 6, "interleaved", 2, 512, torch.bfloat16, True),
    "SmolLM2 fp32": (SMOLLM2, 3, "prefix", 1, 64, torch.float32, False),
    "many heads": (replace(SMOLLM2, hidden_size=96, num_attention_heads=96, num_key_value_heads=96,
                           head_dim=2), 5, "interleaved", 3, 33, torch.bfloat16, True),
}  # fmt: skip


@pytest.mark.parametrize("case", SEARCHES)
def test_the_search_finds_what_trying_one_by_one_finds(case):
    base, new_blocks, placement, batch, length, dtype, everything = SEARCHES[case]
    _, work = workload(base, new_blocks, placement, batch, length, everything)
    work = replace(work, dtype=dtype)
    most, least = (memory(work, [kind] * len(work.blocks))["total"] for kind in ("none", "block"))
    for part in (0, 0.01, 0.2, 0.37, 0.5, 0.63, 0.8, 0.99, 1):
        limit = least + part * (most - least)
        assert choose_recompute(work, limit) == tried_one_by_one(work, limit)
        largest = largest_batch(work, limit)
        found = [tried_one_by_one(replace(work, batch=n), limit) for n in (largest, largest + 1)]
        assert found[0] is not None and found[1] is None
    assert tried_one_by_one(work, least - 1) is None
    with pytest.raises(ValueError, match=f"needs at least {least / 1e9:.2f} GB"):
        choose_recompute(work, least - 1)


@pytest.mark.parametrize("width, limit", [(64, 80e9), (8192, 1e15)])
def test_a_thousand_layers_are_planned_in_seconds(width, limit):
    """Every change that may fit was once tried, and its memory counted anew."""
    base = replace(LLAMA2_7B, num_hidden_layers=900, hidden_size=width, head_dim=width // 32)
    began = time.process_time()
    text = plan(Workload(base, None, 1, 4096), 100, PLACEMENTS, limit=limit)
    assert time.process_time() - began < 5 and "largest batch size" in text


def test_placements():
    assert [s.source for s in place_blocks(4, 1, "top_half")] == [0, 1, 2, 3, 3]
    for name in PLACEMENTS:
        slots = place_blocks(32, 8, name)
        assert len(slots) == 40 and sum(s.new for s in slots) == 8
        assert [s.source for s in slots if not s.new] == list(range(32))
    top = [i for i, s in enumerate(place_blocks(32, 8, "top_half")) if s.new]
    assert top == list(range(18, 40, 3))


def test_the_plan_as_it_is_printed():
    text = plan(Workload(LLAMA2_7B, None, 4, 4096), 8, PLACEMENTS, limit=80e9, rate=8e14)
    for name in PLACEMENTS:
        assert text.count(f"\n| {name.ljust(11)} |") == 1 and f"### {name}:" in text
    heads = ("GFLOPs per token", "FLOPs vs full training", "FLOPs vs tuning the base", "recompute")
    for head in (*heads, "largest batch size", "tokens/s (roofline)"):
        assert f"| {head} " in text.splitlines()[0]
    assert "8.357 B" in text and "1.619 B (19%)" in text and "chosen" in text


def test_a_placement_that_does_not_fit_is_named_and_the_others_are_planned():
    work = Workload(LLAMA2_7B, None, 24, 4096)
    text = plan(work, 8, PLACEMENTS, limit=76e9, frozen="bf16")
    assert "| suffix" in text and "interleaved does not fit: a batch of 24 x 4096" in text
    with pytest.raises(
        ValueError, match=r"of them for weights and optimizer.*largest batch size 0"
    ):
        plan(Workload(LLAMA2_7B, None, 1, 4096), 8, ("suffix",), limit=20e9)


@pytest.mark.parametrize("batch, length", [(0, 8), (1, 0), (-3, 8)])
def test_steps_without_a_token(batch, length):
    with pytest.raises(ValueError, match=f"got {batch} x {length}"):
        plan(Workload(LLAMA2_7B, None, batch, length), 8, PLACEMENTS)


@pytest.mark.parametrize(
    "text, value", [("80GB", 80e9), ("24 GiB", 24 * 2**30), ("1.5tb", 1.5e12), ("512MB", 512e6)]
)
def test_memory_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["80", "GB", "80 G", "-1GB", "1..5GB", "0GB"])
def test_other_memory_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"80GB|1\.\.5"):
        parse_bytes(text)
