import re

import pytest
import torch
from llamapro.new_blocks import merge
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
lpt = pytest.importorskip("llamapro.integrations.transformers")
from test_hf_expansion import build, same, seen  # noqa: E402 (it needs both)

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 61, (40, 16)).tolist()]


def trainer(model, out, *callbacks, **settings):
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=10,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **{"save_steps": 5, **settings},
    )
    return transformers.Trainer(model, arguments, train_dataset=ROWS, callbacks=list(callbacks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trainer_with_the_callback(dtype, tmp_path, capsys):
    """Frozen bits stay, new blocks are saved, and merged they are the trained model."""
    base, load = tmp_path / "base", transformers.AutoModelForCausalLM.from_pretrained
    build(attention_bias=False, mlp_bias=False).to(dtype).save_pretrained(base)
    model = lpt.expand(load(base), 2)
    lpt.train_new_blocks_only(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(model, tmp_path / "run", lpt.BlockExpansionCallback()).train()
    assert "training the new blocks [2, 5] of 6: 0.0 M parameters in 18" in capsys.readouterr().out
    after, patterns = model.state_dict(), lpt.new_block_patterns(model.config)
    for name, tensor in after.items():
        new = any(re.match(pattern, name) for pattern in patterns)
        assert torch.equal(tensor, before[name]) != new, name
    new = tmp_path / "run" / "checkpoint-10" / "new_blocks"
    assert (tmp_path / "run" / "checkpoint-5" / "new_blocks" / "new_blocks.json").exists()
    merged = load(merge(base, new, tmp_path / "merged"))
    assert merged.config.llama_pro["new_blocks"] == [2, 5]
    assert same(seen(merged), seen(model.eval()))
    model.save_pretrained(tmp_path / "whole")
    assert same(seen(load(tmp_path / "whole")), seen(model))
    again = load(base)
    lpt.load_new_blocks(again, new)
    assert same(seen(again), seen(model))


def test_the_callback_goes_on_in_a_folder_that_is_there(tmp_path):
    model = lpt.expand(build(), 2)
    lpt.train_new_blocks_only(model)
    for _ in range(2):
        trainer(model, tmp_path, lpt.BlockExpansionCallback()).train()
    saved = load_file(tmp_path / "checkpoint-10" / "new_blocks" / "new_blocks.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())


class Changes(transformers.TrainerCallback):
    """Moves one frozen number at a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.model.norm.weight.data[3] += 1e-3


@pytest.mark.parametrize("step, saved", [(3, []), (7, [5])])
def test_a_frozen_bit_that_changes_is_an_error(step, saved, tmp_path):
    """At the next checkpoint, or at the end; the new blocks are not saved then."""
    model = lpt.expand(build(), 2)
    lpt.train_new_blocks_only(model)
    run = trainer(model, tmp_path, lpt.BlockExpansionCallback(), Changes(step))
    with pytest.raises(RuntimeError, match=r"what is frozen changed: model\.norm\.weight was"):
        run.train()
    assert [f.parent.name for f in tmp_path.glob("*/new_blocks")] == [
        f"checkpoint-{i}" for i in saved
    ]
    run = trainer(model, tmp_path, lpt.BlockExpansionCallback(), Changes(10), save_strategy="no")
    with pytest.raises(RuntimeError, match="step 10: what is frozen changed"):
        run.train()


def test_the_callback_refuses_what_it_would_not_save(tmp_path):
    model = lpt.expand(build(), 2)
    callback = lpt.BlockExpansionCallback()
    with pytest.raises(ValueError, match=r"\[2, 5\] alone are expected to train, got .* others"):
        trainer(model, tmp_path, callback).train()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="got none"):
        callback.on_train_begin(None, None, None, model=model)
