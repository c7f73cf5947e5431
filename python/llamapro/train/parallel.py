"""Training on several GPUs, by PyTorch's FSDP2, with as little to send as the method allows.

Two layouts. "none": each rank holds the base whole, as plain tensors. What trains is sharded: a
rank keeps its part of the masters and moments, weights are gathered once a step, and the gradients
of what trains are all that is reduced. "full": the frozen blocks are sharded too, and gathered for
forward and, from the first trained block up, again for backward. In both, a gradient is the sum
over the ranks of those of the one loss, see `llamapro.train.loop.take_step`.
"""

import warnings
from dataclasses import asdict

import numpy as np
import torch

from llamapro import __version__
from llamapro.hardware import pick_device
from llamapro.model import Llama, block_tensors, stock_tensors
from llamapro.proof import combined, difference, digests, settings
from llamapro.ranks import Ranks, is_shard, local
from llamapro.train.config import TrainConfig

FORWARDS = ("hidden", "hidden_and_base")  # what a training loop calls of a model
SHARD = "the shard of "


class Frozen:
    """What must stay as it is while a model trains.

    digests: each setting that is computed with, and a digest of each frozen tensor by its stock
    name, the same for any number of ranks. sharded: those of tensors of which there are only shards
    here, taken before they were sharded. loaded: those of what trains, where ranks share it.
    """

    def __init__(self, model: Llama, sharded: dict[str, str], loaded: dict[str, str]):
        self.model, self.loaded = model, loaded
        self._at_first = self._now()
        whole = {n: said for n, said in self._at_first.items() if not n.startswith(SHARD)}
        self.digests = {**settings(model.config), **whole, **sharded}

    def changed(self) -> str | None:
        """The first of what this rank holds that is no longer as it was, in words."""
        return difference(self._at_first, self._now())

    def _now(self) -> dict[str, str]:
        held, shards = held_whole(self.model), dict(self.model.named_parameters())
        held |= {SHARD + name: p for name, p in shards.items() if is_shard(p)}
        return digests({n: local(tensor) for n, tensor in held.items() if not tensor.requires_grad})


def own_device(device: str, ranks: Ranks) -> torch.device:
    """A rank's own: of the GPUs of its machine, the one with its number there."""
    picked = pick_device(device)
    if picked.type == "cuda" and ranks.size > 1:
        return torch.device("cuda", ranks.local_rank)
    return picked


def same_options(config: TrainConfig) -> dict[str, str]:
    """What the ranks of one run must have alike before they do anything, by name."""
    options = {name: repr(value) for name, value in asdict(config).items()}
    return {"llamapro": __version__, "torch": torch.__version__, **options}


def same_inputs(data: dict[str, str], frozen: Frozen) -> dict[str, str]:
    """What they must have read alike, by name."""
    read = {f"data of {name}": hashed for name, hashed in data.items()}
    return {**read, "weights": combined({**frozen.digests, **frozen.loaded})}


def freeze(model: Llama, trainable: str) -> None:
    """Leave only what is named trainable: "new_blocks" or "all"."""
    if trainable == "all":
        model.requires_grad_(True)
    else:
        model.train_new_blocks_only()


def load(
    config: TrainConfig, dtype: torch.dtype, device: torch.device, ranks: Ranks
) -> tuple[Llama, Frozen]:
    """The model of a run, with what does not train frozen, laid out over the ranks by its `shard`.

    A block is sharded as soon as it is read, so that no rank holds more than one of those that it
    shares. Raises as `Llama.from_pretrained`, on all ranks.
    """
    if ranks.size == 1:
        model = Llama.from_pretrained(config.model, dtype, device, config.frozen)
        freeze(model, config.trainable)
        return model, Frozen(model, {}, {})
    mesh = torch.distributed.init_device_mesh(device.type, (ranks.size,))
    torch.manual_seed(int(np.random.SeedSequence((config.seed, ranks.rank)).generate_state(1)[0]))
    return ranks.agree(lambda: _load_shards(config, dtype, device, mesh))


def _load_shards(config: TrainConfig, dtype: torch.dtype, device: torch.device, mesh):
    full, sharded, loaded = config.shard == "full", {}, {}

    def place(model: Llama, i: int) -> None:
        if i == 0:
            freeze(model, config.trainable)
        block = model.blocks[i]
        trains = block.attention_norm.requires_grad
        if trains or full:
            read = digests(block_tensors(block, model.config, f"model.layers.{i}."))
            (loaded if trains else sharded).update(read)
            _shard(block, mesh, reshard_after_forward=full)

    model = Llama.from_pretrained(config.model, dtype, device, config.frozen, placed=place)
    rest = stock_tensors(model, [])
    loaded |= digests({name: tensor for name, tensor in rest.items() if tensor.requires_grad})
    _shard_rest(model, mesh)
    if full and config.trainable == "new_blocks":
        first = model.blocks[model.config.new_blocks[0]]
        # By default it gathers ahead the block below, which has no backward.
        first.set_modules_to_backward_prefetch([first])
    return model, Frozen(model, sharded, loaded)


def _shard(module, mesh, *, reshard_after_forward: bool, ignored_params=None) -> None:
    """Shard the parameters of a module, which all train, or all are frozen. What trains in 16 bits
    becomes its own master, in fp32, and is gathered in 16 bits."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ignored_params, policy = ignored_params or set(), MixedPrecisionPolicy()
    masters = {p for p in module.parameters() if p.requires_grad and not is_shard(p)}
    dtypes = {p.dtype for p in masters} - {torch.float32}
    if dtypes:
        in_16_bits = {"param_dtype": dtypes.pop(), "reduce_dtype": torch.float32}
        policy = MixedPrecisionPolicy(**in_16_bits, cast_forward_inputs=False)
        for parameter in masters:
            parameter.data = parameter.data.float()
    fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=policy,
        ignored_params=ignored_params,
    )
    module.set_gradient_divide_factor(1.0)  # gradients are summed: the loss is divided already
    module.set_force_sum_reduction_for_comms(True)


def _shard_rest(model: Llama, mesh) -> None:
    """Make a model whose blocks are sharded, where they are, the root of FSDP's modules, and shard
    embeddings, norm and head where they train: frozen ones are whole while a step runs, anyhow."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    # What a block returns is a view; nobody writes into it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    frozen = {p for p in model.parameters() if not p.requires_grad and not is_shard(p)}
    _shard(model, mesh, reshard_after_forward=False, ignored_params=frozen)
    for name in FORWARDS:
        register_fsdp_forward_method(model, name)


def begin_micro_batch(model: Llama, shard: str, *, last: bool) -> None:
    """In the layout "none", let gradients add up on each rank, and weights stay gathered, until the
    last micro-batch of a step; in "full" nothing is whole for longer than a block needs it."""
    if shard == "none" and hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def release_gathered(model: Llama) -> None:
    """Let go of weights that were gathered before their shards changed."""
    for module in (model, *model.blocks):
        if hasattr(module, "reshard"):
            module.reshard()


def held_whole(model: Llama) -> dict[str, torch.Tensor]:
    """The tensors of which this rank has more than a shard, by stock name."""
    places = [i for i, block in enumerate(model.blocks) if not is_shard(block.attention_norm)]
    return stock_tensors(model, places)
