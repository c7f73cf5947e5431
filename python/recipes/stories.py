"""stories260K, a Llama of 0.26M parameters that tells stories, as a Hugging Face directory.

It comes in the format of llama2.c (https://github.com/karpathy/llama2.c): sizes as int32, then fp32
matrices, of which queries and keys are laid out for rotations of neighbouring pairs.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from llamapro import Llama, LlamaConfig
from llamapro.model import stock_tensors
from llamapro.storage import new_directory

BEGIN, END, BYTES = 1, 2, 3  # ids: <s>, </s>, and the first of 256 single bytes
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def convert(source: Path, out: Path) -> Path:
    """Make `out` of the folder with stories260K.bin and tok512.bin, unless it is there."""
    if out.exists():
        return out
    with new_directory(out) as directory:
        model = _model((source / "stories260K.bin").read_bytes())
        _tokenizer((source / "tok512.bin").read_bytes(), model.config.vocab_size).save(
            str(directory / "tokenizer.json")
        )
        saved = model.save_pretrained(directory / "model")
        for file in saved.iterdir():
            file.rename(directory / file.name)
        saved.rmdir()
    return out


def _model(content: bytes) -> Llama:
    width, inner, layers, heads, kv_heads, vocab, length = struct.unpack_from("7i", content)
    values = torch.from_numpy(np.frombuffer(content, np.float32, offset=28).copy())
    keys = width // heads * kv_heads

    def take(*shape):
        nonlocal values
        count = int(np.prod(shape))
        taken, values = values[:count].view(shape), values[count:]
        return taken

    names = {"input_layernorm": (width,), "self_attn.q_proj": (width, width)}
    names |= {"self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width)}
    names |= {"self_attn.o_proj": (width, width), "post_attention_layernorm": (width,)}
    names |= {"mlp.gate_proj": (inner, width), "mlp.down_proj": (width, inner)}
    names |= {"mlp.up_proj": (inner, width)}
    tensors = {"model.embed_tokens.weight": take(vocab, width)}
    for name, shape in names.items():
        for i, matrix in enumerate(take(layers, *shape)):
            tensors[f"model.layers.{i}.{name}.weight"] = matrix
    tensors["model.norm.weight"] = take(width)
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = _halves_apart(tensors[name], width // heads)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
    )
    model = Llama(config)
    with torch.no_grad():
        for name, tensor in stock_tensors(model).items():
            tensor.copy_(tensors[name])
    return model


def _halves_apart(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of each head with the first of every pair before the second ones."""
    return matrix.view(-1, dim // 2, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def _tokenizer(content: bytes, vocab: int):
    """A sentencepiece model's pieces: pairs are merged by the score of what they make."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces, scores, at = [], [], 4
    for _ in range(vocab):
        score, size = struct.unpack_from("fi", content, at)
        pieces.append(content[at + 8 : at + 8 + size].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + size
    pieces[:BYTES] = ["<unk>", "<s>", "</s>"]
    pieces[BYTES : BYTES + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [piece.replace(" ", SPACE) for piece in pieces]
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranked = sorted(range(BYTES + 256, vocab), key=lambda i: -scores[i])
    merges = [
        (pieces[i][:cut], pieces[i][cut:])
        for i in ranked
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in ids and pieces[i][cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:BYTES]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BEGIN)]
    )
    return tokenizer
