import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import Llama, expand, planner
from llamapro.data.mixture import Mixture
from llamapro.data.tokens import Batch, DataError, TokenDataset
from llamapro.hf import Checkpoint
from llamapro.model_files import CheckpointError
from llamapro.ranks import ALONE
from llamapro.storage import lock
from llamapro.train import Interrupted, train
from llamapro.train import loop as module
from llamapro.train import run as run_module
from llamapro.train.config import schedule
from llamapro.train.keep import Keeper
from llamapro.train.loop import take_step
from llamapro.train.optimizer import Optimizer
from run_files import flip, one_document, records
from safetensors.torch import load_file, save_file

import llamapro_kernels as lk


def optimizer_of(model, **changes):
    return Optimizer(
        model, **{"max_grad_norm": 1.0, "weight_decay": 0.0, "betas": (0.9, 0.95), **changes}
    )


def test_it_learns_and_leaves_the_frozen_alone(config, tmp_path):
    summary = train(config)
    assert summary["perplexity_after"]["domain"] < 0.8 * summary["perplexity_before"]["domain"]
    before = load_file(tmp_path / "expanded" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    new = tuple(f"model.layers.{i}." for i in Checkpoint(config.model).config.new_blocks)
    for name in before:
        assert torch.equal(before[name], after[name]) != name.startswith(new), name
        assert before[name].dtype == after[name].dtype


def test_the_trained_model_is_plain_hugging_face(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    train(config)
    final = tmp_path / "run" / "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    ours = Llama.from_pretrained(final, dtype=torch.float32)
    tokens = torch.randint(61, (2, 12))
    with torch.no_grad():
        expected = theirs(tokens).logits
        # fp32: rounding of a handful of operations a block
        assert (ours(tokens) - expected).norm() < 1e-5 * expected.norm()


def test_only_trainable_parameters_have_masters_and_moments(config):
    train(config)
    (*_, newest) = run_module.checkpoints(config.out)
    names = load_file(newest / "state.safetensors")
    assert {name.split(".")[0] for name in names} == {"master", "exp_avg", "exp_avg_sq"}
    assert {name.split(".")[2] for name in names} == {"2", "5"}
    assert all(tensor.dtype == torch.float32 for tensor in names.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resume_is_bitwise(config, tmp_path, monkeypatch, dtype):
    """Stopped after step 13, resumed from step 10: the same losses, evaluations and weights."""
    config = replace(config, dtype=dtype)
    train(config)
    other = replace(config, out=str(tmp_path / "other"))

    def stop(*arguments):
        if arguments[-1] == 13:
            raise MemoryError("stopped by the test")
        return take_step(*arguments)

    monkeypatch.setattr(module, "take_step", stop)
    with pytest.raises(MemoryError):
        train(other)
    monkeypatch.setattr(module, "take_step", take_step)
    assert max(records(other)) == 13
    train(other, resume=True)
    assert records(other) == records(config) and len(records(config)) == 20
    assert records(other, "perplexity") == records(config, "perplexity")
    final = "final/model.safetensors"
    assert (tmp_path / "run" / final).read_bytes() == (tmp_path / "other" / final).read_bytes()


def test_a_memory_limit_changes_what_is_kept_and_no_loss(config, tmp_path, monkeypatch):
    """The planner's policies reach the blocks; what does not fit is refused before the run."""
    train(config)
    model = Checkpoint(config.model).config
    work = planner.Workload(
        model, (2, 5), config.batch_size, config.seq_len, getattr(torch, config.dtype), "cpu"
    )
    light = planner.memory(work, ["mlp"] * 6)["total"]
    monkeypatch.setattr(module, "resident_memory", lambda: 0)
    seen = []
    monkeypatch.setattr(lk, "decoder_block", spy(lk.decoder_block, seen))
    limited = replace(config, out=str(tmp_path / "limited"), memory=f"{light / 0.949 / 1e9:.9f}GB")
    train(limited)
    assert {"none", "mlp"} <= set(seen) and records(limited) == records(config)
    with pytest.raises(ValueError, match="needs at least"):
        train(replace(config, out=str(tmp_path / "none"), memory="1KB"))
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="80GB or 24GiB expected, got '80'"):
        replace(config, memory="80")


def spy(function, seen):
    def call(*args, **options):
        seen.append(options["recompute"])
        return function(*args, **options)

    return call


def test_accumulation_is_exact(config, tiny):
    """Micro-batches with unequal numbers of valid targets: the gradient of one large batch."""
    rows = TokenDataset(one_document(torch.randint(61, (4000,)).numpy()), 16)
    tokens, targets = rows.batch(0, 4)[:2]
    targets = targets.masked_fill(torch.arange(64).view(4, 16) < 23, -100)
    gradients = []
    for size in (4, 1):
        model = tiny().double()
        micro = replace(config, batch_size=size, gradient_accumulation_steps=4 // size)

        class Fixed:
            def batch(self, start, count, part):
                return Batch(tokens[start : start + count], targets[start : start + count])

        optimizer = optimizer_of(model, max_grad_norm=1e9)
        grads = {}
        optimizer.step = lambda *_, o=optimizer, g=grads: g.update(
            {n: m.grad.clone() for n, (_, m) in o.pairs.items()}
        )
        metrics = take_step(Keeper(micro, model), optimizer, Fixed(), micro, ALONE, 0)
        gradients.append((metrics["loss"], grads))
    (loss, whole), (accumulated_loss, accumulated) = gradients
    assert accumulated_loss == pytest.approx(loss, rel=1e-6)
    for name in whole:  # four fp32 roundings of the masters' gradients
        torch.testing.assert_close(accumulated[name], whole[name], rtol=1e-5, atol=1e-7)


def test_bf16_weights_follow_fp32_masters(config):
    """Updates far below bf16's resolution add up."""
    model = Llama.from_pretrained(config.model)
    model.train_new_blocks_only()
    optimizer = optimizer_of(model)
    name, (parameter, master) = next(iter(optimizer.pairs.items()))
    assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
    start = parameter.detach().float().clone()
    for _ in range(100):
        for _, m in optimizer.pairs.values():
            m.grad = torch.ones_like(m)
        optimizer.step(1e-4, torch.zeros(()), 1)
    moved = start - parameter.detach().float()
    assert name == "blocks.2.attention_norm"
    # 100 steps of 1e-4 from 1: to half a spacing of bf16 below 1. Alone, bf16 would not move.
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=0, atol=2**-9 + 1e-6)
    assert (moved > 0).all()


def test_schedule_warms_up_and_falls_as_a_cosine(config):
    config = replace(config, steps=100, warmup_ratio=0.06)
    rates = [schedule(config, step) for step in range(100)]
    assert rates[5] == max(rates) == config.learning_rate
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[0] < rates[1]
    assert rates[6 + 47] == pytest.approx(config.learning_rate / 2)  # half of the way down
    assert 0 < rates[-1] < 0.001 * config.learning_rate  # (1 + cos(pi 93 / 94)) / 2 is 0.0003


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(config, monkeypatch):
    def interrupted(*arguments):
        if arguments[-1] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, "take_step", interrupted)
    with pytest.raises(Interrupted, match=r"stopped after step 4; .* --resume"):
        train(config)
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in run_module.checkpoints(config.out)] == ["step-00000004"]
    monkeypatch.setattr(module, "take_step", take_step)
    train(config, resume=True)
    assert list(records(config)) == list(range(1, 21))


