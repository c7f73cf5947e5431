"""`decoder_block` against the composition of the public ops; what it keeps, and what it skips."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import llamapro_kernels as lk
from llamapro_kernels import matmul
from llamapro_kernels.block import RECOMPUTE

BATCH, LENGTH, WIDTH, HEADS, KV_HEADS, DIM, INNER = 2, 9, 24, 4, 2, 8, 20
FIELDS = lk.BlockWeights._fields[:10]  # those of a Llama
# Named sets of tensors that want a gradient.
WANTED = {
    "frozen": {"x"},
    "all": {"x", *FIELDS},
    "all but x": {*FIELDS},
    "norms": {"attention_norm", "mlp_norm"},
    "norms and x": {"x", "attention_norm", "mlp_norm"},
    "outputs": {"o_proj", "down_proj"},
    **{name: {name} for name in FIELDS},
}
OPTIONS = {
    "plain": {},
    "window": {"window": 4},
    "documents": {"cu_seqlens": [0, 3, 3, 9]},
    "documents and window": {"cu_seqlens": [0, 5, 9], "window": 3},
}


def composition(x, w, cos, sin, *, eps=1e-5, window=None, cu_seqlens=None, ops=lk):
    """The same block, spelled out in public ops."""
    batch, length, _ = x.shape
    dim = cos.shape[-1]
    heads = w.o_proj.shape[1] // dim
    kv_heads = (w.qkv.shape[0] // dim - heads) // 2
    qkv = linear(ops.rms_norm(x, w.attention_norm, eps), w.qkv, w.qkv_bias)
    q, k, v = qkv.view(batch, length, -1, dim).split((heads, kv_heads, kv_heads), 2)
    if w.q_norm is not None:
        q, k = ops.rms_norm(q, w.q_norm, eps), ops.rms_norm(k, w.k_norm, eps)
    o = ops.flash_attention(*ops.rope(q, k, cos, sin), v, window=window, cu_seqlens=cu_seqlens)
    attended = linear(o.flatten(2), w.o_proj, w.o_proj_bias)
    normed, h = ops.add_rms_norm(attended, x, w.mlp_norm, eps)
    hidden = ops.swiglu(linear(normed, w.gate_up, w.gate_up_bias))
    return h + linear(hidden, w.down_proj, w.down_proj_bias)


def make(dtype=torch.float64, bias=True, batch=BATCH):
    """x, weights, table and dy, rounded to the dtype."""
    torch.manual_seed(0)
    rows = (HEADS + 2 * KV_HEADS) * DIM
    shapes = {
        "attention_norm": (WIDTH,),
        "qkv": (rows, WIDTH),
        "o_proj": (WIDTH, HEADS * DIM),
        "mlp_norm": (WIDTH,),
        "gate_up": (2 * INNER, WIDTH),
        "down_proj": (WIDTH, INNER),
    }
    if bias:
        for name in ("qkv", "o_proj", "gate_up", "down_proj"):
            shapes[f"{name}_bias"] = shapes[name][:1]
    weights = {
        name: torch.randn(shape).double() / shape[-1] ** 0.5 for name, shape in shapes.items()
    }
    angles = torch.rand(LENGTH, DIM // 2).double().repeat(1, 2)
    x, dy = torch.randn(2, batch, LENGTH, WIDTH).double()
    weights = {name: t.to(dtype) for name, t in weights.items()}
    return x.to(dtype), weights, (angles.cos(), angles.sin()), dy.to(dtype)


def gradients(function, wanted, dtype=torch.float64, bias=True, **options):
    """y and the gradients of what is wanted, by name."""
    documents = options.get("cu_seqlens")
    if documents is not None:
        options["cu_seqlens"] = torch.tensor(documents, dtype=torch.int32)
    x, weights, table, dy = make(torch.float64, bias, batch=BATCH if documents is None else 1)
    leaves = {
        name: t.to(torch.bfloat16).to(dtype).requires_grad_(name in wanted)
        for name, t in {"x": x, **weights}.items()
    }
    w = lk.BlockWeights(**{name: leaves.get(name) for name in FIELDS})
    y = function(leaves["x"], w, *table, **options)
    y.backward(dy.to(torch.bfloat16).to(dtype))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("wanted", WANTED)
def test_equals_the_composition(wanted, recompute, options):
    """In fp64 to rounding; None for what is not wanted."""
    options = OPTIONS[options]
    ours = gradients(lk.decoder_block, WANTED[wanted], recompute=recompute, **options)
    expected = gradients(composition, WANTED[wanted], **options)
    for name, value in expected.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("wanted", ["frozen", "all"])
def test_rounding(wanted):
    """The three-way rule in bf16; the policy changes no bit."""
    ours, light, least = (
        gradients(lk.decoder_block, WANTED[wanted], torch.bfloat16, recompute=recompute)
        for recompute in RECOMPUTE
    )
    with lk.use_backend("reference"):
        plain = gradients(composition, WANTED[wanted], torch.bfloat16)
    truth = gradients(composition, WANTED[wanted])
    for name, true in truth.items():
        if true is None:
            continue
        assert torch.equal(ours[name], light[name]) and torch.equal(ours[name], least[name])
        error, peer = ((t[name].double() - true).abs().max() for t in (ours, plain))
        stored = torch.finfo(torch.bfloat16).eps / 2 * true.abs().max()
        assert error <= 2 * peer + stored, name


class Seen(TorchDispatchMode):
    """The names of all ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


