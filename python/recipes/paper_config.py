"""The settings of the paper's experiments, and the rows that follow from them."""

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from llamapro.storage import one_line, shown
from llamapro.train.config import parse_share

SCALES = Path(__file__).with_name("paper_scales")
WAYS = ("full", "lora", "lora_equal", "top_blocks", "experts", "new_blocks")
SFT = "sft"  # all parameters learn to answer, after a row's way of learning the domain
PLACEMENTS = ("top_half", "suffix", "prefix", "importance")  # beside interleaved


@dataclass
class PaperConfig:
    """One scale of the experiments. The defaults of a run's settings are the library's."""

    model: str
    """The base: a model directory, or generated, stories260k, smollm2; a name on the Hub online."""
    domain: str
    """What is taught: a folder of text, or generated, law, mathematics, code."""
    general: tuple[str, ...]
    """What shall be kept: folders of text, or generated, samples of the base, encyclopaedia, books,
    wikitext."""
    tokens: int
    """The tokens of the domain that each run sees, a row's padding among them."""
    counts: tuple[int, ...]
    """How many new blocks are tried, interleaved."""
    blocks: int
    """How many new blocks the other placements have, and those that are kept by replay."""
    lora_rank: int
    """The rank of the adapters beside the matrices of attention; of those beside all matrices it
    follows from the parameters of the new blocks."""
    rates: dict[str, tuple[float, ...]]
    """The learning rates that are swept, by what is trained."""
    original: str | None = None
    """Which of the general sets is replayed as the base's original data."""
    instructions: str | None = None
    """What is answered, after the domain: a file or folder of conversations, or generated, alpaca;
    its learning rates are those of sft."""
    sft_tokens: int = 0
    """The tokens of instructions that each run after the domain sees."""
    data_root: Path | None = None
    """The folder with models/stories260K and text/{legal,math,english}, where they are named."""
    out: Path = Path("runs/paper")
    """The folder of all that is made: report/paper.md, and what is gone on with."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """The seeds of the order of the rows; the first one is swept."""
    shares: tuple[float, ...] = (0.05, 0.25)
    """The shares of the rows that are replayed."""
    within: str = "1%"
    """The limit of --keep-within."""
    batch_size: int = 16
    """How many rows a micro-batch has."""
    gradient_accumulation_steps: int = 1
    """How many micro-batches a step has."""
    seq_len: int = 256
    """How many tokens a row has."""
    packing: Literal["bfd", "wrapped"] = "bfd"
    """How rows are filled."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """The dtype of weights and activations."""
    device: str = "auto"
    """The device; auto is CUDA when there is one."""
    eval_tokens: int = 16384
    """How many tokens of each held-out set are evaluated."""
    evaluations: int = 4
    """How often a run is evaluated, its end among them."""
    tasks: str | None = None
    """The benchmarks of which each row's model of the first seed is asked, with commas between, as
    `llamapro eval` has them; those of DATA/bench where there is a data_root."""
    limit: int | None = None
    """How many questions of each benchmark are asked; all by default."""
    checkpoint_every: int = 100
    """How many steps lie between checkpoints."""
    workers: int = 1
    """How many runs are made at once, each in a process with its share of the threads."""
    bos_token: str | None = None
    """What samples of the base begin with, by default its beginning of sequence."""

    def __post_init__(self):
        counts = ["tokens", "blocks", "lora_rank", "evaluations", "workers"]
        for name in counts + ["sft_tokens"] * (self.instructions is not None):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("general", "counts", "seeds"):
            given = getattr(self, name)
            if not given or len({*given}) < len(given):
                raise ValueError(f"{name}: one or more, each once, expected, got {shown(given)}")
        if self.blocks not in self.counts:
            raise ValueError(f"blocks must be one of counts {self.counts}, got {self.blocks}")
        ways = WAYS if self.instructions is None else (*WAYS, SFT)
        if {*self.rates} != {*ways} or not all(self.rates.values()):
            raise ValueError(f"rates of each of {ways} expected, got {shown(self.rates)}")
        if self.original is not None and self.original not in self.general:
            raise ValueError(f"original must be one of {self.general}, got {self.original!r}")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"shares above 0 and below 1 expected, got {self.shares}")
        parse_share(self.within)


def scales() -> dict[str, PaperConfig]:
    """The scales that come along, by name."""
    return {path.stem: scale(path) for path in sorted(SCALES.glob("*.yaml"))}


def scale(path: Path) -> PaperConfig:
    """The settings in a YAML file. Raises ValueError for what are none."""
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        lists = {name: tuple(v) for name, v in read.items() if isinstance(v, list)}
        rates = {way: tuple(map(float, values)) for way, values in read["rates"].items()}
        unknown = sorted(read.keys() - {setting.name for setting in fields(PaperConfig)})
        if unknown:
            raise ValueError(f"settings of a scale expected, got {unknown}")
        made = PaperConfig(**{**read, **lists, "rates": rates})
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return replace(made, out=made.out / path.stem)


@dataclass(frozen=True)
class Row:
    """One way to teach the base the domain."""

    way: str
    blocks: int = 0
    placement: str | None = None
    replayed: str | None = None  # "original" or "self"
    share: float = 0.0
    within: str | None = None
    sft: bool = False

    @property
    def name(self) -> str:
        """As tables have it."""
        names = {
            "base": "base",
            "full": "full fine-tuning",
            "lora": "LoRA, attention",
            "lora_equal": "LoRA, equal parameters",
            "top_blocks": f"top {self.blocks} of the base",
            "experts": f"{self.blocks} experts",
            "new_blocks": f"+{self.blocks} {str(self.placement).replace('_', ' ')}",
        }
        said = names[self.way]
        if self.replayed:
            said += f", {self.share:.0%} {self.replayed}-replay".replace("original-", "original ")
        said += f", within {self.within}" if self.within else ""
        return said + (", SFT" if self.sft else "")

    @property
    def plain(self) -> "Row":
        """The same without replay: its learning rate is taken."""
        return replace(self, replayed=None, share=0.0, within=None)

    @property
    def swept(self) -> str:
        """The name of its learning rates."""
        return SFT if self.sft else self.way


@dataclass(frozen=True)
class Run:
    """A row at one learning rate, with one seed; start: the run whose model it goes on with."""

    row: Row
    rate: float
    seed: int
    start: "Run | None" = None

    @property
    def name(self) -> str:
        """Of its folder."""
        row = self.row.name.replace(", ", "-").replace(" ", "-").replace("%", "")
        return f"{row}-{self.rate:g}-{self.seed}"


@dataclass
class Table:
    """The rows of a scale, what instructions come after, and what the paper has and the scale does
    not run, with the reason."""

    rows: list[Row]
    sft: list[Row]
    not_run: dict[str, str] = field(default_factory=dict)


def table_of(config: PaperConfig) -> Table:
    """Every row, those without replay first."""
    count, expanded = config.blocks, Row("new_blocks", config.blocks, "interleaved")
    rows = [Row("full"), Row("lora"), Row("lora_equal")]
    rows += [Row("top_blocks", count), Row("experts", count)]
    rows += [replace(expanded, blocks=n) for n in config.counts]
    rows += [replace(expanded, placement=placement) for placement in PLACEMENTS]
    kinds = ["self"] if config.original is None else ["original", "self"]
    for row in (Row("full"), expanded):
        rows += [replace(row, replayed=k, share=s) for k in kinds for s in config.shares]
        most = max(config.shares)
        rows.append(replace(row, replayed="self", share=most, within=config.within))
    sft = [replace(row, sft=True) for row in (Row("base"), Row("full"), expanded)]
    not_run = {
        "TRACE in sequence": "an experiment of its own: `make trace`",
    }
    if config.original is None:
        not_run["replay of original data"] = f"those of {config.model} are not at hand"
    if config.tasks is None:
        not_run["benchmarks"] = "`llamapro eval RUN/final --tasks ...` measures a run's model"
    else:
        not_run["benchmarks of experts"] = "no model directory holds them"
    if config.instructions is None:
        not_run["SFT of base, full and expanded"] = "no instructions are named"
        sft = []
    return Table(rows, sft, not_run)


def steps(config: PaperConfig, row: Row) -> int:
    """As many as show each row the same tokens of the domain: what is replayed comes on top."""
    size = config.batch_size * config.gradient_accumulation_steps * config.seq_len
    tokens = config.sft_tokens if row.sft else config.tokens
    return max(1, math.ceil(round(tokens / (1 - row.share) / size, 6)))
