"""What is saved is right, and what is resumed is what was saved."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llamapro import hf
from llamapro.eval import perplexity as evaluate
from llamapro.model_files import CheckpointError
from llamapro.train import Interrupted, checkpoint, metrics, train
from llamapro.train import loop as module
from llamapro.train import run as run_module
from llamapro.train.loop import take_step
from llamapro.train.optimizer import Optimizer
from run_files import flip, records


@pytest.fixture
def config(config):
    return replace(config, dtype="float32", gradient_accumulation_steps=1)


def test_base_files_that_change_during_the_run(config, at_step):
    """The final model's frozen tensors are copied from there."""
    file = Path(config.model) / "model.safetensors"
    at_step(12, lambda *_: flip(file, -1))
    with pytest.raises(RuntimeError, match="changed during the run"):
        train(config)
    assert not (Path(config.out) / "final").exists()
    flip(file, -1)
    train(config, resume=True)


@pytest.fixture
def at_step(monkeypatch):
    """Runs a function of model and optimizer after the step of this number was taken."""

    def call(number, function):
        def step(keeper, optimizer, *rest):
            metrics = take_step(keeper, optimizer, *rest)
            if rest[-1] + 1 == number:
                function(keeper.model, optimizer)
            return metrics

        monkeypatch.setattr(module, "take_step", step)

    return call


def undisturbed(config):
    """The same run, elsewhere, from end to end."""
    calm = replace(config, out=config.out + "-calm")
    train(calm)
    return calm


def saved(config):
    return [folder.name for folder in run_module.checkpoints(config.out)]


def goes_on(config, monkeypatch):
    """Resumed without what disturbed it, the run ends as an undisturbed one."""
    monkeypatch.undo()
    train(config, resume=True)
    calm = undisturbed(config)
    assert records(config) == records(calm)
    assert records(config, "perplexity") == records(calm, "perplexity")


def test_a_frozen_tensor_that_changed_reaches_no_checkpoint(config, at_step, monkeypatch):
    def change(model, optimizer):
        model.blocks[3].gate_up.weight.data[0, 0] += 1

    at_step(13, change)
    message = r"step 20: what is frozen changed: model\.layers\.3\.mlp\.gate_proj\.weight was"
    with pytest.raises(RuntimeError, match=message):
        train(config)
    assert saved(config) == ["step-00000010"]
    goes_on(config, monkeypatch)


def test_an_evaluation_of_what_changed_is_no_result(config, monkeypatch):
    """The last one, after the last checkpoint; it is made again."""
    config = replace(config, eval_every=100)
    evaluated = []

    def perplexity(model, *rest, **base):
        evaluated.append(rest)
        if len(evaluated) == 2:
            model.norm.data[0] = 9.0
        return evaluate.perplexity(model, *rest)

    monkeypatch.setattr(module, "perplexity", perplexity)
    with pytest.raises(RuntimeError, match=r"step 20: .* changed: model\.norm\.weight"):
        train(config)
    assert list(records(config, "perplexity")) == [0, 20]
    assert not (Path(config.out) / "final").exists()
    goes_on(config, monkeypatch)


@pytest.mark.parametrize("kind", ["master", "exp_avg_sq"])
def test_nothing_that_is_not_finite_is_saved(config, at_step, monkeypatch, kind):
    """In the step that is saved: no loss has seen it."""
    config = replace(config, eval_every=100)
    name = f"{kind}.blocks.5.attention_norm"

    def poison(model, optimizer):
        optimizer.state()[name][3] = float("inf")

    at_step(20, poison)
    with pytest.raises(FloatingPointError, match=f"step 20: {name} has values that are not"):
        train(config)
    assert saved(config) == ["step-00000010"]
    goes_on(config, monkeypatch)


def test_masters_and_moments_are_checked(tiny):
    optimizer = Optimizer(tiny(), max_grad_norm=1.0, weight_decay=0.0, betas=(0.9, 0.95))
    optimizer.check_finite(1)
    for name, tensor in optimizer.state().items():
        tensor.view(-1)[-1] = float("nan")
        with pytest.raises(FloatingPointError, match=name):
            optimizer.check_finite(1)
        tensor.view(-1)[-1] = 0.0