def test_resume_keeps_the_dtype_that_auto_took(config, monkeypatch):
    """The choice is a measurement; a second one may come out otherwise."""
    config = replace(config, dtype="auto")
    monkeypatch.setattr(run_module, "pick_dtype", lambda device: "bfloat16")
    train(config)
    assert run_module.settings(config.out)["dtype"] == "bfloat16"
    monkeypatch.setattr(run_module, "pick_dtype", lambda device: "float32")
    assert train(config, resume=True)["dtype"] == "bfloat16"


def damage_tensor(file):
    file.with_name("state.safetensors").write_bytes(b"pickle")


def damage_shape(file):
    tensors = load_file(file.with_name("state.safetensors"))
    name = next(name for name in tensors if name.startswith("exp_avg."))
    save_file({**tensors, name: tensors[name][:1].clone()}, file.with_name("state.safetensors"))


def damage_json(file):
    file.write_text("{")


@pytest.mark.parametrize("damage", [damage_tensor, damage_shape, damage_json])
def test_a_damaged_checkpoint_is_named(config, tmp_path, damage):
    train(config)
    damage(tmp_path / "run" / "checkpoints" / "step-00000020" / "state.json")
    with pytest.raises(CheckpointError, match=r"20 is damaged: .* to go on from step-00000010"):
        train(config, resume=True)


