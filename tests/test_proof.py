import numpy as np
import pytest
import torch
from llamapro import proof
from llamapro.proof import CHUNK, combined, difference, digest, fingerprint


def content(size):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))


def test_every_bit_counts():
    """In a tensor that fills its last word by half, and in a chunk of its own."""
    for before in (torch.zeros(2 * 8 + 4, dtype=torch.uint8), content(8 * CHUNK + 4)[-12:]):
        seen = {digest(before)}
        for place in range(len(before)):
            for bit in range(8):
                changed = before.clone()
                changed[place] ^= 1 << bit
                seen.add(digest(changed))
        assert len(seen) == 8 * len(before) + 1


def test_the_highest_bits_of_two_words_do_not_cancel():
    """A wrapping sum alone does not see two signs that change in the last of four bf16."""
    before = torch.ones(64, dtype=torch.bfloat16)
    changed = before.clone()
    changed[[3, 7]] *= -1
    words = before.view(torch.int64), changed.view(torch.int64)
    odd = proof._multipliers(before.device)[:16]
    assert words[0] @ odd == words[1] @ odd
    assert digest(changed) != digest(before)


def test_places_shape_and_dtype_count():
    before = content(8 * (3 * CHUNK + 5)).view(torch.int64)
    words, chunks, both = before.clone(), before.clone(), before.clone()
    words[[0, 1]] = words[[1, 0]]
    chunks[:CHUNK], chunks[CHUNK : 2 * CHUNK] = before[CHUNK : 2 * CHUNK], before[:CHUNK]
    both[[1, CHUNK]] = both[[CHUNK, 1]]
    shapes = before.view(1, -1), before.view(torch.float64), before[:-1]
    zeros = torch.zeros(3), torch.zeros(4), torch.zeros(0), torch.zeros(())
    digests = {digest(tensor) for tensor in (before, words, chunks, both, *shapes, *zeros)}
    assert len(digests) == 11


@pytest.mark.parametrize("size", [1, 6, 8 * CHUNK, 16 * proof.AT_ONCE["cpu"] + 2])
def test_views_are_what_they_show(size):
    """Also where they start within a word, and where their elements are apart."""
    whole = content(2 * size + 14)
    for view in (whole[3 : 3 + size], whole[8 : 8 + size], whole[1 : 1 + 2 * size : 2]):
        before = view.clone()
        assert digest(view) == digest(before)
        assert torch.equal(view, before)
    matrix = whole[: 6 * (size // 6)].view(3, -1)
    assert digest(matrix.T) == digest(matrix.T.clone())


def test_the_sums_are_those_of_the_formula():
    """In Python's whole numbers, and as a device without products of whole numbers has them."""
    words = content(8 * 2 * CHUNK).view(torch.int64).view(2, CHUNK)
    odd = proof._multipliers(words.device)
    low, high = proof._sums(words).view(2, 2).tolist()
    for chunk in range(2):
        pairs = list(zip(words[chunk].tolist(), odd.tolist(), strict=True))
        assert (low[chunk] - sum(w * m for w, m in pairs)) % 2**64 == 0
        assert (high[chunk] - sum((w >> 32) * m for w, m in pairs)) % 2**64 == 0
    assert (odd % 2 == 1).all() and len(odd.unique()) == CHUNK
    assert torch.equal((words * odd).sum(1), words @ odd)


def test_a_digest_stays_what_it_is():
    """Runs are resumed by other versions."""
    assert digest(torch.arange(100_000).to(torch.bfloat16)) == "2593898563a6286307480d5c4927b7e6"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same():
    for size in (1, 6, 8 * proof.AT_ONCE["cuda"] + 2):
        view = content(size + 3)[3:]
        assert digest(view.cuda()) == digest(view)
        assert digest(content(size + 3).cuda()[3:]) == digest(view)


def test_a_fingerprint_names_what_differs(tiny):
    def frozen(**changes):
        return fingerprint(tiny(**changes).requires_grad_(False))

    before = frozen()
    for change in ({"rope_theta": 5e3}, {"rms_norm_eps": 1e-5}, {"tie_word_embeddings": True}):
        assert next(iter(change)) in difference(before, frozen(**change))
    assert difference(before, frozen(rope_theta=5e3)) == "rope_theta was 10000.0, is 5000.0"
    unused = {"max_position_embeddings": 99, "eos_token_id": 1, "other": {"x": 1}}
    assert difference(before, frozen(**unused)) is None
    model = tiny().requires_grad_(False)
    model.blocks[1].qkv.weight.data[-1, 0] += 1e-6
    changed = difference(before, fingerprint(model))
    assert changed.startswith("model.layers.1.self_attn.v_proj.weight was ")
    assert combined(before) == combined(frozen()) != combined(fingerprint(model))


def test_what_is_trained_is_no_part_of_it(tiny):
    model = tiny()
    assert not any("weight" in name for name in fingerprint(model))
