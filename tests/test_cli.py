import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from llamapro.data.tokens import load_tokens
from llamapro.proof import frozen_verdict
from llamapro.report import command
from llamapro.train import TrainConfig

tyro = pytest.importorskip("tyro")
cli = pytest.importorskip("llamapro.cli")
command_line = pytest.importorskip("llamapro.command_line")
inference = pytest.importorskip("llamapro.inference")


@pytest.fixture
def trained(run, tiny, tiny_path, token_data, tmp_path):
    """An expanded and a full run of the same tiny base."""
    data, expanded = token_data(), tmp_path / "expanded"
    assert run("expand", tiny_path, expanded, "--new-blocks", 2)[0] is None
    settings = ["--data", data, "--steps", 4, "--batch-size", 2, "--seq-len", 16]
    settings += ["--eval-tokens", 64, "--dtype", "float32", "--device", "cpu"]
    for name, model in (("new_blocks", expanded), ("all", tiny_path)):
        out = ["--model", model, "--out", tmp_path / name, "--trainable", name]
        assert run("train", *out, *settings, "--evaluate", "general", data)[0] is None
    return tiny_path, [tmp_path / "new_blocks", tmp_path / "all"]


@pytest.mark.parametrize("placement, positions", [("suffix", "[4, 5]"), ("0,3", "[0, 3]")])
def test_expand(run, tiny_path, tmp_path, placement, positions):
    code, out = run(
        "expand", tiny_path, tmp_path / "o", "--new-blocks", 2, "--placement", placement
    )
    assert code is None and f"new blocks at {positions}" in out and "bit-equal" in out


def test_merge(run, tiny_path, tmp_path):
    from llamapro import Llama
    from llamapro.expansion import expand
    from llamapro.new_blocks import save_new_blocks

    new = save_new_blocks(expand(Llama.from_pretrained(tiny_path), 2), tmp_path / "new")
    code, out = run("merge", tiny_path, new, tmp_path / "o")
    assert code is None and out == f"{tmp_path / 'o'}: {tiny_path} with new blocks at [2, 5]\n"
    code, out = run("merge", tmp_path / "o", new, tmp_path / "p")
    assert code.startswith(f"llamapro: {new}: a base of 4 blocks expected, got") and not out


def test_an_option_given_twice_is_refused(run, tmp_path):
    code, _ = run("eval", tmp_path, tmp_path, "--seq-len", 16, "--seq-len=32")
    assert code == "llamapro: --seq-len once expected, got it 2 times"


def test_positions_as_the_plan_prints_them(run, tiny_path, tmp_path):
    code, out = run("expand", tiny_path, tmp_path / "o", "--placement", "[0, 3]")
    assert code is None and "new blocks at [0, 3]" in out
    code, _ = run("expand", tiny_path, tmp_path / "p", "--placement", "1,,2")
    assert code == "llamapro: placement must be a name or whole numbers, got [1, '', 2]"


def test_a_plan_for_several_gpus(run, tiny_path):
    options = ("plan", tiny_path, "--new-blocks", 2, "--seq-len", 8, "--placement", "suffix")
    code, out = run(*options, "--gpus", 2, "--batch-size", 4)
    assert code is None and "| suffix    | none  |" in out and "### Sent, GB" in out
    for more, message in {
        ("--gpus", 2, "--batch-size", 3): "the number of GPUs divides expected, got 3 rows on 2",
        ("--gpus", 0): "the number of GPUs divides expected, got 1 rows on 0",
        ("--shard", "full"): "--shard full is for several GPUs: --gpus 2 or more expected, got 1",
        ("--gpus", 1, "--shard", "none"): "--gpus 2 or more expected, got 1",
    }.items():
        code, out = run(*options, *more)
        assert message in code and not out


def test_errors_are_one_line(run, tiny_path, tmp_path):
    code, out = run("expand", tiny_path, tmp_path / "out", "--placement", "4,-1")
    assert code.startswith("llamapro: positions must be distinct") and "\n" not in code
    assert not out and not (tmp_path / "out").exists()
    code, _ = run("eval", tmp_path, tmp_path)
    assert "no config.json" in code


def test_what_others_say_on_lines_is_said_on_one():
    with pytest.raises(SystemExit) as stop, command_line.said_in_one_line():
        raise RuntimeError("out of memory\n  at: allocator")
    assert stop.value.code == "llamapro: out of memory at: allocator"


def test_eval_prints_json(run, tiny_path, token_data):
    data = token_data()
    documents = len(load_tokens(data, "heldout", 61).ends)
    for packing, tokens in (("wrapped", 592), ("bfd", 600 - documents)):
        options = ("--seq-len", 16, "--dtype", "float32", "--packing", packing)
        code, out = run("eval", tiny_path, data, *options)
        result = json.loads(out)
        assert code is None and result["tokens"] == tokens
        assert result["perplexity"] == pytest.approx(2.718281828459045 ** result["loss"])


def test_an_evaluation_of_nothing_or_that_gives_no_number(
    run, tiny, tiny_path, token_data, tmp_path
):
    rows = ("--seq-len", 16, "--dtype", "float32")
    assert (
        "max_tokens must be at least 1"
        in run("eval", tiny_path, token_data(), *rows, "--max-tokens", 0)[0]
    )
    assert (
        "seq_len must be at least 1"
        in run("eval", tiny_path, token_data("more"), "--seq-len", 0)[0]
    )
    model = tiny()
    torch.nn.init.constant_(model.norm, float("nan"))
    broken = model.save_pretrained(tmp_path / "broken")
    code, out = run("eval", broken, token_data("again"), *rows)
    assert "a finite perplexity expected" in code and not out


