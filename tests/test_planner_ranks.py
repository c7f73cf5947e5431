"""The plan of a run on several ranks against two that run, and against the plan of one."""

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from llamapro import Llama, LlamaConfig
from llamapro.expansion import expanded_config
from llamapro.hardware import keep_freed_memory, peak_memory, resident_memory
from llamapro.placement import PLACEMENTS, place_blocks
from llamapro.planner import Workload, memory, parameters
from llamapro.planner_ranks import (
    SHARDS,
    choose_rank_recompute,
    choose_shard,
    plan_ranks,
    rank_memory,
    rank_traffic,
)
from llamapro.ranks import Ranks
from llamapro.storage import write_json
from llamapro.train import TrainConfig
from llamapro.train.keep import Keeper
from llamapro.train.loop import open_data, take_step
from llamapro.train.optimizer import Optimizer
from llamapro.train.parallel import load

from benchmarks import gpus
from llamapro_kernels.block import RECOMPUTE

LLAMA2_7B = LlamaConfig()
SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
)
CPU = torch.device("cpu")


def workload(base, new_blocks, batch, length, **other):
    slots = place_blocks(base.num_hidden_layers, new_blocks, "interleaved")
    config = expanded_config(base, slots)
    return Workload(config, tuple(config.new_blocks), batch, length, **other)


SMALL_WORK = workload(SMALL, 4, 1, 128, dtype=torch.float32, device="cpu")
LARGE = workload(LLAMA2_7B, 8, 2, 4096)
NOTHING = ["none"] * 40  # is computed again


def steps(config, ranks, length):
    """Two steps of the loop, of which the first makes all that stays: the peak of the second."""
    model, _ = load(config, torch.float32, CPU, ranks)
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    keeper = Keeper(config, model)
    for tokens in (16, length):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what is there now
        rows, _ = open_data(replace(config, seq_len=tokens), model.config)
        take_step(keeper, optimizer, rows, config, ranks, 0)
    return peak_memory(CPU)


def measure(rank, directory, count, length, measured):
    """Write the bytes of a rank's peak, and those that it sent to gather and to reduce."""
    torch.set_num_threads(1)
    keep_freed_memory(False)
    where = f"file://{directory}/store-{count}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
    sent, found = count_traffic(count), []
    for name, shard, micro_batches in [
        ("shallow", "full", 1),
        *(("deep", *how) for how in measured),
    ]:
        gc.collect()  # FSDP2's modules and parameters refer to each other
        before = resident_memory()
        sent.update(gathered=0, reduced=0)
        sizes = {"batch_size": count, "gradient_accumulation_steps": micro_batches}
        paths = f"{directory}/{name}", f"{directory}/data", f"{directory}/run"
        config = TrainConfig(*paths, packing="wrapped", shard=shard, **sizes)
        found.append([steps(config, Ranks(rank, count), length) - before, *sent.values()])
    Path(f"{directory}/{rank}.json").write_text(json.dumps(found[1:]))  # the first loads libraries
    dist.barrier()
    os._exit(0)  # as in test_fsdp.py


def measure_all(directory, work, count, measured):
    """What each rank finds for each of these layouts and numbers of micro-batches."""
    shallow = expanded_config(replace(SMALL, num_hidden_layers=1), place_blocks(1, 1, "suffix"))
    for name, config in (("deep", work.config), ("shallow", shallow)):
        with torch.device("meta"):
            model = Llama(config)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.detach().fill_(1e-3)
        model.save_pretrained(directory / name)
    (directory / "data").mkdir()
    tokens = {"train": 4000, "heldout": 400}
    for part, size in tokens.items():
        np.arange(size, dtype=np.uint16).tofile(directory / "data" / f"{part}.bin")
    meta = {"dtype": "uint16", "vocab_size": 4096, "separator": 2, "max_token": 3999}
    write_json(directory / "data" / "meta.json", {**meta, "tokens": tokens})
    mp.spawn(measure, (str(directory), count, work.length, measured), nprocs=count)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(count)]


def count_traffic(count):
    """Let FSDP2's collectives count the bytes that one of so many ranks sends."""
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

    sent = {"gathered": 0, "reduced": 0}

    def counting(name, collective, shard_of):
        def call(self, output_tensor, input_tensor, *args, **options):
            shard = {"input": input_tensor, "output": output_tensor}[shard_of]
            sent[name] += shard.nbytes * (count - 1)
            return collective(self, output_tensor, input_tensor, *args, **options)

        return call

    gather, reduce = collectives.DefaultAllGather, collectives.DefaultReduceScatter
    gather.__call__ = counting("gathered", gather.__call__, "input")
    reduce.__call__ = counting("reduced", reduce.__call__, "output")
    return sent


