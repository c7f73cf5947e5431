"""The Llama: blocks, loss and generation. Mathematics is in llamapro_kernels."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

import llamapro_kernels as lk
from llamapro.config import PARTS, LlamaConfig, block_shapes
from llamapro.frozen import FORMS, FrozenLinear, check_16_bits, freeze_in_8_bits
from llamapro.generate import generate
from llamapro.hf import Checkpoint, entries_of, fill, write_model
from llamapro.model_files import CheckpointError
from llamapro.storage import new_directory


class Block(nn.Module):
    """One Llama block; q, k, v are rows of one matrix, gate and up of another.

    `recompute` is what backward computes a second time: "none", "mlp" or "block", see
    `lk.decoder_block`, and `window` how many tokens a query sees, None for all before it.
    """

    def __init__(self, config: LlamaConfig, window: int | None = None):
        super().__init__()
        width, dim = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.eps, self.window, self.recompute = config.rms_norm_eps, window, "none"
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, queries + 2 * keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, width, bias=config.attention_bias)
        normed = config.architecture.head_norms
        self.q_norm = nn.Parameter(torch.ones(dim)) if normed else None
        self.k_norm = nn.Parameter(torch.ones(dim)) if normed else None
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=config.mlp_bias)

    def forward(self, x, cos, sin, cu_seqlens=None, cache=None):
        weights = lk.BlockWeights(
            self.attention_norm,
            self.qkv.weight,
            self.o_proj.weight,
            self.mlp_norm,
            self.gate_up.weight,
            self.down_proj.weight,
            self.qkv.bias,
            self.o_proj.bias,
            self.gate_up.bias,
            self.down_proj.bias,
            self.q_norm,
            self.k_norm,
        )
        return lk.decoder_block(
            x,
            weights,
            cos,
            sin,
            eps=self.eps,
            window=self.window,
            cu_seqlens=cu_seqlens,
            cache=cache,
            recompute=self.recompute,
        )

    @torch.no_grad()
    def make_identity(self) -> None:
        """Zero what the block adds to the residual, so that its output is its input."""
        for projection in (self.o_proj, self.down_proj):
            for parameter in projection.parameters():
                parameter.zero_()


class Llama(nn.Module):
    """A Llama with random weights; `from_pretrained` loads one.

    Tied embeddings are one parameter: `lm_head.weight is embed_tokens.weight`.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.skipped = config, frozenset()  # of the blocks, by position
        weight = torch.empty(config.vocab_size, config.hidden_size)  # initialised below
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()
        if self.norm.is_meta:
            return  # there is nothing to initialise, and meta's normal_ would load the compiler
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        path,
        dtype: torch.dtype | None = None,
        device="cpu",
        frozen: str = "bf16",
        *,
        placed: Callable[["Llama", int], None] | None = None,
    ) -> "Llama":
        """Load a Hugging Face directory of a Llama, Mistral, Qwen2 or Qwen3, or a Hub name when
        online.

        dtype: None keeps the checkpoint's. frozen: "8bit" or "8bit-compact" loads an expanded
        model of which the new blocks alone train, as `freeze_in_8_bits` leaves it, a block at a
        time, so that the base is never there in 16 bits. placed: is told of each block, by its
        position, as soon as it is there, and may shard it before the next one is read. The
        configuration and the name, shape and length of every tensor are checked before a weight is
        read; CheckpointError or ValueError says what was got and what was expected.
        """
        if frozen not in FORMS:
            raise ValueError(f"frozen must be one of {FORMS}, got {frozen!r}")
        checkpoint = Checkpoint(path)
        with torch.device("meta"):
            model = cls(checkpoint.config).to(dtype or checkpoint.dtype)
        blocks, model.blocks = model.blocks, nn.ModuleList()
        model.to_empty(device=device)
        model.tie()
        fill(stock_tensors(model), checkpoint)
        model.blocks = blocks
        if frozen != "bf16":
            model.train_new_blocks_only()
        for i, block in enumerate(blocks):
            block.to_empty(device=device)
            fill(block_tensors(block, checkpoint.config, f"model.layers.{i}."), checkpoint)
            if frozen != "bf16":
                freeze_in_8_bits([block], frozen == "8bit-compact")
            if placed is not None:
                placed(model, i)
        checkpoint.close()
        return model

    def save_pretrained(self, out, files_from=None) -> Path:
        """Write a plain Hugging Face model of its architecture to the new directory `out`, whole or
        not at all.

        files_from: a model directory whose tokenizer and generation files are copied along.
        Raises FileExistsError when `out` exists, OSError when the disk is too small, ValueError for
        a model with matrices in 8 bits.
        """
        check_16_bits(self, "saving it")
        if self.config.tie_word_embeddings and self.lm_head.weight is not self.embed_tokens.weight:
            raise ValueError(
                "embeddings are tied, but lm_head.weight is another parameter: call tie()"
            )
        entries = entries_of({name: t.detach() for name, t in stock_tensors(self).items()})
        with new_directory(out, needs=sum(e.nbytes for e in entries)) as directory:
            write_model(directory, self.config, entries, files_from=files_from)
        return Path(out)

    def tie(self) -> None:
        """Make embeddings and head one parameter, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, tokens, cu_seqlens=None, cache=None) -> torch.Tensor:
        """Final normed states: tokens (B, T) -> (B, T, N). Each document has positions from 0."""
        self._check_tokens(tokens)
        x = self._through(range(len(self.blocks)), self.embed_tokens(tokens), cu_seqlens, cache)
        if cache:
            cache.length = cache.length + tokens.shape[1]
        return lk.rms_norm(x, self.norm, self.config.rms_norm_eps)

    def hidden_and_base(self, tokens, cu_seqlens=None, *, base_tokens, base_cu_seqlens=None):
        """Final normed states of tokens (B, T), and the base's of the last of them, base_tokens
        (b, t), which are laid out anew, without a graph: (B, T, N) and (b, t, N).

        The base is this model with its new blocks switched off; what lies below the first of them
        is computed once for both.
        """
        self._check_tokens(tokens)
        new, eps = self._new_blocks(), self.config.rms_norm_eps
        x = self._through(range(new[0]), self.embed_tokens(tokens), cu_seqlens)
        above = range(new[0], len(self.blocks))
        with torch.no_grad():
            base = x.flatten(0, 1)[-base_tokens.numel() :].reshape(*base_tokens.shape, -1)
            base = self._through((i for i in above if i not in new), base, base_cu_seqlens)
            base = lk.rms_norm(base, self.norm, eps)
        return lk.rms_norm(self._through(above, x, cu_seqlens), self.norm, eps), base

    def _through(self, places, x, cu_seqlens=None, cache=None) -> torch.Tensor:
        """x (B, T, N) after the blocks at these places."""
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff()
            positions -= cu_seqlens[:-1].repeat_interleave(lengths, output_size=x.shape[1])
        # A cache's length is a number, or (B, 1) where its rows have lengths of their own.
        cos, sin = rope_table(self.config, positions + (cache.length if cache else 0))
        for i in places:
            if i not in self.skipped:
                held = cache.of_block(i) if cache else None
                x = self.blocks[i](x, cos, sin, cu_seqlens, held)
        return x

    @contextmanager
    def new_blocks_off(self) -> Iterator[None]:
        """Inside `with`, the model is the base that it was expanded from, bit for bit: new blocks
        are skipped. Raises ValueError when there are none."""
        before, self.skipped = self.skipped, frozenset(self._new_blocks())
        try:
            yield
        finally:
            self.skipped = before

    def as_base(self):
        """As `new_blocks_off`; a model that has none is its own base."""
        return self.new_blocks_off() if self.config.new_blocks else nullcontext()

    def _new_blocks(self):
        if not self.config.new_blocks:
            raise ValueError("no new block: expand the model first")
        return self.config.new_blocks

    def forward(self, tokens, cu_seqlens=None, cache=None) -> torch.Tensor:
        """Logits: tokens (B, T) int64 -> (B, T, V) in the model's dtype.

        cu_seqlens: packed documents, see `lk.flash_attention`. cache: a `KVCache` to go on from.
        """
        return self.lm_head(self.hidden(tokens, cu_seqlens, cache))

    def loss(self, tokens, targets, *, cu_seqlens=None, reduction="mean") -> torch.Tensor:
        """Cross-entropy, fp32: the sum over valid targets divided by their number.

        tokens, targets: (B, T); targets of -100 do not count. reduction "sum" leaves the division
        to a caller who accumulates several batches.
        """
        hidden = self.hidden(tokens, cu_seqlens)
        return lk.linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)

    def train_new_blocks_only(self) -> None:
        """Freeze everything but the blocks that expansion added.

        Raises ValueError when there are none.
        """
        new = self._new_blocks()
        self.requires_grad_(False)
        for i in new:
            self.blocks[i].requires_grad_(True)

    def freeze_in_8_bits(self, compact: bool = False) -> None:
        """Hold the matrices of blocks that are frozen by now in 8 bits, see `lk.FrozenMatrix`.

        compact: in half of the memory, and somewhat slower. Embeddings and head stay as they are.
        Raises ValueError when no matrix is frozen.
        """
        if not freeze_in_8_bits(self.blocks, compact):
            raise ValueError(
                "frozen matrices expected, got none: train_new_blocks_only() freezes the base"
            )

    def restore_16_bits(self, path) -> None:
        """Read the matrices that are held in 8 bits from the files that they come from again.

        Raises CheckpointError for another model, which leaves this one as it is.
        """
        checkpoint = Checkpoint(path)
        if block_shapes(checkpoint.config) != block_shapes(self.config):
            raise CheckpointError(f"{path}: a model of the same shapes expected")
        for check in (True, False):
            for i, block in enumerate(self.blocks):
                self._restore_block(block, checkpoint, i, check)
        checkpoint.close()

    def _restore_block(self, block, checkpoint, i, check):
        held = {name: getattr(block, name) for name in PARTS}
        held = {name: linear for name, linear in held.items() if isinstance(linear, FrozenLinear)}
        read = load_block(checkpoint, i, self.norm.dtype) if held else None
        for name, linear in held.items():
            fresh = getattr(read, name).requires_grad_(False)
            if not check:
                setattr(block, name, fresh.to(self.norm.device))
            elif not linear.weight.holds(fresh.weight):
                raise CheckpointError(
                    f"{checkpoint.path}: block {i}'s {name} is another than in the model"
                )

    def generate(
        self, tokens, max_new_tokens, *, temperature=0.0, top_p=1.0, stop=None, generator=None
    ) -> torch.Tensor:
        """Continue tokens (B, T) by up to max_new_tokens, see `llamapro.generate.generate`."""
        return generate(
            self,
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            generator=generator,
        )

    def _check_tokens(self, tokens):
        """The values only where that costs no wait for the device."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (B, T), got {tuple(tokens.shape)}")
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
            return
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= self.config.vocab_size:
            raise IndexError(
                f"token ids must lie in 0..{self.config.vocab_size - 1}, got {low}..{high}"
            )


