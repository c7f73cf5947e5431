"""A Llama, and a run, whose frozen matrices are held in 8 bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from llamapro import Llama, cli, expand, planner
from llamapro.frozen import FORMS, FrozenLinear, matrices_in_8_bits
from llamapro.hf import Checkpoint
from llamapro.model_files import CheckpointError
from llamapro.new_blocks import load_new_blocks, save_new_blocks
from llamapro.proof import fingerprint, frozen_verdict
from llamapro.train import loop as module
from llamapro.train import train
from llamapro.train.loop import take_step
from run_files import records
from test_planner import LLAMA2_7B, SMOLLM2, measure, on_linux, workload

from llamapro_kernels import frozen

IN_8_BITS = FORMS[1:]


@pytest.fixture
def units(monkeypatch):
    monkeypatch.setattr(frozen, "has_units", lambda device: True)


@pytest.fixture
def path(tiny, tmp_path):
    """An expanded model in bf16; sizes that 8 bits are multiplied in."""
    model = expand(tiny(), new_blocks=2).to(torch.bfloat16)
    return model.save_pretrained(tmp_path / "expanded-in-bf16")


def tokens():
    return torch.arange(32).view(2, 16)


@pytest.mark.parametrize("form", IN_8_BITS)
def test_loading_in_8_bits_is_loading_and_freezing(path, form, units):
    loaded, frozen_later = Llama.from_pretrained(path, frozen=form), Llama.from_pretrained(path)
    frozen_later.train_new_blocks_only()
    frozen_later.freeze_in_8_bits(compact=form == "8bit-compact")
    assert fingerprint(loaded) == fingerprint(frozen_later)
    assert len(list(matrices_in_8_bits(loaded))) == 4 * 4  # of four blocks, and not of the new ones
    for i, block in enumerate(loaded.blocks):
        assert isinstance(block.qkv, FrozenLinear) == (i not in loaded.config.new_blocks)
    losses = [model.loss(tokens(), tokens()) for model in (loaded, frozen_later)]
    assert torch.equal(*losses)
    losses[0].backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    assert loaded.generate(tokens()[:, :4], 3).shape == (2, 7)


def test_one_layout_is_half_of_two(path, units):
    two, one = (
        sum(m.nbytes for m in matrices_in_8_bits(Llama.from_pretrained(path, frozen=form)))
        for form in IN_8_BITS
    )
    scales = sum(4 * len(m) for m in matrices_in_8_bits(Llama.from_pretrained(path, frozen="8bit")))
    assert two - scales == 2 * (one - scales)


def test_a_matrix_follows_its_module(path):
    model = Llama.from_pretrained(path, frozen="8bit").float()
    held = model.blocks[0].qkv.weight
    assert held.values.dtype == torch.float8_e4m3fn and held.scale.dtype == torch.float32
    assert model.to("meta").blocks[0].qkv.weight.values.is_meta


@pytest.mark.parametrize("form", IN_8_BITS)
def test_16_bits_are_read_from_the_files_again(path, tiny, tmp_path, form):
    model, whole = Llama.from_pretrained(path, frozen=form), Llama.from_pretrained(path)
    torch.manual_seed(7)
    other = expand(tiny(initializer_range=0.3), new_blocks=2).to(torch.bfloat16)
    before = fingerprint(model)
    with pytest.raises(CheckpointError, match="block 0's qkv is another than in the model"):
        model.restore_16_bits(other.save_pretrained(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="a model of the same shapes expected"):
        model.restore_16_bits(tiny(hidden_size=16).save_pretrained(tmp_path / "narrow"))
    assert fingerprint(model) == before
    model.restore_16_bits(path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[1] for name in trained} == {"2", "5"}


def test_8_bits_are_never_written(path, tmp_path):
    model = Llama.from_pretrained(path, frozen="8bit")
    for write in (model.save_pretrained, lambda out: save_new_blocks(model, out)):
        with pytest.raises(ValueError, match=r"restore_16_bits\(path\) reads them"):
            write(tmp_path / "out")
    with pytest.raises(ValueError, match="restore_16_bits"):
        load_new_blocks(model, tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_held_in_8_bits(path, tiny, config):
    with pytest.raises(ValueError, match="frozen matrices expected, got none"):
        Llama.from_pretrained(path).freeze_in_8_bits()
    with pytest.raises(ValueError, match="no new block: expand"):
        Llama.from_pretrained(tiny().save_pretrained(path.parent / "base"), frozen="8bit")
    with pytest.raises(ValueError, match="frozen must be one of"):
        Llama.from_pretrained(path, frozen="4bit")
    with pytest.raises(ValueError, match="frozen must be bf16 where everything is trained"):
        replace(config, trainable="all", frozen="8bit")


@pytest.mark.parametrize("form", IN_8_BITS)
def test_a_run_keeps_the_bases_own_bits_and_resumes_bitwise(config, tmp_path, monkeypatch, form):
    config = replace(config, frozen=form)
    summary = train(config)
    assert summary["perplexity_after"]["domain"] < 0.8 * summary["perplexity_before"]["domain"]
    assert frozen_verdict(Path(config.out)).endswith("bit-identical")
    assert summary["parameters"] == sum(
        p.numel() for p in Llama.from_pretrained(config.model).parameters()
    )
    other = replace(config, out=str(tmp_path / "other"))

    def stop(*arguments):
        if arguments[-1] == 13:
            raise MemoryError("stopped by the test")
        return take_step(*arguments)

    monkeypatch.setattr(module, "take_step", stop)
    with pytest.raises(MemoryError):
        train(other)
    monkeypatch.undo()
    train(other, resume=True)
    assert records(other) == records(config) and len(records(config)) == 20
    final = "final/model.safetensors"
    assert (tmp_path / "other" / final).read_bytes() == (Path(config.out) / final).read_bytes()
    with pytest.raises(ValueError, match=f"frozen was '{form}', got 'bf16'"):
        train(replace(config, frozen="bf16"), resume=True)


def test_a_matrix_that_changed_reaches_no_checkpoint(config, monkeypatch):
    def change(keeper, *rest):
        metrics = take_step(keeper, *rest)
        if rest[-1] == 12:
            keeper.model.blocks[3].gate_up.weight.values.view(torch.uint8)[0, 0] ^= 1
        return metrics

    monkeypatch.setattr(module, "take_step", change)
    message = r"step 20: what is frozen changed: model\.layers\.3\.mlp\.gate_proj\.weight was"
    with pytest.raises(RuntimeError, match=message):
        train(replace(config, frozen="8bit"))


def test_other_files_of_the_base_are_noticed(config, monkeypatch):
    """A bit that rounding to 8 bits keeps: the largest exponent's."""

    def change(model, *rest):
        if rest[-1] == 12:
            file = Path(config.model) / "model.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 0x40
            file.write_bytes(content)
        return take_step(model, *rest)

    monkeypatch.setattr(module, "take_step", change)
    with pytest.raises(RuntimeError, match="changed during the run"):
        train(replace(config, frozen="8bit"))
    assert not (Path(config.out) / "final").exists()


