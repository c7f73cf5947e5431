"""Decoders of transformers that our own Llama does not compute: their files and their proof.

Expansion needs to know little of them: their blocks are model.layers.0 and so on, and the output
projections of these have the names of a Llama's. What else the files must hold, and whether nothing
changed, is asked of transformers itself.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llamapro.architectures import ARCHITECTURES, OTHERS, OURS, architecture_of
from llamapro.config import check_range, check_settings
from llamapro.hf import FILES, Checkpoint
from llamapro.model_files import CheckpointError, locate, read_object
from llamapro.proof import compare_logits, proof_tokens
from llamapro.storage import one_line, shown


@dataclass
class DecoderConfig:
    """What expansion changes of a config.json and what the proof asks of it; `other` is all of the
    file."""

    model_type: str
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float
    llama_pro: dict | None = None
    other: dict = field(default_factory=dict)

    def __post_init__(self):
        check_settings(self)

    @property
    def new_blocks(self) -> list[int]:
        """Positions of the blocks that expansion added; empty for a base model."""
        return list((self.llama_pro or {}).get("new_blocks", []))

    def to_dict(self) -> dict:
        """For config.json: the file as it was, with the blocks that there are now."""
        own = {"num_hidden_layers": self.num_hidden_layers, "llama_pro": self.llama_pro}
        return {**self.other, **own}


# Of transformers' configuration, with its defaults.
ASKED = ("model_type", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "rms_norm_eps")
ADAPTER = "adapter_config.json"  # transformers would load it, and expansion leave it behind


class DecoderCheckpoint(Checkpoint):
    """A model directory of another architecture; the names and shapes of its tensors are those of
    transformers' model for its config.json."""

    def _read_config(self) -> DecoderConfig:
        raw, file = read_object(self.path, "config.json"), self.path / "config.json"
        if (self.path / ADAPTER).exists():
            raise CheckpointError(f"{self.path}: a whole model expected, got {ADAPTER} as well")
        try:
            _check_settings(raw)
            self._theirs = _understood(file, raw)
            return DecoderConfig(
                **{name: getattr(self._theirs, name) for name in ASKED},
                llama_pro=raw.get("llama_pro"),
                other=raw | _layer_types(self._theirs),
            )
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        from transformers import AutoModelForCausalLM

        with _named(self.path / "config.json"), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._theirs)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        return shapes


def open_checkpoint(path) -> Checkpoint:
    """A model directory or Hub name of any architecture that can be expanded.

    Raises CheckpointError for others, by name, before a weight is looked at.
    """
    path = locate(path, FILES)
    raw = read_object(path, "config.json")
    try:
        architecture_of(raw, ARCHITECTURES)
    except ValueError as error:
        raise CheckpointError(f"{path}/config.json: {error}") from None
    return Checkpoint(path) if raw["model_type"] in OURS else DecoderCheckpoint(path)


def _check_settings(raw: dict) -> None:
    """Refuse what is not expanded before transformers makes anything as large as it says."""
    architecture_of(raw, OTHERS)
    if raw.get("quantization_config"):
        got = shown(raw["quantization_config"])
        raise ValueError(f"quantization_config must be None, got {got}")
    blocks = raw.get("num_hidden_layers")
    if type(blocks) is not int:
        raise ValueError(f"num_hidden_layers must be a whole number, got {shown(blocks)}")
    check_range("num_hidden_layers", blocks)


def _understood(file: Path, raw: dict):
    """The configuration as transformers fills it in."""
    try:
        from transformers import AutoConfig
    except ImportError:
        raise RuntimeError(
            f"{file}: a {raw['model_type']} is checked and proven by transformers, which is not"
            " installed: pip install transformers"
        ) from None
    with _named(file):
        return AutoConfig.for_model(**copy.deepcopy(raw))


@contextmanager
def _named(file: Path):
    """What transformers says of a file from anywhere, on one line: it raises whatever comes up."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{file}: what transformers takes expected: {one_line(error)}"
        ) from error


def _layer_types(theirs) -> dict:
    """Which blocks slide, written out: from their number alone, a copy would not be as its source.

    In old files only the rule is there, such as every sixth.
    """
    kinds = getattr(theirs, "layer_types", None)
    return {} if kinds is None else {"layer_types": list(kinds)}


def prove_by_transformers(base: DecoderCheckpoint, expanded: DecoderCheckpoint) -> None:
    """Raise IdentityError unless both give bit-equal logits on real tokens, in transformers.

    One model is in memory at a time, as a whole.
    """
    tokens = proof_tokens(base)
    compare_logits(*(_logits(side, tokens) for side in (base, expanded)))
    base.close()
    expanded.close()


@torch.no_grad()
def _logits(side: DecoderCheckpoint, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with _named(side.path):
        model = AutoModelForCausalLM.from_pretrained(
            side.path,
            dtype=side.dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        return model.eval()(tokens, use_cache=False).logits
