"""The cost of a block against what really runs: FLOPs exactly, saved bytes exactly."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llamapro_kernels as lk
from llamapro_kernels import cost
from llamapro_kernels.attention import visible_pairs
from llamapro_kernels.block import RECOMPUTE

DIM, BATCH, LENGTH = 16, 2, 24
SHAPES = {
    "heads in groups": cost.BlockShape(width=80, queries=6 * DIM, keys=2 * DIM, inner=176, heads=6),
    "as many key heads": cost.BlockShape(width=48, queries=48, keys=48, inner=112, heads=3),
    "head norms": cost.BlockShape(48, 6 * DIM, 2 * DIM, inner=48, heads=6, head_norms=True),
}
NEEDED = {  # (does x need a gradient, do the weights)
    "frozen": (True, False),
    "trained": (True, True),
    "lowest trained": (False, True),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_policy = pytest.mark.parametrize("recompute", RECOMPUTE)
every_need = pytest.mark.parametrize("needed", NEEDED)


def block(shape, needed, dtype=torch.bfloat16, device="cpu"):
    """x, the weights and the rotary table of a block."""
    sizes = (
        *((shape.width,), (shape.queries + 2 * shape.keys, shape.width)),
        *((shape.width, shape.queries), (shape.width,)),
        *((2 * shape.inner, shape.width), (shape.width, shape.inner)),
    )
    norms = ((DIM,), (DIM,)) if shape.head_norms else ()
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, shape.width, dtype=dtype, device=device)
    weights, norms = (
        [torch.randn(size, dtype=dtype, device=device) for size in group]
        for group in (sizes, norms)
    )
    angles = torch.rand(LENGTH, DIM // 2, device=device).repeat(1, 2)
    want_x, want_weights = needed
    for tensor in (*weights, *norms):
        tensor.requires_grad_(want_weights)
    weights = lk.BlockWeights(*weights, **dict(zip(("q_norm", "k_norm"), norms, strict=False)))
    return x.requires_grad_(want_x), weights, (angles.cos(), angles.sin())


@pytest.mark.parametrize("window", [None, 5])
@every_need
@every_policy
@every_shape
def test_flops_are_exact(shape, recompute, needed, window):
    x, weights, table = block(shape, NEEDED[needed], device="meta")
    with FlopCounterMode(display=False) as counter:
        y = lk.decoder_block(x, weights, *table, window=window, recompute=recompute)
        y.backward(torch.ones_like(y))
    counted = cost.flops(
        *(shape, BATCH * LENGTH, BATCH * visible_pairs(LENGTH, LENGTH, window=window)),
        backward=True,
        trained=needed != "frozen",
        recompute=recompute,
    )
    assert counter.get_total_flops() == sum(counted.values())


@every_policy
@every_shape
def test_flops_below_the_lowest_trained_block_are_exact(shape, recompute):
    x, weights, table = block(shape, (False, False), device="meta")
    with FlopCounterMode(display=False) as counter:
        lk.decoder_block(x, weights, *table, recompute=recompute)
    pairs = BATCH * visible_pairs(LENGTH, LENGTH)
    counted = cost.flops(
        *(shape, BATCH * LENGTH, pairs), backward=False, trained=False, recompute=recompute
    )
    assert counter.get_total_flops() == sum(counted.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_need
@every_policy
@every_shape
def test_saved_bytes_are_exact(shape, recompute, needed, dtype):
    """By saved-tensor hooks, without the weights and the rotary table."""
    x, weights, table = block(shape, NEEDED[needed], dtype)
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lk.decoder_block(x, weights, *table, recompute=recompute)
    for t in (*weights, *table):
        if t is not None:
            storages.pop(t.untyped_storage().data_ptr(), None)
    planned = cost.saved_bytes(shape, BATCH * LENGTH, dtype.itemsize, recompute)
    assert sum(storages.values()) == planned


@every_shape
def test_a_block_that_recomputes_more_saves_less_by_more_than_its_scratch_grows(shape):
    """Which the planner's search relies on: no change to the next policy raises a peak."""
    for itemsize in (2, 4):
        sizes = [
            [function(shape, 1, itemsize, policy) for policy in RECOMPUTE]
            for function in (cost.saved_bytes, cost.scratch_bytes)
        ]
        saved, scratch = (torch.tensor(values).diff() for values in sizes)
        assert (saved < 0).all() and (saved + scratch <= 0).all()
