"""attn_implementation="llamapro" of transformers: an attention function, and its masks.

transformers calls the mask function once a forward pass and hands what it returns to every layer.
Ours returns one of three things:

    None               each row is one document: causal attention, with a window or without
    cu_seqlens         (1, 1, 1, documents + 1) int32: the batch, row after row, is these documents;
                       of four dimensions, for transformers takes those to be a mask that is ready
    mask (B, 1, T, S)  what documents cannot say, for PyTorch's attention: a cache behind padding, a
                       mask with holes, a user's own mask

Padding on the left is a document of its own, as is each document of a packed row: no token of
another one sees it, and nothing is copied. Padding on the right needs no mask: causal attention
never looks there.

Source: the contract is that of transformers' AttentionInterface and AttentionMaskInterface.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import llamapro_kernels as lk

NAME = "llamapro"


def register() -> None:
    """Make the name known to transformers; no model uses it until it is asked to."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(**asked):
    """Say what the tokens of a batch see, by the arguments of transformers' mask functions."""
    seen = asked.get("attention_mask")  # (B, S), False for padding
    mask_function = asked.get("mask_function", causal_mask_function)
    starts = None
    if _can_be_documents(asked, seen):
        if seen is None and mask_function is causal_mask_function:
            return None
        if asked["q_length"] < asked["kv_length"]:  # behind a cache; its last keys are the queries'
            if seen is None or seen.all():
                return None
        else:
            starts = _starts_of_documents(mask_function, seen, asked)
    if starts is None:
        return sdpa_mask(**{**asked, "allow_is_causal_skip": False})
    return cu_seqlens_of(starts)[None, None, None] if starts.any() else None


def _can_be_documents(asked, seen):
    """Whether the last key is that of the last query, and the mask is no function of a user's."""
    offset, first_key = asked.get("q_offset", 0), asked.get("kv_offset", 0)
    if asked.get("use_vmap") or isinstance(offset, torch.Tensor):  # or a cache of fixed length
        return False
    fits = seen is None or seen.shape == (asked["batch_size"], asked["kv_length"])
    return fits and offset + asked["q_length"] == first_key + asked["kv_length"]


def _starts_of_documents(mask_function, seen, asked):
    """Where a token does not go on with the one before it, (B, T - 1); None for other masks."""
    device = asked.get("device") if seen is None else seen.device
    row = torch.arange(asked["batch_size"], device=device)[:, None]
    token = torch.arange(asked["q_length"], device=device)
    head, shape = torch.zeros_like(row), (len(row), len(token) - 1)
    if mask_function(row, head, token[:-1], token[1:]).any():
        return None  # some look ahead
    starts = ~mask_function(row, head, token[1:], token[:-1]).expand(shape)
    if seen is None:
        return starts
    first = seen[:, 1:] & ~seen[:, :-1]
    if (first & (seen[:, :-1].cumsum(1) > 0)).any():
        return None  # padding between tokens of one document
    return starts | first


def cu_seqlens_of(starts: torch.Tensor) -> torch.Tensor:
    """Where documents start in a batch, row after row, and its length, of starts (B, T - 1)."""
    starts = torch.nn.functional.pad(starts, (1, 0), value=True).flatten()
    end = starts.new_full((1,), starts.numel(), dtype=torch.int32)
    return torch.cat((starts.nonzero()[:, 0].int(), end))


def documents(mask, batch: int, kwargs: dict) -> torch.Tensor | None:
    """The documents of a batch: as the mask says, or as a trainer that packs rows says itself."""
    if mask is not None:
        return mask.flatten()
    given = kwargs.get("cu_seq_lens_q")
    if given is None or batch != 1:
        return None
    return given.to(torch.int32)


def is_dense(mask) -> bool:
    return mask is not None and mask.dtype != torch.int32


def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None,
    softcap=None, is_causal=None, **kwargs,
):  # fmt: skip
    """softmax(scale q k^T) v of query (B, H, T, D), key and value (B, Hkv, S, D): (B, T, H, D).

    PyTorch's attention stands in for dropout and for masks that are no documents, transformers' own
    for `output_attentions`. Raises ValueError for a soft cap or attention sinks.
    """
    if softcap is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            f'attn_implementation="{NAME}" has no soft cap and no sinks: "eager" expected, got'
            f" {softcap=}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window if causal else None
    batch, _, length, _ = query.shape
    if kwargs.get("output_attentions"):
        mask = _explicit(attention_mask, query, key, causal, window)
        return eager_attention_forward(module, query, key, value, mask, scaling, dropout)
    if is_dense(attention_mask) or dropout:
        mask = _explicit(attention_mask, query, key, causal, window) > -1
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    cu_seqlens = documents(attention_mask, batch, kwargs)
    if cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
    o = lk.flash_attention(
        q, k, v, causal=causal, scale=scaling, window=window, cu_seqlens=cu_seqlens
    )
    return o.view(batch, length, *o.shape[2:]), None


def _explicit(mask, query, key, causal, window):
    """The mask (B or 1, 1, T, S) that is added to scores."""
    (batch, _, queries, _), keys = query.shape, key.shape[2]
    if not is_dense(mask):
        token = torch.arange(batch * keys, device=query.device)
        ends = token[-1:] + 1 if mask is None else mask.flatten()
        document = torch.searchsorted(ends, token.to(ends.dtype), right=True).view(
            batch, 1, 1, keys
        )
        k = torch.arange(keys, device=query.device)
        q = k[keys - queries :, None]
        seen = (k <= q) if causal else torch.ones_like(k <= q)
        if window is not None:
            seen = seen & (k > q - window)
        mask = seen & (document == document[..., keys - queries :].mT)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )
