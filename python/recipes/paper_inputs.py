"""What the paper's experiments start from: the base, the domain, and what shall be kept."""

from dataclasses import dataclass
from pathlib import Path

import torch
from llamapro.data.packing import open_rows
from llamapro.data.prepare import prepare
from llamapro.eval.importance import least_important, removal_costs
from llamapro.expansion import expand_checkpoint
from llamapro.hardware import pick_device
from llamapro.hf import Checkpoint
from llamapro.model import Llama
from llamapro.storage import write_json, write_text
from llamapro.train.replay import replay

from recipes import assets
from recipes.generated import make_base, write_instructions, write_texts
from recipes.paper_config import PaperConfig
from recipes.stories import convert

TEMPLATE = """\
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}
assistant: {% endif %}"""  # for a base without one
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
    instructions: Path | None


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
    instructions = None
    if config.instructions is not None:
        instructions = _data(config, base, config.instructions, "instructions")
    return Inputs(base, domain, general, instructions)


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
    """The positions of new blocks by what each block's removal costs on the general sets, which is
    noted."""
    shape = Checkpoint(inputs.base).config
    dtype, device = getattr(torch, config.dtype), pick_device(config.device)
    model = Llama.from_pretrained(inputs.base, dtype, device)
    how = shape.vocab_size, config.seq_len, config.packing
    sets = [open_rows(path, "heldout", *how) for path in inputs.general.values()]
    costs = removal_costs(model, sets, config.eval_tokens)
    write_json(config.out / "importance.json", {"nats that each block's removal costs": costs})
    return least_important(costs, count)


def _base(config: PaperConfig) -> Path:
    if config.model == "generated":
        return _with_template(make_base(config.out / "generated", config.seq_len))
    if config.model == "stories260k":
        source = _root(config) / "models" / "stories260K"
        return _with_template(convert(source, config.out / "base"))
    if config.model == "smollm2":
        return assets.smollm2()
    return Path(Checkpoint(config.model).path)


def _with_template(base: Path) -> Path:
    write_text(base / "chat_template.jinja", TEMPLATE)
    return base


def _data(config: PaperConfig, base: Path, name: str, folder: str) -> Path:
    out, pattern = config.out / folder, "*"
    if out.exists():
        return out
    if name == "generated" and folder == "instructions":
        sources = [write_instructions(config.out / "generated" / folder)]
    elif name == "generated":
        kind = folder.split("-")[0]
        sources = [write_texts(config.out / "generated" / kind, kind)]
    elif name == "alpaca":
        sources = [_root(config) / "sft" / "alpaca_en_demo.json"]
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
