"""Models of transformers to apply our kernels to, their batches, and the three-way rule."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    "initializer_range": 0.2,  # so that attention is not all alike
}
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "mistral": {"sliding_window": 4},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}
BATCH, LENGTH = 2, 11
POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]]


def model_of(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS.get(kind, {}), **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases that matter
            nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0, std=0.2)
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model.train()


def batch_of(layout, seed=0):
    """The arguments of a forward pass with labels, of tokens in one of five layouts."""
    torch.manual_seed(1 + seed)
    ids = torch.randint(1, 64, (BATCH, LENGTH))
    seen = torch.ones(BATCH, LENGTH, dtype=torch.long)
    labels = ids.clone()
    if layout == "right padding":
        seen[1, -4:] = 0
    if layout == "left padding":
        seen[0, :3] = 0
        labels[0, 3] = -100  # nothing but padding is before it
    if layout == "packed by positions":
        positions = torch.tensor(POSITIONS)
        return {
            **{"input_ids": ids, "position_ids": positions},
            "labels": labels.masked_fill(positions == 0, -100),
        }
    if layout == "packed by cu_seqlens":
        cuts = torch.tensor([0, 3, 8, 11, 17, 22], dtype=torch.int32)
        positions = torch.tensor(POSITIONS).view(1, -1)
        return {
            **{"input_ids": ids.view(1, -1), "position_ids": positions},
            **{"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": 6, "max_length_k": 6},
            "labels": labels.view(1, -1).masked_fill(positions == 0, -100),
        }
    if layout == "no padding":
        return {"input_ids": ids, "labels": labels}
    return {
        **{"input_ids": ids, "attention_mask": seen},
        "labels": labels.masked_fill(seen == 0, -100),
    }


LAYOUTS = (
    *("no padding", "right padding", "left padding"),
    *("packed by positions", "packed by cu_seqlens"),
)


def gradients(model, batch):
    """The loss and every gradient there is, by name."""
    model.zero_grad()
    # transformers ignores positions beside a cache, which it makes by default.
    if model.dtype == torch.float64:  # its loss would be computed in fp32
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    else:
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def over_batches(model, layout):
    """The same of three batches, side by side: what is rounded well once is luck."""
    results = [gradients(model, batch_of(layout, seed)) for seed in range(3)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def assert_three_way(ours, peer, truth, dtype):
    """The error of ours is at most twice transformers' and what storing it takes."""
    assert ours.keys() == peer.keys()
    for name, true in truth.items():
        if name in ours:
            error, theirs = ((side[name].double() - true).norm() for side in (ours, peer))
            assert error <= 2 * theirs + torch.finfo(dtype).eps * true.norm(), name