def stock_tensors(model: Llama, places=None) -> dict[str, torch.Tensor]:
    """Every tensor under its stock Hugging Face name; parts of fused matrices as views.

    places: positions of the blocks whose tensors are wanted, by default all.
    """
    tensors = {"model.embed_tokens.weight": model.embed_tokens.weight}
    for i in range(len(model.blocks)) if places is None else places:
        tensors |= block_tensors(model.blocks[i], model.config, f"model.layers.{i}.")
    tensors["model.norm.weight"] = model.norm
    if not model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = model.lm_head.weight
    return tensors


def block_tensors(block: Block, config: LlamaConfig, prefix: str) -> dict[str, torch.Tensor]:
    """A block's tensors under their stock names; what it holds in 8 bits as a FrozenMatrix."""
    shapes = block_shapes(config)
    tensors = {
        f"{prefix}input_layernorm.weight": block.attention_norm,
        f"{prefix}post_attention_layernorm.weight": block.mlp_norm,
    }
    if config.architecture.head_norms:
        tensors[f"{prefix}self_attn.q_norm.weight"] = block.q_norm
        tensors[f"{prefix}self_attn.k_norm.weight"] = block.k_norm
    for matrix, names in PARTS.items():
        rows = [shapes[f"{name}.weight"][0] for name in names]
        linear = getattr(block, matrix)
        for kind, held in (("weight", linear.weight), ("bias", linear.bias)):
            pieces = zip(names, () if held is None else held.split(rows), strict=held is not None)
            tensors |= {f"{prefix}{name}.{kind}": piece for name, piece in pieces}
    return tensors


@torch.no_grad()
def load_block(checkpoint: Checkpoint, index: int, dtype: torch.dtype) -> Block:
    """One block alone, on the CPU."""
    with torch.device("meta"):
        block = Block(checkpoint.config, checkpoint.config.windows[index]).to(dtype)
    block.to_empty(device="cpu")
    fill(block_tensors(block, checkpoint.config, f"model.layers.{index}."), checkpoint)
    return block


def rope_table(config: LlamaConfig, positions: torch.Tensor):
    """cos and sin, each (..., D) fp32, of positions (...).

    Computed where it is used: a buffer would be rounded by `model.to(torch.bfloat16)`.
    """
    dimensions = torch.arange(0, config.head_dim, 2, device=positions.device)
    exponents = dimensions.float() / config.head_dim
    frequencies = _scaled(1.0 / config.rope_theta**exponents, config.rope_scaling)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _scaled(frequencies, scaling):
    """Rope scaling: "linear" stretches every wave, "llama3" the long ones (Llama 3.1 report)."""
    if scaling is None or scaling["rope_type"] == "default":
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    trained, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / factor + smooth * frequencies