def test_report_measures_all_models(run, trained, monkeypatch, tmp_path):
    from llamapro import report

    monkeypatch.setattr(report, "complete", lambda *_: "text")  # no tokenizer here
    monkeypatch.setattr(report, "encode_prompt", lambda *_: None)
    base, runs = trained
    code, out = run("report", base, *runs, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    assert code is None and str(tmp_path / "report") in out
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 4 + 5
    assert "bit-identical" in table[7] and "nothing frozen" in table[8]
    for run_directory, line in zip(runs, table[7:], strict=True):
        summary = json.loads((run_directory / "summary.json").read_text())
        assert f"{summary['trainable_parameters'] / 1e6:.1f} M" in line
    base_figures, *figures = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(base_figures["kl"]) == {"general"} and base_figures["kl"]["general"] == 0.0
    for row, line in zip(figures, table[2:4], strict=True):
        assert row["kl"]["general"] > 0 and line.split("|")[2].strip() == f"{row['learnt']:.1%}"
        assert row["kept"] in line and abs(row["learnt"] + row["lost"]) < 1e-12  # the same set
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    commands = [line for line in page.splitlines() if line.startswith("llamapro train")]
    for run_directory, words in zip(runs, map(shlex.split, commands), strict=True):
        config = tyro.cli(TrainConfig, args=words[2:])
        assert asdict(config) == asdict(
            TrainConfig(**json.loads((run_directory / "config.json").read_text()))
        )
        metrics = map(json.loads, (run_directory / "metrics.jsonl").read_text().splitlines())
        tokens = sum(m.get("tokens", 0) for m in metrics)
    assert f"Each run saw {tokens} tokens, the same in the same order." in page
    assert page.count("| expanded, new blocks trained |") == 2


def test_runs_of_one_kind_have_names_of_their_own():
    from llamapro.report import _names

    runs = [{"config": {"trainable": "new_blocks"}, "path": Path(f"r/{x}/run")} for x in "ab"]
    runs.append({"config": {"trainable": "all"}, "path": Path("r/full")})
    *blocks, full = _names(runs)
    assert [name.split(" (")[1] for name in blocks] == ["a/run)", "b/run)"] and "(" not in full


def test_a_report_that_cannot_be_is_refused_before_anything_is_measured(
    run, trained, tiny, tmp_path, monkeypatch
):
    from llamapro import report

    monkeypatch.setattr(report, "_measure", None)
    monkeypatch.setattr(report, "encode_prompt", lambda *_: None)
    base, runs = trained
    model, out = tiny(), tmp_path / "report"
    torch.nn.init.normal_(model.embed_tokens.weight)
    other = model.save_pretrained(tmp_path / "other")
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ((other, *runs, "--out", out), "whose embeddings differ"),
        ((base, *runs, "--out", tmp_path / "there"), "there exists"),
        ((base, *runs, "--out", out, "--max-tokens", 0), "a token of each set expected"),
        ((base, "--out", out), "a run and"),
    ):
        code, _ = run("report", *arguments)
        assert message in code
    (runs[0] / "summary.json").write_text("{}")
    code, _ = run("report", base, *runs, "--out", out)
    assert "summary.json: ['config'" in code and not out.exists()


@pytest.mark.parametrize("prompt", ["", "\udcff"])
def test_prompts_that_are_no_text(run, smollm2, prompt, monkeypatch):
    monkeypatch.setattr(inference, "_load", None)
    code, _ = run("generate", smollm2, prompt)
    assert code.startswith("llamapro: a prompt ")


def test_commands_without_further_sets_parse(tiny_path):
    config = {"model": "m", "data": "d", "out": "a b", "evaluate": {}, "steps": 3, "verify": True}
    again = tyro.cli(TrainConfig, args=command(config)[2:])
    assert (again.out, again.steps, again.evaluate, again.verify) == ("a b", 3, {}, True)


def test_ctrl_c_ends_in_a_checkpoint_and_a_message(tiny, token_data, tmp_path):
    """As a process of its own, as a user has it."""
    from llamapro import expand

    expand(tiny(), new_blocks=1).save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    words = ["train", "--model", tmp_path / "model", "--data", token_data(), "--out", run]
    words += ["--steps", "100000", "--seq-len", "16", "--dtype", "float32", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "-m", "llamapro.cli", *map(str, words)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = run / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume goes on" in said and "Traceback" not in said
    assert list((run / "checkpoints").glob("step-*/state.safetensors"))


def test_a_changed_frozen_tensor_is_seen(trained):
    from safetensors.torch import load_file, save_file

    _, (run_directory, _) = trained
    assert frozen_verdict(run_directory).endswith("bit-identical")
    file = next(
        f
        for f in (run_directory / "final").glob("*.safetensors")
        if "model.norm.weight" in load_file(f)
    )
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, file, metadata={"format": "pt"})
    assert frozen_verdict(run_directory).endswith("CHANGED")


def test_the_whole_way_on_text(run, smollm2, tmp_path):
    """prepare and generate with the real tokenizer."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text("x = 1\n" * 50)
    (tmp_path / "text" / "b.py").write_text("y = 2\n" * 50)
    code, out = run("prepare", tmp_path / "text", "--tokenizer", smollm2, "--out", tmp_path / "d")
    assert code is None and "tokens" in out
    code, out = run("generate", smollm2, "The capital of France is", "--max-new-tokens", 4)
    assert code is None and out.startswith("The capital of France is Paris")


def test_help_names_every_command(run):
    code, out = run("--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)