# Matrix products of backward for each set of wanted gradients, and whether attention's runs.
PRODUCTS = {
    "frozen": (4, True),
    "all": (8, True),
    "all but x": (8, True),  # the norm of the first needs what would become dx
    "norms": (4, True),
    "outputs": (2 + 2, False),
    "down_proj": (1, False),
    "gate_up": (1 + 1, False),
    "o_proj": (1 + 2, False),
    "qkv": (1 + 3, True),
}


@pytest.mark.parametrize("wanted", PRODUCTS)
def test_backward_computes_no_more_than_it_must(wanted):
    def backward(function):
        x, weights, table, dy = make(torch.float32, bias=False)
        leaves = {
            name: t.requires_grad_(name in WANTED[wanted])
            for name, t in {"x": x, **weights}.items()
        }
        w = lk.BlockWeights(**{name: leaves.get(name) for name in FIELDS})
        y = function(leaves["x"], w, *table)
        with Seen() as seen:
            y.backward(dy)
        return seen.names

    names = backward(lk.decoder_block)
    products = names.count("aten::mm") + names.count("mkldnn::_linear_pointwise")
    assert (products, "llamapro::flash_attention_backward_packed" in names) == PRODUCTS[wanted]


def saved_bytes(recompute, wanted="frozen", dtype=torch.bfloat16):
    """Of one block, a token, without the weights: width 512, MLP 1408, 8/4 heads."""
    torch.manual_seed(0)
    tokens, width, inner, heads, kv_heads, dim = 64, 512, 1408, 8, 4, 64
    shapes = [(width,), ((heads + 2 * kv_heads) * dim, width), (width, heads * dim), (width,)]
    shapes += [(2 * inner, width), (width, inner)]
    w = lk.BlockWeights(*(torch.randn(s, dtype=dtype) / 30 for s in shapes))
    for name, t in zip(FIELDS, w, strict=False):
        t.requires_grad_(name in WANTED[wanted]) if t is not None else None
    x = torch.randn(1, tokens, width, dtype=dtype).requires_grad_("x" in WANTED[wanted])
    angles = torch.rand(tokens, dim // 2).repeat(1, 2)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lk.decoder_block(x, w, angles, angles, recompute=recompute)
    for t in (*w, angles):
        if t is not None:
            kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / tokens


@pytest.mark.parametrize("recompute, most", [("none", 10.9e3), ("mlp", 5.6e3), ("block", 1.1e3)])
def test_a_frozen_block_keeps_little(recompute, most):
    assert 0.9 * most < saved_bytes(recompute) <= most


def test_nothing_is_recorded_where_nothing_wants_a_gradient():
    x, weights, table, _ = make(torch.float32, bias=False)
    assert not lk.decoder_block(x, lk.BlockWeights(**weights), *table).requires_grad
    assert saved_bytes("none", "down_proj") < saved_bytes("none") / 1.8  # gate_up alone


def test_backward_twice_and_second_derivatives():
    x, weights, table, dy = make(torch.float32)
    leaves = [t.requires_grad_() for t in (x, *weights.values())]
    y = lk.decoder_block(x, lk.BlockWeights(**weights), *table)
    first, second = (torch.autograd.grad(y, leaves, dy, retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), leaves, create_graph=True)


@pytest.mark.parametrize("wanted", ["frozen", "all", "outputs"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fullgraph_compile(recompute, wanted):
    """One graph, no break, the same gradients as eager."""
    torch.compiler.reset()
    compiled = torch.compile(lk.decoder_block, fullgraph=True, backend="aot_eager")
    options = dict(dtype=torch.float32, recompute=recompute, cu_seqlens=[0, 4, 9], window=3)
    ours = gradients(compiled, WANTED[wanted], **options)
    for name, value in gradients(lk.decoder_block, WANTED[wanted], **options).items():
        assert (ours[name] is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(ours[name], value)


def test_inductor_with_shapes_that_vary():
    """A whole step, whose head dimension and counts are symbols of the graph."""
    torch.compiler.reset()
    compiled = torch.compile(lk.decoder_block, dynamic=True)
    x, weights, table, dy = make(torch.float32)
    leaves = [t.requires_grad_() for t in (x, *weights.values())]
    expected = lk.decoder_block(x, lk.BlockWeights(**weights), *table)
    y = compiled(x, lk.BlockWeights(**weights), *table)
    torch.testing.assert_close(y, expected)
    for got, value in zip(
        *(torch.autograd.grad(o, leaves, dy) for o in (y, expected)), strict=True
    ):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("emulated", [False, True])
def test_autocast(monkeypatch, emulated):
    """The block runs in autocast's dtype; results and gradients have the dtypes of what came in.

    Emulated: products in fp32, several pieces deep, that autocast must leave in fp32.
    """
    monkeypatch.setattr(matmul, "EMULATED", {torch.bfloat16} if emulated else set())
    monkeypatch.setattr(matmul, "COPIED", 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(lk.decoder_block, WANTED["all"], torch.float32)
    plain = gradients(lk.decoder_block, WANTED["all"], torch.bfloat16)
    for name, value in plain.items():
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].bfloat16(), value)


def test_selective_checkpointing_is_right_or_refused():
    """A policy that keeps the projection would rotate it twice; PyTorch sees that it changed."""
    x, weights, table, dy = make(torch.float32)
    leaves = [t.requires_grad_() for t in (x, *weights.values())]
    expected = torch.autograd.grad(
        lk.decoder_block(x, lk.BlockWeights(**weights), *table), leaves, dy
    )

    def checkpointed(kept):
        def policy(context, op, *args, **options):
            keep = op in kept
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(
            *(lk.decoder_block, x, lk.BlockWeights(**weights), *table),
            use_reentrant=False,
            context_fn=contexts,
        )
        return torch.autograd.grad(y, leaves, dy)

    ops = torch.ops
    for kept in ((), (ops.llamapro.flash_attention.default,)):
        assert all(torch.equal(*pair) for pair in zip(checkpointed(kept), expected, strict=True))
    products = ops.aten.mm.default, ops.aten.addmm.default, ops.mkldnn._linear_pointwise.default
    with pytest.raises(RuntimeError, match="has been mutated"):
        checkpointed(products)


def test_what_was_saved_is_unpacked_once():
    """Offloading copies back each tensor that is unpacked."""
    x, weights, table, dy = make(torch.float32)
    count = Counter()

    def pack(t):
        count["packed"] += 1
        return t.detach()

    def unpack(t):
        count["unpacked"] += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = lk.decoder_block(x.requires_grad_(), lk.BlockWeights(**weights), *table)
    y.backward(dy)
    assert count["packed"] == count["unpacked"] > 0


BAD_CACHES = {
    "another dtype": (TypeError, lambda k, v: (k.bfloat16(), v.bfloat16())),
    "heads first": (ValueError, lambda k, v: (k.transpose(1, 2), v.transpose(1, 2))),
    "v shorter than k": (ValueError, lambda k, v: (k, v[:, :3])),
    "another head dimension": (ValueError, lambda k, v: (k[..., :4], v[..., :4])),
    "another batch": (ValueError, lambda k, v: (k[:1], v[:1])),
}


@pytest.mark.parametrize("bad", BAD_CACHES)
def test_what_a_cache_returns_is_checked(bad):
    x, weights, table, _ = make(torch.float32)
    error, cache = BAD_CACHES[bad]
    with pytest.raises(error, match="got"):
        lk.decoder_block(x, lk.BlockWeights(**weights), *table, cache=cache)


def test_bad_input_is_refused():
    x, weights, (cos, sin), _ = make(torch.float32)
    w = lk.BlockWeights(**weights)

    def call(x=x, w=w, cos=cos, sin=sin, **options):
        return lk.decoder_block(x, w, cos, sin, **options)

    two_key_heads_three_query_heads = w._replace(
        qkv=w.qkv[:56], qkv_bias=w.qkv_bias[:56], o_proj=w.o_proj[:, :24]
    )
    for error, message, arguments in (
        (ValueError, "recompute must be one of .* got 'all'", {"recompute": "all"}),
        (ValueError, r"= \(9, 8\) or .* got \(8, 8\)", {"cos": cos[:8], "sin": sin[:8]}),
        (
            ValueError,
            r"gate_up must be .* N = 24, got \(39, 24",
            {"w": w._replace(gate_up=w.gate_up[1:])},
        ),
        (
            ValueError,
            r"qkv_bias must be \(64,\) .* got \(7,\)",
            {"w": w._replace(qkv_bias=w.qkv_bias[:7])},
        ),
        (ValueError, r"even D = 8, .* got \(56, 24\)", {"w": two_key_heads_three_query_heads}),
        (ValueError, r"qkv must be .* got \(\)", {"w": w._replace(qkv=w.qkv.sum())}),
        (ValueError, "window must be a whole number of at least 1, got 0", {"window": 0}),
        (ValueError, r"at least 1, got \(8, 0\)", {"window": (8, 0)}),
        (ValueError, "eps must be finite and at least 0, got -1", {"eps": -1.0}),
        (ValueError, "constants", {"cos": cos.clone().requires_grad_()}),
        (TypeError, "BlockWeights, got tuple", {"w": tuple(w)}),
        (TypeError, "o_proj must be a tensor .* got NoneType", {"w": w._replace(o_proj=None)}),
        (TypeError, "o_proj must be of x's dtype", {"w": w._replace(o_proj=w.o_proj.bfloat16())}),
        (TypeError, "x's dtype, torch.bfloat16, got torch.float32", {"x": x.bfloat16()}),
        (
            ValueError,
            "no gradients through a cache",
            {"x": x.clone().requires_grad_(), "cache": lambda k, v: (k, v)},
        ),
    ):
        with pytest.raises(error, match=message):
            call(**arguments)


def test_norms_of_another_dtype():
    x, weights, table, _ = make(torch.bfloat16)
    w = lk.BlockWeights(**weights)
    wider = w._replace(attention_norm=w.attention_norm.float(), mlp_norm=w.mlp_norm.float())
    assert torch.equal(lk.decoder_block(x, wider, *table), lk.decoder_block(x, w, *table))
