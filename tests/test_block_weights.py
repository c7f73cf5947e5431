"""`decoder_block` on weights that live elsewhere: pieces, norms of heads, positions by row."""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_block import BATCH, DIM, HEADS, INNER, KV_HEADS, LENGTH, WIDTH, Seen, composition
from torch import nn

import llamapro_kernels as lk
from benchmarks import plain
from llamapro_kernels.block import RECOMPUTE

ROWS = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM, "gate": INNER, "up": INNER}
PLAIN = SimpleNamespace(**vars(plain), flash_attention=plain.attention)
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")


def leaves_of(dtype=torch.float64, bias=True, head_norms=True, joined=False, seed=0):
    """Every tensor by its own name, rounded to bf16; pieces of one storage when they are joined."""
    torch.manual_seed(seed)
    shapes = {name: (rows, WIDTH) for name, rows in ROWS.items()}
    shapes |= {"attention_norm": (WIDTH,), "mlp_norm": (WIDTH,)}
    shapes |= {"o_proj": (WIDTH, HEADS * DIM), "down_proj": (WIDTH, INNER)}
    if bias:
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        shapes |= {f"{name}_bias": shapes[name][:1] for name in matrices}
    if head_norms:
        shapes |= {"q_norm": (DIM,), "k_norm": (DIM,)}
    made = {name: torch.randn(s).bfloat16().to(dtype) / 4 for name, s in shapes.items()}
    if joined:
        for names in (QKV, GATE_UP):
            whole = torch.cat([made[name] for name in names])
            made |= zip(names, whole.split([ROWS[name] for name in names]), strict=True)
    made["x"] = torch.randn(BATCH, LENGTH, WIDTH).bfloat16().to(dtype)
    return {name: nn.Parameter(t, requires_grad=False) for name, t in made.items()}


def weights_of(leaves, pack=tuple):
    """BlockWeights of the leaves; pack makes one field of pieces."""

    def packed(names, kind=""):
        return (
            pack([leaves[f"{n}{kind}"] for n in names]) if f"{names[0]}{kind}" in leaves else None
        )

    own = {name: leaves.get(name) for name in lk.BlockWeights._fields}
    own |= {"qkv": packed(QKV), "qkv_bias": packed(QKV, "_bias")}
    own |= {"gate_up": packed(GATE_UP), "gate_up_bias": packed(GATE_UP, "_bias")}
    return lk.BlockWeights(**own)


def tables(by_row=False, dtype=torch.float64):
    torch.manual_seed(1)
    shape = (BATCH, LENGTH, DIM // 2) if by_row else (LENGTH, DIM // 2)
    angles = torch.rand(shape).double()
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def gradients(function, leaves, wanted, table, pack=tuple, **options):
    """y and the gradients of what is wanted, by name."""
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted).grad = None
    y = function(leaves["x"], weights_of(leaves, pack), *table, **options)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).bfloat16().to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


ALL = leaves_of().keys()
WANTED = {"frozen": {"x"}, "all": {*ALL}, "all but x": {*ALL} - {"x"}} | {n: {n} for n in ALL}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize(
    "head_norms, joined, by_row", [(True, False, True), (False, True, False), (True, True, False)]
)
def test_equals_the_composition(head_norms, joined, by_row, wanted, recompute):
    """In fp64 to rounding; None for what is not wanted, piece by piece."""
    leaves = leaves_of(head_norms=head_norms, joined=joined)
    wanted, table = WANTED[wanted] & leaves.keys(), tables(by_row)
    if not wanted:
        pytest.skip("has no such weight")
    options = {"window": 4, "eps": 1e-3}
    ours = gradients(lk.decoder_block, leaves, wanted, table, recompute=recompute, **options)
    expected = gradients(composition, leaves, wanted, table, torch.cat, **options)
    for name, value in expected.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding(dtype, joined):
    """The three-way rule over five draws, since a norm's gradient is few numbers of much rounding.

    How much is computed again changes no bit.
    """
    table, errors = tables(dtype=dtype), defaultdict(lambda: [0.0, 0.0, 0.0])
    exact = tuple(t.double() for t in table)
    for seed in range(5):
        leaves = leaves_of(dtype, joined=joined, seed=seed)
        ours, *others = (
            gradients(lk.decoder_block, leaves, ALL, table, recompute=recompute)
            for recompute in RECOMPUTE
        )
        peer = gradients(partial(composition, ops=PLAIN), leaves, ALL, table, torch.cat)
        truth = gradients(composition, leaves_of(seed=seed), ALL, exact, torch.cat)
        for name, true in truth.items():
            assert all(torch.equal(ours[name], other[name]) for other in others), name
            for i, t in enumerate((ours[name].double() - true, peer[name].double() - true, true)):
                errors[name][i] += t.square().sum()
    for name, squares in errors.items():
        error, plain_error, size = (square.sqrt() for square in squares)
        assert error <= 2 * plain_error + torch.finfo(dtype).eps / 2 * size, name