def change_random_state(file):
    state = json.loads(file.read_text())
    state["random"][0]["cpu"] = state["random"][0]["cpu"][::-1]
    file.write_text(json.dumps(state))


def flip_a_moment(file):
    tensors = file.with_name("state.safetensors")
    flip(tensors, tensors.stat().st_size - 4)  # the lowest bit of a number


def write_a_list(file):
    file.write_text("[]")


def write_a_long_header(file):
    header = json.dumps({"x": {"dtype": "x" * 5000, "shape": [], "data_offsets": [0, 0]}}).encode()
    tensors = file.with_name("state.safetensors")
    tensors.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_a_moment, r"state\.safetensors: the digest of \S+ was \w+, is \w+"),
        (change_random_state, r"state\.json: the digest \w+ expected, got \w+"),
        (write_a_list, r"\S+state\.json: a JSON object expected, got list"),
        (write_a_long_header, r"Error while deserializing header: .{,1000} \.\.\."),
    ],
)
def test_a_changed_checkpoint_is_refused_and_the_one_before_offered(
    config, monkeypatch, damage, message
):
    train(config)
    (Path(config.out) / "summary.json").unlink()
    newest = Path(config.out) / "checkpoints" / "step-00000020"
    damage(newest / "state.json")
    ending = "; remove it to go on from step-00000010$"
    with pytest.raises(CheckpointError, match=f"step-00000020 is damaged: {message}{ending}"):
        train(config, resume=True)
    shutil.rmtree(newest)
    shutil.rmtree(Path(config.out) / "final")
    goes_on(config, monkeypatch)


def test_the_only_checkpoint_can_be_removed(config):
    train(replace(config, checkpoint_every=100))
    flip_a_moment(run_module.checkpoints(config.out)[-1] / "state.json")
    with pytest.raises(CheckpointError, match="remove it to start anew"):
        train(replace(config, checkpoint_every=100), resume=True)


@pytest.mark.parametrize("setting, value", [("rope_theta", 5e3), ("rms_norm_eps", 1e-3)])
def test_a_resumed_run_notices_another_configuration(config, setting, value):
    train(config)
    file = Path(config.model) / "config.json"
    raw = json.loads(file.read_text())
    raw[setting] = value
    raw["rope_parameters"].update({setting: value} if setting in raw["rope_parameters"] else {})
    file.write_text(json.dumps(raw))
    message = f"expanded differs from the run's: {setting} was .*, is {value}"
    with pytest.raises(ValueError, match=message):
        train(config, resume=True)


@pytest.mark.parametrize("setting", ["model", "data", "evaluate"])
def test_settings_with_a_path_of_any_length_are_others_in_a_short_message(config, setting):
    train(config)
    file = Path(config.out) / "config.json"
    long = {"model": "x" * 5000, "data": ["x" * 5000], "evaluate": {"y": "x" * 5000}}[setting]
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: long}))
    with pytest.raises(ValueError, match=f"a resumed run keeps its settings: {setting} was") as got:
        train(config, resume=True)
    assert len(str(got.value)) < 2000


def remove(lines):
    return []


def remove_the_first(lines):
    return lines[1:]


def change_the_first(lines):
    first = json.loads(lines[0])
    return [json.dumps({**first, "perplexity": {"domain": 1.0}}) + "\n", *lines[1:]]


def damage_one(lines):
    return [*lines[:3], "\0\n", *lines[4:]]


@pytest.mark.parametrize("damage", [remove, remove_the_first, change_the_first, damage_one])
def test_lost_metrics_are_restored_and_said(config, monkeypatch, caplog, damage):
    """What was evaluated stays what it was; so does what a later step is compared with."""
    summary = train(config)
    calm = records(config), records(config, "perplexity")
    (Path(config.out) / "summary.json").unlink()
    file = Path(config.out) / "metrics.jsonl"
    file.write_text("".join(damage(file.read_text().splitlines(keepends=True))))
    again = train(config, resume=True)
    assert again["perplexity_before"] == summary["perplexity_before"]
    assert (records(config), records(config, "perplexity")) == calm
    (said,) = (record.getMessage() for record in caplog.records)
    assert "lost or changed since step 20 was saved" in said and "of 0 steps stay lost" in said