def test_the_command_line_evaluates_and_generates_over_8_bits(config, capsys, monkeypatch):
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(61)}, unk_token="t0")
    tokenizers.Tokenizer(words).save(f"{config.model}/tokenizer.json")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["llamapro", *arguments])
        cli.main()
        return capsys.readouterr().out

    options = ["--dtype", "bfloat16", "--device", "cpu", "--frozen"]
    evaluation = ["eval", config.model, *config.data, "--seq-len", "16"]
    for command in (evaluation, ["generate", config.model, "t7"]):
        said = {form: run(*command, *options, form) for form in FORMS}
        assert said["8bit"] == said["8bit-compact"] != said["bf16"], said


# ---- what it will cost


@pytest.mark.parametrize("form", FORMS)
def test_flops_are_the_same(form):
    work = replace(workload(LLAMA2_7B, 8, "interleaved")[1], frozen=form)
    assert planner.flops(work) == planner.flops(replace(work, frozen="bf16"))


@on_linux
def test_what_8_bits_save_is_what_was_planned():
    """To 5 % of what was measured beside the same run in 16 bits."""
    base = replace(SMOLLM2, num_hidden_layers=15)
    work = workload(base, 3, "interleaved", 1, 256)[1]
    work = replace(work, dtype=torch.bfloat16, device="cpu")
    recompute = ["none"] * len(work.blocks)
    forms = [replace(work, frozen=form) for form in ("bf16", "8bit-compact")]
    planned = [planner.memory(form, recompute)["total"] for form in forms]
    measured = [measure(form, "interleaved", recompute, base) for form in forms]
    print(f"planned {planned}, measured {measured}")
    assert planned[0] - planned[1] == pytest.approx(measured[0] - measured[1], rel=0.05)


@pytest.mark.parametrize("form, layouts", [("8bit", 2), ("8bit-compact", 1)])
def test_the_planned_bytes_are_those_of_the_matrices(form, layouts, units):
    with torch.device("meta"):
        model = expand(Llama(replace(SMOLLM2, num_hidden_layers=2)), 1)
    model.train_new_blocks_only()
    work = planner.Workload(model.config, (2,), 1, 64, device="cuda")
    before = planner.memory(work, ["none"] * 3)["weights"]
    model.bfloat16().freeze_in_8_bits(compact=form == "8bit-compact")
    held = sum(m.nbytes for m in matrices_in_8_bits(model))
    kept = 2 * sum(p.numel() for p in model.parameters())
    assert planner.memory(replace(work, frozen=form), ["none"] * 3)["weights"] == held + kept
    matrices = 2 * planner.block_shape(model.config).matrices
    assert before - held - kept == matrices * (2 - layouts) - 4 * sum(
        len(m) for m in matrices_in_8_bits(model)
    )


def test_a_plan_names_the_form_that_recomputes_least():
    limit = planner.usable("24GB")
    work = planner.Workload(LLAMA2_7B, None, 1, 2048)
    text = planner.plan(work, 4, ("interleaved",), limit=limit)
    assert "| 8bit-compact | " in text and "does not fit" not in text
    for form in ("bf16", "8bit"):
        with pytest.raises(ValueError, match=r"needs at least 28\.41 GB"):  # as the README says
            planner.plan(work, 4, ("interleaved",), limit=limit, frozen=form)
    work = planner.Workload(LLAMA2_7B, None, 2, 4096)
    text = planner.plan(work, 8, ("interleaved",), limit=planner.usable("48GB"))
    assert "| 8bit-compact | " in text and "does not fit" not in text
    roomy = planner.plan(work, 8, ("interleaved",), limit=76e9)
    assert "| bf16 " in roomy and "8bit" not in roomy


def test_training_takes_another_form_only_when_told(config, monkeypatch):
    shape = Checkpoint(config.model).config
    sizes = config.batch_size, config.seq_len, torch.bfloat16, "cpu"
    work = planner.Workload(shape, tuple(shape.new_blocks), *sizes, "8bit-compact")
    needed = planner.memory(work, ["block"] * len(work.blocks))["total"]
    monkeypatch.setattr(module, "resident_memory", lambda: 0)
    config = replace(config, memory=f"{needed * 1.001 / planner.USABLE / 1e3:.3f}KB")
    with pytest.raises(ValueError, match=r"needs at least .*; --frozen 8bit fits"):
        train(config)
    assert not Path(config.out).exists()
    train(replace(config, frozen="8bit-compact", steps=1))