@pytest.mark.parametrize("joined", [False, True])
def test_pieces_are_not_copied(joined):
    """Joined ones are one product, forward and backward; others one each. None is concatenated."""
    leaves, table = leaves_of(torch.float32, bias=False, joined=joined), tables(dtype=torch.float32)
    with Seen() as seen:
        gradients(lk.decoder_block, leaves, {"x"}, table)
    kinds = ("aten::mm", "aten::mm.out", "mkldnn::_linear_pointwise")  # by device and size
    products = sum(map(seen.names.count, kinds))
    assert products == 2 * (4 if joined else 3 + 1 + 2 + 1)
    assert "aten::cat" not in seen.names


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_fullgraph_compile(recompute):
    torch.compiler.reset()
    compiled = torch.compile(lk.decoder_block, fullgraph=True, backend="aot_eager")
    leaves, table = leaves_of(torch.float32), tables(True, torch.float32)
    ours = gradients(compiled, leaves, {"x", "k", "up", "q_norm"}, table, recompute=recompute)
    eager = gradients(
        lk.decoder_block, leaves, {"x", "k", "up", "q_norm"}, table, recompute=recompute
    )
    for name, value in eager.items():
        assert (ours[name] is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("kept", [LENGTH, 4], ids=["all keys", "those of the window"])
def test_a_window_with_a_cache(kept):
    """Token by token, the last states are those of the whole row."""
    leaves, (cos, sin) = leaves_of(), tables()
    x, w, window, pairs = leaves["x"], weights_of(leaves), 4, []

    def cache(k, v):
        pairs.append((k, v))
        return tuple(torch.cat(t, 1) for t in zip(*pairs[-kept:], strict=True))

    expected = lk.decoder_block(x, w, cos, sin, window=window)
    for t in range(LENGTH):
        table = cos[t : t + 1], sin[t : t + 1]
        y = lk.decoder_block(x[:, t : t + 1], w, *table, window=window, cache=cache)
        torch.testing.assert_close(y, expected[:, t : t + 1], rtol=1e-12, atol=1e-12)


BAD = {
    "an empty tuple": ({"qkv": ()}, r"pieces of qkv must be rows of one tensor, got \[\]"),
    "another width": (
        {"gate_up": (torch.zeros(INNER, WIDTH), torch.zeros(INNER, 8))},
        r"pieces of gate_up must be rows of one tensor, got .*\(20, 8\)",
    ),
    "a piece too few": (
        {"gate_up": (torch.zeros(INNER, WIDTH),)},
        r"gate_up must be \(40, 24\) for N = 24, got \(20, 24\)",
    ),
    "one norm of heads": ({"k_norm": None}, "both or neither"),
    "a norm of the width": ({"q_norm": torch.ones(WIDTH)}, r"q_norm must be \(8,\)"),
    "a bias in other pieces": (
        {"gate_up_bias": (torch.zeros(3), torch.zeros(37))},
        r"pieces of gate_up_bias must be those of gate_up, got \[3, 37\] and \[20, 20\] rows",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_weights(bad):
    change, message = BAD[bad]
    leaves = leaves_of(torch.float32)
    w = weights_of(leaves)._replace(**change)
    with pytest.raises(ValueError, match=message):
        lk.decoder_block(leaves["x"], w, *tables(dtype=torch.float32))


def test_a_piece_that_is_no_tensor():
    leaves = leaves_of(torch.float32)
    w = weights_of(leaves)._replace(qkv=(leaves["q"], None, leaves["v"]))
    with pytest.raises(TypeError, match=r"qkv\[1\] must be a tensor of .* got NoneType"):
        lk.decoder_block(leaves["x"], w, *tables(dtype=torch.float32))


@pytest.mark.parametrize("joined", [False, True])
def test_one_bias_for_a_weight_in_pieces(joined):
    leaves, table = leaves_of(head_norms=False, joined=joined), tables()
    x, w = leaves["x"], weights_of(leaves)
    whole = w._replace(qkv_bias=torch.cat(w.qkv_bias), gate_up_bias=torch.cat(w.gate_up_bias))
    ours, expected = (lk.decoder_block(x, each, *table) for each in (whole, w))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