def test_steps_that_no_checkpoint_carries_are_said_to_be_lost(config, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "WINDOW", 4)
    summary = train(config)
    (Path(config.out) / "summary.json").unlink()
    (Path(config.out) / "metrics.jsonl").unlink()
    again = train(config, resume=True)
    assert again["perplexity_before"] == summary["perplexity_before"]
    assert list(records(config)) == [17, 18, 19, 20]
    assert "those of 16 steps stay lost" in caplog.text


def test_another_machine_is_said(config, monkeypatch, caplog):
    train(config)
    assert not caplog.records
    summary = json.loads((Path(config.out) / "summary.json").read_text())
    threads = torch.get_num_threads()
    assert {"threads", "build", "torch", "version", "processor"} == set(summary["environment"])
    assert summary["environment"]["threads"] == threads
    other = {**summary["environment"], "threads": 99, "torch": "3.0"}
    monkeypatch.setattr(run_module, "environment", lambda device: other)
    train(config, resume=True)
    expected = f"torch was {torch.__version__}, is 3.0, threads was {threads}, is 99"
    assert f"resumed: {expected}, so the bits may differ" in caplog.text


def full_disk(monkeypatch, steps):
    """As these steps are saved, the disk is full after some bytes."""
    write, failed = hf.write_safetensors, []

    def full(path, entries):
        step = int(path.parent.name.split(".")[1][5:]) if "step-" in str(path) else None
        if step in steps:
            path.write_bytes(b"some")
            failed.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, entries)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    return failed


def test_a_checkpoint_that_cannot_be_written_is_tried_again(config, monkeypatch, caplog):
    failed = full_disk(monkeypatch, range(10, 13))
    train(config)
    assert failed == [10, 11, 12] and saved(config) == ["step-00000013", "step-00000020"]
    assert "no checkpoint of step 12 could be written: [Errno 28] No space" in caplog.text
    assert "there is none on disk" in caplog.text
    assert records(config) == records(undisturbed(config))


def test_it_is_not_tried_forever(config, monkeypatch):
    config = replace(config, steps=40)
    failed = full_disk(monkeypatch, range(11, 40))
    message = (
        r"^no checkpoint of step 30 could .* No space .*; the newest on disk is step-00000010$"
    )
    with pytest.raises(OSError, match=message):
        train(config)
    assert failed == [*range(20, 31)] and len(failed) == 1 + run_module.RETRIES
    goes_on(config, monkeypatch)


def test_a_run_that_cannot_be_saved_at_its_end_is_not_finished(config, monkeypatch):
    full_disk(monkeypatch, [20])
    with pytest.raises(OSError, match=r"of step 20 could .*; the newest on disk is step-00000010"):
        train(config)
    assert not (Path(config.out) / "final").exists()
    goes_on(config, monkeypatch)


def test_an_interrupted_run_says_what_is_on_disk(config, at_step, monkeypatch):
    full_disk(monkeypatch, [13])
    at_step(13, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"after step 13; .* newest on disk is step-00000010"):
        train(config)
    goes_on(config, monkeypatch)


def test_an_old_checkpoint_that_stays_stops_nothing(config, monkeypatch, caplog):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    train(replace(config, checkpoint_every=5))
    assert saved(config) == ["step-00000015", "step-00000020"]
    assert "an old checkpoint could not be removed: [Errno 13]" in caplog.text


def test_a_checkpoint_is_not_half_removed(config, monkeypatch):
    """One that is dropped has another name before its first file is gone."""
    remove = shutil.rmtree

    def stop(path, **options):
        if "step-" in str(path):
            (Path(path) / "state.json").unlink()
            raise MemoryError("stopped by the test")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", stop)
    with pytest.raises(MemoryError):
        train(replace(config, checkpoint_every=5))
    assert saved(config) == ["step-00000010", "step-00000015"]
    goes_on(replace(config, checkpoint_every=5), monkeypatch)
