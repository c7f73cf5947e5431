"""Every public op as the op kit sees it: random inputs, our call, and plain PyTorch beside it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

import llamapro_kernels as lk
from benchmarks import plain

SIZES = ("typical", "odd", "one", "empty")


@dataclass(frozen=True)
class Case:
    """`ours` and `plain` take the tensors of `make`, by name, and return one or more outputs."""

    op: str
    make: Callable[[str], dict[str, torch.Tensor]]  # size -> fp64 tensors that want gradients
    ours: Callable
    plain: Callable
    constants: Callable[[str], dict[str, torch.Tensor]] = field(default=lambda size: {})
    never_expanded: tuple[str, ...] = ()


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rows(size):
    return {"typical": (3, 64), "odd": (5, 7, 33), "one": (1, 1), "empty": (0, 8)}[size]


def norm_inputs(*names):
    def make(size):
        shape = rows(size)
        return {**{name: rand(*shape) for name in names}, "weight": 1 + 0.3 * rand(shape[-1])}

    return make


EPS = 0.02  # not the default, and large enough to matter


def linear_swiglu_inputs(size):
    *tokens, n = rows(size)
    return {"x": rand(*tokens, n), "weight": rand(34, n) / math.sqrt(n)}


def heads(size):
    """(B, T, H, Hkv, D)"""
    sizes = {"typical": (2, 19, 4, 2, 32), "odd": (1, 7, 3, 1, 24), "one": (1, 1, 1, 1, 8)}
    return sizes.get(size, (2, 0, 2, 1, 8))


def rope_inputs(size):
    b, t, h, hkv, d = heads(size)
    return {"q": rand(b, t, h, d), "k": rand(b, t, hkv, d)}


def rope_constants(size, batch=False):
    b, t, _, _, d = heads(size)
    angles = rand(*(b, t) if batch else (t,), d // 2)
    angles = torch.cat((angles, angles), -1)
    return {"cos": angles.cos(), "sin": angles.sin()}


def attention_inputs(keys=None, batch=None):
    def make(size):
        b, t, h, hkv, d = heads(size)
        b, s = batch or b, t if keys is None else max(0, t + keys)
        return {"q": rand(b, t, h, d), "k": rand(b, s, hkv, d), "v": rand(b, s, hkv, d)}

    return make


def documents(size):
    t = heads(size)[1]
    cuts = {"typical": [0, 5, 5, 12, t], "odd": [0, 1, t]}.get(size, [0, t])
    return {"cu_seqlens": torch.tensor(cuts, dtype=torch.int32)}


def attention(make, constants=lambda size: {}, **options):
    return Case(
        "flash_attention",
        make,
        lambda q, k, v, **more: lk.flash_attention(q, k, v, **options, **more),
        lambda q, k, v, **more: plain.attention(q, k, v, **options, **more),
        constants,
    )


def tokens(size):
    """(N, D, V)"""
    sizes = {"typical": (21, 32, 97), "odd": (5, 3, 11), "one": (1, 1, 1), "empty": (0, 4, 7)}
    return sizes[size]


def head_inputs(size):
    n, d, v = tokens(size)
    return {"x": rand(n, d), "weight": rand(v, d)}


def targets(ignored):
    def make(size):
        n, _, v = tokens(size)
        ids = torch.randint(v, (n,))
        skip = torch.ones(n, dtype=torch.bool) if ignored == "all" else torch.arange(n) % 3 == 1
        return {"targets": ids.masked_fill(skip, -100) if ignored else ids}

    return make


def cross_entropy(reduction, ignored):
    def expected(x, weight, targets):
        if reduction != "mean":
            return plain.linear_cross_entropy(x, weight, targets, reduction=reduction)
        valid = (targets != -100).sum().clamp(min=1)  # plain "mean" of nothing is NaN
        return plain.linear_cross_entropy(x, weight, targets, reduction="sum") / valid

    return Case(
        "linear_cross_entropy",
        head_inputs,
        lambda x, weight, targets: lk.linear_cross_entropy(x, weight, targets, reduction=reduction),
        expected,
        targets(ignored),
        # A head whose rows are all alike has gradients that cancel to nothing but rounding.
        never_expanded=("weight",),
    )


def short(*shape):
    """Numbers that every dtype holds."""
    return rand(*shape).bfloat16().half().float()


def kl_divergence(reduction, masked=None, own_head=False, **options):
    def make(size):
        n, d, v = tokens(size)
        return {"x": rand(n, d), "weight": rand(v, d)}

    def constants(size):
        n, d, v = tokens(size)
        found = {"teacher": short(n, d + 2 if own_head else d)}
        if own_head:
            found["teacher_weight"] = short(v, d + 2)
        if masked:
            found["mask"] = torch.full((n,), masked != "all") & (torch.arange(n) % 3 != 1)
        return found

    def call(function):
        def run(x, weight, teacher, teacher_weight=None, mask=None):
            theirs = None if teacher_weight is None else teacher_weight.to(x.dtype)
            return function(
                x,
                teacher.to(x.dtype),
                weight,
                mask=mask,
                teacher_weight=theirs,
                reduction=reduction,
                **options,
            )

        return run

    return Case(
        "linear_kl_divergence",
        make,
        call(lk.linear_kl_divergence),
        call(plain.linear_kl_divergence),
        constants,
        never_expanded=("weight",),
    )


CASES = {
    "rms_norm": Case(
        "rms_norm",
        norm_inputs("x"),
        lambda x, weight: lk.rms_norm(x, weight, EPS),
        lambda x, weight: plain.rms_norm(x, weight, EPS),
    ),
    "add_rms_norm": Case(
        "add_rms_norm",
        norm_inputs("x", "residual"),
        lambda x, residual, weight: lk.add_rms_norm(x, residual, weight, EPS),
        lambda x, residual, weight: plain.add_rms_norm(x, residual, weight, EPS),
    ),
    "rope": Case("rope", rope_inputs, lk.rope, plain.rope, rope_constants),
    "rope_by_row": Case(
        "rope", rope_inputs, lk.rope, plain.rope, partial(rope_constants, batch=True)
    ),
    "swiglu": Case(
        "swiglu",
        lambda size: {"gate_up": 3 * rand(*rows(size)[:-1], 2 * rows(size)[-1])},
        lk.swiglu,
        plain.swiglu,
    ),
    "linear_swiglu": Case(
        "linear_swiglu",
        linear_swiglu_inputs,
        lk.linear_swiglu,
        plain.linear_swiglu,
    ),
    "attention": attention(attention_inputs()),
    "attention_full": attention(attention_inputs(keys=3), causal=False, scale=0.3),
    "attention_more_keys": attention(attention_inputs(keys=6)),
    "attention_fewer_keys": attention(attention_inputs(keys=-2), causal=False),
    "attention_window": attention(attention_inputs(), window=4),
    "attention_packed": attention(attention_inputs(batch=1), documents),
    "attention_packed_window": attention(attention_inputs(batch=1), documents, window=3),
    "attention_packed_full": attention(attention_inputs(batch=1), documents, causal=False),
    "cross_entropy_mean": cross_entropy("mean", "some"),
    "cross_entropy_sum": cross_entropy("sum", "some"),
    "cross_entropy_none": cross_entropy("none", "some"),
    "cross_entropy_all_valid": cross_entropy("mean", None),
    "cross_entropy_all_ignored": cross_entropy("mean", "all"),
    "kl_mean": kl_divergence("mean", "some"),
    "kl_sum": kl_divergence("sum", temperature=2.5),
    "kl_none": kl_divergence("none", "some", own_head=True),
    "kl_all_masked": kl_divergence("mean", "all"),
}

# Those that differ from another case of their op by the mask alone: strides, dtypes and which
# gradients are wanted are handled as there.
BY_MASK = {
    *("attention_full", "attention_more_keys", "attention_fewer_keys", "attention_window"),
    *("attention_packed_window", "attention_packed_full"),
    *("cross_entropy_all_valid", "cross_entropy_all_ignored", "kl_all_masked"),
}