def test_what_does_not_belong_there_is_ignored(config, tmp_path):
    train(config)
    before = records(config)
    (tmp_path / "run" / "checkpoints" / "step-notes.txt").write_text("mine")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 21, "lo')  # power was lost here
    train(config, resume=True)
    assert records(config) == before
    assert (tmp_path / "run" / "checkpoints" / "step-notes.txt").exists()


def test_an_evaluation_that_was_lost_is_made_again(config, tmp_path):
    summary = train(config)
    (tmp_path / "run" / "summary.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:-1]))
    again = train(config, resume=True)
    assert again["perplexity_after"] == summary["perplexity_after"]


def test_two_processes_do_not_share_a_run(config, tmp_path):
    train(config)
    with lock(tmp_path / "run"), pytest.raises(BlockingIOError, match="another process"):
        train(config, resume=True)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"trainable": "head"}, ValueError, "'head'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, ValueError, r"got -1\.0"),
        ({"dtype": "float16"}, ValueError, "'float16'"),
        ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm must be above 0 .* got -1\.0"),
        ({"learning_rate": float("inf")}, ValueError, "got inf"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must lie in 0\.\.inf, got -0\.1"),
        ({"seed": -1}, ValueError, "got -1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"got \(0.9, 1.0\)"),
        ({"evaluate": {"domain": "x"}}, ValueError, "'domain'"),
        ({"device": "cuda"}, ValueError, "no CUDA here"),
        ({"seq_len": 5000, "packing": "wrapped"}, DataError, "5001 tokens expected, got 4000"),
        ({"data": "nowhere"}, DataError, "meta.json"),
        ({"model": "nowhere"}, ValueError, "no such directory"),
    ],
)
def test_bad_settings_write_nothing(config, tmp_path, change, error, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(error, match=message):
        train(replace(config, **change))
    assert not (tmp_path / "run").exists()


def test_ids_beyond_the_vocabulary_write_nothing(config, token_data, tmp_path):
    with pytest.raises(DataError, match="got 99"):
        train(replace(config, data=str(token_data("large", top=100))))
    assert not (tmp_path / "run").exists()


def test_a_base_has_no_new_block_to_train(config, tiny_path, tmp_path):
    with pytest.raises(ValueError, match="expand the model first"):
        train(replace(config, model=str(tiny_path)))
    assert not (tmp_path / "run").exists()


def test_a_frozen_model_has_nothing_to_optimize(tiny):
    with pytest.raises(ValueError, match="no trainable parameter"):
        optimizer_of(tiny().requires_grad_(False))


def test_a_batch_without_targets(config, tiny):
    class Empty:
        def batch(self, start, count, part):
            return Batch(torch.zeros(count, 16, dtype=torch.long), torch.full((count, 16), -100))

    model = tiny()
    with pytest.raises(ValueError, match="without a single valid target"):
        take_step(Keeper(config, model), optimizer_of(model), Empty(), config, ALONE, 0)


def test_a_loss_that_is_not_finite_changes_nothing(config):
    """Neither weights nor masters nor moments."""
    model = Llama.from_pretrained(config.model)
    model.train_new_blocks_only()
    optimizer = optimizer_of(model)
    rows = TokenDataset(one_document(torch.randint(61, (4000,)).numpy()), 16)
    rows = Mixture(["data"], [rows], [1.0])
    take_step(Keeper(config, model), optimizer, rows, config, ALONE, 0)
    poisoned = dict(model.blocks[0].named_parameters())["attention_norm"].data
    poisoned[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r"step 2: .* the step was not taken"):
        take_step(Keeper(config, model), optimizer, rows, config, ALONE, 1)
    for name, tensor in optimizer.state().items():
        assert torch.equal(tensor, before[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), weights[name].nan_to_num()), name


def test_a_run_that_diverges_is_no_result(config, tmp_path):
    with pytest.raises(FloatingPointError):
        train(replace(config, learning_rate=1e6, max_grad_norm=1e9, dtype="float32"))
    assert not (tmp_path / "run" / "final").exists()


def test_an_existing_run_is_kept(config):
    train(config)
    before = records(config)
    with pytest.raises(FileExistsError, match="resume"):
        train(config)
    assert records(config) == before


def test_resume_keeps_its_settings_and_base(config, tiny, tmp_path):
    train(config)
    with pytest.raises(ValueError, match=r"seq_len was 16, got 8"):
        train(replace(config, seq_len=8), resume=True)
    with pytest.raises(FileNotFoundError, match="a run to resume"):
        train(replace(config, out=str(tmp_path / "none")), resume=True)
    (tmp_path / "expanded").rename(tmp_path / "gone")
    torch.manual_seed(1)
    changed = expand(tiny(), new_blocks=2).to(torch.bfloat16)
    torch.nn.init.normal_(changed.norm)
    changed.save_pretrained(tmp_path / "expanded")
    message = r"differs from the run's: model\.norm\.weight was \w+, is \w+"
    with pytest.raises(ValueError, match=message):
        train(config, resume=True)


def test_full_training_of_a_tied_model(config, tiny, tmp_path):
    base = tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    summary = train(replace(config, model=str(base), trainable="all", dtype="float32"))
    assert summary["trainable_parameters"] == summary["parameters"]
    assert summary["perplexity_after"]["domain"] < 0.8 * summary["perplexity_before"]["domain"]


def test_a_resumed_run_notices_other_data(config):
    train(config)
    (Path(config.out) / "summary.json").unlink()
    flip(Path(config.data[0]) / "train.bin", 0)
    with pytest.raises(ValueError, match="the data of 'domain' differ from those of the run"):
        train(config, resume=True)


def test_a_run_goes_on_from_another_directory_with_another_limit(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = os.path.relpath(config.data[0])
    relative = replace(config, model="expanded/", data=data, out="run")
    train(relative)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(replace(relative, model="../expanded", data=config.data, out="../run"), resume=True)
    train(replace(config, memory="100GB"), resume=True)


@pytest.mark.parametrize("text", ["", '{"torch_dtype": "bfloat16"}'])
def test_what_is_no_run_is_not_resumed(config, text):
    Path(config.out).mkdir()
    (Path(config.out) / "config.json").write_text(text)
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(ValueError, match=r"the settings of a run expected"):
            train(replace(config, dtype=dtype), resume=True)


def test_an_evaluation_that_was_due_when_it_stopped_is_made_on_resuming(config, monkeypatch):
    def interrupted(*arguments):
        if arguments[-1] == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(*arguments)

    monkeypatch.setattr(module, "take_step", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 10"):
        train(config)
    monkeypatch.setattr(module, "take_step", take_step)
    train(config, resume=True)
    assert list(records(config, "perplexity")) == [0, 10, 20]
