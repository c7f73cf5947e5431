"""What the paper's experiments start from: the base, the domain, and what shall be kept."""

from dataclasses import dataclass
from pathlib import Path

import torch
from llamapro.data.packing import open_rows
from llamapro.data.prepare import prepare
from llamapro.eval.perplexity import perplexity
from llamapro.expansion import expand_checkpoint
from llamapro.hardware import pick_device
from llamapro.hf import Checkpoint
from llamapro.model import Llama
from llamapro.storage import write_json
from llamapro.train.replay import replay

from recipes import assets
from recipes.generated import make_base, write_texts
from recipes.paper_config import PaperConfig
from recipes.stories import convert

FRESH_SEED = 1000  # of samples that no run has seen
HELD_OUT = {"code": 0.05, "encyclopaedia": 0.5, "wikitext": 1.0}  # a tenth of others
TEXTS = {
    "law": ("legal", "*.jsonl"),
    "mathematics": ("math", "*.jsonl"),
    "books": ("english", "books.*.jsonl"),
    "wikitext": ("english", "wikitext2_test.txt"),
}


@dataclass
class Inputs:
    """Paths of what is there."""

    base: Path
    domain: Path
    general: dict[str, Path]


def make(config: PaperConfig) -> Inputs:
    """The base and the data, made where they are missing."""
    config.out.mkdir(parents=True, exist_ok=True)
    base = _base(config)
    domain = _data(config, base, config.domain, "domain")
    general = {}
    for name in config.general:
        folder = f"general-{Path(name).name}"
        if name == "samples":
            tokens = 9 * config.eval_tokens
            path = samples(config, base, folder, tokens, FRESH_SEED)
        else:
            path = _data(config, base, name, folder)
        general[Path(name).name] = path
    return Inputs(base, domain, general)


def samples(config: PaperConfig, base: Path, name: str, tokens: int, seed: int) -> Path:
    """What the base says by itself."""
    out = config.out / name
    if not out.exists():
        how = {"seq_len": config.seq_len, "bos_token": config.bos_token, "device": config.device}
        replay(base, out, tokens=tokens, seed=seed, dtype=config.dtype, **how)
    return out


def expanded(config: PaperConfig, inputs: Inputs, blocks: int, placement: str) -> Path:
    """The base with so many new blocks."""
    out = config.out / f"expanded-{blocks}-{placement}"
    if not out.exists():
        where = placement
        if placement == "importance":
            where = after_the_least_important(config, inputs, blocks)
        expand_checkpoint(inputs.base, out, blocks, where)
    return out


def after_the_least_important(config: PaperConfig, inputs: Inputs, count: int) -> list[int]:
    """The positions of new blocks that are copies of those whose removal costs least on the general
    sets (as ADEPT does, arXiv 2510.10071), each above its own; what each costs is noted."""
    shape = Checkpoint(inputs.base).config
    dtype, device = getattr(torch, config.dtype), pick_device(config.device)
    model = Llama.from_pretrained(inputs.base, dtype, device)
    how = shape.vocab_size, config.seq_len, config.packing
    sets = {name: open_rows(path, "heldout", *how) for name, path in inputs.general.items()}

    def loss() -> float:
        found = [perplexity(model, rows, config.eval_tokens)["loss"] for rows in sets.values()]
        return sum(found) / len(found)

    whole, costs = loss(), []
    for i in range(shape.num_hidden_layers):
        model.skipped = frozenset({i})
        costs.append(loss() - whole)
    write_json(config.out / "importance.json", {"nats that each block's removal costs": costs})
    least = sorted(sorted(range(len(costs)), key=costs.__getitem__)[:count])
    return [place + 1 + number for number, place in enumerate(least)]


def _base(config: PaperConfig) -> Path:
    if config.model == "generated":
        return make_base(config.out / "generated", config.seq_len)
    if config.model == "stories260k":
        return convert(_root(config) / "models" / "stories260K", config.out / "base")
    if config.model == "smollm2":
        return assets.smollm2()
    return Path(Checkpoint(config.model).path)


def _data(config: PaperConfig, base: Path, name: str, folder: str) -> Path:
    out, pattern = config.out / folder, "*"
    if out.exists():
        return out
    if name == "generated":
        kind = folder.split("-")[0]
        sources = [write_texts(config.out / "generated" / kind, kind)]
    elif name == "code":
        sources = assets.standard_library()
    elif name == "encyclopaedia":
        sources = [assets.fetch(assets.BRITANNICA)]
    elif name in TEXTS:
        subfolder, pattern = TEXTS[name]
        sources = [_root(config) / "text" / subfolder]
    else:
        sources = [Path(name)]
    heldout = HELD_OUT.get(name, 0.1)
    separator = config.bos_token  # between documents stands what samples begin with, too
    prepare(sources, base, out, pattern=pattern, heldout=heldout, separator=separator)
    return out


def _root(config: PaperConfig) -> Path:
    if config.data_root is None:
        raise ValueError("data_root, the folder with models and text, expected, got none")
    return config.data_root
