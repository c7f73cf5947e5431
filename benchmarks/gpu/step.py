"""The whole training step on one GPU: Llama-2-7B and 8 new blocks, and its neighbours.

    python -m benchmarks.gpu.step --out DIR           # writes DIR/step-<device>-<date>.json
    python -m benchmarks.gpu.step --out DIR --tiny    # the same on small models, on a CPU too
    python -m benchmarks.gpu.step --table FILE.json   # prints the Markdown of such a file

From the repository's root, with it and `python/` on the path. Every row is a process of its own, so
that one which runs out of memory says so and the others go on; the file is written anew after each.
Weights are random with the real shapes and tokens are random. TFLOP/s counts the FLOPs that are
really needed, without those that are computed again; the roof is the rate of a large bf16 product,
measured right after the steps of each row in its process: the median of the rows, for a hot card
slows down.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from llamapro import Llama, LlamaConfig
from llamapro.expansion import expanded_config
from llamapro.hardware import keep_freed_memory, matmul_rate, peak_memory
from llamapro.placement import place_blocks
from llamapro.planner import USABLE, Workload, choose_recompute, flops, memory
from llamapro.storage import write_json
from llamapro.train.optimizer import Optimizer

import llamapro_kernels as lk
from benchmarks import plain
from benchmarks.gpu.measure import installed
from benchmarks.gpu.report import step_markdown

LLAMA2_7B = {"num_hidden_layers": 32}
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 5e5}
LLAMA3_8B = {**LLAMA3, "num_hidden_layers": 32, "intermediate_size": 14336}
LLAMA32_1B = {
    **LLAMA3,
    **{"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192},
    **{"num_attention_heads": 32, "tie_word_embeddings": True},
}
TINY = {
    **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
    "num_attention_heads": 4,
}
SMOLLM2_135M = {
    **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
    **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "tie_word_embeddings": True,
}
# (model, its shape, new blocks, placement or "all" for training everything, rows, their tokens)
MODELS = [
    ("Llama-2-7B + 8", LLAMA2_7B, 8, "interleaved", 2, 4096),
    ("Llama-2-7B + 8", LLAMA2_7B, 8, "top_half", 2, 4096),
    ("Llama-2-7B + 8", LLAMA2_7B, 8, "suffix", 4, 4096),
    ("SmolLM2-135M + 6", SMOLLM2_135M, 6, "interleaved", 16, 1024),
    ("Llama-3.2-1B + 4", LLAMA32_1B, 4, "interleaved", 4, 4096),
    ("Llama-3-8B + 8", LLAMA3_8B, 8, "interleaved", 1, 4096),
    ("Llama-3.2-1B", LLAMA32_1B, 0, "all", 2, 4096),
]
LIGER = ("transformers Liger checkpointing", "transformers Liger")
OURS = {"ours": "bf16", "8bit": "8bit", "8bit-compact": "8bit-compact"}  # how the frozen are held
SIDES = (
    *(*OURS, "transformers apply", "transformers checkpointing", "transformers"),
    *(LIGER if importlib.util.find_spec("liger_kernel") else ()),
    "composition",
)
STEPS = 6  # of which the first two warm up
KERNELS = {  # parts of the names of what runs on the GPU in our step
    "matrix products": ("nvjet", "gemm", "cutlass", "xmma"),
    "attention": ("attention_",),
    "norms, SwiGLU, RoPE": ("rms_norm", "sum_of_rows", "swiglu", "rope"),
    "quantizing": ("quantize_rows",),
    "loss": ("cross_entropy", "dlogits"),
    "optimizer": ("multi_tensor",),
}


def configuration(shape, new_blocks, placement):
    base = LlamaConfig(max_position_embeddings=4096, **shape)
    if placement == "all":
        return base
    return expanded_config(base, place_blocks(base.num_hidden_layers, new_blocks, placement))


def composition(x, w, cos, sin, *, eps, recompute, **options):
    """`lk.decoder_block` as plain PyTorch, with SDPA."""
    dim = cos.shape[-1]
    heads = w.o_proj.shape[1] // dim
    kv_heads = (w.qkv.shape[0] // dim - heads) // 2
    normed = plain.rms_norm(x, w.attention_norm, eps)
    qkv = F.linear(normed, w.qkv).unflatten(-1, (-1, dim)).transpose(1, 2)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    q, k = (plain.rotate(t, cos.to(x.dtype), sin.to(x.dtype)) for t in (q, k))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    h = x + F.linear(o.transpose(1, 2).flatten(2), w.o_proj)
    hidden = plain.linear_swiglu(plain.rms_norm(h, w.mlp_norm, eps), w.gate_up)
    return h + F.linear(hidden, w.down_proj)


def our_model(config, recompute, device):
    with torch.device(device):
        model = Llama(config)
    for block, policy in zip(model.blocks, recompute, strict=True):
        block.recompute = policy
    return model, model.blocks, model.loss


def their_model(config, side, device):
    from transformers import AutoModelForCausalLM
    from transformers import LlamaConfig as TheirConfig

    if "Liger" in side:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            TheirConfig(**config.to_dict()), dtype=torch.bfloat16
        )
    model.train()
    if "apply" in side:
        from llamapro_kernels.integrations import transformers as lkt

        assert lkt.apply(model)["block"] == "applied"
    if "checkpointing" in side:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(tokens, targets):
        return model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss

    return model, model.model.layers, loss


def measure(side, shape, new_blocks, placement, batch, length, device):
    """One row: tokens/s, TFLOP/s of the steps and of a large product, peak and planned memory."""
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    config = configuration(shape, new_blocks, placement)
    trainable = None if placement == "all" else tuple(config.new_blocks)
    frozen = OURS.get(side, "bf16")
    work = Workload(config, trainable, batch, length, torch.bfloat16, device, frozen)
    recompute = ["none"] * len(work.blocks)
    if device == "cuda" and side in OURS:
        recompute = choose_recompute(
            work, USABLE * torch.cuda.get_device_properties(0).total_memory
        )
    if side == "composition":
        lk.decoder_block = composition
    if side in OURS or side == "composition":
        model, blocks, loss_of = our_model(config, recompute, device)
    else:
        model, blocks, loss_of = their_model(config, side, device)
    model.requires_grad_(trainable is None)
    for i in work.trained:
        blocks[i].requires_grad_(True)
    if frozen != "bf16":
        model.freeze_in_8_bits(compact=frozen == "8bit-compact")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # a run loads a block at a time
    optimizer = Optimizer(model, max_grad_norm=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    rows = torch.randint(config.vocab_size, (batch, length + 1), device=device)

    def step():
        loss = loss_of(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        optimizer.step(1e-5, loss, 1)  # waits for the device
        return loss

    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    rate = matmul_rate(torch.device(device), torch.bfloat16, 8192 if device == "cuda" else 512)
    row = {
        "tokens/s": round(batch * length / median, 1),
        "TFLOP/s": round(sum(flops(work).values()) / median / 1e12, 2),
        "roof TFLOP/s": round(rate / 1e12, 2),
        "peak GB": round(peak_memory(torch.device(device)) / 1e9, 2),
        "loss": round(loss.item(), 3),
        "step ms": round(1e3 * median, 1),
    }
    if side in OURS:
        row["planned GB"] = round(memory(work, recompute)["total"] / 1e9, 2)
        row["recompute"] = {kind: recompute.count(kind) for kind in sorted(set(recompute))}
        if device == "cuda":
            row["GPU ms"] = where_time_goes(step)
    return row


def where_time_goes(step):
    """ms on the GPU by kind of kernel, over one more step."""
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    events = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    spent = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in events:
        kinds = (kind for kind, parts in KERNELS.items() if any(p in event.key for p in parts))
        spent[next(kinds, "other")] += event.self_device_time_total / 1e3
    return {kind: round(ms, 1) for kind, ms in spent.items()}


def in_order():
    """The first model on every side, then each side of all others."""
    first, *others = MODELS
    yield from itertools.product((first,), SIDES)
    for side, model in itertools.product(SIDES, others):
        if "all" not in model or OURS.get(side, "bf16") == "bf16":
            yield model, side


def row_in_a_process(arguments):
    command = [sys.executable, "-m", "benchmarks.gpu.step", "--row", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small models, to try the command")
    parser.add_argument("--minutes", type=float, default=9, help="no row starts after these")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print its Markdown")
    options = parser.parse_args()
    if options.table:
        print(step_markdown(json.loads(options.table.read_text())))
        return
    if options.row:
        keep_freed_memory()
        print(json.dumps(measure(*json.loads(options.row))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    packages = ("triton", "transformers", "liger-kernel")
    commit = options.commit or commit.strip()
    report = {"device": name, "torch": torch.__version__, "commit": commit}
    report |= installed(*packages) | {"rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.out / f"step-{slug}-{datetime.date.today()}.json"
    began = time.monotonic()
    for (model, shape, new_blocks, placement, batch, length), side in in_order():
        if time.monotonic() - began > 60 * options.minutes:
            break
        small = (TINY, min(new_blocks, 2), placement, 2, 64)
        sizes = small if options.tiny else (shape, new_blocks, placement, batch, length)
        row = {"model": model, "placement": placement, "batch": sizes[3], "length": sizes[4]}
        row |= {"side": side}
        row |= row_in_a_process((side, *sizes, device))
        report["rows"].append(row)
        write_json(path, report)
        print(row, flush=True)
    print(path)


if __name__ == "__main__":
    main()
