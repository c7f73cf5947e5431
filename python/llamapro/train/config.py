"""The settings of a run, and the learning rate that follows from them."""

import math
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from llamapro import planner, planner_ranks
from llamapro.data.mixture import corpora
from llamapro.data.packing import PACKINGS
from llamapro.data.tokens import are_samples
from llamapro.frozen import FORMS
from llamapro.storage import MAX_JSON_BYTES, check_regular, one_line, shown
from llamapro.train.trackers import TRACKERS

TRAINABLE = ("new_blocks", "all")
DTYPES = ("auto", "bfloat16", "float32")
KEEP_LOSSES = ("kl", "ce")
SHARDS = ("auto", *planner_ranks.SHARDS)
KEPT = "kept"  # the name of the set that keeps the base
KEEP = 0.2  # of the rows, where nothing is said but how much may be lost


@dataclass
class TrainConfig:
    """One run. The defaults are the paper's (LLaMA Pro, section 4.1), but for the sizes.

    Raises ValueError for settings that make no sense.
    """

    model: str
    """The Hugging Face model directory to train: an expanded one, unless everything is trained."""
    data: tuple[str, ...]
    """The directories of tokens that `llamapro prepare` made, each DIR or DIR=WEIGHT: rows are
    drawn from each in proportion to its weight, which is 1 unless it is given."""
    out: str
    """The run directory that is made: metrics, checkpoints, and the final model."""
    trainable: Literal["new_blocks", "all"] = "new_blocks"
    """What is trained: the blocks that expansion added, or everything."""
    steps: int = 100
    """How many optimizer steps are taken."""
    batch_size: int = 4
    """How many rows a micro-batch has, on all GPUs together."""
    gradient_accumulation_steps: int = 1
    """How many micro-batches a step has."""
    seq_len: int = 512
    """How many tokens a row has."""
    packing: Literal["bfd", "wrapped"] = "bfd"
    """How rows are filled: bfd puts whole documents, which do not see each other, where they fit
    best; wrapped runs across documents."""
    keep: float | None = None
    """The share of the rows from which nothing is learnt, but what the base says is kept: its own
    samples, which are made once, at OUT-samples, or keep_data. Corpora in data that `llamapro
    replay` made are kept, too."""
    keep_data: str | None = None
    """The data directory of those rows: samples of the base, or any general text."""
    keep_loss: Literal["kl", "ce"] = "kl"
    """The loss on rows that are kept: kl is the divergence from the base, ce cross-entropy."""
    keep_within: str | None = None
    """How much may be lost, such as 1%: of perplexity on the sets of evaluate, or, where there are
    none, on samples of the base, as the divergence from it predicts. The weight of the rows that
    are kept follows from it, at each evaluation."""
    learning_rate: float = 2e-4
    """The peak learning rate, which is reached after the warm-up."""
    warmup_ratio: float = 0.06
    """The share of the steps in which the learning rate rises."""
    weight_decay: float = 0.1
    """How much matrices decay; norms and biases do not."""
    betas: tuple[float, float] = (0.9, 0.95)
    """The two decay rates of AdamW's moments."""
    max_grad_norm: float = 1.0
    """The norm to which a larger gradient is clipped."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """The dtype of weights and activations; auto is bfloat16, unless fp32 is twice as fast here."""
    frozen: Literal["bf16", "8bit", "8bit-compact"] = "bf16"
    """How the frozen matrices of blocks are held: as they are in dtype, or in 8 bits for products
    in 8 bits, in the memory of bf16 or, compact, in half of it."""
    device: str = "auto"
    """The device to train on; auto is CUDA when there is one."""
    memory: str | None = None
    """How much memory there is, such as 80GB: blocks recompute more in backward until a step
    fits."""
    shard: Literal["auto", "none", "full"] = "auto"
    """How several GPUs share a model: none, each holds the base whole and shares what trains; full,
    they share the frozen blocks too; auto, none where it fits in memory."""
    timeout: float = 600.0
    """How many seconds a rank waits for the others, before the run ends."""
    seed: int = 0
    """The seed of the order of the rows."""
    evaluate: dict[str, str] = field(default_factory=dict)
    """Further held-out sets that are evaluated, each a name and a data directory."""
    eval_every: int = 50
    """How many steps lie between evaluations; there is one before and one after."""
    eval_tokens: int = 16384
    """How many tokens of each held-out set are evaluated."""
    checkpoint_every: int = 50
    """How many steps lie between checkpoints."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    """The experiment trackers that are told of the metrics, beside metrics.jsonl."""
    verify: bool = False
    """Hash all of the tokens at the start, also beyond 4 GB, where a sample is hashed otherwise."""

    def __post_init__(self):
        self.data = (self.data,) if isinstance(self.data, str) else tuple(self.data)
        self.betas = tuple(self.betas)
        choices = (("trainable", TRAINABLE), ("dtype", DTYPES), ("frozen", FORMS))
        choices += (("packing", PACKINGS), ("keep_loss", KEEP_LOSSES), ("shard", SHARDS))
        self.report_to = tuple(self.report_to)
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not {*self.report_to} <= {*TRACKERS}:
            raise ValueError(f"report_to must be of {TRACKERS}, got {self.report_to}")
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "seq_len")
        for name in (*counts, "eval_every", "eval_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name, most in (("warmup_ratio", 1), ("weight_decay", math.inf), ("seed", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in 0..{most}, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in 0..1, below 1, got {self.betas}")
        if self.trainable == "all" and self.frozen != FORMS[0]:
            raise ValueError(
                f"frozen must be {FORMS[0]} where everything is trained, got {self.frozen}"
            )
        if self.memory is not None:
            planner.parse_bytes(self.memory)
        if self.keep is not None and not 0 < self.keep < 1:
            raise ValueError(f"keep must be a share above 0 and below 1, got {self.keep}")
        if self.keep_within is not None:
            parse_share(self.keep_within)
        if self.keep_data is not None and self.keep is None:
            raise ValueError(f"keep_data {self.keep_data}: keep, the share of its rows, expected")
        held_out_sets(self.data, self.evaluate, self.keep_data)

    @property
    def rows(self) -> int:
        """How many rows the run sees."""
        return self.steps * self.gradient_accumulation_steps * self.batch_size


def as_options(settings: dict) -> list[str]:
    """The words of a command line for the settings that differ from the defaults."""
    words = []
    for setting in fields(TrainConfig):
        default = None if setting.default is MISSING else setting.default
        name, value = f"--{setting.name.replace('_', '-')}", settings.get(setting.name, default)
        if isinstance(value, dict):
            words += [name, *chain(*value.items())] if value else []
        elif isinstance(value, list | tuple):
            words += [name, *map(str, value)] if tuple(value) != default else []
        elif value != default:
            words += [name, *[str(value)] * (value is not True)]
    return words


def options_in(path, leave_out: set[str]) -> list[str]:
    """The settings in a YAML file, of which JSON is a part, as words of a command line.

    Raises ValueError for what is no mapping of settings to values, and OSError.
    """
    import yaml

    check_regular(Path(path), MAX_JSON_BYTES)
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {one_line(error)}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: settings by name expected, got {shown(read)}")
    read = {str(name).replace("-", "_"): value for name, value in read.items()}
    unknown = sorted(read.keys() - {setting.name for setting in fields(TrainConfig)})
    if unknown:
        raise ValueError(f"{path}: settings of `llamapro train` expected, got {unknown}")
    return as_options({name: value for name, value in read.items() if name not in leave_out})


def held_out_sets(data, evaluate: dict[str, str], keep_data: str | None = None) -> dict[str, str]:
    """The data directories that are evaluated on, by name: "domain" is that of a single corpus,
    several have the names of their directories, "kept" is what keeps the base. Raises ValueError
    for a name that is there twice.
    """
    found = {name: path for name, (path, _) in corpora(data).items()}
    if len(found) == 1:
        found = dict(zip(["domain"], found.values(), strict=True))
    if keep_data is not None:
        if KEPT in found:
            raise ValueError(f"the corpus {KEPT!r} has the name of what is kept; name it else")
        found[KEPT] = keep_data
    for name in evaluate:
        if name in found:
            raise ValueError(f"the held-out set {name!r} is of data; name the further one else")
    return {**found, **evaluate}


def kept_corpora(config: TrainConfig) -> dict[str, str]:
    """The data directories whose rows are kept, by name: samples of the base, and keep_data."""
    found = {name: path for name, (path, _) in corpora(config.data).items() if are_samples(path)}
    return found if config.keep_data is None else {**found, KEPT: config.keep_data}


def with_keep_data(config: TrainConfig) -> TrainConfig:
    """With the share of rows that are kept, and their directory, where they follow from the rest.
    Raises DataError for corpora that are none, and ValueError when all of them are kept."""
    samples, keep = kept_corpora(replace(config, keep_data=None)), config.keep
    if config.keep_within is not None and not samples:
        keep = keep or KEEP
    if len(samples) == len(config.data):
        raise ValueError(f"data to learn from expected, got samples alone: {[*config.data]}")
    return replace(config, keep=keep, keep_data=config.keep_data or (keep and own_samples(config)))


def distilled_share(config: TrainConfig) -> float:
    """The share of the rows of which the base is asked, too."""
    kept, weights = kept_corpora(config), {n: w for n, (_, w) in corpora(config.data).items()}
    learnt = sum(weight for name, weight in weights.items() if name not in kept)
    asked = sum(weights.values()) - learnt + (own_weight(config, learnt) if config.keep_data else 0)
    return asked / (learnt + asked) if config.keep_loss == "kl" else 0.0


def own_weight(config: TrainConfig, learnt: float) -> float:
    """The weight of keep_data beside corpora that are learnt from, of these weights in all."""
    return learnt * config.keep / (1 - config.keep)


def own_samples(config: TrainConfig) -> str:
    """Where the samples stand that a run makes itself."""
    return f"{config.out}-samples"


def parse_share(text: str) -> float:
    """ "1%" or "0.5 %" as a share. Raises ValueError for anything else, and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or not float(match[1]):
        raise ValueError(f"a limit such as 1% expected, above 0, got {text!r}")
    return float(match[1]) / 100


def schedule(config: TrainConfig, step: int) -> float:
    """Learning rate of the step after `step`: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup_ratio * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
