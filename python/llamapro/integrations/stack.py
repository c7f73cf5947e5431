"""A decoder of transformers as `llamapro.new_blocks` sees it: base blocks and new ones."""

import copy
import json

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llamapro.architectures import ARCHITECTURES
from llamapro.config import LlamaConfig
from llamapro.expansion import is_per_layer
from llamapro.new_block_files import base_settings

# Of a configuration, what no result depends on, besides the fields that every model has.
UNUSED = {"max_position_embeddings", "initializer_range", "use_cache", "llama_pro"}
UNUSED |= {"bos_token_id", "eos_token_id", "pad_token_id"}


class DecoderStack:
    """What `llamapro.new_blocks` asks of a model, see `LlamaStack`.

    Raises ValueError for a model that is not one of the served decoders.
    """

    def __init__(self, model: PreTrainedModel):
        _check_served(model)
        self.model, self.name = model, _find_layers(model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.name)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def layout(self) -> dict:
        config = self.model.config
        lists = {n: v for n, v in config.to_dict().items() if is_per_layer(n, v, config)}
        llama_pro = getattr(config, "llama_pro", None)
        return {"num_hidden_layers": config.num_hidden_layers, "llama_pro": llama_pro, **lists}

    def put(self, blocks: list[nn.Module], layout: dict) -> None:
        """Make these the model's layers, each with its own place in a cache."""
        del self.layers[:]
        self.layers.extend(blocks)
        for i, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i
        for name, value in layout.items():
            setattr(self.model.config, name, value)
        if layout["llama_pro"] is None:
            del self.model.config.llama_pro

    def copy(self, block: nn.Module) -> nn.Module:
        """All but the configuration: where it is changed, that must reach the copy, too.

        Raises ValueError while the kernels are applied, whose `revert` would not know of the copy.
        """
        if "llamapro_applied" in vars(self.model):
            raise ValueError(
                "a model without llamapro_kernels' apply expected where blocks are added: revert"
                " it, and apply afterwards"
            )
        configs = [module.config for module in block.modules() if hasattr(module, "config")]
        return copy.deepcopy(block, {id(config): config for config in configs})

    def tensors(self, block: nn.Module) -> dict[str, torch.Tensor]:
        return block.state_dict(keep_vars=True)

    def outside(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            tied = any(tensor is other for other in found.values())
            if not name.startswith(f"{self.name}.") and not tied:
                found[name] = tensor
        return found

    def settings(self, layout: dict) -> dict[str, str]:
        config = {**self.model.config.to_dict(), **layout, "llama_pro": None}
        try:
            return base_settings(LlamaConfig.from_dict(config))
        except ValueError:  # another architecture: what differs from its defaults
            usual, generic = type(self.model.config)().to_dict(), PreTrainedConfig().to_dict()
            used = {n: v for n, v in config.items() if n not in UNUSED | generic.keys()}
            used = {n: v for n, v in used.items() if v != usual.get(n)}
            used["model_type"] = config["model_type"]
            return {name: json.dumps(value, sort_keys=True) for name, value in used.items()}


def _check_served(model) -> None:
    """Raise ValueError unless this is a model that is understood, as transformers built it."""
    kind = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"a model without adapters expected, got {kind}: expand first, then add them"
            " (get_peft_model(expand(model, ...), config)), or merge_and_unload() before"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"a model of transformers expected, got {kind}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"a model in floating point expected, got a quantized {kind}")
    if model.config.model_type not in ARCHITECTURES:
        served = tuple(ARCHITECTURES)
        raise ValueError(f"model_type must be one of {served}, got {model.config.model_type!r}")


def _find_layers(model: PreTrainedModel) -> str:
    """The name of the one list of decoder layers."""
    count = model.config.num_hidden_layers
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(hasattr(layer, "self_attn") for layer in module)
    ]
    if len(found) != 1 or len(model.get_submodule(found[0])) != count:
        raise ValueError(f"one stack of {count} decoder layers expected, got {found}")
    return found[0]
