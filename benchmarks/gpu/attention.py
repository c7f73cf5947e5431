"""The attention cases of `benchmarks.gpu`: causal, packed documents, and a window."""

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import llamapro_kernels as lk
from benchmarks.gpu.measure import Case, Peer


def attention_formula(q, k, v, seen=None, cu_seqlens=None):
    """By explicit scores, a key head at a time so that their memory is bounded.

    seen: (T, T), True where a query sees a key; causal by default.
    """
    batch, length, kv_heads, _ = k.shape
    if seen is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()

    def one(q, k, v):  # (G, T, D), (T, D), (T, D)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ v

    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    heads = zip(grouped, *(x.transpose(1, 2).flatten(0, 1) for x in (k, v)), strict=True)
    o = torch.stack([checkpoint(one, *head, use_reentrant=False) for head in heads])
    return o.unflatten(0, (batch, kv_heads)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def sdpa(backend):
    """PyTorch's attention by one named backend. It takes heads first: views suit it."""

    def run(q, k, v, seen=None, cu_seqlens=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=grouped
            )
        return o.transpose(1, 2)

    return run


def one_by_one(backend, lengths):
    """Packed documents by a call for each."""

    def run(q, k, v, seen, cu_seqlens):
        documents = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(backend)(*document) for document in documents], 1)

    return run


def flash_varlen(longest, window=None):
    """What `torch.nn.attention.varlen` calls, whose own signature changes with the version."""

    def run(q, k, v, seen, cu_seqlens):
        o, *_ = torch.ops.aten._flash_attention_forward(
            *(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False),
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return o[None]

    return run


def backends(device):
    second = (
        {"cuDNN": SDPBackend.CUDNN_ATTENTION} if device == "cuda" else {"math": SDPBackend.MATH}
    )
    return {"flash": SDPBackend.FLASH_ATTENTION, **second}


def attention(name, model, batch, length, device, wanted=("q", "k", "v"), **more):
    """Causal. With grouped heads each peer runs as it is and with k and v expanded beforehand."""
    group = model.heads // model.kv_heads
    peers = {name: Peer(sdpa(backend)) for name, backend in backends(device).items()}
    if group > 1:
        peers |= {f"{n}, k v expanded": replace(p, group=group) for n, p in peers.items()}
    product = model.heads * model.dim * batch * length**2  # two FLOPs, half of them visible
    return Case(
        "flash_attention",
        f"{name}, {batch} x {length}, {model.heads} and {model.kv_heads} heads of {model.dim}",
        lambda device, dtype: qkv(model, batch, length, device, dtype),
        lambda *qkv: lk.flash_attention(*qkv),
        attention_formula,
        wanted,
        "flops",
        forward=2 * product,
        backward=products(wanted) * product,
        terms=length,
        **{"peers": peers, **more},
    )


def products(wanted):
    """Of backward: the scores once more, do v^T for dq and dk, and one for each gradient."""
    return 1 + bool({"q", "k"} & set(wanted)) + len(wanted)


def qkv(model, batch, length, device, dtype):
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
    return {
        name: torch.randn(batch, length, count, model.dim, device=device, dtype=dtype)
        for name, count in heads.items()
    }


def packed(name, model, length, device, **more):
    """Documents of many lengths in one row of tokens."""
    cuts = [round(length * part) for part in (0, 0.01, 0.15, 0.2, 0.45, 0.5, 0.52, 0.8, 1)]
    lengths = [after - before for before, after in itertools.pairwise(cuts)]
    peers = {"flash varlen": Peer(flash_varlen(max(lengths)))} | {
        f"{n}, one by one": Peer(one_by_one(b, lengths)) for n, b in backends(device).items()
    }
    whole = attention(name, model, 1, length, device, peers=peers, **more)

    def make(device, dtype):
        cu_seqlens = torch.tensor(cuts, dtype=torch.int32, device=device)
        document = torch.searchsorted(cu_seqlens, positions(length, device).int(), right=True)
        seen = (document == document[:, None]).tril()
        return {**whole.make(device, dtype), "seen": seen, "cu_seqlens": cu_seqlens}

    visible = sum(n**2 for n in lengths) / length**2
    return replace(
        whole,
        shape=f"{whole.shape}, {len(lengths)} documents",
        make=make,
        ours=lambda q, k, v, _, cu_seqlens: lk.flash_attention(q, k, v, cu_seqlens=cu_seqlens),
        forward=visible * whole.forward,
        backward=visible * whole.backward,
    )


def windowed(name, model, length, window, device, **more):
    """Each query sees itself and the window - 1 tokens before it."""
    masked = SDPBackend.EFFICIENT_ATTENTION if device == "cuda" else SDPBackend.MATH
    peers = {
        "flash varlen": Peer(flash_varlen(length, window)),
        f"{masked.name.split('_')[0].lower()}, mask": Peer(sdpa(masked)),
    }
    whole = attention(name, model, 1, length, device, peers=peers, **more)

    def make(device, dtype):
        place = positions(length, device)
        seen = (place > place[:, None] - window).tril()
        ends = torch.tensor([0, length], dtype=torch.int32, device=device)
        return {**whole.make(device, dtype), "seen": seen, "cu_seqlens": ends}

    visible = (2 * length * window - window**2) / length**2
    return replace(
        whole,
        shape=f"{whole.shape}, window {window}",
        make=make,
        ours=lambda q, k, v, *_: lk.flash_attention(q, k, v, window=window),
        forward=visible * whole.forward,
        backward=visible * whole.backward,
    )


def positions(length, device):
    return torch.arange(length, device=device)