MEASURED = [("none", 1), ("full", 1), ("none", 2), ("full", 2)]  # layout, micro-batches


def test_memory_and_traffic_of_two_ranks_are_what_was_planned(tmp_path):
    """To 5 % of what was measured, and exactly, of both steps."""
    if not sys.platform.startswith("linux") or not dist.is_available():
        pytest.skip("needs /proc, and torch's distributed package")
    first, second = measure_all(tmp_path, SMALL_WORK, 2, MEASURED)
    assert [row[1:] for row in first] == [row[1:] for row in second]
    recompute = ["none"] * len(SMALL_WORK.blocks)
    for (shard, accumulation), (peak, gathered, reduced) in zip(MEASURED, first, strict=True):
        planned = rank_memory(SMALL_WORK, recompute, 2, shard, accumulation)["total"]
        print(f"{shard}: planned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
        assert planned == pytest.approx(peak, rel=0.05), (shard, accumulation)
        traffic = (2 * size for size in rank_traffic(SMALL_WORK, 2, shard, accumulation).values())
        forward, backward, reducing = traffic
        assert [gathered, reduced] == [forward + backward, reducing], (shard, accumulation)


def test_one_rank_of_an_fp32_model_adds_a_copy_to_the_plan_of_one_device():
    """Of what trains, which FSDP2 computes with. The peak is in the last block, before anything is
    reduced."""
    work = replace(LARGE, dtype=torch.float32, device="cpu")
    alone, ranked = memory(work, NOTHING), rank_memory(work, NOTHING, 1, "none")
    copies = 8 * parameters(work.config)["block"] * 4
    assert ranked == {
        **alone,
        "weights": alone["weights"] - copies,
        "masters": copies,
        "gathered": copies,
        "total": alone["total"] + copies,
    }


def test_one_rank_of_a_bf16_model_holds_the_buffer_of_a_reduction():
    """What is gathered from the masters stands for weights. The peak is where the last block's are
    gone, and its gradients are there in fp32, in the buffer they come from and in gloo's copy."""
    work, block = replace(LARGE, device="cpu"), parameters(LARGE.config)["block"]
    alone, ranked = memory(work, NOTHING), rank_memory(work, NOTHING, 1, "none")
    assert ranked["weights"] == alone["weights"] - 8 * block * 2
    assert (ranked["masters"], ranked["optimizer"]) == (alone["masters"], alone["optimizer"])
    assert (ranked["gathered"], ranked["gradients"]) == (7 * block * 2, 3 * block * 4)


def test_more_ranks_hold_less_and_send_more():
    for shard in SHARDS:
        held = [rank_memory(LARGE, NOTHING, ranks, shard)["total"] for ranks in (1, 2, 8, 64)]
        sent = [sum(rank_traffic(LARGE, ranks, shard).values()) for ranks in (1, 2, 8, 64)]
        assert held == sorted(held, reverse=True) and sent == sorted(sent) and sent[0] == 0


def test_traffic_of_the_papers_model():
    """In blocks: 8 are new, 40 are there, and backward goes through 36. With a kept share the 28
    frozen ones above the first new one run again."""
    block = parameters(LARGE.config)["block"]

    def sent(shard, **other):
        forward, backward, reduced = rank_traffic(replace(LARGE, **other), 2, shard, 3).values()
        return forward / block, backward / block, reduced / block  # half of 2 bytes, of 4

    assert sent("none") == (8, 0, 16)
    assert sent("full") == (3 * 40, 3 * 36, 3 * 16)
    assert sent("full", kept=0.2) == (3 * 68, 3 * 36, 3 * 16)


def test_all_of_a_model_is_trained():
    """Nothing is held whole in "full" but what is outside the blocks, which stays gathered."""
    work = replace(LARGE, trainable=None)
    counts = parameters(work.config)
    total = 40 * counts["block"] + counts["rest"]
    held = {shard: rank_memory(work, NOTHING, 64, shard) for shard in SHARDS}
    for parts in held.values():
        assert (parts["weights"], parts["masters"]) == (0, -(-total * 4 // 64))
    assert held["none"]["gathered"] == 2 * (total + 2 * counts["block"])
    assert held["full"]["gathered"] == 2 * (3 * counts["block"] + counts["rest"])
    assert list(rank_traffic(work, 64, "none").values()) == [
        total * 2 * 63 // 64,
        0,
        total * 4 * 63 // 64,
    ]


def test_the_layout_is_the_one_that_sends_least_of_those_that_fit():
    totals = {
        shard: [rank_memory(LARGE, [p] * 40, 8, shard)["total"] for p in ("none", "block")]
        for shard in SHARDS
    }
    assert choose_shard(LARGE, totals["none"][0], 8) == ("none", NOTHING)
    shard, recompute = choose_shard(LARGE, totals["none"][1], 8)
    assert shard == "none" and len(set(recompute)) > 1
    shard, recompute = choose_shard(LARGE, totals["none"][1] - 1, 8)
    assert shard == "full" and rank_memory(LARGE, recompute, 8, shard)["total"] < totals["none"][1]
    with pytest.raises(ValueError, match=r"--shard none on 8 .* more than .*--shard full on 8 "):
        choose_shard(LARGE, totals["full"][1] - 1, 8)
    with pytest.raises(ValueError, match="--shard none on 8") as refused:
        choose_shard(replace(LARGE, frozen="8bit"), 1e9, 8)
    assert "--shard full" not in str(refused.value)


def test_gradients_that_add_up_whole_count_when_a_layout_is_chosen():
    once = rank_memory(LARGE, ["block"] * 40, 8, "none")["total"]
    more = rank_memory(LARGE, ["block"] * 40, 8, "none", 2)["total"]
    assert more > once and choose_shard(LARGE, once, 8)[0] == "none"
    assert choose_shard(LARGE, once, 8, accumulation=2)[0] == "full"


def test_no_block_could_recompute_less():
    limit = rank_memory(LARGE, ["mlp"] * 40, 8, "full")["total"]
    recompute = choose_rank_recompute(LARGE, limit, 8, "full")
    assert rank_memory(LARGE, recompute, 8, "full")["total"] <= limit
    for i in LARGE.blocks_in_backward:
        for kind in RECOMPUTE[: RECOMPUTE.index(recompute[i])]:
            less = [*recompute[:i], kind, *recompute[i + 1 :]]
            assert rank_memory(LARGE, less, 8, "full")["total"] > limit


@pytest.mark.parametrize(
    "shard, frozen, message",
    [
        ("full", "8bit", "--shard full with frozen blocks in bf16 expected, got 8bit"),
        ("half", "bf16", r"shard must be one of \('none', 'full'\), got 'half'"),
    ],
)
def test_layouts_that_are_refused(shard, frozen, message):
    with pytest.raises(ValueError, match=message):
        rank_memory(replace(LARGE, frozen=frozen), ["none"] * 40, 8, shard)


def test_the_computed_figures_of_docs_are_those_of_this_code():
    """`python -m benchmarks.gpus` writes them."""
    path = Path(gpus.__file__).parent / "results" / "gpus-computed.json"
    assert json.loads(path.read_text(encoding="utf-8")) == gpus.report()


def test_the_plan_as_it_is_printed():
    tuning = Workload(LLAMA2_7B, None, 2, 4096)
    text = plan_ranks(tuning, 8, PLACEMENTS, 8, limit=76e9)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split("|")[-2].strip() == "auto" and lines[2].split("|")[-2].strip() == "yes"
    for name in PLACEMENTS:
        assert text.count(f"| {name.ljust(11)} | none ") == 3
    assert "auto" not in plan_ranks(tuning, 8, PLACEMENTS, 8, "full", 76e9)
    tight = plan_ranks(tuning, 8, ("interleaved",), 8, limit=20e9)
    assert "interleaved does not fit: --shard none on 8 GPUs needs at least" in tight
    assert "| interleaved | full  |" in tight and "| yes " in tight.splitlines()[2]
    with pytest.raises(ValueError, match=r"--shard none(.|\n)*--shard full"):
        plan_ranks(tuning, 8, ("interleaved",), 8, limit=1e9)
    compact = plan_ranks(replace(tuning, frozen="8bit"), 8, ("suffix",), 8)
    assert "| suffix    | none  |" in compact and "| full " not in compact
